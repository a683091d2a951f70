"""Something happens to a process at each system call that touches its store: nothing acknowledged is lost, and errors have a type."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import evidence
import pytest
import rivals
from every_call import AGAIN, Call, Possible, attached, calls_of, grow, keep_house, save_twice
from procs import Nursery, nursery

from ckptstore import Store

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "ESTALE")
FAULTS = {
    "SIGKILL": "signal=KILL:when={nth}",
    **{error: f"error={error}:when={{nth}}" for error in ERRORS},
    **{f"{error} from then on": f"error={error}:when={{nth}}+" for error in ERRORS if error != "EINTR"},
    "EINTR ten times": "error=EINTR:when={nth}..{last}",  # whoever repeats calls, as Python does, would repeat for ever
}


@pytest.fixture(scope="module")
def warm() -> Iterator[Nursery]:
    yield from nursery(__name__)


def warm_up() -> None:
    """For the nursery: have everything imported that a save needs."""
    from stores import write

    with Store("memory://warm") as store:
        write(store)


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("grown") / "store"
    grow(place)
    return place


@pytest.fixture(scope="module")
def calls(warm: Nursery, grown: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Call]:
    """All system calls with which `keep_house` touches its store."""
    place = tmp_path_factory.mktemp("calls") / "store"
    shutil.copytree(grown, place)
    child = warm.start(keep_house, str(place))
    child.expect("ready")
    found = calls_of(child, place)
    assert {"openat", "pwrite64", "fsync", "linkat", "unlinkat", "mkdirat", "close"} <= {c.name for c in found}
    return found


def strike(warm: Nursery, grown: Path, place: Path, call: Call, fault: str) -> tuple[bool, list[str]]:
    """Have something happen at a call; return whether it did, and what is wrong then.

    Which of its threads makes a call is up to chance, and the last ones of one may be another one's: then all is done once more.
    """
    for _ in range(AGAIN):
        fired, violations = _strike(warm, grown, place, call, fault)
        if fired or violations:
            break
    return fired, violations


def _strike(warm: Nursery, grown: Path, place: Path, call: Call, fault: str) -> tuple[bool, list[str]]:
    shutil.copytree(grown, place)
    with Store(place) as store:
        possible = Possible.of(dict(store.names()))
    child = warm.start(keep_house, str(place))
    child.expect("ready")
    with attached(child, call.name, f"{call.name}:{FAULTS[fault].format(nth=call.nth, last=call.nth + 9)}") as strace:
        child.send("go")
        try:
            while True:
                possible.hear(child.recv())
        except EOFError:
            child.rest()
        except TimeoutError:
            possible.violations.append("it waits for ever")
            child.close()
        fired = strace.injected() > 0 or not possible.ended
    if not possible.ended and fault != "SIGKILL":
        possible.violations.append("the process died")
    possible.check(str(place))
    shutil.rmtree(place)
    return fired, possible.violations


def test_something_happens_at_some_calls(ram: Path, warm: Nursery, grown: Path, calls: list[Call]) -> None:
    """A sample: each fault at some calls, by turns."""
    fired = 0
    sample = calls[:: max(1, len(calls) // 40)]
    for n, call in enumerate(sample):
        fault = list(FAULTS)[n % len(FAULTS)]
        happened, violations = strike(warm, grown, ram / "store", call, fault)
        assert violations == [], (call, fault)
        fired += happened
    assert fired > 0.8 * len(sample) > 20


def test_nothing_can_be_removed_from_then_on(ram: Path, warm: Nursery, grown: Path, calls: list[Call]) -> None:
    """All of these: a name that has become a second one of a finished file is for a later collection."""
    fired = 0
    for call in calls:
        if call.name == "unlinkat":
            happened, violations = strike(warm, grown, ram / "store", call, "EIO from then on")
            assert violations == [], call
            fired += happened
    assert fired >= 4


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
def test_it_happens_at_every_call(ram: Path, warm: Nursery, grown: Path, calls: list[Call], fault: str) -> None:
    found = {}
    with evidence.experiment(f"{fault} at every system call") as tally:
        tally.points = len(calls)
        for call in calls:
            happened, violations = strike(warm, grown, ram / "store", call, fault)
            tally.fired += happened
            if violations:
                found[call] = violations
                tally.violations += 1
    assert found == {}
    assert tally.fired > 0.9 * len(calls)


# -- the others


@pytest.fixture(scope="module")
def others() -> Iterator[Nursery]:
    yield from nursery("rivals", __name__)


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_it_happens_at_every_call_of_others(ram: Path, others: Nursery, name: str, fault: str) -> None:
    """Only counted."""
    place = ram / "store"
    place.mkdir()
    child = others.start(save_twice, name, str(place))
    child.expect("ready")
    calls = calls_of(child, place)
    fired = violations = 0
    for call in calls:
        shutil.rmtree(place)
        place.mkdir()
        child = others.start(save_twice, name, str(place))
        child.expect("ready")
        with attached(child, call.name, f"{call.name}:{FAULTS[fault].format(nth=call.nth, last=call.nth + 9)}") as strace:
            child.send("go")
            said = child.rest()
            happened = strace.injected() > 0 or ["end"] not in said
        fired += happened
        done = ["done"] in said
        violations += happened and rivals.is_violation(rivals.RIVALS[name], place, 2 if done else 1, None if done else 2)
    evidence.record(f"{fault} at every system call", points=len(calls), fired=fired, violations=violations, subject=name)
    assert fired > 0.8 * len(calls)
