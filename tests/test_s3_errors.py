"""The S3 backend when things go wrong: what may or may not have happened, every answer a service may give, bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from botocore import exceptions as sdk
from s3_rig import PART, TIMEOUT, Service, created, keys, loses, on_wire, says, some_bytes, write
from urllib3.exceptions import HTTPError

from ckptstore import errors
from ckptstore.backends.s3 import S3Backend

pytest_plugins = ("s3_fixtures",)


# --- what may or may not have happened


def test_a_lost_answer_to_a_creation_is_ambiguous_and_sent_once(backend: S3Backend) -> None:
    for after in (False, True):
        with on_wire(backend, loses(TIMEOUT, after=after), "PutObject") as seen, pytest.raises(errors.Ambiguous):
            backend.put_if_absent("log/1", b"x")
        assert seen == {"PutObject": 1}
    assert not created(backend, "log/1")


@pytest.mark.parametrize(
    ("status", "code"), [(409, "ConditionalRequestConflict"), (500, "InternalError"), (503, "SlowDown"), (502, "")]
)
def test_creations_that_may_have_happened(backend: S3Backend, status: int, code: str) -> None:
    with on_wire(backend, says(status, code), "PutObject") as seen:
        with pytest.raises(errors.Ambiguous):
            backend.put_if_absent("log/1", b"x")
        with pytest.raises(errors.Throttled if status == 503 else errors.Transient):
            backend.replace("hint", b"x")
    assert seen == {"PutObject": 2}


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, "InvalidRequest"), (403, "AccessDenied"), (404, "NoSuchBucket"), (400, "RequestTimeout"), (429, "")],
)
def test_creations_that_did_not_happen(backend: S3Backend, status: int, code: str) -> None:
    with on_wire(backend, says(status, code), "PutObject"), pytest.raises(errors.BackendError) as caught:
        backend.put_if_absent("log/1", b"x")
    assert not isinstance(caught.value, errors.Ambiguous)


def test_a_service_without_the_condition_is_refused(backend: S3Backend) -> None:
    with (
        on_wire(backend, says(501, "NotImplemented"), "PutObject"),
        pytest.raises(errors.NoAtomicCreate, match="single_writer=1"),
    ):
        backend.put_if_absent("log/1", b"x")
    assert backend._bucket.checksums  # that was not what it refused


@pytest.mark.parametrize("size", [3, 2 * PART])
@pytest.mark.parametrize("after", [False, True])
def test_finish_after_a_lost_answer(backend: S3Backend, size: int, after: bool) -> None:
    data = some_bytes(size)
    writer = backend.open_writer("data/x/state.pt")
    for number, start in enumerate(range(0, size, PART)):
        writer.write(start, memoryview(data)[start : start + PART], number)
    with on_wire(backend, loses(TIMEOUT, after=after)), pytest.raises(errors.Transient):
        writer.finish()
    assert writer.finish() == backend.stat("data/x/state.pt").checksum
    writer.abort()
    read = bytearray(size)
    backend.read_into("data/x/state.pt", 0, memoryview(read))
    assert read == data
    assert keys(backend) == ["data/x/state.pt"]


def test_an_error_inside_a_200_is_no_success(backend: S3Backend) -> None:
    """CompleteMultipartUpload may begin to answer before it knows."""
    data = some_bytes(2 * PART)
    writer = backend.open_writer("data/x/state.pt")
    writer.write(0, memoryview(data)[:PART], 0)
    writer.write(PART, memoryview(data)[PART:], 1)
    for code in ("InternalError", "SlowDown"):
        error = f'<?xml version="1.0" encoding="UTF-8"?>\n\n<Error><Code>{code}</Code><Message>again</Message></Error>'
        with on_wire(backend, says(200, error), "CompleteMultipartUpload") as seen, pytest.raises(errors.Transient, match=code):
            writer.finish()
        assert seen == {"CompleteMultipartUpload": 1}
    assert writer.finish() is not None


@pytest.mark.parametrize("page", ["", "<html><title>Log in</title></html>", "<html><br></html>"])
def test_a_200_that_is_not_s3s(backend: S3Backend, page: str) -> None:
    """A proxy, or a log-in page, says that all is well. To the SDK, that is an object without attributes, or an empty listing."""
    write(backend, "data/x/state.pt", b"x")
    with on_wire(backend, says(200, page)):
        for call in (
            lambda: backend.replace("hint", b"x"),
            lambda: backend.get("data/x/state.pt", 100),
            lambda: backend.read_into("data/x/state.pt", 0, memoryview(bytearray(1))),
            lambda: backend.stat("data/x/state.pt"),
            lambda: keys(backend, "log/"),
            lambda: keys(backend, "data/"),
            lambda: write(backend, "data/x/small", b"x"),
            lambda: write(backend, "data/x/large", bytes(2 * PART)),
        ):
            with pytest.raises(errors.Transient):
                call()
        with pytest.raises(errors.Ambiguous):
            backend.put_if_absent("log/1", b"x")
    assert keys(backend) == ["data/x/state.pt"]


def test_an_answer_without_a_length(backend: S3Backend) -> None:
    """A proxy that packs answers anew does not know how long they will be."""
    write(backend, "data/x/state.pt", b"x")
    with on_wire(backend, says(200, "<x/>", headers={"ETag": '"e"'})):
        for call in (
            lambda: backend.get("data/x/state.pt", 100),
            lambda: backend.read_into("data/x/state.pt", 0, memoryview(bytearray(1))),
            lambda: backend.stat("data/x/state.pt"),
        ):
            with pytest.raises(errors.Transient, match="no ContentLength"):
                call()


def test_an_upload_that_somebody_aborted(backend: S3Backend) -> None:
    writer = backend.open_writer("data/x/state.pt")
    writer.write(0, memoryview(bytes(PART)), 0)
    backend.delete(keys(backend, "data/"))
    for step in (lambda: writer.write(PART, memoryview(b"x"), 1), writer.finish):
        with pytest.raises(errors.BackendError, match="aborted") as caught:
            step()
        assert not isinstance(caught.value, (errors.Transient, errors.Ambiguous))
    writer.abort()


def test_abort_raises_nothing(backend: S3Backend) -> None:
    writer = backend.open_writer("data/x/state.pt")
    writer.write(0, memoryview(bytes(PART)), 0)
    with on_wire(backend, says(503, "SlowDown")):
        writer.abort()
    assert len(keys(backend)) == 1


# --- bad input: each one line that says what to do


@pytest.mark.parametrize(
    ("status", "code", "kind", "text"),
    [
        (301, "PermanentRedirect", errors.BackendError, "another region; name it with region=eu-central-1"),
        (400, "AuthorizationHeaderMalformed", errors.BackendError, "region=eu-central-1"),
        (403, "AccessDenied", errors.PermissionDenied, "needs s3:ListBucket"),
        (403, "", errors.PermissionDenied, "s3:ListBucket"),
        (403, "RequestTimeTooSkewed", errors.BackendError, "clock"),
        (400, "ExpiredToken", errors.Transient, "expired; renew"),
        (403, "InvalidAccessKeyId", errors.PermissionDenied, "AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", errors.PermissionDenied, "AWS_SECRET_ACCESS_KEY"),
        (404, "NoSuchBucket", errors.BackendError, "make the bucket"),
        (503, "SlowDown", errors.Throttled, "fewer requests"),
        (400, "ThrottlingException", errors.Throttled, "fewer requests"),
        (503, "", errors.Throttled, "fewer requests"),
        (500, "InternalError", errors.Transient, "failed"),
        (507, "", errors.StorageFull, "delete something"),
        (418, "Teapot", errors.BackendError, "because"),
    ],
)
def test_answers(backend: S3Backend, status: int, code: str, kind: type[Exception], text: str) -> None:
    answer = says(status, code, headers={"x-amz-bucket-region": "eu-central-1"})
    with on_wire(backend, answer) as seen, pytest.raises(kind) as caught:
        keys(backend, "log/")
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, sdk.ClientError)
    assert seen["ListObjectsV2"] <= 2  # the second where the SDK followed the bucket to its region


@pytest.mark.parametrize(
    ("exc", "kind", "text"),
    [
        (sdk.ReadTimeoutError(endpoint_url="u"), errors.Transient, "imeout"),
        (sdk.ConnectionClosedError(endpoint_url="u"), errors.Transient, "closed"),
        (sdk.ProxyConnectionError(proxy_url="u"), errors.Transient, "proxy"),
        (sdk.SSLError(endpoint_url="u", error="CERTIFICATE_VERIFY_FAILED"), errors.BackendError, "AWS_CA_BUNDLE"),
        (sdk.SSLError(endpoint_url="u", error="EOF"), errors.Transient, "EOF"),
        (sdk.HTTPClientError(error="x"), errors.Transient, "x"),
        (sdk.CredentialRetrievalError(provider="p", error_msg="m"), errors.Transient, "credentials"),
        (sdk.UnauthorizedSSOTokenError(), errors.PermissionDenied, "log in again"),
        (ConnectionResetError("reset"), errors.Transient, "reset"),
        (HTTPError("of urllib3"), errors.Transient, "urllib3"),
    ],
)
def test_failures(backend: S3Backend, exc: Exception, kind: type[Exception], text: str) -> None:
    with on_wire(backend, loses(exc, after=False)), pytest.raises(kind, match=text) as caught:
        keys(backend, "log/")
    assert type(caught.value) is kind
    assert caught.value.__cause__ is exc


def test_missing_bucket(simple_server: Service) -> None:
    backend = simple_server.backend("no-such-bucket-here/run")
    for call in (lambda: keys(backend), lambda: backend.put_if_absent("log/1", b"x"), lambda: backend.get("log/1", 10)):
        with pytest.raises(errors.BackendError, match=r"NoSuchBucket: .*make the bucket") as caught:
            call()
        assert type(caught.value) is errors.BackendError


def test_wrong_endpoint() -> None:
    missing = S3Backend.open("bucket/run", {"endpoint_url": "http://no-such-host.invalid", "anonymous": "1"})
    closed = S3Backend.open("bucket/run", {"endpoint_url": "http://127.0.0.1:9", "anonymous": "1"})
    for call in (lambda b: b.put_if_absent("log/1", b"x"), keys):
        with pytest.raises(errors.BackendError, match="check endpoint_url") as caught:
            call(missing)
        assert not isinstance(caught.value, errors.Ambiguous)
        with pytest.raises(errors.Transient, match="Check endpoint_url"):
            call(closed)


def test_wrong_credentials(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = server.backend()
    secret = "wrong-and-secret-0123456789"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    with pytest.raises(errors.PermissionDenied, match="check AWS_ACCESS_KEY_ID") as caught:
        keys(backend)
    assert secret not in f"{caught.value!r}{caught.value.__cause__!r}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    assert keys(backend) == []  # credentials that were renewed are found


def test_no_credentials(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = server.backend()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(errors.PermissionDenied, match="anonymous=1"):
        keys(backend)
    with pytest.raises(errors.PermissionDenied):
        keys(server.backend(anonymous="1"))


def test_a_profile(server: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    location = server.place()
    (tmp_path / "config").write_text(
        f"[profile lab]\naws_access_key_id = {server.key_id}\n"
        f"aws_secret_access_key = {server.secret}\nendpoint_url = {server.options['endpoint_url']}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert keys(S3Backend.open(location, {"profile": "lab"})) == []
    with pytest.raises(errors.InvalidOption, match="nope"):
        keys(S3Backend.open(location, {"profile": "nope"}))


@pytest.mark.parametrize(
    ("location", "options", "text"),
    [
        ("", {}, "s3://bucket/prefix"),
        ("/run", {}, "s3://bucket/prefix"),
        ("arn:aws:s3:us-east-1:1:accesspoint/x", {}, "alias"),
        ("bucket/a//b", {}, "prefix"),
        ("bucket/../b", {}, "prefix"),
        ("bucket/a\nb", {}, "prefix"),
        ("bucket/" + "a" * 600, {}, "512"),
        ("bucket", {"secret_access_key": "hunter2"}, "never in a URL"),
        ("bucket", {"aws_session_token": "hunter2"}, "never in a URL"),
        ("bucket", {"bogus": "hunter2"}, "no option 'bogus'"),
        ("bucket", {"endpoint_url": "http://user:hunter2@host"}, "no credentials"),
        ("bucket", {"endpoint_url": "http://host?token=hunter2"}, "no credentials"),
        ("bucket", {"endpoint_url": "host:9000"}, "https://"),
        ("bucket", {"endpoint_url": "http://host:port"}, "https://"),
        ("bucket", {"part_size": "1M"}, "5M"),
        ("bucket", {"part_size": "8MiB"}, "16M"),
        ("bucket", {"concurrency": "0"}, "from 1"),
        ("bucket", {"concurrency": "many"}, "from 1"),
        ("bucket", {"anonymous": "yes"}, "0 or 1"),
        ("bucket", {"checksum": "none"}, "when_required"),
        ("bucket", {"sse": "rot13"}, "aws:kms"),
        ("bucket", {"sse_kms_key_id": "x"}, "sse=aws:kms"),
        ("bucket", {"request_payer": "1"}, "requester"),
        ("bucket", {"region": "http://evil"}, "eu-central-1"),
    ],
)
def test_bad_urls(location: str, options: dict[str, str], text: str) -> None:
    with pytest.raises(errors.InvalidURL) as caught:
        S3Backend.open(location, options)
    assert text in str(caught.value)
    assert "hunter2" not in repr(caught.value)


def test_a_password_in_the_environment_s_endpoint_is_not_shown(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in ("http://user:hunter2@localhost:9", "http://user:hunter2@[bad"):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        with pytest.raises(errors.InvalidOption, match="endpoint") as caught:
            keys(S3Backend.open("bucket/run", {"anonymous": "1"}))
        assert "hunter2" not in f"{caught.value!r}"


def test_an_endpoint_of_the_environment_s_that_is_no_url(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    with pytest.raises(errors.InvalidOption, match="AWS_ENDPOINT_URL"):
        keys(S3Backend.open("bucket/run", {"anonymous": "1"}))


def test_a_region_of_the_environment_s_that_is_none(aws: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us_east_1!")
    with pytest.raises(errors.InvalidOption, match=r"us_east_1!.*AWS_REGION"):
        keys(S3Backend.open("bucket/run", {"anonymous": "1"}))
