"""The servers that the other tests rely on do what those take for granted, and the proxy in front of them breaks what it is told to."""

from __future__ import annotations

import base64
import signal
import subprocess
import sys
import textwrap
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
)
from conftest import require

if TYPE_CHECKING:
    from services import Server

pytest_plugins = ("services",)  # and so imported only in functions: pytest rewrites its asserts first

THREADS = 16
PART = 5 << 20


def client(server: Server, url: str = "", **config: Any) -> Any:
    """Return a client that sends each request once."""
    once = Config(retries={"total_max_attempts": 1}, max_pool_connections=THREADS, s3={"addressing_style": "path"}, **config)
    keys = server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]
    return boto3.Session(*keys, region_name="us-east-1").client("s3", endpoint_url=url or server.endpoint_url, config=once)


def race(attempt: Callable[[int], object]) -> Counter[object]:
    """Return how often each outcome was met by threads that begin at one moment."""
    start = threading.Barrier(THREADS)

    def one(n: int) -> object:
        start.wait()
        return attempt(n)

    with ThreadPoolExecutor(THREADS) as pool:
        return Counter(pool.map(one, range(THREADS)))


def creation(s3: Any, bucket: str, key: str, body: bytes = b"x") -> int:
    """Return the status of a create-if-absent."""
    try:
        s3.put_object(Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")
    except ClientError as exc:
        return int(exc.response["ResponseMetadata"]["HTTPStatusCode"])
    return 200


# --- S3


@pytest.mark.parametrize("name", ["seaweedfs", "moto"])
def test_one_of_many_creates(request: pytest.FixtureRequest, name: str) -> None:
    server: Server = request.getfixturevalue(name)
    s3, bucket = client(server), server.new_bucket()
    said = race(lambda n: creation(s3, bucket, "k", b"%d" % n))
    assert said == {200: 1, 412: THREADS - 1}
    before = s3.get_object(Bucket=bucket, Key="k")["Body"].read()
    assert creation(s3, bucket, "k") == 412
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == before


def test_rclone_ignores_the_condition(rclone: Server) -> None:
    s3, bucket = client(rclone, request_checksum_calculation="when_required"), rclone.new_bucket()
    assert [creation(s3, bucket, "k", body) for body in (b"1", b"2")] == [200, 200]
    assert s3.get_object(Bucket=bucket, Key="k")["Body"].read() == b"2"


@pytest.mark.parametrize(("conditional_writes", "said"), [("enforce", 412), ("reject", 501), ("ignore", 200)])
def test_snailmail_does_as_it_is_told(tmp_path: Path, conditional_writes: str, said: int) -> None:
    from services import snailmail_server

    with snailmail_server(tmp_path, conditional_writes) as server:
        s3, bucket = client(server), server.new_bucket()
        s3.put_object(Bucket=bucket, Key="k", Body=b"1")
        assert creation(s3, bucket, "k") == said


def test_seaweedfs_compares_checksums(seaweedfs: Server) -> None:
    s3, bucket = client(seaweedfs), seaweedfs.new_bucket()
    wrong = base64.b64encode(bytes(8)).decode()
    with pytest.raises(ClientError):
        s3.put_object(Bucket=bucket, Key="k", Body=b"x", ChecksumCRC64NVME=wrong)
    assert "Contents" not in s3.list_objects_v2(Bucket=bucket)


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_servers_do_not_outlive_their_tests(tmp_path: Path, how: str) -> None:
    code = f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import services
        with services.moto_server(pathlib.Path({str(tmp_path)!r})) as server:
            print(server.endpoint_url, flush=True)
            {"os.kill(os.getpid(), 9)" if how == "kill" else "sys.exit()"}
    """
    require(sys.platform == "linux", "needs Linux")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0)
    with pytest.raises(OSError, match=r"refused|reset"):  # reset: it is dying
        urllib.request.urlopen(done.stdout.strip())


def test_what_a_server_said_is_told_when_it_does_not_start(tmp_path: Path) -> None:
    from services import _running

    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    with pytest.raises(AssertionError, match="no luck today"), _running(command, 1, tmp_path):
        pass
