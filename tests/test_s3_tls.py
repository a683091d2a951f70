"""S3 as it is on the Internet: over TLS, and with credentials that expire in the middle of a run. SeaweedFS, which gives them, too."""

from __future__ import annotations

import base64
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore import exceptions as sdk
from conftest import require
from s3_rig import PART, Service, on_wire
from stores import contents, write

from ckptstore import Store
from ckptstore.cli import main
from ckptstore.errors import BackendError, PermissionDenied, Transient

pytest_plugins = ("s3_fixtures",)

_ROLE = "arn:aws:iam::000000000000:role/job"
_ALLOW = {"Effect": "Allow", "Resource": ["*"], "Action": ["*"]}
_TRUST = {"Effect": "Allow", "Principal": "*", "Action": ["sts:AssumeRole"]}
_IAM = {
    "sts": {
        "tokenDuration": "1s",
        "maxSessionLength": "1h",
        "issuer": "tests",
        "signingKey": base64.b64encode(bytes(32)).decode(),
    },
    "policy": {"defaultEffect": "Deny", "storeType": "memory"},
    "policies": [{"name": "all", "document": {"Version": "2012-10-17", "Statement": [_ALLOW]}}],
    "roles": [
        {
            "roleName": "job",
            "roleArn": _ROLE,
            "trustPolicy": {"Version": "2012-10-17", "Statement": [_TRUST]},
            "attachedPolicies": ["all"],
        }
    ],
}


class _Secure:
    """The service, where it is reached over TLS, and the certificate of the authority that vouches for it."""

    def __init__(self, server: Any, url: str, authority: Path) -> None:
        self.server = server
        self.url = url
        self.authority = str(authority)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Secure]:
    from services import _free_port, seaweedfs_server

    require(find_spec("trustme"), "needs trustme")
    import trustme

    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    authority.cert_pem.write_to_path(folder / "authority.pem")
    (folder / "iam.json").write_text(json.dumps(_IAM))
    port = _free_port()
    options = [
        f"-s3.port.https={port}",
        "-s3.cert.file=cert.pem",
        "-s3.key.file=key.pem",
        "-s3.iam.config=iam.json",
        "-s3.iam.readOnly=false",
    ]
    with seaweedfs_server(folder, *options) as server:
        yield _Secure(server, f"https://127.0.0.1:{port}", folder / "authority.pem")


