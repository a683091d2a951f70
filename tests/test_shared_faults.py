"""What a shared file system can do to each system call of each operation: what was said about the outcome is true, then and later."""

from __future__ import annotations

import errno
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sick_os import SickOS, Trouble, error_after, error_before, half, hide_new_names, old_listing, silly_rename
from stores import contents, state_of, store_on, write

from ckptstore.backends import shared
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import CkptStoreError, CommitUnknown, Fenced
from ckptstore.record import Record

FILES = {"a": b"first", "b/c": b"second" * 1000, "d": b""}


@pytest.fixture(autouse=True)
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[SickOS]:
    monkeypatch.setattr(shared, "_PAUSES", (0.0,) * len(shared._PAUSES))
    with SickOS().installed() as it:
        yield it


@dataclass
class Past:
    """What three jobs have left behind."""

    folder: Path
    state: Record
    data: dict[str, dict[str, bytes]]


@pytest.fixture
def past(tmp_path: Path, sick: SickOS) -> Past:
    folder = tmp_path / "past"
    (folder / "log").mkdir(parents=True)
    with store_on(backend_at(folder), keep_last="all") as first:
        ids = [write(first, step=step) for step in range(3)]
        first.tag("old", ids[0])
    with store_on(backend_at(folder), keep_last="all") as second:
        write(second, step=3)
        (folder / "data/e1-s7-0123456789ab").mkdir()
        (folder / "data/e1-s7-0123456789ab/state.pt").write_bytes(b"left by the first job, which died")
        data = {c.id: contents(second, c.id) for c in second}
    return Past(folder, state_of(backend_at(folder)), data)


def backend_at(folder: Path) -> SharedBackend:
    backend = SharedBackend.open(str(folder), {})
    backend.capabilities = replace(backend.capabilities, parallel=1)  # the same calls in the same order each time
    return backend


class Job:
    """A store with a past, and a job about to do one thing to it."""

    def __init__(self, past: Past, folder: Path, *, warm: bool) -> None:
        self.past, self.folder = past, folder
        shutil.copytree(past.folder, folder)
        self.store = store_on(backend_at(folder), keep_last="all", owner="job")
        if warm:
            self.store.acquire()
            self.store.tag("warm", "latest")

    def save(self) -> None:
        write(self.store, files=FILES, step=9)

    def prune(self) -> None:
        with store_on(backend_at(self.folder), keep_last=1, owner="job") as strict:
            self.store = strict
            strict.prune()

    @property
    def state(self) -> Record:
        return state_of(backend_at(self.folder))


@dataclass(frozen=True)
class Operation:
    name: str
    run: Callable[[Job], object]
    took_effect: Callable[[Record], bool]
    warm: bool = True


def steps(state: Record) -> list[int | None]:
    return [e.step for e in state.checkpoints]


OPERATIONS = [
    Operation("save", Job.save, lambda s: 9 in steps(s)),
    Operation("first save", Job.save, lambda s: 9 in steps(s), warm=False),
    Operation("acquire", lambda job: job.store.acquire(), lambda s: s.owner == "job", warm=False),
    Operation("tag", lambda job: job.store.tag("best", "old"), lambda s: "best" in s.names),
    Operation("delete", lambda job: job.store.delete("old"), lambda s: 0 not in steps(s)),
    Operation("prune", Job.prune, lambda s: 1 not in steps(s)),
    Operation("gc", lambda job: job.store.gc(), lambda s: True),
]

PATHS = ("link", "listdir", "lstat", "mkdir", "open", "replace", "rmdir", "scandir", "stat", "unlink")
LOOKS = ("link", "lstat", "mkdir", "open", "stat")
LATE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
TROUBLES: list[tuple[str, str, Trouble]] = [
    *((call, "ESTALE", error_before(errno.ESTALE)) for call in PATHS),
    *((call, "EIO", error_before(errno.EIO)) for call in PATHS),
    *((call, "ENOENT", error_before(errno.ENOENT)) for call in ("open", "stat", "lstat", "unlink")),
    *((call, f"{errno.errorcode[e]} late", error_after(e)) for call in ("fsync", "close") for e in LATE),
    *(("link", f"made, but {errno.errorcode[e]}", error_after(e)) for e in (errno.EEXIST, errno.EIO, errno.ENOENT, errno.ESTALE)),
    *(("replace", f"made, but {errno.errorcode[e]}", error_after(e)) for e in (errno.ENOENT, errno.EIO)),
    ("unlink", "done, but ENOENT", error_after(errno.ENOENT)),
    ("mkdir", "done, but EEXIST", error_after(errno.EEXIST)),
    ("pwrite", "ENOSPC", error_before(errno.ENOSPC)),
    ("pwrite", "short", half),
    ("preadv", "EIO", error_before(errno.EIO)),
    ("preadv", "ESTALE", error_before(errno.ESTALE)),
    ("preadv", "short", half),
]


