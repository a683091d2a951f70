"""Requests to Google Cloud Storage through gcsfs's connections, and what went wrong with them as our errors."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    NotFound,
    PermissionDenied,
    Throttled,
    Transient,
)

__all__ = ["Answer", "Refused", "crc32c", "crc32c_base64", "exchange", "run", "spelled", "typed_error"]

_LOGIN = "log in with 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS"
_R = TypeVar("_R")


class Answer(NamedTuple):
    """What the service sent back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the JSON object in the body. Raises `Refused` if there is none, or one that tells of an error."""
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Refused(502, "the answer is no JSON object")
        if "error" in found:
            raise Refused(502, _message(self.body))
        return found


class Refused(Exception):
    """The service answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message


async def exchange(
    client: Any,
    method: str,
    path: str,
    *,
    ok: Sequence[int],
    headers: Mapping[str, str] | None = None,
    body: Sequence[bytes | memoryview] = (),
    **parameters: str | None,
) -> Answer:
    """Send one request through the connections and with the credentials of `client`, a GCSFileSystem."""

    from yarl import URL  # comes with aiohttp

    async def pieces() -> AsyncIterator[memoryview]:  # straight from memory, and others get their turn in between
        for part in body:
            for start in range(0, len(part), 1 << 20):
                yield memoryview(part)[start : start + (1 << 20)]

    length = sum(map(len, body))
    session = await client._set_session()
    url = path if path.startswith("http") else f"{client._location}{path}" if path.startswith("/") else f"{client.base}{path}"
    async with session.request(
        method,
        URL(url, encoded=True),
        params=None if path.startswith("http") else client._get_params(parameters),
        headers=client._get_headers({**(headers or {}), "Content-Length": str(length)} if method == "POST" else headers),
        data=pieces() if length else None,
        timeout=client.requests_timeout,
        allow_redirects=False,
    ) as response:
        answer = Answer(response.status, response.headers, await response.read())
    if answer.status not in ok:
        raise Refused(answer.status, _message(answer.body))
    return answer


def run(client: Any, work: Coroutine[Any, Any, _R]) -> _R:
    """Run `work` in gcsfs's own thread, and wait for it."""
    from fsspec.asyn import sync

    async def start() -> _R:
        return await work

    result: _R = sync(client.loop, start)
    return result


def _message(body: bytes) -> str:
    """Return what the service says is wrong: ``{"error": {"message": …}}``, or a text."""
    text = body.decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(body)["error"]["message"])
    return " ".join(text.split())[:300]


def typed_error(exc: Exception, what: str, doing: str, creating: bool) -> CkptStoreError:
    """Return our error for `exc`, met while `doing` something; `what` begins the message. See `GcsBackend.errors`."""
    import aiohttp
    from google.auth.exceptions import GoogleAuthError, TransportError

    if isinstance(exc, Refused):
        return _typed_status(exc.status, f"{what}: {exc.message or 'no reason given'} ({exc.status})", doing, creating)
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return BackendError(f"{what}: the server's certificate is not valid: {exc.certificate_error}")
    if isinstance(exc, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, TransportError)):
        return Transient(f"{what}: no connection ({type(exc).__name__}); check endpoint_url and the network")
    if isinstance(exc, GoogleAuthError) or getattr(exc, "code", None) == 401:
        return PermissionDenied(f"{what}: the credentials cannot be used; {_LOGIN}")
    lost = f"{what}: no answer ({type(exc).__name__}: {exc!s:.100})"
    return Ambiguous(lost) if creating else Transient(lost)


def _typed_status(status: int, what: str, doing: str, creating: bool) -> CkptStoreError:
    if status == 404:
        if doing in ("read", "look at"):
            return NotFound(what)
        return BackendError(f"{what}; is there such a bucket? Create it, or correct the URL")
    if status == 412 and doing == "create":
        return AlreadyExists(f"{what}: it exists already, and was left as it is")
    if status == 401:
        return PermissionDenied(f"{what}; {_LOGIN}")
    if status == 403:
        return PermissionDenied(f"{what}; give this account the role Storage Object User on the bucket")
    if status == 429:
        return Throttled(what)
    if status in (408, 409) or status >= 500:
        return Ambiguous(what) if creating else Throttled(what) if status == 503 else Transient(what)
    return BackendError(what)


def crc32c(data: bytes | memoryview, before: int = 0) -> int:
    """Return the CRC-32C of `data`, or of what had the CRC `before` and `data` behind it."""
    from awscrt import checksums

    return int(checksums.crc32c(data, before))


def crc32c_base64(data: bytes | memoryview, before: int = 0) -> str:
    """Return the CRC-32C as the service writes it: big-endian, in base64."""
    return base64.b64encode(crc32c(data, before).to_bytes(4, "big")).decode("ascii")


def spelled(crc: str | None) -> str | None:
    """Return a CRC-32C of the service as in `ObjectInfo.checksum`."""
    return crc and f"crc32c:{base64.b64decode(crc).hex()}"
