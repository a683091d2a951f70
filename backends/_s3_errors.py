"""From what boto3 raises to `ckptstore.errors`, with what to do about it. For `s3` alone."""

from __future__ import annotations

import socket
from typing import Any

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    InvalidOption,
    NoAtomicCreate,
    NotFound,
    PermissionDenied,
    StorageFull,
    Throttled,
    Transient,
)

__all__ = ["RAISED", "about_credentials", "code_of", "explain", "status_of"]

_CREDENTIALS = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE: "
    "they must be for this service, and not have expired"
)
_REGION = "the bucket is in another region; name it with region="
_EXPIRED = "the credentials have expired; renew them"

_STALE: dict[str, tuple[type[BackendError], str]] = {
    # A new look for credentials may find newer ones, in a file or from a role.
    "ExpiredToken": (Transient, _EXPIRED),
    "ExpiredTokenException": (Transient, _EXPIRED),
    "RequestExpired": (Transient, _EXPIRED),
    "TokenRefreshRequired": (Transient, _EXPIRED),
    "InvalidAccessKeyId": (PermissionDenied, _CREDENTIALS),
    "InvalidToken": (PermissionDenied, _CREDENTIALS),
    "SignatureDoesNotMatch": (PermissionDenied, _CREDENTIALS),
}
_KNOWN: dict[str, tuple[type[BackendError], str]] = {
    **_STALE,
    "AuthorizationHeaderMalformed": (BackendError, _REGION),
    "BadDigest": (Transient, "the bytes were changed on their way; if this goes on, look at the network"),
    "EntityTooLarge": (StorageFull, "the service takes no part or object of this size; set part_size="),
    "IllegalLocationConstraintException": (BackendError, _REGION),
    "InternalError": (Transient, "the service failed"),
    "InvalidObjectState": (BackendError, "it was moved to an archive; restore it there first"),
    "NoSuchBucket": (BackendError, "make the bucket, or correct the URL or endpoint_url"),
    "NoSuchUpload": (BackendError, "the upload was aborted: by a newer job's garbage collection, or by a lifecycle rule"),
    "PermanentRedirect": (BackendError, _REGION),
    "QuotaExceeded": (StorageFull, "delete something, or raise the quota"),
    "RequestTimeTooSkewed": (BackendError, "this machine's clock is wrong; set it, for instance by NTP"),
    "RequestTimeout": (Transient, "the connection is too slow; a smaller part_size or concurrency may help"),
    "SlowDown": (Throttled, "the service asks for fewer requests"),
    "XAmzContentChecksumMismatch": (Transient, "the bytes were changed on their way; if this goes on, look at the network"),
    "XAmzContentSHA256Mismatch": (Transient, "the bytes were changed on their way; if this goes on, look at the network"),
}
_PERMISSIONS = {
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObjects": "s3:DeleteObject, and a bucket that does not retain its objects (object lock)",
    "GetObject": "s3:GetObject, and s3:ListBucket to be told what is absent",
    "HeadObject": "s3:GetObject, and s3:ListBucket to be told what is absent",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
}
_UNSENT = (sdk.EndpointConnectionError, sdk.ConnectTimeoutError, sdk.ProxyConnectionError)
_LOST = (
    *(sdk.HTTPClientError, sdk.ConnectionError, sdk.IncompleteReadError, ResponseParserError, OSError),
    HTTPError,  # of urllib3: bodies are read past the SDK's own mapping of errors
)
RAISED = (sdk.BotoCoreError, sdk.ClientError, RuntimeError, *_LOST)
"""All that the SDK raises; RuntimeError where renewed credentials have expired, too."""


def code_of(exc: BaseException) -> str:
    """Return the service's error code, empty if `exc` is not an answer of the service."""
    return str(exc.response.get("Error", {}).get("Code", "")) if isinstance(exc, sdk.ClientError) else ""


def status_of(exc: sdk.ClientError) -> int:
    """Return the HTTP status of an answer; 0 for an error inside the answer to a request for many things."""
    return int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def about_credentials(exc: BaseException) -> bool:
    """Say whether other credentials could have helped."""
    found = isinstance(exc, (sdk.NoCredentialsError, sdk.CredentialRetrievalError)) or type(exc) is RuntimeError
    return found or code_of(exc) in _STALE


