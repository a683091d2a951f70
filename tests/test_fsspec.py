"""The backend for everything that fsspec knows, on real file systems and real services."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ckptstore.backends.fsspec import backend_for
from ckptstore.protocol import Backend
from ckptstore.testing import BackendConformance
from ckptstore.wrapper import SingleWriter

pytest_plugins = ("services",)

_numbers = itertools.count(1)
_buckets: dict[str, str] = {}


def _opened(scheme: str, location: str, **options: str) -> Backend:
    backend = backend_for(scheme)
    assert backend is not None
    return backend.open(location, options)


def _place(server: Any) -> str:
    """Return a bucket and a prefix that nobody has used. One bucket for all: SeaweedFS reserves much disk for each."""
    bucket = _buckets.get(server.endpoint_url) or _buckets.setdefault(server.endpoint_url, server.new_bucket())
    return f"{bucket}/runs/{next(_numbers)}"


class TestLocal(BackendConformance):
    """Stands for all file systems with folders and renames: local, sftp, smb, ftp."""

    def make_backend(self, place: Path) -> Backend:
        return SingleWriter(_opened("fsspec+file", str(place / "runs" / "42")))

    @property
    def root(self) -> Path:
        return self.place / "runs" / "42"

    def raw_get(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.exists() else None

    def raw_put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_keys(self) -> Sequence[str]:
        return [str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir()]


class TestMemory(BackendConformance):
    """Stands for those without folders of which nothing is known."""

    many = 300  # fsspec looks through all of them for each

    def make_backend(self, place: Path) -> Backend:
        return SingleWriter(_opened("fsspec+memory", f"{str(place).strip('/')}/42"))

    def raw_get(self, key: str) -> bytes | None:
        found = self.store.get(f"{self.place}/42/{key}")
        return None if found is None else bytes(found.getvalue())

    def raw_put(self, key: str, data: bytes) -> None:
        fsspec.filesystem("memory").pipe_file(f"{self.place}/42/{key}", data)

    def raw_keys(self) -> Sequence[str]:
        root = f"{self.place}/42/"
        return [key.removeprefix(root) for key in [*self.store] if key.startswith(root)]

    @property
    def store(self) -> dict[str, Any]:
        return fsspec.filesystem("memory").store  # type: ignore[no-any-return]


class _OnS3(BackendConformance):
    finish_may_overwrite = True
    options: dict[str, str]

    def prepare(self, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import boto3

        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        self.location = _place(server)
        self.endpoint_url = server.endpoint_url
        self.bucket, _, self.prefix = f"{self.location}/".partition("/")
        keys = server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]
        self.client = boto3.Session(*keys, region_name="us-east-1").client("s3", endpoint_url=server.endpoint_url)
        self.secrets = keys[1:]

    def make_backend(self, place: Path) -> Backend:
        return _opened("s3fs", self.location, endpoint_url=self.endpoint_url)

    def raw_get(self, key: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"].read()  # type: ignore[no-any-return]
        except self.client.exceptions.NoSuchKey:
            return None

    def raw_put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)

    def raw_keys(self) -> Sequence[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix)
        return [item["Key"].removeprefix(self.prefix) for page in pages for item in page.get("Contents", ())]


class TestS3fsOnMoto(_OnS3):
    many = 1010

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path, moto: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.prepare(moto, monkeypatch)
        self.place, self.backend = tmp_path, self.make_backend(tmp_path)
        yield
        self.backend.close()


class TestS3fsOnSeaweedFS(_OnS3):
    many = 1010
    rounds = 2  # who loses there waits in steps of a second

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path, seaweedfs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        self.prepare(seaweedfs, monkeypatch)
        self.place, self.backend = tmp_path, self.make_backend(tmp_path)
        yield
        self.backend.close()
