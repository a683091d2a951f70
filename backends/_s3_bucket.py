"""One bucket as boto3 reaches it: options, connection, credentials, checksums on the wire. For `s3` alone."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore import UNSIGNED
from botocore import exceptions as sdk
from botocore.config import Config
from botocore.parsers import ResponseParserError

from ckptstore.checksum import crc64nvme
from ckptstore.errors import CkptStoreError, InvalidOption, StoreWarning

from ._s3_errors import RAISED, about_credentials, code_of, explain

__all__ = ["OPTIONS", "Bucket", "base64_crc", "recorded", "spelled"]

OPTIONS = {
    "region": "the bucket's region, if the AWS configuration names another one or none",
    "endpoint_url": "another service than Amazon's, as in https://minio.example.com:9000; its buckets are addressed by path",
    "profile": "a profile of the AWS configuration, which may hold credentials and everything else",
    "anonymous": "'1' sends no credentials: for reading public buckets",
    "part_size": "bytes per part of an upload, as in 16M (default 8M, at least 5M)",
    "concurrency": "how many parts are moved at a time (default 8); memory stays within about concurrency × part_size",
    "checksum": "'when_required' for services that know no CRC-64/NVME, which get Content-MD5 (default: when_supported)",
    "sse": "encrypt with AES256, aws:kms or aws:kms:dsse, if not as the bucket says",
    "sse_kms_key_id": "the KMS key for sse=aws:kms",
    "request_payer": "'requester' agrees to pay for requests to a requester-pays bucket",
}
"""URL options, with one line of help each."""
_VALUES = {
    "anonymous": ("0", "1"),
    "checksum": ("when_supported", "when_required"),
    "request_payer": ("requester",),
    "sse": ("AES256", "aws:kms", "aws:kms:dsse"),
}
_SDK_CHAIN = "the environment, AWS_PROFILE or a role, never in a URL, which ends up in logs"
_UNKNOWN_HEADER = ("InvalidArgument", "InvalidRequest", "NotImplemented")
"""Codes by which services refuse what they do not know."""
_SIGNS = {
    "create_multipart_upload": ("UploadId",),
    "complete_multipart_upload": ("ETag",),
    "get_object": ("ETag", "ContentLength"),
    "head_object": ("ETag", "ContentLength"),
    "list_multipart_uploads": ("MaxUploads", "IsTruncated"),
    "list_objects_v2": ("IsTruncated",),
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
}
"""What every answer of S3 to these holds, or of a listing one of them: some services do not say that one is complete."""
_PIECE = 1 << 18
"""Bytes that are given to a connection at a time, each within its time-out: a whole part would have to go out within 10 s."""
_AMAZON = re.compile(r".*\.amazonaws\.(com|com\.cn|eu)")


class Bucket:
    """The SDK's client, made when first needed and again after a fork, and how all requests are sent. Thread-safe."""

    def __init__(self, name: str, prefix: str, options: Mapping[str, str]) -> None:
        _check(options)
        self.url = f"s3://{name}/{prefix}".rstrip("/")
        self.part_size = _size(options.get("part_size", "8M"))
        self.parallel = _count(options.get("concurrency", "8"))
        self.root = f"{prefix}/" if prefix else ""
        self.checksums = options.get("checksum") != "when_required"
        """Whether CRC-64/NVME is sent."""
        self.encryption = {}
        if "sse" in options:
            self.encryption["ServerSideEncryption"] = options["sse"]
        if "sse_kms_key_id" in options:
            self.encryption["SSEKMSKeyId"] = options["sse_kms_key_id"]
        self._options = options
        self._always = {"Bucket": name}
        if "request_payer" in options:
            self._always["RequestPayer"] = options["request_payer"]
        self._proven = False  # the service has sent a CRC-64/NVME back
        self._lock = threading.Lock()
        self._made: tuple[int, Any, Any] | None = None  # by which process; the client; its credentials then

    def call(self, operation: str, key: str | None = None, **params: Any) -> Any:
        """Send one request and return the SDK's answer; raises what the SDK raises.

        One that is refused for its credentials, and so did nothing, is sent again if other ones are found now: in a file, or from a role.
        """
        params.update(self._always if key is None else {**self._always, "Key": self.root + key})
        _, client, credentials = made = self._make()
        try:
            answer = getattr(client, operation)(**params)
        except RAISED as exc:
            if not about_credentials(exc):
                raise
            with self._lock:
                if self._made is made:  # else another thread has looked already
                    self._made = None
            _, client, found = self._make()
            if found == credentials:
                raise
            answer = getattr(client, operation)(**params)
        missing = [sign for sign in _SIGNS.get(operation, ()) if answer.get(sign) is None]
        if missing and (not operation.startswith("list_") or missing == [*_SIGNS[operation]]):
            # A 200 of something in between, a proxy or a log-in page: to the SDK, an object without attributes, or no objects.
            raise ResponseParserError(f"the answer has no {missing[0]}, so it is not S3's; look at endpoint_url and the network")
        return answer

    def put(self, key: str, data: bytes, **condition: str) -> str | None:
        """Write one object at one go; return the service's own checksum, None if it has none."""
        crc = {"ChecksumCRC64NVME": base64_crc(crc64nvme(data))}
        answer, _ = self._negotiated("put_object", key, crc, Body=_Body([memoryview(data)]), **self.encryption, **condition)
        return recorded(answer)

    def begin_upload(self, key: str) -> tuple[str, bool]:
        """Begin an upload in parts; return its id, and whether the parts must come with checksums."""
        crc = {"ChecksumAlgorithm": "CRC64NVME", "ChecksumType": "FULL_OBJECT"}
        answer, checksums = self._negotiated("create_multipart_upload", key, crc, **self.encryption)
        return str(answer["UploadId"]), checksums

    def upload_part(self, key: str, upload: str, number: int, pieces: Sequence[memoryview], crc: int | None) -> dict[str, Any]:
        """Send part `number`, from 1, which is `pieces` of bytes one behind the other, and return how the completion has to name it."""
        check = {"ContentMD5": _md5(*pieces)} if crc is None else {"ChecksumCRC64NVME": base64_crc(crc)}
        answer = self.call("upload_part", key, UploadId=upload, PartNumber=number, Body=_Body(pieces), **check)
        named = {"PartNumber": number, "ETag": answer["ETag"]}
        return named if crc is None else {**named, **check}

    def abort_upload(self, key: str, upload: str) -> None:
        """Abort an upload; one that is gone already is no error."""
        with self.mapped("abort the upload of", key):
            try:
                self.call("abort_multipart_upload", key, UploadId=upload)
            except sdk.ClientError as exc:
                if code_of(exc) != "NoSuchUpload":
                    raise

    def _negotiated(self, operation: str, key: str, crc: Mapping[str, str], **params: Any) -> tuple[Any, bool]:
        """Send `crc` along, unless the service turns out not to know it; return the answer, and whether it was sent."""
        self._connected()  # only then it is known what the AWS configuration says
        if self.checksums:
            try:
                answer = self.call(operation, key, **crc, **params)
            except sdk.ClientError as exc:
                if self._proven or code_of(exc) not in _UNKNOWN_HEADER:
                    raise
            else:
                if "ChecksumCRC64NVME" in answer:
                    self._proven = True
                elif operation == "put_object" and not self._proven:
                    self._fall_back()  # it did not look at ours
                return answer, True
        md5 = {"ContentMD5": _md5(*params["Body"].pieces)} if "Body" in params else {}
        answer = self.call(operation, key, **md5, **params)
        self._fall_back()
        return answer, False

    def _fall_back(self) -> None:
        with self._lock:
            before, self.checksums = self.checksums, False
        if before:
            why = (
                "this service knows no CRC-64/NVME checksums, so uploads are checked by Content-MD5 and size instead; "
                "checksum=when_required in the URL says so beforehand"
            )
            warnings.warn(f"{self.url}: {why}", StoreWarning, stacklevel=5)

    @contextmanager
    def mapped(self, doing: str, key: str, *, reading: bool = False, creating: bool = False) -> Iterator[None]:
        """Map what the SDK raises to our errors. `reading`: 404 means `NotFound`; `creating`: a lost answer is `Ambiguous`."""
        try:
            yield
        except CkptStoreError:
            raise
        except RAISED as exc:
            kind, why = explain(exc, reading, creating)
            raise kind(f"{self.url}: cannot {doing} {key or 'objects'}: {why}") from exc

    def close(self) -> None:
        """Close the connections. Idempotent; used again, it connects again."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            made[1].close()

    def _connected(self) -> Any:
        return self._make()[1]

    def _make(self) -> tuple[int, Any, Any]:
        made = self._made
        if made is None or made[0] != os.getpid():  # connections must not be shared with a parent process
            with self._lock:
                made = self._made
                if made is None or made[0] != os.getpid():
                    made = self._made = (os.getpid(), *self._connect())
        return made

    def _connect(self) -> tuple[Any, Any]:
        options = self._options
        session = boto3.Session(profile_name=options.get("profile"), region_name=options.get("region"))
        config = Config(
            # What may be repeated is repeated above. If the SDK did, a creation whose first answer was lost would be told that
            # somebody else came first, and parts in flight would be more than the engine knows of.
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=4 * self.parallel,
            connect_timeout=10,
            read_timeout=60,
            response_checksum_validation="when_required",  # chunks are checked above
            signature_version=UNSIGNED if options.get("anonymous") == "1" else None,
        )
        client = self._client_of(session, config)
        # Only now is it known what the environment and the AWS configuration say.
        if client.meta.config.request_checksum_calculation == "when_required":
            self.checksums = False
        place = urlsplit(client.meta.endpoint_url)
        if "@" in place.netloc:  # the SDK's errors would show it
            raise InvalidOption(f"{self.url}: the endpoint in the environment or AWS configuration must hold no credentials")
        s3 = dict(client.meta.config.s3 or {})
        if not _AMAZON.fullmatch(place.hostname or ""):
            s3.setdefault("addressing_style", "path")
        if place.scheme == "https":
            # TLS and the checksum protect it; a SHA-256 would take longer than both.
            s3.setdefault("payload_signing_enabled", False)
        client = self._client_of(session, config.merge(Config(s3=s3, request_checksum_calculation="when_required")))
        client.meta.events.register_last("before-call.s3", self._adapt)
        client.meta.events.register("before-send.s3", _send_memory)
        if "payload_signing_enabled" not in s3:
            # Over plain http, what the SDK signs holds the SHA-256 of the body, which takes longer than to send it. So parts go without:
            # their own checksum, which is signed, tells accidents. Against somebody on the network, who could change what is read as well,
            # there is https, and `hmac_key`. Records and manifests stay signed; and parts too if the AWS configuration says so. (Ceph
            # compares it with the body that comes, as Amazon does; SeaweedFS 4.48, moto 5.2 and rclone 1.75 do not look.)
            unsigned = client.meta.config.merge(Config(s3={**s3, "payload_signing_enabled": False}))
            client.meta.events.register("before-sign.s3.UploadPart", functools.partial(_sign_as, unsigned))
        credentials = None if options.get("anonymous") == "1" else session.get_credentials()
        return client, credentials and credentials.get_frozen_credentials()

    def _client_of(self, session: Any, config: Config) -> Any:
        try:
            return session.client("s3", config=config, endpoint_url=self._options.get("endpoint_url"))
        except sdk.InvalidRegionError as exc:
            raise InvalidOption(f"{self.url}: {exc}; correct region= or AWS_REGION") from exc
        except ValueError as exc:  # not shown: it may hold a password
            raise InvalidOption(f"{self.url}: the endpoint in AWS_ENDPOINT_URL or the AWS configuration is no URL") from exc

    def _adapt(self, model: Any, params: dict[str, Any], **_: Any) -> None:
        params["headers"].pop("Expect", None)  # the SDK would wait for "100 Continue" before it sends a part
        if model.name == "DeleteObjects" and not self.checksums:
            params["context"].pop("checksum", None)  # the CRC-32 that the SDK would send
            params["headers"]["Content-MD5"] = _md5(params["body"])


def _sign_as(config: Config, request: Any, **_: Any) -> None:
    request.context["client_config"] = config


class _Body(io.RawIOBase):
    """Pieces of memory as the one file that the SDK asks for, without a copy."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self.pieces = pieces
        self._size = sum(map(len, pieces))
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        start = self._at
        for piece in self.pieces:
            if start < len(piece):
                found = piece[start : start + len(buffer)]
                buffer[: len(found)] = found
                self._at += len(found)
                return len(found)
            start -= len(piece)
        return 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at


