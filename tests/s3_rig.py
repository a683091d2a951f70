"""S3 services under test, and what a service says, or what becomes of it on the way."""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import boto3
import botocore.session
from botocore import exceptions as sdk
from botocore.awsrequest import AWSResponse

from ckptstore import errors
from ckptstore.backends.s3 import S3Backend
from ckptstore.protocol import Backend

PART = 5 << 20
TIMEOUT = sdk.ReadTimeoutError(endpoint_url="http://s3")
_numbers = itertools.count(1)
_buckets: dict[str, str] = {}

# Each session reads and parses megabytes of JSON, always the same: with hundreds of them, most of the time goes there.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)


class Service:
    """A running S3 service, reached by what the environment and `options` say."""

    def __init__(self, server: Any, **options: str) -> None:
        self.server = server
        self.options = {"endpoint_url": server.endpoint_url, "part_size": "5M", **options}
        self.secret: str = server.env["AWS_SECRET_ACCESS_KEY"]
        self.key_id: str = server.env["AWS_ACCESS_KEY_ID"]

    @functools.cached_property
    def client(self) -> Any:
        """Past the backend under test."""
        return boto3.Session(self.key_id, self.secret, region_name="us-east-1").client(
            "s3", endpoint_url=self.server.endpoint_url
        )

    def place(self) -> str:
        """Return a bucket and a prefix that nobody has used. One bucket for all: SeaweedFS reserves much disk for each."""
        url = self.server.endpoint_url
        bucket = _buckets.get(url) or _buckets.setdefault(url, self.server.new_bucket())
        return f"{bucket}/runs/{next(_numbers)}"

    def backend(self, location: str = "", **options: str) -> S3Backend:
        """Open a backend at a location, by default a new one."""
        return S3Backend.open(location or self.place(), {**self.options, **options})

    def url(self, **options: Any) -> str:
        """Return the URL of a new store."""
        given = {**self.options, "retry_seconds": 20, **options}
        return f"s3://{self.place()}?" + "&".join(f"{k}={v}" for k, v in given.items())


def location_of(url: str) -> str:
    """Return the bucket and prefix in a URL."""
    return url.removeprefix("s3://").partition("?")[0]


# --- what is done with a backend


def some_bytes(n: int, seed: int = 0) -> bytes:
    """Return `n` bytes of no pattern."""
    return random.Random(seed).randbytes(n)


def write(backend: Backend, key: str, data: bytes) -> str | None:
    """Write an object in parts."""
    writer = backend.open_writer(key)
    for number, start in enumerate(range(0, len(data), PART)):
        writer.write(start, memoryview(data)[start : start + PART], number)
    return writer.finish()


def read(backend: Backend, key: str) -> bytes:
    """Return the whole of a large object."""
    buffer = bytearray(backend.stat(key).size)
    backend.read_into(key, 0, memoryview(buffer))
    return bytes(buffer)


def keys(backend: Backend, prefix: str = "") -> list[str]:
    """Return the listed keys."""
    return [info.key for info in backend.list(prefix)]


def created(backend: Backend, key: str) -> bool:
    """Say whether this call has created `key`."""
    try:
        backend.put_if_absent(key, b"x")
    except errors.AlreadyExists:
        return False
    return True


# --- the wire

Handler = Callable[[Callable[[Any], Any], Any], Any]
"""Decides from (send, request) what becomes of a request: None sends it on, else it is the answer."""


@contextmanager
def on_wire(backend: S3Backend, handler: Handler, operation: str = "*") -> Iterator[Counter[str]]:
    """Let `handler` decide what becomes of each request of `operation`. Yields how many requests of each kind were sent."""
    client = backend._bucket._connected()
    seen: Counter[str] = Counter()

    def before_send(request: Any, event_name: str, **_: Any) -> Any:
        seen[event_name.rpartition(".")[2]] += 1
        return handler(client._endpoint.http_session.send, request)

    client.meta.events.register_last(f"before-send.s3.{operation}", before_send)
    try:
        yield seen
    finally:
        client.meta.events.unregister(f"before-send.s3.{operation}", before_send)


def passes(send: Any, request: Any) -> None:
    """Send it on."""


def says(status: int, code: str = "", message: str = "because", headers: Mapping[str, str] | None = None) -> Handler:
    """Answer with an error, or with `code` as the whole body."""
    text = code if code.startswith("<") else f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if code else ""

    class Raw:
        def stream(self, *_: Any, **__: Any) -> Iterator[bytes]:
            yield text.encode()

    return lambda send, request: AWSResponse(request.url, status, dict(headers or {}), Raw())


def loses(exc: Exception, *, after: bool) -> Handler:
    """Lose the request, or only the answer."""

    def handler(send: Any, request: Any) -> Any:
        if after:
            send(request)
        raise exc

    return handler


def once(handler: Handler) -> Handler:
    """Do it once, and then send on."""
    left = [handler]
    return lambda send, request: left.pop()(send, request) if left else None
