"""Secrets given in every way that is allowed, and in those that are not: nothing that is shown or stored has one, or half of one."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import random
import string
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import fsspec
import pytest
import torch
from faulty_http import FaultyProxy, answer, lost
from sftp_rig import PASSWORD, USER, sftp_server
from stores import tree

from ckptstore import PendingSave, Store, cli, retry
from ckptstore.errors import BackendError, CkptStoreError, CommitUnknown, InvalidOption, InvalidURL

pytest_plugins = ("s3_fixtures",)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's advice to azure-core

STATE = {"weight": torch.ones(3)}


def new_secret(length: int) -> str:
    """Return a text as services give out, with what has a meaning in URLs."""
    return (
        "".join(random.choices(string.ascii_letters + string.digits, k=length - 4)) + "/+=" + random.choice(string.ascii_letters)
    )


def spellings(secret: str) -> Iterator[bytes]:
    """Yield how a secret may be written, and its halves: a message that was cut would show one."""
    raw = secret.encode()
    texts = [raw, raw[: max(11, len(raw) // 2)], raw[-max(11, len(raw) // 2) :]]
    for text in texts:
        yield text
        yield quote(text, safe="").encode()
        yield text.hex().encode()
    yield base64.b64encode(raw)
    yield base64.urlsafe_b64encode(raw)


@dataclass
class Ear:
    """Notes all that is shown to somebody, or stored somewhere."""

    secrets: list[str]
    heard: list[bytes] = field(default_factory=list)

    def note(self, *things: object) -> None:
        for thing in things:
            self.heard.extend([thing] if isinstance(thing, bytes) else [f"{thing!r} {thing!s}".encode()])

    def fails(self, call: Callable[[], object], kind: type[CkptStoreError]) -> None:
        with pytest.raises(kind) as caught:
            call()
        self.error(caught.value)

    def error(self, error: BaseException) -> None:
        """Note an error as it is shown, as it is handed to another process, and all that it came from."""
        self.note("".join(traceback.format_exception(error)), pickle.dumps(error))
        seen: BaseException | None = error
        while seen is not None:
            self.note(seen, *seen.args)
            seen = seen.__cause__ or seen.__context__

    def check(self) -> None:
        everything = b"\n".join(self.heard)
        for secret in self.secrets:
            for spelling in spellings(secret):
                at = everything.find(spelling)
                assert at < 0, f"a secret was shown: {everything[max(0, at - 300) : at + 100]!r}"


@pytest.fixture
def ear(capfd: pytest.CaptureFixture[str]) -> Iterator[Ear]:
    """Listens to logs (ours from DEBUG on, those of all others from WARNING on), warnings, and both streams. Checks at the end."""
    ear = Ear([])

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.name.startswith("ckptstore") or record.levelno >= logging.WARNING:
                ear.note(logging.Formatter("%(name)s %(message)s").format(record))

    handler = Handler()
    ours = logging.getLogger("ckptstore")
    ours.setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield ear
        ear.note(*(str(w.message) for w in told), *capfd.readouterr())
    finally:
        logging.getLogger().removeHandler(handler)
        ours.setLevel(logging.NOTSET)
    assert len(ear.heard) > 2
    ear.check()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)


@dataclass
class Place:
    """Where a store can be, reached with secrets."""

    url: str
    stored: Callable[[], Sequence[bytes]]
    """All that is there, past the library."""
    nowhere: str
    """The same, in a bucket or folder that is not there."""
    closed: str | None
    """The same, where nobody listens."""
    wrong_key: Callable[[], None] | None
    """Gives another secret than the one that the service knows."""


def s3_objects(client: Any, bucket: str) -> list[bytes]:
    """Return all keys, bodies and metadata."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", ())]
    found = []
    for key in keys:
        got = client.get_object(Bucket=bucket, Key=key)
        found += [key.encode(), got["Body"].read(), repr(got["Metadata"]).encode()]
    return found


