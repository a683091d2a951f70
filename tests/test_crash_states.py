"""Whatever a POSIX file system may keep of a save after a crash, the store opens, and nothing acknowledged is missing."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import evidence
import pytest
from crash_states import Entries, History, Sync, Tree, Truncate, Write, build, crash_states, recording
from procs import litter
from stores import write

from ckptstore import Store
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import CkptStoreError
from ckptstore.log import Log

State = tuple[int, dict[str, str], list[str]]
"""Epoch, names, ids of the checkpoints."""


def state_of(root: Path) -> State:
    """Return what a process finds that knows nothing."""
    if not root.exists():
        return 0, {}, []
    record = Log(LocalBackend(str(root))).head().record
    return record.epoch, dict(record.names), [e.id for e in record.checkpoints]


@dataclass
class Life:
    """What was done to a store, operation by operation."""

    history: History
    calls: list[tuple[int, int, State, State]] = field(default_factory=list)
    """How many operations were over before and after each call, and the state before and after."""

    def may_be(self, at: int) -> list[State]:
        """Return the states that are right after a crash when `at` operations were over."""
        last: State = (0, {}, [])
        for start, end, before, after in self.calls:
            if start < at < end:
                acquired = (after[0], *before[1:])  # the first save acquires, and then saves
                return [before, after, acquired]
            if at >= end:
                last = after
        return [last]


def live(folder: Path) -> Life:
    """Do one of everything, from a folder that is empty."""
    root = folder / "runs" / "42"
    with recording(folder) as history:
        life = Life(history)

        def done(store: Store, call: Callable[[], object]) -> None:
            start, before = len(history.operations), state_of(root)
            call()
            end = len(history.operations)
            life.calls.append((start, end, before, state_of(root)))
            store._engine.settle()

        with Store(root, keep_last=1) as store:
            done(store, lambda: write(store, step=1))
            done(store, lambda: write(store, step=2, files={"a": b"of the second", "deep/b": b"and more"}))
            done(store, lambda: store.tag("best", "latest"))
        with Store(root, keep_last=1) as store:
            done(store, store.acquire)
            done(store, lambda: write(store, step=3, metrics={f"{i}" * 999: i for i in range(4)}))  # the next shrinks this record
            done(store, lambda: write(store, "export", step=3))
            done(store, lambda: write(store, step=4))
            done(store, lambda: store.delete("best"))
            done(store, store.prune)
            done(store, store.gc)
            for step in range(5, 8):  # so many that there is a hint
                done(store, lambda step=step: write(store, step=step))  # type: ignore[misc]
    return life


_places = itertools.count()


def is_right(tree: Tree, right: list[State], folder: Path) -> bool:
    """Return whether a store in a disk like `tree` is in one of the states `right`, is whole, and can be saved to."""
    disk = folder / str(next(_places))
    build(tree, disk)
    root = disk / "runs" / "42"
    try:
        with Store(root, keep_last=1) as store:
            if state_of(root) not in right or store.verify():
                return False
            saved = write(store, "next")
            store.gc()
            return store.names()["next"] == saved and not store.verify() and not litter(store)
    except (CkptStoreError, Warning):
        return False
    finally:
        shutil.rmtree(disk)


@contextmanager
def no_flushes() -> Iterator[None]:
    """Save the disk's time: what a crash keeps is not asked any more."""
    with mock.patch.object(os, "fsync", lambda fd: None), mock.patch("ckptstore.posix.start_writeback", lambda fd, end=0: None):
        yield


def verdicts(life: Life, folder: Path, most: int, start: int = 0) -> Iterator[bool]:
    """Yield for each crash state from operation `start` on, of which there are at most `most` at one point, whether it is right."""
    rng = random.Random(20261124)
    seen = set()
    with no_flushes():
        for at in range(start, len(life.history.operations) + 1):
            right = life.may_be(at)
            for tree in crash_states(life.history, at, most, rng):
                key = hash((repr(right), tuple(sorted(tree.items()))))
                if key not in seen:
                    seen.add(key)
                    yield is_right(tree, right, folder)


@pytest.fixture
def life(tmp_path: Path) -> Life:
    (tmp_path / "disk").mkdir()
    return live(tmp_path / "disk")


@pytest.mark.parametrize(
    ("most", "at_least"), [pytest.param(3, 300, id="sampled"), pytest.param(600, 20_000, id="full", marks=pytest.mark.soak)]
)
def test_nothing_is_lost_in_any_crash_state(life: Life, tmp_path: Path, most: int, at_least: int) -> None:
    found = Counter(verdicts(life, tmp_path, most))
    states, wrong = found.total(), found[False]
    print(f"{len(life.history.operations)} operations, {states} states, {wrong} wrong")
    evidence.record("crash states that POSIX allows", points=states, fired=states, violations=wrong)
    assert wrong == 0
    assert states >= at_least


