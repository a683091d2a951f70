"""A process is stopped after each system call that touches its store: the power goes, or a newer job takes over and it goes on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import evidence
import pytest
import rivals
from every_call import AGAIN, Call, Possible, Strace, attached, calls_of, grow, keep_house, save_twice
from procs import Child, Nursery, nursery
from test_every_call import warm_up  # noqa: F401  # for the nursery
from test_kill import save_parts
from test_power import NOTHING_FLUSHED, Disk, place

from ckptstore import Store

KINDS = ("ext4", "xfs", "btrfs")


@pytest.fixture(scope="module")
def warm() -> Iterator[Nursery]:
    yield from nursery(__name__)


@pytest.fixture(scope="module")
def others() -> Iterator[Nursery]:
    yield from nursery("rivals", __name__)


# -- the power goes


def cut(disk: Disk, child: Child, call: Call) -> tuple[bool, list[list[object]]]:
    """Cut the power after a call of a process; return whether it made that call, and what the process had said by then."""
    with attached(child, call.name, f"{call.name}:signal=STOP:when={call.nth}") as strace:
        child.send("go")
        fired = strace.stopped()
        disk.cut_power(NOTHING_FLUSHED)
        said = child.kill()
    return fired, said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [pytest.param(90, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_power_cut_after_every_call(ram: Path, warm: Nursery, kind: str, stride: int) -> None:
    start = Disk.new(kind, ram / "start")
    with start.plugged_in() as folder:
        Path(place(folder)).parent.mkdir()
        grow(Path(place(folder)))
        with Store(place(folder)) as store:
            names = store.names()
    disk = start.copy(ram / "disk")
    with disk.plugged_in() as folder:
        child = warm.start(keep_house, place(folder))
        child.expect("ready")
        calls = calls_of(child, Path(place(folder)))
    points = len(calls[::stride])
    found = {}
    with evidence.experiment(f"power cut after every system call, {kind}") as tally:
        tally.points = points
        for call in calls[::stride]:
            for _ in range(AGAIN):
                disk = start.copy(ram / "disk")
                possible = Possible.of(dict(names))
                with disk.plugged_in() as folder:
                    child = warm.start(keep_house, place(folder))
                    child.expect("ready")
                    happened, said = cut(disk, child, call)
                for message in said:
                    possible.hear(message)
                with disk.plugged_in() as folder:
                    possible.check(place(folder))
                if happened or possible.violations:
                    break
            tally.fired += happened
            if possible.violations:
                found[call] = possible.violations
                tally.violations += 1
    assert found == {}
    assert tally.fired > 0.9 * points


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_power_cut_after_every_call_of_others(ram: Path, others: Nursery, kind: str, name: str) -> None:
    """Only counted. Besides what was under way, all that was acknowledged before is on the disk."""
    start = Disk.new(kind, ram / "start")
    disk = start.copy(ram / "disk")
    with disk.plugged_in() as folder:
        child = others.start(save_twice, name, str(folder))
        child.expect("ready")
        calls = calls_of(child, folder)
    fired = violations = 0
    for call in [*calls, Call("exit_group", 1)]:
        disk = start.copy(ram / "disk")
        with disk.plugged_in() as folder:
            child = others.start(save_twice, name, str(folder))
            child.expect("ready")
            happened, said = cut(disk, child, call)
        acknowledged = 2 if ["done"] in said else 1
        with disk.plugged_in() as folder:
            violations += rivals.is_violation(rivals.RIVALS[name], folder, acknowledged, 2)
        fired += happened
    what = f"power cut after every system call, {kind}"
    evidence.record(what, points=len(calls), fired=fired, violations=violations, subject=name)
    assert fired > 0.8 * len(calls)


# -- a newer job takes over


@pytest.mark.parametrize("stride", [pytest.param(30, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_stopped_after_every_call_and_continued_later(ram: Path, warm: Nursery, stride: int) -> None:
    """A newer job has taken over by then: nothing of the old one takes effect, and it is told so."""
    grow(ram / "grown")
    shutil.copytree(ram / "grown", ram / "store")
    child = warm.start(keep_house, str(ram / "store"), True)
    child.expect("ready")
    calls = calls_of(child, ram / "store")
    points = len(calls[::stride])
    found = {}
    with evidence.experiment("an old job stops after every system call") as tally:
        tally.points = points
        for call in calls[::stride]:
            shutil.rmtree(ram / "store")
            shutil.copytree(ram / "grown", ram / "store")
            child = warm.start(keep_house, str(ram / "store"), True)
            child.expect("ready")
            happened, violations = overtaken(child, str(ram / "store"), call)
            tally.fired += happened
            if violations:
                found[call] = violations
                tally.violations += 1
    assert found == {}
    assert tally.fired > 0.9 * points


def continued(child: Child, strace: Strace) -> None:
    """Send SIGCONT whenever a process stops, until its end."""
    for line in strace.lines():
        if "stopped" in line:
            with suppress(OSError):  # it has ended, and been let go
                child.proceed()


def overtaken(child: Child, url: str, call: Call) -> tuple[bool, list[str]]:
    """Have a newer job live while a process is stopped after a call; return whether it was, and what is wrong then."""
    with attached(child, call.name, f"{call.name}:signal=STOP:when={call.nth}") as strace:
        child.send("go")
        if not strace.stopped():
            child.rest()
            return False, []
        with closing(Store(url, owner="newer", keep_last=1)) as newer:
            newer.acquire()
            taken_over = newer.names()
            saved = save_parts(newer, "latest", 40)
            newer.gc()
            child.proceed()
            # Each thread stops at the call with this number of its own.
            going_on = threading.Thread(target=continued, args=(child, strace))
            going_on.start()
            said = child.rest()
            going_on.join()
            violations = list(_untrue(said, taken_over))
            if newer.names() != {**taken_over, "latest": saved.id}:
                violations.append(f"{taken_over} and the newer job's {saved.id} became {newer.names()}")
            violations += map(str, newer.verify())
            save_parts(newer, "latest", 41)
    return True, violations


def _untrue(said: list[list[object]], taken_over: dict[str, str]) -> Iterator[str]:
    """Judge what the old job says, which it may have begun to do before it was stopped."""
    if said[-1] != ["end"]:
        yield f"it ended after {said[-1]}"
    for kind, *about in said:
        if kind == "untyped" or (kind == "refused" and about[1] != "Fenced"):
            yield f"{kind} {about}"
        # What it changed must have been there when the newer job took over, unless it was the old job itself that changed it again.
        if kind == "done" and about[0] == "best" and about[1] != taken_over.get("best"):
            yield f"{kind} {about}, which nobody has seen"
    latest = [about[1] for kind, *about in said if kind == "done" and about[0] == "latest"]
    if latest and latest[-1] != taken_over.get("latest"):
        unknown = [about for kind, *about in said if kind == "unknown" and about[0] == "latest"]
        if not unknown:
            yield f"done {latest[-1]}, but a newer job found {taken_over.get('latest')}"