@pytest.fixture
def place(
    request: pytest.FixtureRequest, ear: Ear, aws: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Place]:
    kind: str = request.param
    if kind == "sftp":
        ear.secrets.append(PASSWORD)
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": PASSWORD})
        (root := tmp_path / "served").mkdir()
        with sftp_server(root) as port:
            url = f"sftp://127.0.0.1:{port}/runs/42?username={USER}&single_writer=1"

            def wrong() -> None:
                ear.secrets.append(new_secret(40))
                monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": ear.secrets[-1]})

            yield Place(url, lambda: [*tree(root).values()], url.replace("runs", "no/such"), url.replace(f":{port}", ":9"), wrong)
        return
    server = request.getfixturevalue({"abfs": "azurite", "s3, SeaweedFS": "seaweedfs"}.get(kind, "moto"))
    bucket = server.new_bucket()
    if kind == "abfs":
        from azure.storage.blob import ContainerClient

        ((name, connection),) = server.env.items()
        known = connection.partition("AccountKey=")[2].partition(";")[0]
        ear.secrets.append(known)
        monkeypatch.setenv(name, connection)

        def blobs() -> list[bytes]:
            with ContainerClient.from_connection_string(connection, bucket) as client:
                return [
                    data for blob in client.list_blobs() for data in (blob.name.encode(), client.download_blob(blob).readall())
                ]

        def wrong() -> None:
            ear.secrets.append(base64.b64encode(new_secret(60).encode()).decode())
            monkeypatch.setenv(name, connection.replace(known, ear.secrets[-1]))

        yield Place(f"abfs://{bucket}/runs/42", blobs, "abfs://no-such-container/runs/42", None, wrong)
        return
    if kind == "s3, SeaweedFS":  # the only one that looks at signatures; it knows one key, and no tokens
        keys = server.env["AWS_ACCESS_KEY_ID"], server.env["AWS_SECRET_ACCESS_KEY"]
        ear.secrets.append(keys[1])
    else:  # moto takes any
        keys = new_secret(20), new_secret(40), new_secret(300)
        ear.secrets += keys
    names = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")[: len(keys)]
    scheme, options = "s3", f"endpoint_url={server.endpoint_url}&region=us-east-1"
    if kind == "s3, profile":
        lines = ["[lab]", *(f"{name} = {value}" for name, value in zip(names, keys, strict=True))]
        (tmp_path / "credentials").write_text("\n".join(lines))
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        options += "&profile=lab"
    elif kind == "s3fs":
        scheme, options = "s3fs", f"endpoint_url={server.endpoint_url}"
        monkeypatch.setitem(fsspec.config.conf, "s3", dict(zip(("key", "secret", "token"), keys, strict=True)))
    else:
        for name, value in zip(names, keys, strict=True):
            monkeypatch.setenv(name.upper(), value)

    def wrong() -> None:
        ear.secrets.append(new_secret(40))
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ear.secrets[-1])

    client = boto3.Session(*keys, region_name="us-east-1").client("s3", endpoint_url=server.endpoint_url)
    url = f"{scheme}://{bucket}/runs/42?{options}"
    yield Place(
        url,
        lambda: s3_objects(client, bucket),
        url.replace(bucket, "no-such-bucket"),
        None if kind == "s3fs" else url.replace(server.endpoint_url, "http://127.0.0.1:9"),  # it tries for half a minute
        wrong if kind == "s3, SeaweedFS" else None,
    )


PLACES = pytest.mark.parametrize(
    "place", ["s3, SeaweedFS", "s3, environment", "s3, profile", "s3fs", "abfs", "sftp"], indirect=True
)
COMMANDS = (["ls"], ["show"], ["verify"], ["verify", "--remote"], ["gc"])


def ask(ear: Ear, url: str, status: int | None = None) -> None:
    """Give the commands, with and without --json; what they print is heard."""
    for command, *more in COMMANDS:
        for words in ([command, url, *more], [command, url, *more, "--json"]):
            got = cli.main(words)
            assert status is None or got == status or (status == 0 and "--remote" in more), words


def live(ear: Ear, url: str, **more: Any) -> None:
    """Do with a store all that can be done."""
    with Store(url, **more) as store:
        ear.note(store, store.url, store.resume({"weight": torch.zeros(3)}))
        saved = store.save(STATE, step=1, metadata={"by": "us"})
        pending: PendingSave = store.save_async(STATE, step=2)
        ear.note(pending, pending.result(), saved, saved.metadata, saved.files)
        with store.transaction("files") as tx:
            tx.save(STATE, "a.pt")
            ear.note(tx)
        ear.note(store.tag("best", saved), store.names(), store.checkpoints(), store.verify(), store.gc(), store.prune())
        assert (store.load()["weight"] == STATE["weight"]).all()
        if more.get("hmac_key") is None:
            ear.note(pickle.dumps(store))


