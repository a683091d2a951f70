"""What is sent to S3 for each option, and what the command line says when S3 is not as it should be: one line, and exit status 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from faulty_http import Fault, FaultyProxy, answer
from s3_rig import PART, Service, keys, on_wire, says
from stores import write

from ckptstore import Store
from ckptstore.backends.s3 import S3Backend
from ckptstore.cli import main
from ckptstore.errors import BackendError

pytest_plugins = ("s3_fixtures",)


def the_line(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run the command, which fails, and return what it says."""
    capsys.readouterr()
    assert main([*words]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


@pytest.fixture
def proxy(server: Service) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.server.endpoint_url) as running:
        yield running


# --- the command line


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (answer(400, "AuthorizationHeaderMalformed"), "name it with region="),
        (answer(400, "IllegalLocationConstraintException"), "name it with region="),
        (answer(400, "ExpiredToken"), "have expired; renew them"),
        (answer(403, "RequestTimeTooSkewed"), "clock is wrong"),
        (answer(403, "AccessDenied"), "this needs s3:"),
        (answer(503, "SlowDown"), "asks for fewer requests"),
    ],
)
def test_each_trouble_is_one_line(
    proxy: FaultyProxy, server: Service, capsys: pytest.CaptureFixture[str], fault: Fault, advice: str
) -> None:
    for _ in range(10):
        proxy.inject(fault)
    url = server.url(retry_seconds=0, endpoint_url=proxy.url)
    assert advice in the_line(capsys, "ls", url)


def test_no_bucket_no_host_no_credentials_no_store(
    server: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = server.url(retry_seconds=0)
    bucket = url.removeprefix("s3://").partition("/")[0]
    assert "make the bucket" in the_line(capsys, "ls", url.replace(bucket, "there-is-no-such-bucket"))
    assert "check endpoint_url" in the_line(
        capsys, "ls", "s3://bucket/run?endpoint_url=http://no-such-host.invalid&retry_seconds=0"
    )
    backend = server.backend(url.removeprefix("s3://").partition("?")[0])
    backend.replace("photos/1.jpg", b"x")
    assert "no store" in the_line(capsys, "ls", url)
    assert "no store" in the_line(capsys, "verify", "--remote", url)
    assert keys(backend) == ["photos/1.jpg"]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret-0123456789")
    line = the_line(capsys, "ls", url)
    assert "check AWS_ACCESS_KEY_ID" in line and "wrong-and-secret" not in line
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "or anonymous=1" in the_line(capsys, "ls", url)


def test_verify_remote(server: Service, simple_server: Service, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a download; and it says which service has nothing to compare with."""
    for service, said in ((server, "1 checkpoint whole"), (simple_server, "storage has no checksum to compare")):
        url = service.url()
        with Store(url) as store:
            made = write(store, files={"state.pt": bytes(PART + 1)})
            backend: Any = store._engine.backend
            with on_wire(backend.inner, lambda send, request: None if "state.pt" not in request.url else 1 / 0, "GetObject"):
                assert store.checkpoint(made).verify_remote() == ([], [] if service is server else ["state.pt"])
        assert main(["verify", "--remote", url]) == 0
        assert said in capsys.readouterr().out
        service.backend(url.removeprefix("s3://").partition("?")[0]).replace(f"data/{made}/state.pt", bytes(PART) + b"x")
        # Of the same size: only a checksum can tell.
        assert main(["verify", "--remote", url]) == (1 if service is server else 0)
        capsys.readouterr()


def test_gc_aborts_uploads_that_nobody_finished(server: Service, capsys: pytest.CaptureFixture[str]) -> None:
    url = server.url()
    backend = server.backend(url.removeprefix("s3://").partition("?")[0])
    with Store(url, owner="a") as store, pytest.raises(KeyError), store.transaction() as tx:
        raise KeyError
    with Store(url, owner="b") as store:
        made = write(store)
    backend.open_writer(f"data/{tx.id}/state.pt").write(0, memoryview(bytes(PART)), 0)  # as one that hung meanwhile
    assert [key for key in keys(backend) if key.endswith(".partial")]
    assert main(["gc", url]) == 0
    assert {key.split("/")[1] for key in keys(backend, "data/")} == {made}


# --- options on the wire


def headers_of(request: Any) -> dict[str, str]:
    return {k.lower(): v if isinstance(v, str) else v.decode() for k, v in request.headers.items()}


def test_every_request_of_a_life_agrees_to_pay(server: Service) -> None:
    sent: list[tuple[str, dict[str, str]]] = []
    with Store(server.url(request_payer="requester", keep_last=1), owner="a") as store:
        backend: Any = store._engine.backend
        with on_wire(backend.inner, lambda send, request: sent.append((request.url, headers_of(request)))) as seen:
            for step in range(2):
                write(store, step=step, files={"big": bytes(PART + 1), "small": b"x"})
            with pytest.raises(KeyError), store.transaction() as tx, tx.open("x") as file:
                file.write(bytes(2 * PART))
                raise KeyError
            assert store.verify() == []
            store.gc()
    assert {"AbortMultipartUpload", "CompleteMultipartUpload", "DeleteObjects", "GetObject", "ListMultipartUploads"} < {*seen}
    assert [url for url, headers in sent if headers.get("x-amz-request-payer") != "requester"] == []


def test_nobody_s_requests_are_not_signed(simple_server: Service) -> None:
    url = simple_server.url()
    with Store(url) as store:
        made = write(store)
    bucket, _, prefix = url.removeprefix("s3://").partition("?")[0].partition("/")
    for item in simple_server.client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        simple_server.client.put_object_acl(Bucket=bucket, Key=item["Key"], ACL="public-read")
    sent: list[dict[str, str]] = []
    with Store(f"{url}&anonymous=1", acquire=False) as store:
        backend: Any = store._engine.backend
        with on_wire(backend.inner, lambda send, request: sent.append(headers_of(request))):
            assert store.names() == {"latest": made}
            assert store.verify() == []
    assert sent and not [headers for headers in sent if "authorization" in headers]


def test_s3_express(server: Service) -> None:
    """Its buckets are told by their names: the SDK opens a session, and signs with that; all else is as ever."""
    session = "".join(
        f"<{name}>{value}</{name}>"
        for name, value in (
            ("AccessKeyId", "id"),
            ("SecretAccessKey", "secret"),
            ("SessionToken", "session-token"),
            ("Expiration", "2099-01-01T00:00:00Z"),
        )
    )
    opened = says(200, f"<CreateSessionResult><Credentials>{session}</Credentials></CreateSessionResult>")
    sent: list[tuple[str, dict[str, str]]] = []

    def express(send: Any, request: Any) -> Any:
        sent.append((request.url, headers_of(request)))
        return opened(send, request) if request.url.endswith("?session") else says(403, "AccessDenied")(send, request)

    bucket = "mine--use1-az4--x-s3"
    backend = S3Backend.open(f"{bucket}/run", {"region": "us-east-1"})
    with on_wire(backend, express), pytest.raises(BackendError):
        backend.put_if_absent("log/1", b"x")
    (asked, _), (url, headers) = sent
    assert asked.startswith(f"https://{bucket}.s3express-use1-az4.us-east-1.amazonaws.com/?session")
    assert url == f"https://{bucket}.s3express-use1-az4.us-east-1.amazonaws.com/run/log/1"
    assert headers["x-amz-s3session-token"] == "session-token"
    assert headers["if-none-match"] == "*"
    assert "x-amz-checksum-crc64nvme" in headers