class _Pieces:
    """Memory as a body that is sent piece by piece, as often as asked for."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[memoryview]:
        return (data[start : start + _PIECE] for data in self._pieces for start in range(0, len(data), _PIECE))


def _send_memory(request: Any, **_: Any) -> None:
    """Let the socket take a part from memory: 16 KiB at a time, as the SDK reads files, cost more than sending them."""
    if isinstance(request.body, _Body):
        request.body = _Pieces(request.body.pieces)


def recorded(answer: Mapping[str, Any]) -> str | None:
    """Return the checksum of the whole object in an answer, as `ObjectInfo.checksum` has it."""
    crc = answer.get("ChecksumCRC64NVME")
    if crc and answer.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
        return f"crc64nvme:{base64.b64decode(crc).hex()}"
    etag = str(answer.get("ETag", "")).strip('"')
    if re.fullmatch("[0-9a-f]{32}", etag) and not str(answer.get("ServerSideEncryption", "")).startswith("aws:kms"):
        return f"md5:{etag}"
    return None


def spelled(crc: int) -> str:
    """Return a CRC-64/NVME as `ObjectInfo.checksum` has it."""
    return f"crc64nvme:{crc:016x}"


def base64_crc(crc: int) -> str:
    """Return a CRC-64/NVME as S3's headers have it."""
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def _md5(*pieces: bytes | memoryview) -> str:
    whole = hashlib.md5(usedforsecurity=False)
    for piece in pieces:
        whole.update(piece)
    return base64.b64encode(whole.digest()).decode()


