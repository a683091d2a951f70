"""The backend for everything that fsspec knows, on real file systems and real services."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.blob import ContainerClient
from sftp_rig import PASSWORD, USER, sftp_server
from stores import RawFolder

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


class TestLocal(RawFolder, BackendConformance):
    """Stands for all file systems with folders and renames: local, sftp, smb, ftp."""

    def make_backend(self, place: Path) -> Backend:
        return SingleWriter(_opened("fsspec+file", str(place / "runs" / "42")))


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


@pytest.mark.soak  # it takes a minute, and above the wire it is the same
class TestSftp(TestLocal):
    """asyncssh's server and paramiko."""

    threads = 8

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": PASSWORD})
        self.place = tmp_path
        with sftp_server(tmp_path) as self.port:
            self.backend = self.make_backend(tmp_path)
            yield
            self.backend.close()

    def make_backend(self, place: Path) -> Backend:
        self.secrets = [PASSWORD]
        return SingleWriter(_opened("sftp", f"127.0.0.1:{self.port}/runs/42", username=USER))


class TestS3fs(BackendConformance):
    """SeaweedFS through s3fs."""

    finish_may_overwrite = True
    many = 300  # a thousand take a quarter of a minute, and pages are the library's business
    rounds = 1  # who loses there waits in steps of a second

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path, seaweedfs: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name, value in seaweedfs.env.items():
            monkeypatch.setenv(name, value)
        self.location, self.endpoint_url = _place(seaweedfs), seaweedfs.endpoint_url
        self.bucket, _, self.prefix = f"{self.location}/".partition("/")
        keys = seaweedfs.env["AWS_ACCESS_KEY_ID"], seaweedfs.env["AWS_SECRET_ACCESS_KEY"]
        self.client = boto3.Session(*keys, region_name="us-east-1").client("s3", endpoint_url=self.endpoint_url)
        self.secrets = keys[1:]
        self.place, self.backend = tmp_path, self.make_backend(tmp_path)
        yield
        self.backend.close()

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


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's advice to azure-core
class TestAzure(BackendConformance):
    """Azurite through adlfs."""

    finish_may_overwrite = True
    many = 300

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path, azurite: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        for name, value in azurite.env.items():
            monkeypatch.setenv(name, value)
        self.location = _place(azurite)
        container, _, self.prefix = f"{self.location}/".partition("/")
        (connection,) = azurite.env.values()
        self.secrets = re.findall("AccountKey=([^;]*)", connection)
        self.place, self.backend = tmp_path, self.make_backend(tmp_path)
        with ContainerClient.from_connection_string(connection, container) as self.client:
            yield
        self.backend.close()

    def make_backend(self, place: Path) -> Backend:
        return _opened("abfs", self.location)

    def raw_get(self, key: str) -> bytes | None:
        try:
            return bytes(self.client.download_blob(self.prefix + key).readall())
        except ResourceNotFoundError:
            return None

    def raw_put(self, key: str, data: bytes) -> None:
        self.client.upload_blob(self.prefix + key, data, overwrite=True)

    def raw_keys(self) -> Sequence[str]:
        return [blob.name.removeprefix(self.prefix) for blob in self.client.list_blobs(self.prefix)]