@PLACES
def test_the_life_of_a_store(ear: Ear, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    live(ear, place.url)
    ask(ear, place.url, 0)
    stored = place.stored()
    assert len(stored) > 5
    ear.note(*stored)


@pytest.mark.parametrize("way", ["bytes", "environment", "file"])
@pytest.mark.parametrize("place", ["s3, environment"], indirect=True)
def test_a_key_for_authenticity(ear: Ear, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str) -> None:
    secret, another = new_secret(32), new_secret(32)
    ear.secrets += [secret, another]
    if way == "bytes":
        live(ear, place.url, hmac_key=secret.encode())
    elif way == "environment":
        monkeypatch.setenv("CKPTSTORE_HMAC_KEY", secret)
        live(ear, place.url)
        ask(ear, place.url, 0)
    else:
        (tmp_path / "key").write_text(secret)
        live(ear, place.url, hmac_key=tmp_path / "key")
    ear.note(*place.stored())
    ear.fails(lambda: Store(place.url, hmac_key=another.encode()).names(), CkptStoreError)
    ear.fails(lambda: Store(place.url, hmac_key=secret[:9].encode()), InvalidOption)  # too short


@PLACES
def test_what_goes_wrong(ear: Ear, place: Place) -> None:
    quick = "&" if "?" in place.url else "?"
    urls = [place.nowhere, *([place.closed] if place.closed else [])]
    if place.url.startswith("sftp"):
        urls = urls[1:]  # a folder is made
    for url in urls:
        with Store(f"{url}{quick}retry_seconds=0") as store:
            try:
                store.save(STATE)
            except BackendError as exc:
                ear.error(exc)
            else:  # SeaweedFS makes the bucket
                assert url == place.nowhere
            ear.note(store)
        ask(ear, f"{url}{quick}retry_seconds=0")
    if place.wrong_key:
        place.wrong_key()
        with Store(f"{place.url}{quick}retry_seconds=0") as store:
            ear.fails(lambda: store.save(STATE), BackendError)
            ear.fails(store.names, BackendError)
        ask(ear, f"{place.url}{quick}retry_seconds=0")


@pytest.mark.parametrize("place", ["s3, environment"], indirect=True)
def test_what_a_service_says(ear: Ear, place: Place) -> None:
    endpoint = place.url.partition("endpoint_url=")[2].partition("&")[0]
    with FaultyProxy(endpoint) as proxy:
        url = place.url.replace(endpoint, proxy.url) + "&retry_seconds=0"
        with Store(url) as store:
            store.save(STATE)
            for status, code in ((403, "SignatureDoesNotMatch"), (400, "InvalidToken"), (400, "ExpiredToken"), (503, "SlowDown")):
                for _ in range(20):
                    proxy.inject(answer(status, code))
                ear.fails(lambda: store.save(STATE), CkptStoreError)
                proxy.heal()
            for _ in range(40):
                proxy.inject(lost, lambda request: "/log/" in request.path)
            ear.fails(lambda: store.save(STATE), CommitUnknown)
            proxy.heal()
            ear.note(store, store.names())
        ear.note(*place.stored())


SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE"
IN_URLS = [
    *(f"s3://AKIDEXAMPLE:{text}@bucket/run" for text in (SECRET, quote(SECRET, safe=""), SECRET.replace("/", ""))),
    f"s3://bucket/run?aws_secret_access_key={SECRET}",
    f"s3://bucket/run?secret={SECRET}",
    f"s3://bucket/run?token={SECRET}",
    f"s3://bucket/run?hmac_key={SECRET}",
    f"s3://bucket/run?X-Amz-Signature={SECRET}&keep_last=3",
    *(f"s3://bucket/run?endpoint_url=http://me:{text}@host:9000" for text in (SECRET, quote(SECRET))),
    f"gs://bucket/run?token={SECRET}",
    f"gs://me:{SECRET}@bucket/run",
    f"s3fs://bucket/run?secret={SECRET}",
    f"sftp://me:{SECRET}@host/run?single_writer=1",
    f"sftp://host/run?password={SECRET}&single_writer=1",
    f"abfs://container/run?account_key={SECRET}",
    f"abfs://container/run?sas_token=sv=2024&sig={SECRET}",
    f"abfs://container/run?connection_string=AccountKey={SECRET}",
    f"hf://me:{SECRET}@buckets/run",
    f"shared://me:{SECRET}@host/run",
    f"runs/42?hmac_key={SECRET}",
]


@pytest.mark.parametrize("url", IN_URLS)
def test_in_a_url_they_are_refused(ear: Ear, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ear.secrets.append(SECRET)
    ear.secrets.append(SECRET.partition("/")[2])
    monkeypatch.setenv("CKPTSTORE_URL", url)
    for given in (url, None):
        with pytest.raises((InvalidURL, InvalidOption)) as caught:
            Store(given)  # type: ignore[arg-type]
        ear.note("".join(traceback.format_exception(caught.value)[-1:]), caught.value)
        assert "\n" not in str(caught.value)
    for words in (["ls", url], ["ls", "-"], ["ls", url, "--json"], ["verify", url, "--remote", "--json"]):
        assert cli.main(words) == 2
    for misplaced in ([url], ["ls", "runs", url], ["tag", url], ["show", "runs", "latest", url, "--json"]):
        assert cli.main(misplaced) == 2


@pytest.mark.parametrize("scheme", ["s3", "gs", "s3fs", "sftp", "abfs", "memory", "file"])
@pytest.mark.parametrize("name", ["key", "secret", "password", "token", "account_key", "aws_secret_access_key"])
def test_as_a_keyword_they_are_refused(ear: Ear, scheme: str, name: str, tmp_path: Path) -> None:
    """A keyword is no URL, but there is one way only, which also works in the processes of a launch, and for the commands."""
    ear.secrets.append(SECRET)
    url = str(tmp_path) if scheme == "file" else f"{scheme}://somewhere/run"
    with pytest.raises(InvalidOption) as caught:
        Store(url, **{name: SECRET})
    ear.note(caught.value, json.dumps(str(caught.value)), "".join(traceback.format_exception_only(caught.value)), "1", "2")
