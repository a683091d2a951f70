"""Google Cloud Storage, on gcsfs: ``gs://bucket/prefix``.

gcsfs finds the credentials (`gcloud auth application-default login`, ``GOOGLE_APPLICATION_CREDENTIALS``, the machine's own account) and
keeps the connections. The requests are ours, each sent once: gcsfs would repeat every one of them six times, and forget what the answer
was. They are those of the JSON API, https://cloud.google.com/storage/docs/json_api. Objects have a CRC-32C, which the service compares.

The permissions needed are those of the role Storage Object User. Zonal buckets (Rapid Storage) have another API and are not supported.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any, ClassVar
from urllib.parse import quote

from ckptstore.errors import (
    AlreadyExists,
    BackendError,
    CkptStoreError,
    InvalidOption,
    InvalidURL,
    Transient,
    UnknownScheme,
)
from ckptstore.inorder import InOrder
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

from ._gcs_http import Answer, crc32c, crc32c_base64, exchange, run, spelled, typed_error

__all__ = ["GcsBackend"]

_UNIT = 256 << 10
"""Bytes: every request of a resumable upload but the last carries a multiple of this."""
_SMALL = 4 << 20
"""Bytes: what is not longer goes up in one request, and so is kept in memory until it is finished."""
_PINS = 4096
"""Objects of which the generation that was looked at is remembered."""
_DELETIONS = 16
"""Deletions at a time."""


class GcsBackend:
    """A prefix of one bucket. Thread-safe, and usable on both sides of a fork."""

    options: ClassVar[Mapping[str, str]] = {
        "endpoint_url": "another address of the service, such as http://localhost:4443 of an emulator",
        "anon": "'1': send no credentials",
        "requester_pays": "the project that is billed for requests to a requester-pays bucket",
    }

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, str]) -> None:
        self.url = f"gs://{bucket}/{prefix}".rstrip("/")
        endpoint = options.get("endpoint_url")
        self.capabilities = Capabilities(
            atomic_create=True,
            durable=True,
            part_size=16 << 20,
            parallel=8,
            remote=True,
            # Google's own service keeps its word: https://cloud.google.com/storage/docs/request-preconditions. Emulators do not all.
            probe=bool(endpoint or os.environ.get("STORAGE_EMULATOR_HOST")),
        )
        self.bucket = bucket
        self._prefix = prefix
        self._arguments: dict[str, Any] = {"endpoint_url": endpoint, "requester_pays": options.get("requester_pays", False)}
        if options.get("anon") == "1":
            self._arguments["token"] = "anon"
        self._lock = threading.Lock()
        self._clients: dict[int, Any] = {}  # by process: what was made before a fork works only there
        self._pins: dict[str, str] = {}

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> GcsBackend:
        """Make a backend for ``bucket`` or ``bucket/prefix``. Sends nothing.

        Raises:
            InvalidOption: unknown, or with a bad value.
            InvalidURL: no bucket, or a prefix with empty, ``.`` or ``..`` parts or control characters.
            UnknownScheme: gcsfs is not installed.
        """
        bucket, _, prefix = location.rstrip("/").partition("/")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
            raise InvalidURL(f"{bucket!r:.100} is no bucket's name: write gs://bucket/prefix")
        if prefix and any(s in ("", ".", "..") or re.search(r"[\0-\x1f\x7f]", s) for s in prefix.split("/")):
            raise InvalidURL(f"{prefix!r:.200} cannot be a prefix: no empty, '.' or '..' parts, no control characters")
        for name in options:
            if name not in cls.options:
                raise InvalidOption(f"gs:// has no option {name!r:.50}; it has {', '.join(cls.options)}")
        if options.get("anon", "0") not in ("0", "1"):
            raise InvalidOption("anon must be 0 or 1")
        if not re.fullmatch(r"https?://[^/@?#]+/?", options.get("endpoint_url", "https://x")):
            raise InvalidOption(
                "endpoint_url must be an address such as https://host:port, with nothing behind it and no user or password"
            )
        if find_spec("gcsfs") is None:
            raise UnknownScheme("gs:// needs the package gcsfs: pip install 'ckptstore[gcs]'")
        return cls(bucket, f"{prefix}/" if prefix else "", options)

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`. ``ifGenerationMatch=0``: only if there is no live object of that name."""
        if ready:
            ready()
        with self.errors("create", key, creating=True):
            self.upload(key, data, crc32c_base64(data), condition="0")

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        with self.errors("write", key):
            self.upload(key, data, crc32c_base64(data))

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`. Google drops uploads that were never finished after a week, and does not list them."""
        return _GcsWriter(self, key)

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        with self.errors("read", key):
            # A range that begins at the end of the object, so only in an empty one, is answered with 416.
            answer = self.call("GET", self._object(key), ok=(200, 206, 416), headers={"Range": f"bytes=0-{limit}"}, alt="media")
        data = b"" if answer.status == 416 else answer.body
        if len(data) > limit:
            raise BackendError(f"{self.url}: {key} is longer than the {limit} bytes that belong here")
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`. Of an object that was looked at by `stat`, only that generation is read."""
        if not buffer.nbytes:
            self.stat(key)
            return
        end = offset + buffer.nbytes
        with self.errors("read", key):
            answer = self.call(
                "GET",
                self._object(key),
                ok=(200, 206, 412, 416),
                headers={"Range": f"bytes={offset}-{end - 1}"},
                alt="media",
                ifGenerationMatch=self._pins.get(key),
            )
        if answer.status == 412:
            self._pins.pop(key, None)
            raise BackendError(f"{self.url}: {key} was replaced while it was being read; nothing in a store ever should be")
        if answer.status == 416 or len(answer.body) < buffer.nbytes:
            raise BackendError(f"{self.url}: {key} ends before byte {end}")
        if len(answer.body) > buffer.nbytes:
            raise BackendError(f"{self.url}: the service sent more of {key} than the range it was asked for")
        buffer.cast("B")[:] = answer.body

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`. The checksum is CRC-32C, which every object has."""
        with self.errors("look at", key):
            found = self.call("GET", self._object(key), fields="size,crc32c,generation").json()
            info = ObjectInfo(key, int(found["size"]), spelled(found.get("crc32c")))
        if len(self._pins) >= _PINS:
            self._pins.clear()
        self._pins[key] = found["generation"]
        return info

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. In order of name, as the service has it. Strongly consistent."""
        token = None
        while True:
            with self.errors("list", prefix):
                page = self.call(
                    "GET",
                    f"b/{self.bucket}/o",
                    prefix=self._prefix + prefix,
                    startOffset=self._prefix + start_after if start_after > prefix else None,
                    pageToken=token,
                    maxResults="1000",
                    fields="items(name,size),nextPageToken",
                ).json()
                found = [ObjectInfo(item["name"][len(self._prefix) :], int(item["size"])) for item in page.get("items", ())]
            # A name that ends in "/" stands for an empty folder in Google's console.
            yield from (info for info in found if info.key > start_after and not info.key.endswith("/"))
            token = page.get("nextPageToken")
            if not token:
                return

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        if not keys:
            return
        for key in keys:
            self._pins.pop(key, None)

        async def delete_all() -> list[BaseException | None]:
            places = asyncio.Semaphore(_DELETIONS)

            async def one(key: str) -> None:
                async with places:
                    await exchange(client, "DELETE", self._object(key), ok=(200, 204, 404))

            return await asyncio.gather(*map(one, keys), return_exceptions=True)

        with self.errors("delete", keys[0]):
            client = self._client()
            for error in run(client, delete_all()):
                if error is not None:
                    raise error

    def close(self) -> None:
        """See `Backend.close`. Connections are opened again if need be."""
        with self._lock:
            client = self._clients.pop(os.getpid(), None)
        if client is not None and client.session is not None:
            run(client, client.session.close())

    # --- shared with the writer

    def call(
        self,
        method: str,
        path: str,
        *,
        ok: Sequence[int] = (200,),
        headers: Mapping[str, str] | None = None,
        body: Sequence[bytes | memoryview] = (),
        **parameters: str | None,
    ) -> Answer:
        """Send one request and return the answer, whose status is one of `ok`."""
        client = self._client()
        return run(client, exchange(client, method, path, ok=ok, headers=headers, body=body, **parameters))

    def upload(self, key: str, data: bytes | memoryview, crc: str, *, condition: str | None = None) -> dict[str, Any]:
        """Store a small object by one request (``uploadType=multipart``), and return what the service says of it."""
        boundary = secrets.token_hex(16)
        about = json.dumps({"name": self._prefix + key, "crc32c": crc})
        kind = "Content-Type: application/octet-stream"
        head = f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{about}\r\n--{boundary}\r\n{kind}\r\n\r\n"
        return self.call(
            "POST",
            self.upload_path,
            headers={"Content-Type": f'multipart/related; boundary="{boundary}"'},
            body=(head.encode(), data, f"\r\n--{boundary}--\r\n".encode()),
            uploadType="multipart",
            ifGenerationMatch=condition,
        ).json()

    def begin_upload(self, key: str) -> str:
        """Begin a resumable upload, and return its address. Who knows that may write to it: it is a secret."""
        answer = self.call("POST", self.upload_path, uploadType="resumable", name=self._prefix + key, ifGenerationMatch="0")
        return answer.headers["Location"]

    @property
    def upload_path(self) -> str:
        """Where uploads go."""
        return f"/upload/storage/v1/b/{self.bucket}/o"

    def drop(self, key: str, generation: str) -> None:
        """Remove just this generation of an object."""
        self.call("DELETE", self._object(key), ok=(200, 204, 404), generation=generation)

    @contextmanager
    def errors(self, doing: str, key: str, *, creating: bool = False) -> Iterator[None]:
        """Turn whatever goes wrong in the block, while `doing` something to `key`, into our errors, with the original as cause.

        `creating`: what may have happened all the same is `Ambiguous`.
        """
        try:
            yield
        except CkptStoreError:
            raise
        except Exception as exc:
            raise typed_error(exc, f"could not {doing} {self.url}/{key}", doing, creating) from exc

    def _object(self, key: str) -> str:
        return f"b/{self.bucket}/o/{quote(self._prefix + key, safe='')}"

    def _client(self) -> Any:
        with self._lock:
            client = self._clients.get(os.getpid())
            if client is None:
                import aiohttp
                from gcsfs.core import GCSFileSystem  # half a second

                client = self._clients[os.getpid()] = GCSFileSystem(
                    skip_instance_cache=True,
                    requests_timeout=aiohttp.ClientTimeout(total=None, sock_connect=15, sock_read=60),
                    **self._arguments,
                )
            return client


class _GcsWriter:
    """See `PartWriter`. A small file is kept until `finish`; a larger one goes up by one resumable upload, in order."""

    def __init__(self, backend: GcsBackend, key: str) -> None:
        self._backend = backend
        self._key = key
        self._parts = InOrder(self._send)
        self._upload: str | None = None
        self._sent = 0  # bytes that the service has confirmed
        self._kept = b""  # and those that come after them
        self._crc = 0
        self._unsure = False  # whether the service may have more than it has confirmed
        self._over = False
        self._tried = False
        self._checksum: str | None = None

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        self._check_open()
        with self._backend.errors("write", self._key):
            self._parts.write(offset, data)

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`. It would cost a request."""

    def finish(self) -> str | None:
        """See `PartWriter.finish`. Asked again after a lost answer, it compares what is there."""
        if self._checksum is not None:
            return self._checksum
        self._check_open()
        with self._backend.errors("write", self._key):
            self._parts.close()
        crc, size = crc32c_base64(self._kept, self._crc), self._sent + len(self._kept)
        again, self._tried = self._tried, True
        try:
            with self._backend.errors("create", self._key):
                if self._upload is None:
                    found = self._backend.upload(self._key, self._kept, crc, condition="0")
                else:
                    found = self._push(self._kept, last=True) or {}
        except Transient:
            raise
        except (AlreadyExists, BackendError) as exc:
            if not again and not isinstance(exc, AlreadyExists):
                raise
            # An earlier attempt may have been the one, or this one, sent twice on the way: nobody else ever writes this key.
            there = self._backend.stat(self._key)
            if (there.size, there.checksum) != (size, spelled(crc)):
                raise
            found = {"size": size, "crc32c": crc}
        self._over = True
        if (int(found["size"]), found.get("crc32c")) != (size, crc):
            with suppress(CkptStoreError), self._backend.errors("delete", self._key):
                self._backend.drop(self._key, found["generation"])
            raise BackendError(f"{self._backend.url}: {self._key} arrived damaged, and was dropped: save again")
        self._kept = b""
        self._checksum = spelled(crc)
        return self._checksum

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        self._over, self._kept = True, b""
        upload, self._upload = self._upload, None
        if upload is not None and self._checksum is None:
            with suppress(CkptStoreError), self._backend.errors("cancel", self._key):
                self._backend.call("DELETE", upload, ok=(200, 204, 404, 410, 499))  # 499 is what it says when it has done it

    def _check_open(self) -> None:
        if self._over:
            raise BackendError(f"{self._key}: this writer is finished or aborted; open a new one")

    def _send(self, data: memoryview) -> None:
        waiting = len(self._kept) + len(data)
        if waiting <= _SMALL and self._upload is None:
            self._kept += data
            return
        if self._upload is None:
            self._upload = self._backend.begin_upload(self._key)
        whole = b"".join((self._kept, data))
        full = (waiting - 1) // _UNIT * _UNIT  # something is kept for the last request, which cannot do without
        if full:
            self._push(whole[:full], last=False)
            self._crc = crc32c(memoryview(whole)[:full], self._crc)
            self._sent += full
        self._kept = whole[full:]

    def _push(self, data: bytes, *, last: bool) -> dict[str, Any] | None:
        """Send `data`, which begins at byte `_sent`, as far as the service does not have it yet; return what it says of the whole file.

        https://cloud.google.com/storage/docs/performing-resumable-uploads
        """
        assert self._upload is not None
        start, end = self._sent, self._sent + len(data)
        total = str(end) if last else "*"
        while start < end or self._unsure:
            if self._unsure:
                span, body = f"bytes */{total}", memoryview(b"")  # asks how much there is
            else:
                span, body = f"bytes {start}-{end - 1}/{total}", memoryview(data)[start - self._sent :]
            asking, self._unsure = self._unsure, True
            # POST: aiohttp repeats a PUT by itself when a kept connection turns out to be dead.
            answer = self._backend.call("POST", self._upload, ok=(200, 201, 308), headers={"Content-Range": span}, body=(body,))
            found = None if answer.status == 308 else answer.json()
            self._unsure = False
            if found is not None:
                return found
            reached = int(answer.headers.get("Range", "bytes=0--1").partition("-")[2]) + 1
            if not self._sent <= reached <= end:
                raise BackendError(
                    f"the upload of {self._key} is at byte {reached}, and should be between {self._sent} and {end}"
                )
            if reached == start and not asking:
                raise Transient(f"the service took nothing of {self._key}")
            start = reached
        if last:
            self._unsure = True
            raise Transient(f"the service has all of {self._key}, and does not say that it is finished")
        return None