def strike(job: Job, sick: SickOS, operation: Operation, decide: Callable[[str, int], Trouble | None]) -> str:
    """Run the operation, and check all that is promised. Anything but our own errors ends the test."""
    sick.start(decide)
    error: CkptStoreError | None = None
    try:
        operation.run(job)
    except CkptStoreError as exc:
        error = exc
    job.store._engine.settle()
    sick.heal()

    assert not isinstance(error, Fenced), "nobody else was there"
    assert error is None or "\n" not in str(error)
    happened = operation.took_effect(job.state)
    if error is None:
        assert happened, "it said that it was done"
    elif isinstance(error, CommitUnknown):
        answer = True if not error.durable else job.store.resolve(error)
        assert answer == happened or operation.name == "acquire", "resolve told the truth"
    elif operation.name != "gc":
        assert not happened, f"it said that it was not done: {error!r}"
    check_past(job, operation)
    with store_on(backend_at(job.folder), keep_last="all", owner="job") as same:
        made = write(same, "next")
        assert contents(same, made)
        assert operation.took_effect(job.state) == happened or operation.name == "acquire", "nothing changes its mind later"
    with store_on(backend_at(job.folder), keep_last="all", owner="newer") as newer:
        newer.acquire()
        newer.gc()
        assert newer.verify() == []
    check_past(job, operation)
    job.store.close()
    return type(error).__name__


def check_past(job: Job, operation: Operation) -> None:
    """Check that all that was acknowledged before is there, whole, but for what was asked to go."""
    state = job.state
    may_go = {0} if operation.name == "delete" else {1, 2} if operation.name == "prune" else set()
    assert {e.step for e in job.past.state.checkpoints if state.entry(e.id) is None} <= may_go
    with store_on(backend_at(job.folder)) as reader:
        for entry in state.checkpoints:
            if entry.step is not None:
                assert contents(reader, entry.id) == job.past.data.get(entry.id, FILES)
    newest = state.entry(state.names["latest"])
    assert newest is not None
    assert newest.step in (3, 9), "latest never goes back"


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("most", [40, pytest.param(10**6, marks=pytest.mark.soak)])
def test_every_trouble_at_every_call(tmp_path: Path, sick: SickOS, past: Past, operation: Operation, most: int) -> None:
    job = Job(past, tmp_path / "peace", warm=operation.warm)
    sick.start(lambda name, nth: None)
    operation.run(job)
    job.store._engine.settle()
    calls = dict(sick.seen)
    job.store.close()
    assert calls["open"] >= 3
    plans = [
        (call, what, trouble, nth, many)
        for call, what, trouble in TROUBLES
        for nth in range(1, calls.get(call, 0) + 1)
        for many in (1, 3, 10**6)
    ]
    outcomes: Counter[str] = Counter()
    for plan in random.Random(0).sample(plans, min(most, len(plans))):
        call, what, _, nth, many = plan

        def decide(name: str, n: int, plan: tuple[str, str, Trouble, int, int] = plan) -> Trouble | None:
            call, _, trouble, nth, many = plan
            return trouble if name == call and nth <= n < nth + many else None

        again = Job(past, tmp_path / "run", warm=operation.warm)
        try:
            outcomes[strike(again, sick, operation, decide)] += 1
        except BaseException as exc:
            raise AssertionError(f"{many} × {what} from {call} {nth} on") from exc
        shutil.rmtree(again.folder)
    print(len(plans), outcomes)
    assert min(outcomes["NoneType"], len(plans) - outcomes["NoneType"]) > 5


# --- what is not one call gone wrong


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_old_listings_and_removed_files_that_stay(tmp_path: Path, sick: SickOS, past: Past, operation: Operation) -> None:
    for calls, make in ((("scandir", "listdir"), old_listing), (("unlink",), lambda root: silly_rename)):
        job = Job(past, tmp_path / "run", warm=operation.warm)
        trouble = make(str(job.folder))
        assert strike(job, sick, operation, lambda name, nth, c=calls, t=trouble: t if name in c else None) == "NoneType"  # type: ignore[misc]
        shutil.rmtree(job.folder)


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 10**6])
@pytest.mark.parametrize("commits", [1, 3, 12])
def test_what_another_job_has_committed_is_not_seen_for_a_while(
    tmp_path: Path, sick: SickOS, past: Past, looks: int, commits: int
) -> None:
    """A job that cannot see that it is fenced changes nothing all the same; and one that is not told of older ones takes over."""
    for act in (Job.save, lambda job: job.store.tag("best", "old"), lambda job: job.store.delete("old")):
        job = Job(past, tmp_path / "run", warm=True)
        hide = hide_new_names(str(job.folder), looks)
        with store_on(backend_at(job.folder), keep_last="all", owner="newer") as newer:
            for step in range(commits):
                write(newer, step=20 + step)
        before = job.state
        sick.start(lambda name, nth, hide=hide: hide if name in LOOKS else None)  # type: ignore[misc]
        with pytest.raises((Fenced, CommitUnknown)) as caught:
            act(job)
        sick.heal()
        if isinstance(caught.value, CommitUnknown):
            assert looks > 5
            assert job.store.resolve(caught.value) is False
        assert job.state == before
        with pytest.raises(Fenced):
            write(job.store)
        job.store.close()
        shutil.rmtree(job.folder)


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 10**6])
def test_a_new_job_acquires_although_it_cannot_see_the_newest_records(
    tmp_path: Path, sick: SickOS, past: Past, looks: int
) -> None:
    job = Job(past, tmp_path / "run", warm=False)
    hide = hide_new_names(str(job.folder), looks)
    with store_on(backend_at(job.folder), keep_last="all", owner="older") as older:
        for step in range(3):
            write(older, step=20 + step)
        before = job.state
        sick.start(lambda name, nth: hide if name in LOOKS else None)
        try:
            job.store.acquire()
        except CkptStoreError:
            assert looks == 10**6
        sick.heal()
        job.store.acquire()
        state = job.state
        assert state.owner == "job"
        assert steps(state) == steps(before)
        with pytest.raises(Fenced):
            write(older)
