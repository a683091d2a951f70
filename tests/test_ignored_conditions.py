"""Services that ignore the condition of a create-if-absent, or have none: whoever would write is refused before anything is written.

At every kind of operation, and whatever happens to its requests. Readers are served.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import evidence
import gcs_rig
import pytest
import s3_rig
from faulty_http import FaultyProxy, Request
from stores import contents, write
from test_every_request import no_waiting  # noqa: F401  # a fixture
from wire_life import GCS, S3, Kind, late

from ckptstore import Store
from ckptstore.errors import NoAtomicCreate

pytest_plugins = ("gcs_fixtures", "s3_fixtures")

SERVICES = ("rclone", "snailmail_ignores", "snailmail_rejects", "GCS")
WRITING: dict[str, Callable[[Store], object]] = {
    "save": lambda store: store.save({"x": 1}, step=9),
    "save_async": lambda store: store.save_async({"x": 1}, step=9).result(),
    "transaction": lambda store: write(store, step=9),
    "acquire": lambda store: store.acquire(),
    "resume": lambda store: store.resume({}),
    "tag": lambda store: store.tag("best", "latest"),
    "delete": lambda store: store.delete("kept"),
    "prune": lambda store: store.prune(),
}
READING: dict[str, Callable[[Store], object]] = {
    "names": lambda store: store.names(),
    "read": lambda store: contents(store, "kept"),
    "verify": lambda store: store.verify(),
    "gc": lambda store: store.gc(),  # of a job that has acquired nothing, and so may collect nothing here
}
# A service that obeys no condition never says that one does not hold, whatever is sent twice.
KINDS = {s: {name: kind for name, kind in kinds.items() if not name.startswith("412")} for s, kinds in (("S3", S3), ("GCS", GCS))}


@dataclass
class Place:
    """A store on such a service, that a single writer has made."""

    kind: str
    """S3 or GCS."""
    proxy: FaultyProxy
    url: str
    direct: Store
    """Past the proxy."""
    numbers: Iterator[int]
    known: dict[str, bytes] = field(default_factory=dict)
    """What was written before, by key: nothing else ever is."""

    def __post_init__(self) -> None:
        self.known = self.objects()

    def objects(self) -> dict[str, bytes]:
        backend = self.direct._engine.backend
        return {info.key: backend.get(info.key, 1 << 20) for info in backend.list("")}

    def strike(self, operation: str, nth: int, fault: Kind | None) -> tuple[bool, list[str]]:
        """Do it in a new job while `fault` happens to the `nth` request that it can happen to; return whether, and what is wrong."""
        seen = itertools.count(1)
        if fault:
            self.proxy.inject(fault.fault, lambda request: fault.applies(request) and next(seen) == nth)
        error: BaseException | None = None
        try:
            with Store(self.url, owner=f"job-{next(self.numbers)}", keep_last=1) as store:
                (WRITING | READING)[operation](store)
        except Exception as exc:  # judged below
            error = exc
        fired = not self.proxy.pending
        self.proxy.heal()
        late.arrive()
        if operation in READING:
            found = [] if error is None else [f"{type(error).__name__}: {error}"]
        else:
            right = isinstance(error, NoAtomicCreate) and "single_writer=1" in str(error) and "\n" not in str(error)
            found = [] if right else [f"{type(error).__name__}: {error}"]
        after = self.objects()
        if fault:  # what tries the service out may arrive when it has been cleaned up already
            late_ones = [key for key in after if key.startswith("probe/")]
            self.direct._engine.backend.delete(late_ones)
            after = {key: data for key, data in after.items() if key not in late_ones}
        if after != self.known:
            found.append(f"written: {sorted(set(after.items()) ^ set(self.known.items()))}")
        return fired, found

    def requests(self, operation: str) -> list[Request]:
        before = len(self.proxy.requests)
        assert self.strike(operation, 0, None) == (True, []), operation
        return self.proxy.requests[before:]


@pytest.fixture(params=SERVICES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with ExitStack() as stack:
        service: Any
        if request.param == "GCS":
            service = request.getfixturevalue("fake_gcs")
            upstream = service.layer.url

            def ignore(obey: Callable[[], gcs_rig.Answer], request: gcs_rig.Request) -> gcs_rig.Answer:
                request.query.pop("ifGenerationMatch", None)
                return service.layer.obey(request)

            stack.enter_context(service.layer.fated(ignore))
        else:
            reach = request.getfixturevalue("reached")
            service = reach(s3_rig.Service(request.getfixturevalue(request.param), checksum="when_required"))
            upstream = service.server.endpoint_url
        url = service.url()
        with Store(f"{url}&single_writer=1", owner="first", keep_last="all") as store:
            for name in ("kept", "latest", "latest"):
                write(store, name, step=1)
        proxy = stack.enter_context(FaultyProxy(upstream))
        direct = stack.enter_context(Store(url, acquire=False))
        kind = "GCS" if request.param == "GCS" else "S3"
        yield Place(kind, proxy, url.replace(upstream, proxy.url), direct, itertools.count())


@pytest.mark.parametrize("place", ["snailmail_ignores", "GCS"], indirect=True)
def test_writers_are_refused_and_readers_served(place: Place) -> None:
    """A sample: some operations, each with one fault, but none the first time."""
    faults = itertools.cycle(KINDS[place.kind].values())
    assert place.strike("save", 0, None) == (True, [])
    for n, operation in enumerate([*WRITING, *READING][1::2], start=1):
        _, wrong = place.strike(operation, 1 + n % 4, next(faults))
        assert wrong == [], operation


@pytest.mark.soak
@pytest.mark.parametrize("operation", WRITING | READING)
def test_whatever_happens_meanwhile(place: Place, operation: str) -> None:
    violations = []
    with evidence.experiment(f"{place.kind}: conditions ignored, and a fault at every request") as tally:
        requests = place.requests(operation)
        for name, fault in KINDS[place.kind].items():
            points = sum(map(fault.applies, requests))
            tally.points += points
            for nth in range(1, points + 1):
                fired, wrong = place.strike(operation, nth, fault)
                tally.fired += fired
                if fired and wrong:
                    violations.append((name, nth, wrong))
                    tally.violations += 1
    assert violations == []
    assert tally.fired > tally.points / 2 > 0