def explain(exc: Exception, reading: bool, creating: bool) -> tuple[type[CkptStoreError], str]:
    """Return which of our errors `exc` is, and one line of text.

    `reading`: 404 means `NotFound`. `creating`: what may have taken effect unseen is `Ambiguous`.
    """
    if isinstance(exc, sdk.ClientError):
        kind, text = _answer(exc, reading, creating)
        unseen = status_of(exc) == 409 or status_of(exc) >= 500
    else:
        kind, text = _failure(exc)
        unseen = isinstance(exc, _LOST) and not isinstance(exc, _UNSENT)
    if creating and unseen and issubclass(kind, Transient):
        kind = Ambiguous
    text = " ".join(text.split())
    return kind, text if len(text) <= 500 else text[:500] + "…"


def _answer(exc: sdk.ClientError, reading: bool, creating: bool) -> tuple[type[CkptStoreError], str]:
    code, status = code_of(exc), status_of(exc)
    if reading and code in ("NoSuchKey", "NotFound", "404"):
        return NotFound, "there is no such object"
    if creating and status == 412:
        return AlreadyExists, "it exists already, and was left as it is"
    if creating and status == 501:
        why = "this service has no create-if-absent (PUT with If-None-Match), so two jobs could both believe they committed"
        return NoAtomicCreate, f"{why}; add single_writer=1 to the URL if you make sure that only one job ever writes"
    kind, advice = _KNOWN.get(code) or _by_status(exc, code, status)
    if advice == _REGION:
        advice += str(exc.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region", ""))
    message = exc.response.get("Error", {}).get("Message")
    return kind, "; ".join(text for text in (f"{code}: {message}" if message else code, advice) if text)


def _by_status(exc: sdk.ClientError, code: str, status: int) -> tuple[type[BackendError], str]:
    if status == 403 or code in ("AccessDenied", "403"):
        return PermissionDenied, f"this needs {_PERMISSIONS.get(exc.operation_name, 's3:PutObject')}; or {_CREDENTIALS}"
    if status == 301:
        return BackendError, _REGION
    if status in (429, 503) or "Throttl" in code:
        return Throttled, "the service asks for fewer requests"
    if status == 507:
        return StorageFull, "delete something"
    if status in (408, 409) or (status >= 500 and status != 501):
        return Transient, "the service could not answer now"
    if status == 400 and code == "400":  # HEAD has no text
        return BackendError, f"the service does not say why; {_CREDENTIALS}, and that {_REGION}"
    return BackendError, ""


def _failure(exc: Exception) -> tuple[type[CkptStoreError], str]:
    if isinstance(exc, (sdk.NoCredentialsError, sdk.PartialCredentialsError)):
        return PermissionDenied, f"{exc}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or anonymous=1"
    if isinstance(exc, sdk.SSOError):
        return PermissionDenied, f"{exc}; log in again with the AWS command line"
    if isinstance(exc, (sdk.CredentialRetrievalError, sdk.MetadataRetrievalError)):
        return Transient, f"{exc}; credentials could not be had now"
    if type(exc) is RuntimeError:
        return Transient, f"{exc} Renew them"
    if isinstance(exc, sdk.ProfileNotFound):
        return InvalidOption, f"{exc}; see ~/.aws/config, AWS_PROFILE and profile="
    if isinstance(exc, sdk.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return BackendError, f"{exc}; if the certificate is the right one, name its authority's in AWS_CA_BUNDLE"
    if isinstance(exc, sdk.SSLError):
        return Transient, f"{exc} Check that endpoint_url is right to say https"
    if isinstance(exc, sdk.EndpointConnectionError) and _no_such_host(exc):
        return BackendError, f"{exc} There is no such host: check endpoint_url, region and the bucket's name"
    if isinstance(exc, _UNSENT):
        return Transient, f"{exc} Check endpoint_url and the network"
    if isinstance(exc, (*_LOST, sdk.UnseekableStreamError)):  # the latter: the bucket is elsewhere, where the SDK goes next time
        return Transient, str(exc)
    return BackendError, str(exc)


def _no_such_host(exc: BaseException) -> bool:
    seen: Any = exc.kwargs.get("error") if isinstance(exc, sdk.EndpointConnectionError) else None
    while seen is not None:
        if isinstance(seen, socket.gaierror):
            return seen.errno == socket.EAI_NONAME  # EAI_AGAIN: the network is down
        seen = seen.__cause__ or seen.__context__
    return False
