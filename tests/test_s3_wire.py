"""S3 through a proxy that breaks connections, cuts answers, and answers in the service's place: nothing is lost, nothing falsely told."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faulty_http import Answer, Exchange, Fault, FaultyProxy, Late, Request, answer, error_inside, lost, stale, unanswered
from s3_rig import PART, Service
from stores import contents, write

from ckptstore import Store, retry
from ckptstore.errors import BackendError, CkptStoreError, Fenced, PermissionDenied

pytest_plugins = ("s3_fixtures",)


@pytest.fixture
def proxy(server: Service) -> Iterator[FaultyProxy]:
    with FaultyProxy(server.server.endpoint_url) as running:
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)


def through(proxy: FaultyProxy, server: Service, **options: object) -> str:
    """Return the URL of a new store, reached through the proxy."""
    return server.url(**options).replace(server.server.endpoint_url, proxy.url)


@dataclass
class Life:
    """What a job does with its store, and what it was told."""

    url: str
    saved: list[str] = field(default_factory=list)

    def live(self) -> None:
        with Store(self.url, owner="job", keep_last=2) as store:
            store.acquire()
            self.saved.append(write(store, step=1))
            self.saved.append(write(store, step=2, files={"big": bytes(PART + 1), "small": b"x"}))
            assert contents(store, "latest") == {"big": bytes(PART + 1), "small": b"x"}
            store.tag("best", "latest")
            self.saved.append(write(store, step=3))
            store.prune()
            self.saved.append(write(store, step=4))
            store.gc()
        with Store(self.url, owner="next", keep_last=2) as store:
            store.acquire()
            assert store.names() == {"latest": self.saved[3], "best": self.saved[1]}

    def check(self) -> None:
        with Store(self.url, acquire=False) as store:
            assert {c.id for c in store.checkpoints()} == {self.saved[1], *self.saved[2:]}
            assert store.names() == {"latest": self.saved[3], "best": self.saved[1]}
            assert store.verify() == []


def is_completion(request: object) -> bool:
    return str(request).startswith("POST") and "uploadId=" in str(request)


@pytest.mark.parametrize("fault", [error_inside, unanswered, lost], ids=lambda f: f.__name__)
def test_the_completion_of_an_upload_goes_wrong(proxy: FaultyProxy, server: Service, fault: Fault) -> None:
    """Amazon begins to answer 200 before it knows; an error comes in the body then."""
    life = Life(through(proxy, server))
    proxy.inject(fault, is_completion)
    life.live()
    assert not proxy.pending
    life.check()


def test_a_completion_that_always_fails_is_an_error(proxy: FaultyProxy, server: Service) -> None:
    with Store(through(proxy, server, retry_seconds=0)) as store:
        first = write(store)
        proxy.inject(error_inside, is_completion)
        with pytest.raises(BackendError) as caught:
            write(store, files={"big": bytes(PART + 1)})
        assert "\n" not in str(caught.value)
        assert store.names() == {"latest": first}
        store.gc()
        assert not [info.key for info in store._engine.backend.list("data/") if first not in info.key]


@pytest.mark.parametrize(
    ("code", "status", "kind", "advice"),
    [
        ("RequestTimeTooSkewed", 403, BackendError, "clock"),
        ("AccessDenied", 403, PermissionDenied, "s3:"),
        ("NoSuchBucket", 404, BackendError, "make the bucket"),
        ("QuotaExceeded", 403, BackendError, "quota"),
    ],
)
def test_what_waiting_does_not_help_is_told_at_once(
    proxy: FaultyProxy, server: Service, code: str, status: int, kind: type[CkptStoreError], advice: str
) -> None:
    with Store(through(proxy, server)) as store:
        first = write(store)
        for n in (1, 2, 3):  # the file, the manifest, the record
            struck = len(proxy.requests) + n
            proxy.strike_number(n, answer(status, code))
            with pytest.raises(kind, match=advice) as caught:
                write(store)
            assert "\n" not in str(caught.value)
            assert [str(r) for r in proxy.requests].count(str(proxy.requests[struck - 1])) == 1, "it was repeated"
            assert store.names() == {"latest": first}
        assert write(store) == store.names()["latest"]


def test_a_listing_as_of_long_ago(proxy: FaultyProxy, server: Service) -> None:
    """No service of today does this; a cache in between might. A writer still finds the end of the log."""
    url = through(proxy, server, keep_last="all")

    def is_listing_of_the_log(request: object) -> bool:
        return "list-type=2" in str(request) and "log" in str(request)

    with Store(url, owner="a") as store:
        first = write(store)
    listed: list[Answer] = []

    def listen(x: Exchange) -> None:
        listed.append(x.forward())
        x.reply(listed[0])

    proxy.inject(listen, is_listing_of_the_log)
    with Store(url, acquire=False) as reader:
        assert reader.names() == {"latest": first}
    with Store(url, owner="a") as store:
        newer = [write(store, step=step) for step in range(3)]
    proxy.inject(stale(listed[0]), is_listing_of_the_log)
    with Store(url, owner="b") as store:
        newest = write(store, step=9)
        assert [c.id for c in store] == [first, *newer, newest]


def test_a_record_that_arrives_when_its_writer_is_fenced(proxy: FaultyProxy, server: Service) -> None:
    """The old job's record is under way for so long that a newer job has come meanwhile."""
    url = through(proxy, server, keep_last="all", retry_seconds=0)
    late = Late()
    with Store(url, owner="old") as old, Store(url, owner="new") as new:
        first = write(old)
        saved: list[str] = []

        def overtake(x: Exchange) -> None:
            saved.append(write(new, step=2))
            late(x)

        proxy.inject(overtake, lambda r: r.method == "PUT" and "/log/0" in r.path)
        with pytest.raises(Fenced):
            write(old, step=1)
        late.arrive()
        assert {c.id for c in new.checkpoints()} == {first, *saved}
        assert new.names() == {"latest": saved[0]}
        assert new.verify() == []


