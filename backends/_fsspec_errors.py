"""What the many libraries behind fsspec raise, as our errors. None of them is imported for it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    NotFound,
    PermissionDenied,
    StorageFull,
    Throttled,
    Transient,
)

__all__ = ["typed_error"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# In the names of exceptions, of Python, aiohttp, azure.core, botocore, httpx, paramiko and requests:
_LOST = re.compile(r"Timeout|Connect|Disconnect|EOF|Payload|Service(Request|Response)Error|SSHException")
_DENIED = re.compile(r"Authentication")
_NOBODY = re.compile(r"ConnectionRefused|NoValidConnections|gaierror")


def typed_error(exc: Exception, what: str, doing: str, creating: bool) -> CkptStoreError:
    """Return our error for `exc`, met while `doing` something; `what` begins the message. See `FsspecBackend.errors`."""
    status = _status(exc)
    told = f"{what}: {_told(exc)}"
    if not creating:
        return _error(exc, status, told, doing)
    if isinstance(exc, FileExistsError) or status == 412:
        return AlreadyExists(f"{what}: it exists already, and was left as it is")
    # The libraries repeat requests: whatever the last one was told, an earlier one may have taken effect.
    return Ambiguous(str(_error(exc, status, told, doing)))


def _error(exc: Exception, status: int | None, told: str, doing: str) -> CkptStoreError:
    if status == 404 or (isinstance(exc, FileNotFoundError) and status is None and not _is(_LOST, exc)):
        if doing in ("read", "look at") and isinstance(exc, FileNotFoundError):
            return NotFound(told)
        return BackendError(f"{told}; is there such a bucket, container or folder? Make it, or correct the URL")
    if isinstance(exc, PermissionError) or status in (401, 403) or _is(_DENIED, exc):
        return PermissionDenied(
            f"{told}; check the credentials (see docs/storage.md for where they come from) and what they may do"
        )
    if _is(_NOBODY, exc):
        return Transient(f"{told}; nobody answers there: check the address and the network")
    if status in (429, 503):
        return Throttled(told)
    if status is not None and status < 500 and status not in (408, 409):
        return BackendError(told)
    if isinstance(exc, OSError) and exc.errno in _FULL:
        return StorageFull(exc.errno, told)
    return Transient(told) if status is not None or _is(_LOST, exc) else BackendError(told)


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """Yield `exc`, what it came from, and so on."""
    found: BaseException | None = exc
    for _ in range(10):
        if found is None:
            return
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _status(exc: Exception) -> int | None:
    """Return the HTTP status that `exc` came from, as the libraries note it."""
    for e in _causes(exc):
        response = getattr(e, "response", None)
        if isinstance(response, dict):  # botocore's ClientError
            found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:  # requests and httpx; azure.core; aiohttp; gcsfs
            found = getattr(response, "status_code", None)
            for name in ("status_code", "status", "code"):
                found = found or getattr(e, name, None)
        if isinstance(found, int) and 100 <= found < 600:
            return found
    return None


def _is(names: re.Pattern[str], exc: Exception) -> bool:
    """Return whether `names` is found in the name of a class of `exc`, or of what it came from."""
    return any(names.search(kind.__name__) for e in _causes(exc) for kind in type(e).__mro__)


def _told(exc: Exception) -> str:
    """Return what `exc` says, on one line, without what may be secret: the query of a URL, or a user before an ``@``."""
    text = re.sub(r"\?[^\s'\"]+=[^\s'\"]*", "?…", " ".join(str(exc).split()))
    return f"{type(exc).__name__}: {re.sub(r'//[^/@ ]+@', '//…@', text)[:300]}"  # cut last: half a secret would not be found