def _size(text: str) -> int:
    match = re.fullmatch("([1-9][0-9]{0,11})([KMG]?)", text)
    size = int(match[1]) << 10 * " KMG".index(match[2] or " ") if match else 0
    if not 5 << 20 <= size <= 1 << 30:
        raise InvalidOption(f"part_size must be from 5M to 1G, as in 16M, not {text!r:.100}")
    return size


def _count(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]?|1[0-9][0-9]", text):
        raise InvalidOption(f"concurrency must be a number from 1 to 199, not {text!r:.100}")
    return int(text)


def _check(options: Mapping[str, str]) -> None:
    for name, value in options.items():
        if name not in OPTIONS:
            secret = re.search("key|secret|token|password", name.lower())
            why = f"; credentials are given by {_SDK_CHAIN}" if secret else ""
            raise InvalidOption(f"an s3 store takes no option {name!r}{why}")
        if name in _VALUES and value not in _VALUES[name]:
            raise InvalidOption(f"{name} must be {' or '.join(_VALUES[name])}, not {value!r:.100}")
    if "sse_kms_key_id" in options and not options.get("sse", "").startswith("aws:kms"):
        raise InvalidOption("sse_kms_key_id needs sse=aws:kms beside it")
    if not re.fullmatch("[a-z0-9-]{1,64}", options.get("region", "-")):
        raise InvalidOption(f"region must be like eu-central-1, not {options['region']!r:.100}")
    if "endpoint_url" in options:
        try:
            place = urlsplit(options["endpoint_url"])
            known = place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
        except ValueError:
            known = False
        else:
            if "@" in place.netloc or place.query:
                raise InvalidOption(f"endpoint_url must hold no credentials; they are given by {_SDK_CHAIN}")
        if not known:
            raise InvalidOption("endpoint_url must be like https://minio.example.com:9000")