@pytest.fixture
def service(secure: _Secure, reached: Callable[[Service], Service], monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setenv("AWS_CA_BUNDLE", secure.authority)
    found = reached(Service(secure.server))
    found.options["endpoint_url"] = secure.url
    return found


# --- TLS


def test_a_life_over_tls(service: Service) -> None:
    """Parts go with their checksum and without a SHA-256, which would cost more than both."""
    hashed: list[str] = []

    def look(send: Any, request: Any) -> None:
        hashed.append(request.headers["X-Amz-Content-SHA256"].decode())
        assert request.url.startswith("https://")

    files = {"big": bytes(PART + 1), "small": b"x"}
    with Store(service.url(keep_last=1), owner="a") as store:
        backend: Any = store._engine.backend
        with on_wire(backend.inner, look) as seen:
            saved = [write(store, step=step, files=files) for step in range(2)]
            assert contents(store, saved[1]) == files
            assert store.verify() == []
            assert store.checkpoint("latest").verify_remote() == ([], [])
            store.gc()
        assert [c.id for c in store.checkpoints()] == saved[1:]
        assert seen["UploadPart"] == 4
        assert "UNSIGNED-PAYLOAD" in hashed
        assert not [h for h in hashed if h.startswith("STREAMING")], "a trailer would be sent in pieces"


def test_a_certificate_that_nobody_vouches_for(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("AWS_CA_BUNDLE")
    url = service.url()
    with Store(url) as store, pytest.raises(BackendError, match="AWS_CA_BUNDLE") as caught:
        write(store)
    assert not isinstance(caught.value, Transient), "waiting does not help"
    assert main(["ls", url]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "AWS_CA_BUNDLE" in line


def test_tls_asked_of_a_service_without_it(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    plain = service.server.endpoint_url.replace("http://", "https://")
    assert main(["ls", service.url(endpoint_url=plain, retry_seconds=0)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "endpoint_url" in line


# --- credentials that expire


class _Credentials:
    """A program that the SDK asks for credentials, which prints a file."""

    def __init__(self, service: Service, place: Path) -> None:
        self._service = service
        self._file = place / "credentials.json"
        script = place / "print.py"
        script.write_text(f"print(open({str(self._file)!r}).read())")
        program = shlex.join([sys.executable, "-I", "-S", str(script)])
        (place / "config").write_text(f"[default]\nregion = us-east-1\ncredential_process = {program}\n")
        self.config = str(place / "config")

    def admin(self, kind: str) -> Any:
        """The service's own administration: "iam" or "sts"."""
        endpoint = self._service.server.endpoint_url
        return boto3.Session(self._service.key_id, self._service.secret, region_name="us-east-1").client(
            kind, endpoint_url=endpoint
        )

    def prints(self, made: dict[str, Any], until: datetime | None) -> None:
        """Have the program print these, and say that they are good until then."""
        wanted = {k: made[k] for k in ("AccessKeyId", "SecretAccessKey", "SessionToken") if k in made}
        text = json.dumps({"Version": 1, **wanted, **({"Expiration": until.isoformat()} if until else {})})
        self._file.with_suffix(".new").write_text(text)
        self._file.with_suffix(".new").replace(self._file)

    def wait(self, made: dict[str, Any], *, good: bool) -> None:
        """Return when the service takes these, or does so no more."""
        keys = (made["AccessKeyId"], made["SecretAccessKey"], made.get("SessionToken"))
        client = boto3.Session(*keys, region_name="us-east-1").client("s3", endpoint_url=self._service.server.endpoint_url)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                client.list_buckets()
                if good:
                    return
            except sdk.ClientError as exc:
                if not good:
                    assert exc.response["Error"]["Code"] == "InvalidAccessKeyId", "what this service says to expired ones, too"
                    return
            time.sleep(0.05)
        raise AssertionError("the service does not change its mind")


@pytest.fixture
def credentials(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Credentials:
    service.place()  # by who may make a bucket
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    made = _Credentials(service, tmp_path)
    monkeypatch.setenv("AWS_CONFIG_FILE", made.config)
    return made


@pytest.mark.parametrize("told", [True, False], ids=["told when", "not told"])
def test_credentials_that_end_in_the_middle_of_a_save_are_renewed(
    service: Service, credentials: _Credentials, told: bool
) -> None:
    """Even without any repetition: a request that is refused for its credentials has done nothing."""
    iam, user = credentials.admin("iam"), f"user-{told}"
    iam.create_user(UserName=user)
    policy = {"Version": "2012-10-17", "Statement": [{**_ALLOW, "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}]}
    iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(policy))

    def new() -> dict[str, Any]:
        made: dict[str, Any] = iam.create_access_key(UserName=user)["AccessKey"]
        credentials.wait(made, good=True)
        # So near, the SDK asks for new ones before every request.
        credentials.prints(made, datetime.now(timezone.utc) + timedelta(minutes=5) if told else None)
        return made

    def renew() -> None:
        nonlocal current
        old, current = current, new()
        iam.delete_access_key(UserName=user, AccessKeyId=old["AccessKeyId"])
        credentials.wait(old, good=False)

    current = new()
    data = bytes(3 * PART + 1)
    with Store(service.url(retry_seconds=0, concurrency=1), owner="a") as store:
        saved = [write(store)]
        with store.transaction("latest") as tx, tx.open("big") as file:
            file.write(data[: 2 * PART])
            renew()
            file.write(data[2 * PART :])
        saved.append(tx.checkpoint.id)
        assert contents(store, saved[1]) == {"big": data}
        renew()
        store.tag("best", "latest")  # a record
        assert store.names() == {"latest": saved[1], "best": saved[1]}
        assert store.verify() == []


@pytest.mark.parametrize("told", [True, False], ids=["told when", "not told"])
def test_credentials_that_expire_and_nobody_renews(
    service: Service, credentials: _Credentials, capsys: pytest.CaptureFixture[str], told: bool
) -> None:
    made = credentials.admin("sts").assume_role(RoleArn=_ROLE, RoleSessionName="tests")["Credentials"]
    credentials.wait(made, good=False)
    credentials.prints(made, made["Expiration"] if told else None)
    url = service.url(retry_seconds=0)
    with Store(url) as store, pytest.raises((PermissionDenied, Transient), match="expired") as caught:
        write(store)
    assert "\n" not in str(caught.value)
    assert main(["ls", url]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "expired" in line
    assert made["SecretAccessKey"] not in line and made["SessionToken"] not in line
