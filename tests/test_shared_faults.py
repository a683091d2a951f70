"""What a shared file system can do to each system call of each operation: what was said about the outcome is true, then and later."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sick_os import SickOS, Trouble, error_after, error_before, half, hide_new_names, old_listing, silly_rename
from stores import contents, state_of, store_on, write

from ckptstore import Store
from ckptstore.backends import shared
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import AlreadyExists, BackendError, CkptStoreError, CommitUnknown, Fenced, NoAtomicCreate, NotFound
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
    ("preadv", "EBADF", error_before(errno.EBADF)),
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


def test_all_is_flushed_and_closed_before_the_link_and_the_folder_after_it(tmp_path: Path, sick: SickOS) -> None:
    steps: list[str] = []

    def note(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        name = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
        kind = "temp" if name.endswith(".partial") else os.path.relpath(name, tmp_path)
        steps.append(f"{call.__name__.strip('_').replace('no_flush', 'fsync')} {kind}")
        return call(*args, **kwargs)

    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("log/1", b"settles what is above")
    sick.start(lambda name, nth: note if name in ("pwrite", "fsync", "close", "link") else None)
    backend.put_if_absent("log/2", b"2", lambda: steps.append("ready"))
    put = [step for step in steps if not step.startswith("close") or step == "close temp"]
    assert put == ["pwrite temp", "ready", "fsync temp", "close temp", "link temp", "fsync log"]
    steps.clear()
    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"a"), 0)
    writer.start_finish()
    writer.finish()
    finish = [step for step in steps if not step.startswith("close") or step == "close temp"]
    assert finish == ["pwrite temp", "fsync temp", "close temp", "fsync .", "fsync data", "link temp", "fsync data/x"]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_old_listings_and_removed_files_that_stay(tmp_path: Path, sick: SickOS, past: Past, operation: Operation) -> None:
    for calls, make in ((("scandir", "listdir"), old_listing), (("unlink",), lambda root: silly_rename)):
        job = Job(past, tmp_path / "run", warm=operation.warm)
        trouble = make(str(job.folder))
        assert strike(job, sick, operation, lambda name, nth, c=calls, t=trouble: t if name in c else None) == "NoneType"  # type: ignore[misc]
        shutil.rmtree(job.folder)


def test_removed_files_that_somebody_has_open_are_neither_listed_nor_deleted(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("data/x/a", b"a")
    odd = tmp_path / "data" / "x" / f".nfs{0:024x}"
    odd.write_bytes(b"somebody has it open")
    assert [info.key for info in backend.list("")] == ["data/x/a"]
    backend.delete(["data/x/a"])
    assert [info.key for info in backend.list("")] == []
    assert odd.exists()


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


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_only_a_single_writer_may_write(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    sick.start(lambda name, nth: error_before(number) if name == "link" else None)
    with Store(f"shared://{tmp_path}") as store, pytest.raises(NoAtomicCreate, match=r"hard links.*single_writer=1"):
        write(store)
    with Store(f"shared://{tmp_path}?single_writer=1") as store:
        made = write(store, files=FILES)
        assert contents(store, made) == FILES


def test_a_link_that_replaces_is_found_out(tmp_path: Path, sick: SickOS) -> None:
    def replacing(call: Callable[..., object], args: tuple[str, str], kwargs: dict[str, int]) -> None:
        fd = kwargs["dst_dir_fd"]
        with suppress(FileNotFoundError):
            os.unlink(args[1], dir_fd=fd)
        os.link(*args, src_dir_fd=fd, dst_dir_fd=fd)

    (tmp_path / "log").mkdir()
    sick.start(lambda name, nth: replacing if name == "link" else None)
    with Store(f"shared://{tmp_path}") as store, pytest.raises(NoAtomicCreate, match="single_writer=1"):
        write(store)


def test_two_links_that_both_say_that_they_won(tmp_path: Path, sick: SickOS) -> None:
    """The file under the name is looked at, whatever was said."""

    def lie(call: Callable[..., object], args: tuple[str, str], kwargs: dict[str, int]) -> None:
        with suppress(FileExistsError):
            os.link(*args, **kwargs)

    (tmp_path / "log").mkdir()
    first, second = backend_at(tmp_path), backend_at(tmp_path)
    sick.start(lambda name, nth: lie if name == "link" else None)
    first.put_if_absent("log/1", b"first")
    with pytest.raises(AlreadyExists):
        second.put_if_absent("log/1", b"second")
    assert second.get("log/1", 10) == b"first"


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EIO])
def test_the_count_of_links_tells_when_the_name_is_not_seen_yet(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    made = error_after(number)

    def hidden(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if args[0] == "1":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: made if name == "link" else hidden if name == "stat" else None)
    backend.put_if_absent("log/1", b"1")
    assert backend.get("log/1", 1) == b"1"


def test_a_folder_that_has_become_stale_is_opened_anew_for_the_link(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    stale: list[int] = []

    def link(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        stale[:] = stale or [os.dup(kwargs["dst_dir_fd"]), kwargs["dst_dir_fd"]]
        if kwargs["dst_dir_fd"] in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: link if name == "link" else None)
    backend.put_if_absent("log/1", b"1")
    assert backend.get("log/1", 1) == b"1"
    os.close(stale[0])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_rename_that_was_made_counts(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    sick.start(lambda name, nth: error_after(number) if name == "replace" else None)
    backend.replace("hint", b"new")
    assert backend.get("hint", 3) == b"new"
    assert sorted(os.listdir(tmp_path)) == ["hint", "log"]


@pytest.mark.parametrize(
    ("method", "known", "times", "found"),
    [
        ("stat", "created", 4, True),
        ("stat", "met", 4, True),
        ("stat", False, 1, True),
        ("stat", False, 2, False),  # the newest slot is found by looking at what is not there
        ("stat", True, 4, True),
        ("get", False, 4, True),  # its folder lists it
        ("get", True, 4, True),
        ("get", False, 10**6, None),
        ("stat", True, 10**6, None),
    ],
)
def test_what_is_missing_is_looked_for_again(
    tmp_path: Path, sick: SickOS, method: str, known: bool | str, times: int, found: bool | None
) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    (backend if known == "created" else backend_at(tmp_path)).put_if_absent("log/1", b"1")
    if known == "met":
        with pytest.raises(AlreadyExists):
            backend.put_if_absent("log/1", b"2")
    elif known is True:
        backend.stat("log/1")
    left = times

    def missing(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        nonlocal left
        if args[0] == "1" and left:
            left -= call.__name__ == method.replace("get", "open")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    def look() -> object:
        return backend.stat("log/1") if method == "stat" else backend.get("log/1", 1)

    sick.start(lambda name, nth: missing if name in ("open", "stat") else None)
    if found:
        assert look()
    else:
        with pytest.raises(BackendError if found is None else NotFound):
            look()


@pytest.mark.parametrize("call", PATHS)
def test_what_the_server_calls_stale_is_opened_anew(tmp_path: Path, sick: SickOS, call: str) -> None:
    """Nobody is told of it but by the time it takes."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("log/1", b"1")
    struck = 0
    for act in (
        lambda: backend.get("log/1", 1),
        lambda: backend.stat("log/1"),
        lambda: backend.read_into("log/1", 0, memoryview(bytearray(1))),
        lambda: list(backend.list("")),
        lambda: backend.replace("hint", b"x"),
        lambda: backend.put_if_absent("data/x/a", b"x"),
        lambda: backend.put_if_absent("data/y/a", b"x"),
        lambda: backend.open_writer("data/z/a").abort(),
        lambda: backend.delete(["data/x/a"]),
        lambda: backend.delete(["data/y/a"]),
    ):
        sick.start(lambda name, nth: error_before(errno.ESTALE) if name == call and nth <= 2 else None)
        act()
        struck += sick.seen[call]
        sick.heal()
    found = [info.key for info in backend.list("")]
    assert [key for key in found if not key.endswith(("/", ".partial"))] == ["hint", "log/1"]
    assert struck or call in ("listdir", "lstat")


def test_a_file_that_was_replaced_while_it_was_read_is_read_again(tmp_path: Path, sick: SickOS) -> None:
    """JuiceFS then answers EBADF."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.replace("hint", b"1")
    for read in (lambda: backend.get("hint", 9), lambda: backend.read_into("hint", 0, memoryview(bytearray(1)))):
        sick.start(lambda name, nth: error_before(errno.EBADF) if name == "preadv" and nth == 1 else None)
        read()
        assert sick.seen["preadv"] >= 2
        sick.heal()


def test_a_file_that_could_not_be_made_durable_has_no_name(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    for nth in range(1, 100):
        backend = backend_at(tmp_path)
        writer = backend.open_writer("data/x/a")
        writer.write(0, memoryview(b"a"), 0)
        sick.start(lambda name, n, nth=nth: error_before(errno.EIO) if name == "fsync" and n == nth else None)  # type: ignore[misc]
        try:
            writer.finish()
        except BackendError:
            writer.abort()
            assert list(backend.list("")) == []
        else:
            break
    assert nth > 4
