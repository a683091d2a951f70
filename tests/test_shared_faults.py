"""What a shared file system can do to each system call of each operation: what was said about the outcome is true, then and later."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from sick_os import SickOS, Trouble, error_after, error_before, half, hide_new_names, old_listing, silly_rename
from stores import contents, state_of, store_on, write

from ckptstore import log
from ckptstore.backends import _shared_names
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import CkptStoreError, CommitUnknown, DamagedRecord, Fenced
from ckptstore.record import Record

FILES = {"a": b"first", "b/c": b"second" * 1000, "d": b""}


@pytest.fixture(autouse=True)
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[SickOS]:
    monkeypatch.setattr(_shared_names, "PAUSES", (0.0,) * len(_shared_names.PAUSES))
    monkeypatch.setattr(log, "_HINT_EVERY", 2)  # so that files are replaced, too
    monkeypatch.setattr(log, "_SHRINK_ABOVE", 0)
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
        ids = [first.save({"step": step}, step=step).id for step in range(3)]
        first.tag("old", ids[0])
    with store_on(backend_at(folder), keep_last="all") as second:
        second.save({"step": 3}, step=3)
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

    def gc(self) -> None:
        for place in ("data/e1-s7-ba9876543210", "log"):
            (self.folder / place).mkdir(exist_ok=True)
            (self.folder / place / "000000000003.0123456789abcdef.partial").write_bytes(b"left by a job that died")
        self.store.gc()

    def load(self) -> None:
        """Load the newest; what is not seen yet cannot be. Falling back from a whole one would be a warning, which ends the test."""
        assert self.store.load()["step"] in (2, 3)

    def resume(self) -> None:
        state = {"step": -1}
        resumed = self.store.resume(state)
        assert resumed is not None
        assert resumed.step == state["step"] == 3

    @property
    def state(self) -> Record:
        return state_of(backend_at(self.folder))


@dataclass(frozen=True)
class Operation:
    name: str
    run: Callable[[Job], object]
    took_effect: Callable[[Record], bool]
    calls: str
    """What it must be known to call, so that no trouble is left out unseen."""
    warm: bool = True
    at_once: bool = True
    """Whether an error means that nothing of it was done."""
    took_over: bool = False
    """Whether it is done by the next change as well."""


def steps(state: Record) -> list[int | None]:
    return [e.step for e in state.checkpoints]


COMMIT = "close fsync link open preadv pwrite replace stat unlink"
TAKE_OVER = f"{COMMIT} rmdir scandir"
OPERATIONS = [
    Operation("save", Job.save, lambda s: 9 in steps(s), f"{COMMIT} mkdir"),
    Operation("first save", Job.save, lambda s: 9 in steps(s), f"{TAKE_OVER} mkdir", warm=False),
    Operation("acquire", lambda job: job.store.acquire(), lambda s: s.owner == "job", TAKE_OVER, warm=False, took_over=True),
    Operation("tag", lambda job: job.store.tag("best", "old"), lambda s: "best" in s.names, COMMIT),
    Operation("delete", lambda job: job.store.delete("old"), lambda s: 0 not in steps(s), TAKE_OVER),
    Operation("prune", Job.prune, lambda s: 1 not in steps(s), TAKE_OVER),
    Operation("gc", Job.gc, lambda s: True, "close open rmdir scandir stat unlink", at_once=False),
    Operation("load", Job.load, lambda s: True, "close open preadv stat", warm=False, at_once=False),
    Operation("resume", Job.resume, lambda s: s.owner == "job", TAKE_OVER, warm=False, at_once=False, took_over=True),
]

PATHS = ("link", "listdir", "lstat", "mkdir", "open", "replace", "rmdir", "scandir", "stat", "unlink")
LOOKS = ("link", "lstat", "mkdir", "open", "stat")
DATA = ("close", "fsync", "preadv", "pwrite")
LATE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def before(number: int, *calls: str) -> list[tuple[str, str, Trouble]]:
    return [(call, errno.errorcode[number], error_before(number)) for call in calls]


def after(number: int, *calls: str) -> list[tuple[str, str, Trouble]]:
    return [(call, f"done, but {errno.errorcode[number]}", error_after(number)) for call in calls]


TROUBLES: list[tuple[str, str, Trouble]] = [
    *before(errno.ESTALE, *PATHS, *DATA),
    *before(errno.EIO, *PATHS, "preadv", "pwrite"),
    *before(errno.EBADF, "preadv"),
    *before(errno.ENOENT, "lstat", "open", "stat", "unlink"),
    *(trouble for number in LATE for trouble in after(number, "close", "fsync")),
    *(trouble for number in (errno.EEXIST, errno.EIO, errno.ENOENT, errno.ESTALE) for trouble in after(number, "link")),
    *(trouble for number in (errno.ENOENT, errno.EIO) for trouble in after(number, "replace")),
    *after(errno.ENOENT, "unlink"),
    *after(errno.EEXIST, "mkdir"),
    *before(errno.ENOSPC, "mkdir", "open", "link", "pwrite"),
    *before(errno.EDQUOT, "mkdir", "open", "link", "pwrite"),
    ("pwrite", "short", half),
    ("preadv", "short", half),
]


def strike(job: Job, sick: SickOS, operation: Operation, decide: Callable[[str, int], Trouble | None]) -> str:
    """Run the operation, and check all that is promised. Anything but our own errors ends the test."""
    descriptors = len(os.listdir("/proc/self/fd"))
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
        assert answer == happened or operation.took_over, "resolve told the truth"
    elif operation.at_once:
        assert not happened, f"it said that it was not done: {error!r}"
    check_past(job, operation)
    with store_on(backend_at(job.folder), keep_last="all", owner="job") as same:
        made = write(same, "next")
        assert contents(same, made)
        assert operation.took_effect(job.state) == happened or operation.took_over, "nothing changes its mind later"
    with store_on(backend_at(job.folder), keep_last="all", owner="newer") as newer:
        newer.acquire()
        newer.gc()
        assert newer.verify() == []
    check_past(job, operation)
    job.store.close()
    assert len(os.listdir("/proc/self/fd")) <= descriptors, "each that was opened was closed"
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


Plan = tuple[str, str, Trouble, int, int]


def calls_of(operation: Operation, past: Past, folder: Path, sick: SickOS) -> Counter[str]:
    """Return how often the operation makes each system call when all is well."""
    job = Job(past, folder, warm=operation.warm)
    sick.start(lambda name, nth: None)
    operation.run(job)
    job.store._engine.settle()
    calls = Counter(sick.seen)
    job.store.close()
    return calls


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("each", [1, pytest.param(10**6, marks=pytest.mark.soak)])
def test_every_trouble_at_every_call(tmp_path: Path, sick: SickOS, past: Past, operation: Operation, each: int) -> None:
    """Once, three times or from then on; `each` of a kind, chosen at random."""
    calls = calls_of(operation, past, tmp_path / "peace", sick)
    assert set(operation.calls.split()) <= calls.keys()
    chosen = random.Random(0)
    outcomes: Counter[str] = Counter()
    for call, what, trouble in TROUBLES:
        plans = [(nth, many) for nth in range(1, calls[call] + 1) for many in (1, 3, 10**6)]
        for nth, many in chosen.sample(plans, min(each, len(plans))):
            fired = 0

            def decide(name: str, n: int, plan: Plan = (call, what, trouble, nth, many)) -> Trouble | None:
                nonlocal fired
                call, _, trouble, nth, many = plan
                if name != call or not nth <= n < nth + many:
                    return None
                fired += 1
                return trouble

            job = Job(past, tmp_path / "run", warm=operation.warm)
            try:
                outcomes[strike(job, sick, operation, decide)] += 1
                assert fired
            except BaseException as exc:
                raise AssertionError(f"{many} × {what} from {call} {nth} on") from exc
            shutil.rmtree(job.folder)
    print(operation.name, sorted(calls.items()), outcomes)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
@pytest.mark.parametrize("each", [3, pytest.param(10**6, marks=pytest.mark.soak)])
def test_the_file_system_is_gone_from_one_call_on(
    tmp_path: Path, sick: SickOS, past: Past, operation: Operation, each: int
) -> None:
    total = calls_of(operation, past, tmp_path / "peace", sick).total()
    for number in (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ENOENT, errno.EACCES, errno.ETIMEDOUT):
        for nth in random.Random(number).sample(range(1, total + 1), min(each, total)):
            gone = error_before(number)
            job = Job(past, tmp_path / "run", warm=operation.warm)
            try:
                strike(job, sick, operation, lambda name, n, nth=nth, gone=gone: gone if sick.seen.total() >= nth else None)  # type: ignore[misc]
            except BaseException as exc:
                raise AssertionError(f"{errno.errorcode[number]} from call {nth} of {total} on") from exc
            shutil.rmtree(job.folder)


# --- what is not one call gone wrong


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_old_listings_and_removed_files_that_stay(tmp_path: Path, sick: SickOS, past: Past, operation: Operation) -> None:
    for calls, make in ((("scandir", "listdir"), old_listing), (("unlink",), lambda root: silly_rename)):
        job = Job(past, tmp_path / "run", warm=operation.warm)
        trouble = make(str(job.folder))
        fired: list[str] = []

        def decide(
            name: str, nth: int, calls: tuple[str, ...] = calls, trouble: Trouble = trouble, fired: list[str] = fired
        ) -> Trouble | None:
            if name in calls:
                fired.append(name)
                return trouble
            return None

        assert strike(job, sick, operation, decide) == "NoneType"
        assert fired or calls[0] not in operation.calls
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
        with pytest.raises((Fenced, CommitUnknown, DamagedRecord)) as caught:
            act(job)
        sick.heal()
        if isinstance(caught.value, DamagedRecord):
            assert commits > log._WHOLE
            assert "a cache may be old" in str(caught.value)
        if isinstance(caught.value, CommitUnknown):
            assert looks > 5
            assert job.store.resolve(caught.value) is False
        assert job.state == before
        with pytest.raises(Fenced):
            write(job.store)
        job.store.close()
        shutil.rmtree(job.folder)


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 10**6])
@pytest.mark.parametrize("act", [lambda job: job.store.acquire(), Job.prune, lambda job: job.store.resume({"step": 0})])
def test_a_new_job_takes_over_although_it_cannot_see_the_newest_records(
    tmp_path: Path, sick: SickOS, past: Past, act: Callable[[Job], object], looks: int
) -> None:
    job = Job(past, tmp_path / "run", warm=False)
    hide = hide_new_names(str(job.folder), looks)
    with store_on(backend_at(job.folder), keep_last="all", owner="older") as older:
        for step in range(3):
            older.save({"step": 20 + step}, step=20 + step)
        before = job.state
        sick.start(lambda name, nth: hide if name in LOOKS else None)
        try:
            act(job)
        except CkptStoreError:
            assert looks >= 20
        sick.heal()
        act(job)
        state = job.state
        assert state.owner == "job"
        assert steps(state) == ([0, 22] if act is Job.prune else steps(before)), "the newest, and what has a name, stays"
        assert job.store.load() == {"step": 22}
        with pytest.raises(Fenced):
            write(older)
    job.store.close()


@pytest.mark.parametrize("looks", [1, 2, 5, 20, 10**6])
def test_what_is_not_seen_is_not_collected_and_not_taken_for_damage(tmp_path: Path, sick: SickOS, past: Past, looks: int) -> None:
    """An old job's tools, beside a newer one."""
    job = Job(past, tmp_path / "run", warm=True)
    hide = hide_new_names(str(job.folder), looks)
    with store_on(backend_at(job.folder), keep_last="all", owner="newer") as newer:
        for step in range(3):
            newer.save({"step": 20 + step}, step=20 + step)
        (job.folder / f"data/e{job.state.epoch}-s99-ba9876543210").mkdir()
        (job.folder / f"data/e{job.state.epoch}-s99-ba9876543210/state.pt").write_bytes(b"the newer job is about to save this")
        before = sorted(job.folder.rglob("*"))
        sick.start(lambda name, nth: hide if name in LOOKS else None)
        for act in (job.store.gc, job.store.load, lambda: store_on(backend_at(job.folder)).load()):
            try:
                found = act()
            except CkptStoreError:
                assert looks >= 20
            else:
                assert not isinstance(found, dict) or found["step"] in (3, 20, 21, 22)
        sick.heal()
        assert sorted(job.folder.rglob("*")) == before
        assert newer.verify() == []
    job.store.close()
