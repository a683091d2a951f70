"""Servers for the S3 tests."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from conftest import require

_ENV = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class _Server:
    def __init__(self, url: str) -> None:
        self.endpoint_url, self.env, self._numbers = url, _ENV, itertools.count()

    def new_bucket(self) -> str:
        name = f"bucket-{next(self._numbers)}"
        boto3.Session("testing", "testing-secret").client("s3", endpoint_url=self.endpoint_url).create_bucket(Bucket=name)
        return name


def _run(command: list[str], url: str, folder: Path) -> Iterator[_Server]:
    require(shutil.which(command[0]), f"needs {command[0]}")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url).close()
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} has ended"
                time.sleep(0.1)
        yield _Server(url)
    finally:
        process.kill()  # nobody wants the data, and ending in peace takes it seconds
        process.wait()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    """A server of one process, that knows conditions."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["moto_server", "-H", "127.0.0.1", "-p", str(port)]
    yield from _run(command, f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("moto"))


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Server]:
    """A server that knows conditions and checksums."""
    folder = tmp_path_factory.mktemp("weed")
    keys = {"accessKey": _ENV["AWS_ACCESS_KEY_ID"], "secretKey": _ENV["AWS_SECRET_ACCESS_KEY"]}
    who = {"name": "admin", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [who]}))
    (folder / "data").mkdir()
    options = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.config=s3.json", "-webdav=false", "-admin.ui=false"]
    base = 20_000 + os.getpid() % 2000 * 10  # it uses each of them plus 10 000 as well
    ports = [f"-{name}.port={base + i}" for i, name in enumerate(("s3", "master", "volume", "filer", "admin"))]
    ports += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    yield from _run(["weed", "mini", "-dir=data", *options, *ports], f"http://127.0.0.1:{base}", folder)
