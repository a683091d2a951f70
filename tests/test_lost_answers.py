"""Every kind of fault at every call to the storage: what was said about the outcome is true, then and later.

Each operation is run once in peace and its calls are counted; then it is run again for each call and each kind of fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import pytest
from stores import contents, new_memory, objects, state_of, store_on, write

from ckptstore import Store
from ckptstore.backends.memory import MemoryBackend
from ckptstore.errors import AlreadyExists, Ambiguous, BackendError, CkptStoreError, CommitUnknown, Fenced
from ckptstore.protocol import Backend
from ckptstore.record import Record
from ckptstore.testing import FaultyBackend

_T = TypeVar("_T")
FILES = {"a": b"first", "b/c": b"second", "d": b""}


class Cursed(FaultyBackend):
    """Storage on which a chosen call, and perhaps all later ones, go wrong."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.capabilities = replace(inner.capabilities, parallel=1)  # the same calls in the same order each time
        self.seen: Counter[str] = Counter()
        self.curse: Callable[[str, int, Callable[[], Any]], Any] | None = None
        self.late: list[tuple[int, str, bytes]] = []
        self.last_put: tuple[str, bytes] = ("", b"")

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        self.late = [(left - 1, key, data) for left, key, data in self.late]
        for left, key, data in self.late:
            if left == 0:
                self.land(key, data)
        self.seen[method] += 1
        result: _T = self.curse(method, self.seen[method], call) if self.curse else call()
        return result

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        self.last_put = (key, data)
        super().put_if_absent(key, data, ready)

    def land(self, key: str, data: bytes) -> None:
        with suppress(AlreadyExists):
            self.inner.put_if_absent(key, data)

    def land_all(self) -> None:
        """Let every packet that is still under way arrive."""
        for _, key, data in self.late:
            self.land(key, data)

    def heal(self) -> None:
        self.curse = None


# --- kinds of fault: what a call does instead

Kind = Callable[[Cursed, str, Callable[[], Any]], Any]