@pytest.mark.parametrize("configured", [False, True], ids=["by default", "configured"])
def test_all_is_signed_but_the_bytes_of_parts(
    proxy: FaultyProxy, server: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, configured: bool
) -> None:
    """Over plain http. The checksum by which the service judges those is signed, so that only one who can forge it can change them."""
    if configured:
        (tmp_path / "config").write_text("[default]\ns3 =\n  payload_signing_enabled = true\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    seen: list[Request] = []
    proxy.inject(lost, lambda request: seen.append(request) is not None)
    with Store(through(proxy, server), owner="job") as store:
        write(store, files={"big": bytes(2 * PART), "small": b"x"})
    parts = 0
    for request in seen:
        headers = {name.lower(): value for name, value in request.headers}
        part = "partNumber=" in request.path
        parts += part
        whole = hashlib.sha256(request.body).hexdigest()
        assert headers["x-amz-content-sha256"] == ("UNSIGNED-PAYLOAD" if part and not configured else whole), request
        (signed,) = re.findall("SignedHeaders=([^,]*)", headers["authorization"])
        assert {name for name in headers if name.startswith("x-amz-")} <= set(signed.split(";"))
        assert not part or "x-amz-checksum-crc64nvme" in headers
    assert parts == 2


class Parts:
    """Parts of uploads on their way through the proxy, which counts how many there are at a time."""

    def __init__(self, proxy: FaultyProxy, refused: int, expected: Callable[[int], int]) -> None:
        """Refuse the first few by 503; hold each, number n from 1, until `expected(n)` have been there at the same time."""
        self.came = 0
        self.most: list[int] = [0, 0]
        """The greatest number at the same time: among the first eight, and later."""
        self.missed = False
        """Whether as many as were expected never came."""
        self._proxy = proxy
        self._refused = refused
        self._expected = expected
        self._now = 0
        self._changed = threading.Condition()
        self._watch()

    def _watch(self) -> None:
        self._proxy.inject(self._deal, lambda request: "partNumber=" in request.path)

    def _deal(self, x: Exchange) -> None:
        self._watch()  # for the next one
        with self._changed:
            self.came += 1
            self._now += 1
            number, later = self.came, self.came > 8
            self.most[later] = max(self.most[later], self._now)
            self._changed.notify_all()
            self.missed |= not self._changed.wait_for(lambda: self.most[later] >= self._expected(number), timeout=60)
        answered = None if number <= self._refused else x.forward()
        with self._changed:
            self._now -= 1  # before the client can know, and send the next one
        if answered is None:
            answer(503, "SlowDown")(x)
        else:
            x.reply(answered)


def test_a_service_that_asks_for_less_gets_less_for_a_while(simple_server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the service sees it: eight parts at a time; after 503, four; when all has gone well for a while, eight again."""
    files = {"big": bytes(16 * PART)}
    with (
        FaultyProxy(simple_server.server.endpoint_url) as proxy,
        Store(through(proxy, simple_server, concurrency=8, keep_last="all")) as store,
    ):
        monkeypatch.setattr(retry, "_CALM", 1000)
        parts = Parts(proxy, 8, lambda number: 8 if number <= 8 else 4)
        write(store, step=1, files=files)
        assert not parts.missed
        assert parts.came == 8 + 16
        assert parts.most == [8, 4]
        monkeypatch.setattr(retry, "_CALM", 1)
        proxy.heal()
        parts = Parts(proxy, 0, lambda number: 0 if number <= 8 else 8)
        write(store, step=2, files=files)
        assert not parts.missed
        assert parts.most[True] == 8
        assert store.verify() == []
