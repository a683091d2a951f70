"""Amazon S3 and services that speak its protocol, on boto3: ``s3://bucket/prefix``.

Credentials come from where boto3 finds them: the environment, ``~/.aws``, a container's or machine's role. The SDK's retries are off, and
its transfer manager is not used: parts go to the wire straight from the caller's memory. Each carries its CRC-64/NVME, which the service
compares, and keeps as that of the whole object; a service that cannot is noticed at the first upload, and gets Content-MD5 instead.

The permissions needed are GetObject, PutObject, DeleteObject, AbortMultipartUpload, ListBucket and ListBucketMultipartUploads.
"""

from __future__ import annotations

import hashlib
import http.client
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

from botocore import exceptions as sdk
from urllib3.response import HTTPResponse

from ckptstore.checksum import combine, crc64nvme
from ckptstore.errors import Ambiguous, BackendError, CkptStoreError, DamagedFile, InvalidURL, NotFound, Transient, Unreadable
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

from ._s3_bucket import OPTIONS, Bucket, base64_crc, recorded, spelled
from ._s3_errors import code_of, status_of

__all__ = ["S3Backend"]

_RECORDS = "log/"
"""Where records are: never uploaded in parts, so a listing need not look for unfinished uploads, nor read in parts."""
_UNFINISHED = ".partial"
_PINS = 4096
"""Objects of which the version that was read is remembered."""
_BLOCK = 1 << 18
"""Bytes per read of an answer: much less or much more is slower."""