def refused(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    raise BackendError("refused")


def lost_request(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    raise Ambiguous("no answer")


def lost_answer(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    call()
    raise Ambiguous("no answer")


def not_durable(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    call()
    raise Ambiguous("visible, but the flush failed", durable=False)


def sent_twice(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    call()
    raise AlreadyExists("the second of two packets")


def late(after: int) -> Kind:
    def arrive(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
        backend.late.append((after, *backend.last_put))
        raise Ambiguous("no answer")

    arrive.__name__ = f"late by {after} calls"
    return arrive


def interrupted(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    raise KeyboardInterrupt


def interrupted_after(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    call()
    raise KeyboardInterrupt


def no_memory(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
    raise MemoryError


ANYWHERE: list[Kind] = [refused, lost_request, lost_answer, interrupted, interrupted_after, no_memory]
AT_THE_LOG: list[Kind] = [not_durable, sent_twice, *(late(n) for n in (1, 2, 3, 5, 1000))]
READS = {"get", "read_into", "stat", "list", "list.item"}


@dataclass(frozen=True)
class Fault:
    kind: Kind
    method: str
    nth: int
    span: str
    """``once``, ``method`` (each later call of the same method too) or ``all`` (every later call of any method)."""

    def __str__(self) -> str:
        return f"{self.kind.__name__} at {self.method} {self.nth} {self.span}"

    def put_on(self, backend: Cursed) -> None:
        struck = False

        def curse(method: str, nth: int, call: Callable[[], Any]) -> Any:
            nonlocal struck
            here = method == self.method and (nth == self.nth if self.span == "once" else nth >= self.nth)
            struck = struck or here
            if not here and not (struck and self.span == "all"):
                return call()
            if not here and method != "put_if_absent":
                return refused(backend, method, call) if self.kind in AT_THE_LOG else self.kind(backend, method, call)
            return self.kind(backend, method, call)

        backend.seen.clear()
        backend.curse = curse


# --- operations


class Job:
    """A store with a history, and a job about to do one thing to it."""

    def __init__(self, *, warm: bool) -> None:
        self.storage: MemoryBackend = new_memory()
        raw, self.before, self.data = history()
        objects(self.storage).update(raw)
        self.backend = Cursed(self.storage)
        self.store = store_on(self.backend, keep_last="all", owner="job")
        self.saving = ""
        if warm:
            self.store.acquire()
            self.store.tag("warm", "latest")

    def save(self) -> None:
        with self.store.transaction("latest", step=9) as tx:
            self.saving = tx.id
            for path, data in FILES.items():
                with tx.open(path) as file:
                    file.write(data)

    def prune(self) -> None:
        with store_on(self.backend, keep_last=1, owner="job") as strict:
            self.store = strict
            strict.prune()


@cache
def history() -> tuple[dict[str, bytes], Record, dict[str, dict[str, bytes]]]:
    """Return what three jobs left behind (checkpoints, names, and the data of one that died), its state, and each one's files."""
    storage = new_memory()
    with store_on(storage, keep_last="all") as first:
        for step in range(3):
            first.save({"x": step}, step=step)
        first.tag("old", first.checkpoint(step=0))
    with store_on(storage, keep_last="all") as second:
        second.save({"x": 3}, step=3)
        objects(storage)["data/e1-s7-0123456789ab/state.pt"] = b"left by the first job, which died"
        data = {c.id: contents(second, c.id) for c in second}
    return dict(objects(storage)), state_of(storage), data


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
    Operation("resume", lambda job: job.store.resume({"x": 0}), lambda s: s.resumed is not None, warm=False),
    Operation("tag", lambda job: job.store.tag("best", "old"), lambda s: "best" in s.names),
    Operation("first tag", lambda job: job.store.tag("best", "old"), lambda s: "best" in s.names, warm=False),
    Operation("delete", lambda job: job.store.delete("old"), lambda s: 0 not in steps(s)),
    Operation("prune", Job.prune, lambda s: 1 not in steps(s)),
    Operation("gc", lambda job: job.store.gc(), lambda s: True),
]


def faults(operation: Operation) -> Iterator[Fault]:
    job = Job(warm=operation.warm)
    job.backend.seen.clear()
    operation.run(job)
    job.store._engine.settle()
    calls = {method: n for method, n in job.backend.seen.items() if method not in ("close", "writer.abort")}
    assert sum(calls.values()) >= 3, calls
    assert operation.took_effect(state_of(job.storage))
    for method, n in calls.items():
        for kind in ANYWHERE + (AT_THE_LOG if method == "put_if_absent" else []):
            if kind is lost_answer and method in READS:
                continue  # a read has no effect that it could have after all
            for nth in range(1, n + 1):
                for span in ("once", "method", "all") if method == "put_if_absent" else ("once", "all"):
                    yield Fault(kind, method, nth, span)


# --- the promises


def resolved(store: Store, error: CommitUnknown) -> bool:
    """Return what the store says in the end of what became of an operation."""
    try:
        return store.resolve(error.op_id)
    except CommitUnknown as again:
        assert not error.durable and not again.durable
        assert again.op_id == error.op_id
        return True  # it is visible, which is all that is promised then


@contextmanager
def told(fault: Fault) -> Iterator[None]:
    """Say under which fault a check failed."""
    try:
        yield
    except BaseException as exc:
        raise AssertionError(f"under this fault: {fault}") from exc


def strike(operation: Operation, fault: Fault) -> tuple[Job, BaseException | None]:
    """Run the operation under the fault, and check what must hold at once."""
    job = Job(warm=operation.warm)
    fault.put_on(job.backend)
    error: BaseException | None = None
    try:
        operation.run(job)
    except (CkptStoreError, KeyboardInterrupt, MemoryError) as exc:
        error = exc
    job.store._engine.settle()
    job.backend.heal()

    assert not isinstance(error, Fenced), "nobody else was there"
    if isinstance(error, KeyboardInterrupt | MemoryError):
        assert fault.kind in (interrupted, interrupted_after, no_memory)
    now = operation.took_effect(state_of(job.storage))
    if error is None:
        assert now, "it said that it was done"
    elif isinstance(error, CkptStoreError) and not isinstance(error, CommitUnknown):
        assert not now or operation.name == "gc", "it said that it was not done"
    if isinstance(error, CommitUnknown) and job.saving:
        check_data(job)
    check_history(job, operation)
    return job, error


def check_history(job: Job, operation: Operation) -> None:
    """Check that all that was acknowledged before is there, whole, but for what was asked to go."""
    state = state_of(job.storage)
    may_go = {0} if operation.name == "delete" else {1, 2} if operation.name == "prune" else set()
    missing = [e.step for e in job.before.checkpoints if state.entry(e.id) is None]
    assert set(missing) <= may_go
    reader = store_on(job.storage)
    for entry in state.checkpoints:
        assert entry.id in job.data or entry.step in (None, 9)
        if entry.step is not None:
            assert contents(reader, entry.id) == job.data.get(entry.id, FILES)
    assert set(job.before.names) - ({"old"} if operation.name == "delete" else set()) <= set(state.names)
    slots = sorted(int(key[4:]) for key in objects(job.storage) if key.startswith("log/0"))
    assert slots == list(range(1, len(slots) + 1))


def check_data(job: Job) -> None:
    """Check that the data of an outcome that is not known is all there."""
    keys = {key.removeprefix(f"data/{job.saving}/") for key in objects(job.storage) if job.saving in key}
    assert keys == {*FILES, "manifest.json"}


def check_next_save(store: Store, job: Job) -> None:
    made = write(store, "next", {"x": b"life goes on"})
    store._engine.settle()  # what it deletes in the background must not go while the storage is looked through
    assert contents(store_on(job.storage), made) == {"x": b"life goes on"}


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_every_fault_at_every_call_and_the_same_job_goes_on(operation: Operation) -> None:
    outcomes: Counter[str] = Counter()
    for fault in faults(operation):
        with told(fault):
            job, error = strike(operation, fault)
            outcomes[type(error).__name__] += 1
            unknown = isinstance(error, CommitUnknown)
            if unknown:
                job.store.gc()
                if job.saving:
                    check_data(job)
            answer = resolved(job.store, error) if isinstance(error, CommitUnknown) else None
            settled = operation.took_effect(state_of(job.storage))
            # An acquisition that never was is done anew, to take the slot; its answer is still that it was not.
            assert answer in (None, settled) or (operation.name == "acquire" and answer is False), "resolve told the truth"
            job.backend.land_all()
            if answer is not None or isinstance(error, CkptStoreError | None):
                assert operation.took_effect(state_of(job.storage)) == settled, "nothing changes its mind later"
            if isinstance(error, CommitUnknown):
                assert resolved(job.store, error) == answer
            check_next_save(job.store, job)
            check_history(job, operation)
            job.store.close()
    if operation.name != "gc":
        assert min(outcomes["NoneType"], outcomes["BackendError"], outcomes["KeyboardInterrupt"]) >= 3, outcomes
        assert outcomes["CommitUnknown"] >= (0 if operation.name.startswith("first") else 3), outcomes


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda o: o.name)
def test_every_fault_at_every_call_and_another_job_takes_over(operation: Operation) -> None:
    for fault in faults(operation):
        with told(fault):
            job, error = strike(operation, fault)
            with store_on(job.storage, keep_last="all", owner="newer") as newer:
                newer.acquire()
                taken = state_of(job.storage)
                assert taken.epoch > job.before.epoch
                assert taken.owner == "newer"
                settled = operation.took_effect(taken)
                if error is None and operation.name != "acquire":
                    assert settled
                job.backend.land_all()
                assert state_of(job.storage) == taken, "nothing of the older job takes effect any more"
                check_history(job, operation)
                if isinstance(error, CommitUnknown):
                    assert resolved(job.store, error) in ([True, False] if operation.name == "acquire" else [settled])
                if "job" in taken.past_owners:  # else it never got the store, and may still come to own it
                    with pytest.raises(Fenced):
                        write(job.store)
                named = {e.id for e in state_of(job.storage).checkpoints}
                assert {key.split("/")[1] for key in objects(job.storage) if key.startswith("data/")} == named
                check_next_save(newer, job)
            job.store.close()


def test_an_outcome_is_told_even_if_the_lost_packet_arrives_while_it_is_looked_for() -> None:
    job = Job(warm=True)
    Fault(late(1000), "put_if_absent", 1, "method").put_on(job.backend)
    with pytest.raises(CommitUnknown) as error:
        job.save()

    def arrive(backend: Cursed, method: str, call: Callable[[], Any]) -> Any:
        if method == "stat":  # the slot was free when its record was asked for
            backend.land_all()
        return call()

    job.backend.curse = lambda method, nth, call: arrive(job.backend, method, call)
    assert job.store.resolve(error.value)
    assert 9 in steps(state_of(job.storage))