def mistakes(life: Life) -> Iterator[tuple[int, Life]]:
    """Yield what would have happened without each flush, and with each flush of what a record needs coming only after the next step.

    Each with the number of the first operation that is different. Flushes of one thing without a change between them are left out
    together: whoever comes later cannot know that an earlier one was not killed before it flushed.
    """
    operations, calls = life.history.operations, life.calls
    groups: dict[tuple[int, int], list[int]] = {}
    for i, op in enumerate(operations):
        if isinstance(op, Sync):
            covered = sum(is_about(step, op.what) for step in operations[: op.covers])
            groups.setdefault((op.what, covered), []).append(i)
    for group in groups.values():
        without = [Sync(-1, 0) if i in group else op for i, op in enumerate(operations)]
        yield group[0], Life(replace(life.history, operations=without), calls)
    # Without its folder, a record is not there at all: that flush may come at any time before the commit is acknowledged.
    way_to_log = {folder for op in operations if isinstance(op, Entries) for folder, name, _ in op.changes if name in WAY_TO_LOG}
    for (what, _), (i, *others) in groups.items():
        after = next((j for j in range(i, len(operations)) if not isinstance(operations[j], Sync)), None)
        if not others and after is not None and what not in way_to_log:
            late = [*operations[:i], *operations[i + 1 : after + 1], operations[i], *operations[after + 1 :]]
            moved = [(a - (i < a <= after), b - (i < b <= after), before, then) for a, b, before, then in calls]
            yield i, Life(replace(life.history, operations=late), moved)


WAY_TO_LOG = ("runs", "42", "log", f"{1:012}")


def is_about(step: Entries | Write | Truncate | Sync, what: int) -> bool:
    """Return whether an fsync of `what` makes `step` safe."""
    if isinstance(step, Entries):
        return any(folder == what for folder, _, _ in step.changes)
    return isinstance(step, Write | Truncate) and step.file == what


@pytest.mark.parametrize(
    ("stride", "most"), [pytest.param(17, 20, id="sampled"), pytest.param(1, 20, id="full", marks=pytest.mark.soak)]
)
def test_a_missing_or_late_flush_is_found(life: Life, tmp_path: Path, stride: int, most: int) -> None:
    survivors, tried = [], 0
    for first, mistake in itertools.islice(mistakes(life), 0, None, stride):
        tried += 1
        if all(verdicts(mistake, tmp_path, most, first)):
            survivors.append((first, life.history.operations[first]))
    print(f"{tried} mistakes")
    evidence.record("flushes left out or made too late", points=tried, fired=tried, violations=len(survivors))
    assert not survivors
    assert tried >= 100 // stride


LIFE_OF_A_RIVAL = """
import os, rivals
from pathlib import Path
rival, folder = rivals.RIVALS[{name!r}], {folder!r}
def mark(text):
    try: os.unlink(folder + "/mark-" + text)
    except FileNotFoundError: pass
for step in (1, 2, 3):
    mark(f"begin {{step}}")
    rival.save(Path(folder), step)
    mark(f"end {{step}}")
"""


@pytest.mark.soak
@pytest.mark.parametrize("name", ["torch.save", "tmp + os.replace", "DCP"])
def test_others_in_the_same_crash_states(tmp_path: Path, name: str) -> None:
    """Counted for the table: what they lose."""
    import crash_trace
    import rivals

    (tmp_path / "disk").mkdir()
    code = LIFE_OF_A_RIVAL.format(name=name, folder=str(tmp_path / "disk"))
    history, marks = crash_trace.traced(tmp_path / "disk", crash_trace.python(code))
    rival = rivals.RIVALS[name]
    assert rival.load(tmp_path / "disk") == 3
    rng = random.Random(20261124)
    seen, wrong = set(), 0
    for at in range(len(history.operations) + 1):
        acknowledged = max((step for step in (1, 2, 3) if marks[f"end {step}"] <= at), default=None)
        begun = max((step for step in (1, 2, 3) if marks[f"begin {step}"] < at), default=None)
        for tree in crash_states(history, at, 100, rng):
            key = hash((acknowledged, begun, tuple(sorted(tree.items()))))
            if key not in seen:
                seen.add(key)
                disk = tmp_path / str(next(_places))
                build(tree, disk)
                wrong += rivals.is_violation(rival, disk, acknowledged, begun)
                shutil.rmtree(disk)
    print(f"{name}: {len(history.operations)} operations, {len(seen)} states, {wrong} wrong")
    evidence.record("crash states that POSIX allows", subject=name, points=len(seen), fired=len(seen), violations=wrong)
    assert len(seen) > 30