class S3Backend:
    """A prefix of one bucket. Thread-safe, and usable on both sides of a fork."""

    options: ClassVar[Mapping[str, str]] = OPTIONS

    def __init__(self, bucket: Bucket, *, ordered: bool) -> None:
        self.url = bucket.url
        self.capabilities = Capabilities(
            atomic_create=True,
            durable=True,
            part_size=bucket.part_size,
            parallel=bucket.parallel,
            min_part=5 << 20,
            max_parts=10_000,
            gathers=True,
            remote=True,
            probe=True,
        )
        self._bucket = bucket
        self._ordered = ordered
        self._lock = threading.Lock()
        self._pins: OrderedDict[str, str] = OrderedDict()
        self._if_match = True

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> S3Backend:
        """Make a backend for ``bucket`` or ``bucket/prefix``. Nothing is sent.

        Raises:
            InvalidOption: unknown, with a bad value, or with something secret.
            InvalidURL: no bucket, or a prefix with empty, ``.`` or ``..`` parts or control characters.
        """
        bucket, _, prefix = location.rstrip("/").partition("/")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,254}", bucket):
            raise InvalidURL(f"{bucket!r:.100} is not a bucket: write s3://bucket/prefix (for an access point, its alias)")
        if any(s in ("", ".", "..") or re.search(r"[\0-\x1f\x7f]", s) for s in prefix.split("/") if prefix):
            raise InvalidURL(f"{prefix!r:.200} cannot be a prefix: no empty, '.' or '..' parts, no control characters")
        if len(prefix.encode("utf-8", "replace")) > 512:
            raise InvalidURL("the prefix is longer than 512 bytes, and keys have at most 1024")
        # S3 Express ("directory buckets") lists in no order, and cannot begin after a key.
        return cls(Bucket(bucket, prefix, options), ordered=not bucket.endswith("--x-s3"))

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`."""
        if ready:
            ready()
        with self._bucket.mapped("create", key, creating=True):
            checksum = self._bucket.put(key, data, IfNoneMatch="*")
        if not _is_of(checksum, data):
            try:
                wrong = _difference(self.stat(key), len(data), crc64nvme(data))
            except CkptStoreError as exc:
                raise Ambiguous(f"{self.url}/{key} was created, but cannot be looked at: {exc}") from exc
            if wrong:  # the one who reads it back will tell what this means
                raise Ambiguous(f"{self.url}/{key} {wrong}")

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        with self._bucket.mapped("write", key):
            self._bucket.put(key, data)

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`. Sends nothing."""
        return _S3Writer(self, self._bucket, key)

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        with self._bucket.mapped("read", key, reading=True):
            answer = self._bucket.call("get_object", key)
            body, size = answer["Body"], answer["ContentLength"]
            if size > limit:
                body.close()  # and with it the connection, which is cheaper than reading to the end
                raise BackendError(f"{self.url}/{key} is {size} bytes long, more than the {limit} that belong here")
            data: bytes = body.read()  # raises if it ends early
            return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`. All reads of one object are of one version of it, or `Unreadable` is raised."""
        size = buffer.nbytes
        if not size:
            return  # no range says "nothing"
        pin = self._pins.get(key)
        with self._bucket.mapped("read", key, reading=True):
            condition = {"IfMatch": pin} if pin and self._if_match else {}
            range_ = {"Range": f"bytes={offset}-{offset + size - 1}"}
            try:
                answer = self._bucket.call("get_object", key, **range_, **condition)
            except sdk.ClientError as exc:
                if status_of(exc) != 412:
                    raise
                answer = self._bucket.call("get_object", key, **range_)
                # The same after all: some services compare what they sent, in quotes, with what they have, without.
                self._if_match = answer["ETag"] != pin
            with answer["Body"] as body:
                if answer["ETag"] != self._pin(key, answer["ETag"]):
                    with self._lock:
                        self._pins.pop(key, None)
                    raise Unreadable(f"{self.url}/{key} was overwritten while it was read; look who else writes there")
                if answer["ContentLength"] != size:
                    raise BackendError(f"{self.url}/{key} ends at byte {offset + answer['ContentLength']}, not {offset + size}")
                _fill(buffer.cast("B"), body)

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`. What `read_into` reads from here on is the version that was seen now."""
        with self._bucket.mapped("look at", key, reading=True):
            try:
                answer = self._bucket.call("head_object", key, ChecksumMode="ENABLED")
            except sdk.ClientError as exc:
                if status_of(exc) not in (400, 403):
                    raise
                # An answer to HEAD has no text, so it does not say whether the key has expired, the clock is wrong, or what it is.
                self._bucket.call("get_object", key, Range="bytes=0-0")["Body"].close()
                raise Transient(f"{self.url}/{key} could not be looked at ({exc}), but read") from exc
        if not key.startswith(_RECORDS):
            self._pin(key, answer["ETag"], anew=True)
        return ObjectInfo(key, answer["ContentLength"], recorded(answer))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Unfinished multipart uploads have the object's key, their id, and ``.partial``."""
        if prefix.startswith(_RECORDS) and self._ordered:
            yield from self._objects(prefix, start_after)
            return
        # Some services list folder by folder ("a/b" before "a-b"), so all of it is sorted here; records are in one folder. Uploads come
        # first: one that is finished in between is then listed twice rather than not at all.
        uploads = () if prefix.startswith(_RECORDS) else self._uploads(prefix)
        found = [info for some in (uploads, self._objects(prefix, "")) for info in some if info.key > start_after]
        yield from sorted(found, key=lambda info: info.key)

    def _objects(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        start = {"StartAfter": self._bucket.root + start_after} if start_after else {}
        for page in self._pages("list_objects_v2", prefix, {"ContinuationToken": "NextContinuationToken"}, start):
            for item in page.get("Contents", ()):
                key = item["Key"][len(self._bucket.root) :]
                if key:  # else it is the "folder" itself, made in a browser
                    yield ObjectInfo(key, item["Size"])

    def _uploads(self, prefix: str) -> Iterator[ObjectInfo]:
        markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        try:
            for page in self._pages("list_multipart_uploads", prefix, markers, {}):
                for item in page.get("Uploads", ()):
                    upload = "".join(c if c.isalnum() and c.isascii() else f"={ord(c):02X}" for c in item["UploadId"])
                    yield ObjectInfo(f"{item['Key'][len(self._bucket.root) :]}.{upload}{_UNFINISHED}", 0)
        except BackendError as exc:
            # So rclone's service says that there are none. Some services have uploads, but no such list; theirs end by the bucket's rules.
            if exc.__cause__ is None or code_of(exc.__cause__) not in ("NoSuchUpload", "NotImplemented"):
                raise

    def _pages(self, operation: str, prefix: str, markers: Mapping[str, str], more: dict[str, Any]) -> Iterator[Any]:
        while True:
            with self._bucket.mapped("list", prefix):
                page = self._bucket.call(operation, Prefix=self._bucket.root + prefix, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            before, more = more, {asked: page[told] for asked, told in markers.items() if page.get(told)}
            if more in ({}, before):
                raise BackendError(f"{self.url}: the service's listing of {prefix or 'objects'} breaks off or does not go on")

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`. In a bucket with versions, the data stays until the bucket's lifecycle rules remove it."""
        objects = []
        for name in dict.fromkeys(keys):
            if not name.endswith(_UNFINISHED):
                objects.append({"Key": self._bucket.root + name})
                continue
            key, _, upload = name[: -len(_UNFINISHED)].rpartition(".")
            self._bucket.abort_upload(key, re.sub("=([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), upload))
        for i in range(0, len(objects), 1000):
            with self._bucket.mapped("delete", ""):
                answer = self._bucket.call("delete_objects", Delete={"Objects": objects[i : i + 1000], "Quiet": True})
                if errors := [e for e in answer.get("Errors", ()) if e.get("Code") != "NoSuchKey"]:
                    raise sdk.ClientError({"Error": errors[0]}, "DeleteObjects")

    def close(self) -> None:
        """See `Backend.close`."""
        self._bucket.close()

    def _pin(self, key: str, etag: str, *, anew: bool = False) -> str:
        """Remember the version `etag` of an object, unless another one is remembered; return the one that is."""
        with self._lock:
            if anew:
                self._pins.pop(key, None)
            pin = self._pins.setdefault(key, etag)
            if len(self._pins) > _PINS:
                self._pins.popitem(last=False)
            return pin


class _S3Writer:
    """See `PartWriter`. A first part that is shorter than usual is kept: if no other follows, one PUT will do."""

    def __init__(self, backend: S3Backend, bucket: Bucket, key: str) -> None:
        self._backend = backend
        self._bucket = bucket
        self._key = key
        self._lock = threading.Lock()
        self._first: bytes | None = None
        self._upload = ""
        self._checksums = False
        self._parts: dict[int, tuple[dict[str, Any], int, int]] = {}  # number -> how the completion names it; length, CRC
        self._checksum: str | None = None
        self._done = False

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        self.write_pieces(offset, [data.cast("B")] if data.nbytes else [], number, crc)

    def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
        """See `GatheringWriter.write_pieces`."""
        with self._lock:
            if number == 0 and not self._upload and sum(map(len, pieces)) < self._backend.capabilities.part_size:
                self._first = b"".join(pieces)
                return
            if not self._upload:
                with self._bucket.mapped("begin to write", self._key):
                    self._upload, self._checksums = self._bucket.begin_upload(self._key)
        self._send_first()
        self._send(number, pieces, crc)

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`. It would cost a request, or a thread."""

    def finish(self) -> str | None:
        """See `PartWriter.finish`."""
        if not self._done:
            self._checksum = self._complete() if self._upload else self._put(self._first or b"")
            self._done = True
            self._first = None
        return self._checksum

    def abort(self) -> None:
        """See `PartWriter.abort`. What cannot be aborted now is found by garbage collection."""
        self._first = None
        if self._upload and not self._done:
            with suppress(CkptStoreError):
                self._bucket.abort_upload(self._key, self._upload)

    def _send_first(self) -> None:
        with self._lock:
            first, self._first = self._first, None
        if first is not None:
            try:
                self._send(0, [memoryview(first)])
            except BaseException:
                self._first = first
                raise

    def _send(self, number: int, pieces: Sequence[memoryview], known: int | None = None) -> None:
        crc = _crc(pieces) if known is None else known
        try:
            with self._bucket.mapped(f"write part {number + 1} of", self._key):
                named = self._bucket.upload_part(self._key, self._upload, number + 1, pieces, crc if self._checksums else None)
        except BackendError as exc:  # perhaps because the service has compared
            self._check_unchanged(pieces, crc, exc)
            raise
        if not self._checksums and known is not None:  # the service has compared something that was computed later
            self._check_unchanged(pieces, crc, None)
        self._parts[number] = (named, sum(map(len, pieces)), crc)

    def _check_unchanged(self, pieces: Sequence[memoryview], crc: int, cause: BackendError | None) -> None:
        if _crc(pieces) != crc:
            path = self._key.split("/", 2)[-1]
            what = f"{path} changed in memory while it was sent, so nothing is published"
            raise DamagedFile(f"{what}; let nothing write to tensors during a save", path) from cause

    def _put(self, data: bytes) -> str | None:
        with self._bucket.mapped("write", self._key):
            checksum = self._bucket.put(self._key, data)
        return checksum if _is_of(checksum, data) else self._compared(len(data), crc64nvme(data))

    def _complete(self) -> str | None:
        self._send_first()
        parts = [self._parts[number] for number in sorted(self._parts)]
        size, crc = sum(p[1] for p in parts), combine((p[1], p[2]) for p in parts)
        whole = {"ChecksumCRC64NVME": base64_crc(crc), "ChecksumType": "FULL_OBJECT", "MpuObjectSize": size}
        with self._bucket.mapped("complete", self._key):
            try:
                self._bucket.call(
                    "complete_multipart_upload",
                    self._key,
                    UploadId=self._upload,
                    MultipartUpload={"Parts": [p[0] for p in parts]},
                    **(whole if self._checksums else {}),
                )
            except sdk.ClientError as exc:
                if code_of(exc) != "NoSuchUpload":
                    raise
                try:
                    return self._compared(size, crc)  # completed by an earlier attempt, whose answer was lost?
                except NotFound:
                    raise exc from None
        return self._compared(size, crc)

    def _compared(self, size: int, crc: int) -> str | None:
        """Compare size and checksum of what the service has stored with what was sent; return the service's checksum."""
        found = self._backend.stat(self._key)
        wrong = _difference(found, size, crc)
        if wrong is None:
            return found.checksum
        why = f"{self._backend.url}/{self._key} {wrong}"
        try:
            self._backend.delete([self._key])
        except CkptStoreError as exc:
            raise Ambiguous(f"{why}, and could not be removed: {exc}", durable=False) from exc
        raise BackendError(f"{why}; it was removed")


def _is_of(checksum: str | None, data: bytes) -> bool:
    """Whether a checksum of the service's proves that it has kept `data`."""
    return checksum in (spelled(crc64nvme(data)), f"md5:{hashlib.md5(data, usedforsecurity=False).hexdigest()}")


def _difference(found: ObjectInfo, size: int, crc: int) -> str | None:
    """Say in which way what the service has kept differs from what was sent; None if it does not."""
    known = found.checksum is not None and found.checksum.startswith("crc64nvme:")
    if found.size == size and (not known or found.checksum == spelled(crc)):
        return None
    return f"arrived as {found.size} bytes, {found.checksum}, not {size}, {spelled(crc)}"


def _crc(pieces: Sequence[memoryview]) -> int:
    crc = 0
    for piece in pieces:
        crc = crc64nvme(piece, crc)
    return crc


def _fill(buffer: memoryview, body: HTTPResponse) -> None:
    # urllib3's own `readinto` reads into memory of its own, and copies; the response below it reads from the socket into ours.
    below: Any = getattr(body, "_fp", None)
    straight = isinstance(below, http.client.HTTPResponse)
    done = 0
    while done < len(buffer):
        got = below.readinto(buffer[done:]) if straight else body.readinto(buffer[done : done + _BLOCK])
        if not got:
            raise Transient(f"the connection ended after {done} of {len(buffer)} bytes")
        done += got
    if straight and below.isclosed():  # read to its end, which urllib3 has not seen: the connection can be used again
        body.release_conn()
