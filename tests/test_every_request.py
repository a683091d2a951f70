"""Whatever happens to whichever request, on S3 and on Google Cloud Storage: nothing is lost, nothing falsely told, no false conflict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import cycle

import evidence
import gcs_rig
import pytest
import s3_rig
from faulty_http import FaultyProxy
from wire_life import GCS, OPERATIONS, S3, Kind, Side, World, requests_of, strike

from ckptstore import retry

pytest_plugins = ("gcs_fixtures", "s3_fixtures")

KINDS = {"S3": S3, "GCS": GCS}
AGAIN = 4
"""How often it is tried to come to a request: some are made only by a job that has done the same before, as only it shrinks old records."""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)


@pytest.fixture(params=["S3", "GCS"])
def service(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def side(service: str, request: pytest.FixtureRequest) -> Iterator[Side]:
    if service == "S3":
        s3: s3_rig.Service = request.getfixturevalue("server")
        url, upstream = s3.url, s3.server.endpoint_url
    else:
        gcs: gcs_rig.Service = request.getfixturevalue("fake_gcs")
        url, upstream = gcs.url, gcs.layer.url
    with FaultyProxy(upstream) as proxy:
        yield Side(proxy, url, upstream)


def test_something_happens_to_each_request(side: Side, service: str) -> None:
    """A sample: every second request meets one of what can happen to it, by turns."""
    kinds = cycle(KINDS[service].items())
    points = fired = 0
    with closing(World(side)) as world:
        for name, operation in OPERATIONS.items():
            requests = requests_of(world, operation)
            for at, request in list(enumerate(requests))[points % 2 :: 2]:
                kind, what = next(k for k in kinds if k[1].applies(request))
                tried = strike(world, operation, sum(map(what.applies, requests[: at + 1])), what)
                assert tried.violations == [], (name, str(request), kind)
                points += 1
                fired += tried.fired
        world.check_all()
    assert points > 30
    assert fired > 0.9 * points


@pytest.mark.soak
@pytest.mark.parametrize("newer", [False, True], ids=["", "newer job"])
@pytest.mark.parametrize("kind", S3)
@pytest.mark.parametrize("name", OPERATIONS)
def test_it_happens_to_each_request(side: Side, service: str, name: str, kind: str, newer: bool) -> None:
    if kind not in KINDS[service] or (newer and kind != "late"):
        return
    _matrix(side, service, name, kind, KINDS[service][kind], newer=newer)


def _matrix(side: Side, service: str, name: str, kind: str, what: Kind, *, newer: bool = False) -> None:
    violations = []
    label = f"{service}: {kind}{' and after a newer commit' if newer else ''} at every request"
    with evidence.experiment(label) as tally, closing(World(side)) as world:
        tally.points = sum(map(what.applies, requests_of(world, OPERATIONS[name])))
        for nth in range(1, tally.points + 1):
            for earlier in range(AGAIN):
                tried = strike(world, OPERATIONS[name], nth, what, newer=newer, earlier=earlier)
                if tried.fired or tried.violations:
                    break
            tally.fired += tried.fired
            if tried.fired and tried.violations:
                violations.append((name, nth, kind, tried.violations))
                tally.violations += 1
        world.check_all()
    assert violations == []
    assert tally.fired >= tally.points / 2
