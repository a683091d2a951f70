"""Saves in the background: what a `PendingSave` says and when, and that nothing is lost or goes unnoticed."""

from __future__ import annotations

import errno
import gc
import io
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import evidence
import pytest
import torch
from procs import in_fork, litter
from stores import new_memory, state_of, store_on, write
from test_interrupted import HandlerAt, interrupt

from ckptstore import (
    Ambiguous,
    BackendError,
    Checkpoint,
    CommitUnknown,
    Fenced,
    InvalidName,
    NotSerializable,
    PendingSave,
    Store,
    StoreWarning,
    UsageError,
    background,
    folder,
)
from ckptstore.backends.local import LocalBackend
from ckptstore.backends.memory import MemoryBackend
from ckptstore.hostcopy import HostCopy
from ckptstore.hostmemory import Buffer
from ckptstore.protocol import PartWriter
from ckptstore.testing import Fault, FaultyBackend
from ckptstore.wrapper import Wrapper


class Valve(Wrapper):
    """A backend that lets nobody write data while it is shut, and tells that somebody wants to."""

    def __init__(self, inner: MemoryBackend) -> None:
        super().__init__(inner)
        self.open = threading.Event()
        self.reached = threading.Event()
        self.trouble: BaseException | None = None

    def open_writer(self, key: str) -> PartWriter:
        self.reached.set()
        assert self.open.wait(60)
        if self.trouble is not None:
            raise self.trouble
        return self.inner.open_writer(key)


@pytest.fixture
def valve() -> Iterator[Valve]:
    """It is shut. What a test leaves going on ends after it."""
    it = Valve(new_memory())
    yield it
    it.open.set()


def value(checkpoint: Checkpoint) -> Any:
    return checkpoint.load()["x"].item()


def state(x: float) -> dict[str, Any]:
    return {"x": torch.tensor(x)}


# -- a future of a checkpoint


def test_a_save_in_the_background(valve: Valve) -> None:
    store = store_on(valve)
    live = state(1)
    pending = store.save_async(live, "other", step=3, metrics={"loss": torch.tensor(0.5)}, metadata={"a": 1}, rng=True)
    assert isinstance(pending, PendingSave) and isinstance(pending, Future)
    called: queue.SimpleQueue[object] = queue.SimpleQueue()
    pending.add_done_callback(called.put)
    assert valve.reached.wait(60)
    live["x"] += 1
    assert pending.running() and not pending.done() and called.empty()
    with pytest.raises(TimeoutError if sys.version_info >= (3, 11) else Exception):
        pending.result(timeout=0)
    assert store.names() == {}
    valve.open.set()
    checkpoint = pending.result(60)
    assert value(checkpoint) == 1
    assert (checkpoint.step, checkpoint.metrics, checkpoint.metadata) == (3, {"loss": 0.5}, {"a": 1})
    assert set(checkpoint.files) == {"state.pt", "rng.pt"}
    assert store.names() == {"other": checkpoint.id}
    store.close()
    assert called.get(timeout=60) is pending and called.empty()
    assert pending.exception() is None and not pending.running()


def test_all_is_taken_at_the_call(valve: Valve) -> None:
    class Counting:
        def __init__(self) -> None:
            self.n = 1

        def state_dict(self) -> dict[str, Any]:
            return {"n": self.n, "deep": [self.n]}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.n = state["n"]

    store = store_on(valve)
    sampler, plain, metrics, metadata = Counting(), Counting(), {"m": 1}, {"k": [1]}
    model = torch.nn.BatchNorm1d(2)
    torch.manual_seed(5)
    pending = store.save_async(
        {"p": plain, "model": model, "plain": [1]}, sampler=sampler, metrics=metrics, metadata=metadata, rng=True
    )
    expected = torch.rand(1)
    sampler.n = plain.n = metrics["m"] = 2
    metadata["k"].append(2)
    model(torch.rand(4, 2))
    valve.open.set()
    checkpoint = pending.result(60)
    loaded = checkpoint.load()
    assert loaded["p"] == {"n": 1, "deep": [1]} and loaded["model"]["num_batches_tracked"] == 0
    assert checkpoint.sampler_state == {"n": 1, "deep": [1]}
    assert checkpoint.metrics == {"m": 1} and checkpoint.metadata == {"k": [1]}
    store.resume({"p": plain}, sampler=sampler)
    assert plain.n == sampler.n == 1 and torch.equal(torch.rand(1), expected)


def test_names_move_and_old_ones_go_only_when_it_is_durable(valve: Valve) -> None:
    store = store_on(valve, keep_last=1)
    valve.open.set()
    first = store.save(state(1))
    valve.open.clear()
    valve.reached.clear()
    pending = store.save_async(state(2))
    assert valve.reached.wait(60)
    assert state_of(valve).names == {"latest": first.id}
    assert value(first) == 1
    valve.open.set()
    second = pending.result(60)
    record = state_of(valve)
    assert record.names == {"latest": second.id} and first.id in record.retired


def test_bad_arguments_are_refused_at_the_call(valve: Valve) -> None:
    store = store_on(valve)
    with pytest.raises(InvalidName):
        store.save_async({}, "a/b")
    with pytest.raises(UsageError, match="when_busy"):
        store.save_async({}, when_busy="never")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="optimizer must be"):
        store.save_async({}, optimizer=torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match="checked"):
        store.save_async({}, checked=True)
    with pytest.raises(NotSerializable):
        store.save_async({"f": lambda: 0})

    class Broken:
        def state_dict(self) -> Any:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.save_async({"b": Broken()})
    assert not valve.reached.is_set()
    valve.open.set()
    store.save(state(1))
    assert [value(c) for c in store] == [1]
    store.close()


def test_a_future_among_others(valve: Valve) -> None:
    store = store_on(valve)
    pending = store.save_async(state(1))
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(pending)
    valve.open.set()
    assert wait([pending], 60).done == {pending}
    again = pickle.loads(pickle.dumps(Store("memory://pickled")))
    assert again.save_async(state(2)).result(60).step is None


# -- one at a time


def test_the_next_one_waits(valve: Valve) -> None:
    store = store_on(valve, keep_last="all")
    first = store.save_async(state(1))
    assert valve.reached.wait(60)
    threading.Timer(0.05, valve.open.set).start()
    second = store.save_async(state(2))
    assert first.done()
    assert [value(f.result(60)) for f in (first, second)] == [1, 2]
    store.close()
    assert [value(c) for c in store] == [1, 2]


def test_the_next_one_is_skipped(valve: Valve) -> None:
    store = store_on(valve)
    first = store.save_async(state(1))

    class Untouched:
        def state_dict(self) -> Any:
            raise AssertionError("nobody needs it")

    second = store.save_async({"u": Untouched()}, when_busy="skip")
    assert second.cancelled() and second.done() and not first.done()
    with pytest.raises(CancelledError):
        second.result()
    valve.open.set()
    first.result(60)
    store.close()
    assert [value(c) for c in store] == [1]


def test_the_next_one_replaces_what_has_not_begun(valve: Valve) -> None:
    store = store_on(valve, keep_last="all")
    first = store.save_async(state(1))
    assert valve.reached.wait(60)
    second = store.save_async(state(2), when_busy="replace")
    assert not second.done()
    third = store.save_async(state(3), when_busy="replace")
    assert second.cancelled() and not first.done() and not third.done()
    assert wait([second], 0).done == {second}
    skipped = store.save_async(state(4), when_busy="skip")
    assert skipped.cancelled()
    valve.open.set()
    assert [value(f.result(60)) for f in (first, third)] == [1, 3]
    store.close()
    assert [value(c) for c in store] == [1, 3]


def test_what_changes_the_store_waits_and_keeps_the_order(valve: Valve) -> None:
    store = store_on(valve, keep_last="all")
    changes: dict[str, Callable[[], object]] = {
        "save": lambda: store.save(state(9)),
        "transaction": lambda: write(store),
        "tag": lambda: store.tag("best", "latest"),
        "delete": lambda: store.delete("best"),
        "prune": store.prune,
        "gc": store.gc,
        "acquire": store.acquire,
        "resume": lambda: store.resume(state(0)),
    }
    for name, change in changes.items():
        valve.open.clear()
        valve.reached.clear()
        pending = store.save_async(state(1))
        assert valve.reached.wait(60)
        threading.Timer(0.02, valve.open.set).start()
        change()
        assert not store._background._others(), name
        pending.result(60)  # which its thread tells a moment after it has let the next one go on
    store.close()


def test_callbacks_may_use_the_store(valve: Valve) -> None:
    store = store_on(valve, keep_last="all")
    later: list[PendingSave] = []
    done = threading.Event()

    def go_on(pending: Future[Checkpoint]) -> None:
        store.tag("best", pending.result())
        store.save(state(2))
        later.append(store.save_async(state(3)))
        done.set()

    valve.open.set()
    store.save_async(state(1)).add_done_callback(go_on)
    assert done.wait(60)
    assert value(later[0].result(60)) == 3
    store.close()
    assert value(store.checkpoint("best")) == 1 and value(store.checkpoint()) == 3


# -- failures


def failing(valve: Valve, error: BaseException) -> tuple[Store, PendingSave]:
    """Begin a save that fails, and wait until it has."""
    store = store_on(valve)
    valve.trouble = error
    valve.open.set()
    pending = store.save_async(state(1))
    wait([pending], 60)
    return store, pending


@pytest.mark.parametrize(
    "error", [BackendError("full"), MemoryError("none left"), KeyboardInterrupt(), OSError(5, "not ours")], ids=repr
)
def test_a_failure_is_raised_at_the_next_call_once(valve: Valve, error: BaseException) -> None:
    calls: list[Callable[[Store], object]] = [
        lambda s: s.save_async(state(2)),
        lambda s: s.save(state(2)),
        lambda s: s.transaction(),
        lambda s: s.names(),
        lambda s: s.checkpoints(),
        lambda s: s.load(),
        lambda s: s.checkpoint(),
        lambda s: s.tag("a", "latest"),
        lambda s: s.verify(),
        lambda s: s.resume({}),
        lambda s: s.close(),
    ]
    for call in calls:
        store, _ = failing(valve, error)
        with pytest.raises(type(error)) as caught:
            call(store)
        assert caught.value is error
        valve.trouble = None
        assert store.names() == {}
        store.save(state(3))
        store.close()
        assert not [k for k in (i.key for i in valve.list("data/")) if store.checkpoint().id not in k]
        valve.inner = new_memory()


def test_a_failure_that_was_asked_about_is_not_raised_again(valve: Valve) -> None:
    store, pending = failing(valve, BackendError("full"))
    with pytest.raises(BackendError):
        pending.result()
    store.close()
    store, pending = failing(valve, BackendError("full"))
    assert isinstance(pending.exception(), BackendError)
    assert store.names() == {}


@pytest.mark.parametrize("where", ["open_writer", "write"])
def test_a_failure_does_not_keep_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Whoever holds on to it; nor does it take a garbage collection, which may be far off, to let go of that."""
    copies: list[weakref.ref[Any]] = []
    begin = Buffer.__init__

    def begun(self: Buffer, size: int, pinned: bool) -> None:
        begin(self, size, pinned)
        copies.append(weakref.ref(self._memory))

    def trouble(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Buffer, "__init__", begun)
    monkeypatch.setattr(*((LocalBackend, "open_writer") if where == "open_writer" else (folder, "write_all")), trouble)
    gc.collect()
    gc.disable()
    try:
        store = Store(tmp_path / "store")
        pending = store.save_async({"x": torch.zeros(5 << 20)})
        error = pending.exception(60)
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC
        store.close()
        assert [copy() for copy in copies] == [None]
        assert "in _save\n" in "".join(traceback.format_exception(error)), "where it came from is known all the same"
    finally:
        gc.enable()


def test_a_failure_does_not_hide_the_error_that_leaves_the_block(valve: Valve) -> None:
    with (
        pytest.warns(StoreWarning, match="full"),
        pytest.raises(ZeroDivisionError),
        failing(valve, BackendError("full"))[0],
    ):
        raise ZeroDivisionError
    with pytest.raises(BackendError), failing(valve, BackendError("full"))[0]:
        pass


def test_fenced_in_the_background() -> None:
    backend = Valve(new_memory())
    backend.open.set()
    store = store_on(backend)
    first = store.save(state(1))
    backend.open.clear()
    backend.reached.clear()
    pending = store.save_async(state(2))
    assert backend.reached.wait(60)
    newer = store_on(backend.inner)
    newer.acquire()
    backend.open.set()
    assert isinstance(pending.exception(60), Fenced)
    with pytest.raises(Fenced):
        store.save_async(state(3)).result(60)
    assert newer.names() == {"latest": first.id}
    store.close()


def test_an_unknown_outcome_in_the_background() -> None:
    faulty = FaultyBackend(new_memory())
    store = store_on(faulty)
    store.save(state(1))
    lost = [Fault("put_if_absent", 0, after=Ambiguous("no answer")), Fault("get", 0, before=BackendError("gone away"))]
    faulty.plan.extend(lost)
    pending = store.save_async(state(2))
    wait([pending], 60)
    faulty.plan.clear()
    with pytest.raises(CommitUnknown) as caught:
        store.names()
    assert store.resolve(caught.value)
    assert value(store.checkpoint()) == 2
    store.close()


# -- giving up


def test_what_is_given_up_is_never_published(valve: Valve) -> None:
    store = store_on(valve)
    pending = store.save_async(state(1))
    assert valve.reached.wait(60)
    assert pending.cancel() and pending.cancelled() and pending.cancel()
    with pytest.raises(CancelledError):
        pending.result()
    valve.open.set()
    store.close()
    assert store.names() == {} and not list(valve.list("data/"))
    second = store.save(state(2))
    assert store.names() == {"latest": second.id}


def test_it_is_too_late_to_give_up_once_the_commit_is_under_way() -> None:
    backend = new_memory()

    class Slow(Wrapper):
        entered, go_on = threading.Event(), threading.Event()

        def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
            def then() -> None:
                if ready is not None:
                    ready()
                    self.entered.set()
                    assert self.go_on.wait(60)

            self.inner.put_if_absent(key, data, then)

    slow = Slow(backend)
    store = store_on(slow)
    pending = store.save_async(state(1))
    assert slow.entered.wait(60)
    assert not pending.cancel() and not pending.cancelled()
    slow.go_on.set()
    assert value(pending.result(60)) == 1
    assert not pending.cancel()
    store.close()


def test_giving_up_what_waits_its_turn(valve: Valve) -> None:
    store = store_on(valve)
    first = store.save_async(state(1))
    second = store.save_async(state(2), when_busy="replace")
    assert second.cancel()
    valve.open.set()
    first.result(60)
    store.close()
    assert value(store.checkpoint()) == 1


# -- interruptions, forks, the end of the process


def test_an_interrupt_while_waiting_or_copying(valve: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_on(valve)
    pending = store.save_async(state(1))
    assert valve.reached.wait(60)
    threading.Timer(0.05, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        store.save_async(state(2))
    valve.open.set()
    assert value(pending.result(60)) == 1

    from ckptstore import hostcopy

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hostcopy, "_move_all", interrupted)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(KeyboardInterrupt):
        store.save_async({**state(3), "o": optimizer}, optimizer=optimizer)
    monkeypatch.undo()
    optimizer.step()
    assert value(store.save_async(state(4)).result(60)) == 4
    store.close()
    assert value(store.checkpoint()) == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some come where Python can only say so
@pytest.mark.parametrize("stride", [pytest.param(7, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_an_interrupt_at_every_moment(stride: int) -> None:
    """Of the thread that asks for the save and its outcome. Nobody waits for ever, and the next save and step go on."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full((3,), -1.0)
    store = store_on(new_memory(), keep_last=2)
    live = {"p": parameter.data, "x": torch.zeros(2), "o": optimizer}
    store.save_async(live, rng=True).result()
    points = 0

    def change() -> None:
        store.save_async(live, "maybe", optimizer=optimizer, when_busy="replace").result()

    def then() -> None:
        optimizer.step()
        assert store.save_async(live, step=points, optimizer=optimizer).result().load()["p"].tolist() == parameter.tolist()
        store.tag("best", "latest")

    with evidence.experiment("an interrupt at every moment") as tally:
        while True:
            fired, error = interrupt(1 + points * stride, change, then)
            assert error is None or (fired and isinstance(error, KeyboardInterrupt)), repr(error)
            if not fired:
                break
            points += 1
            tally.strike()
        store.close()
        gc.collect()
        assert store.verify() == []
    assert points > 200 / stride


def test_no_memory_for_the_copy(valve: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore import hostmemory

    def full(*_: object) -> None:
        raise MemoryError

    store = store_on(valve)
    valve.open.set()
    monkeypatch.setattr(hostmemory, "Buffer", full)
    with pytest.raises(MemoryError):
        store.save_async(state(1))
    monkeypatch.undo()
    assert value(store.save_async(state(2)).result(60)) == 2
    store.close()


def test_no_thread_can_be_had(valve: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    store = store_on(valve)
    valve.open.set()
    monkeypatch.setattr(background, "start_new_thread", refused)
    pending = store.save_async(state(1))
    assert pending.done() and value(pending.result()) == 1


def test_a_signal_handler_that_saves(valve: Valve) -> None:
    """It comes while this thread is taking a state, and does not wait for itself."""
    store = store_on(valve, keep_last="all")
    valve.open.set()
    made: list[Any] = []

    class Signalled:
        def state_dict(self) -> Any:
            signal.raise_signal(signal.SIGUSR1)
            return {}

    def handler(*_: object) -> None:
        made.append(store.save(state(1)))
        made.append(store.save_async(state(2)).result(60))

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        pending = store.save_async({"s": Signalled(), **state(3)})
    finally:
        signal.signal(signal.SIGUSR1, before)
    pending.result(60)
    store.close()
    assert [value(c) for c in store] == [1, 2, 3]


@pytest.mark.parametrize("how", ["save", "save_async"])
def test_a_signal_handler_that_saves_when_a_thread_is_just_to_be_started(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """It does not wait for the save that this thread is for, which it keeps from starting."""
    store = store_on(new_memory(), keep_last="all")
    made: list[float] = []

    def handler(*args: Any) -> int:
        monkeypatch.undo()
        made.append(value(store.save(state(1)) if how == "save" else store.save_async(state(1)).result(60)))
        return background.start_new_thread(*args)

    def interrupted() -> None:
        made.append(value(store.save_async(state(2)).result(60)))

    monkeypatch.setattr(background, "start_new_thread", handler)
    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(60)
    assert made == [1, 2], "it waits for ever"
    store.save(state(3))
    assert [value(c) for c in store] == [1, 2, 3]
    store.close()


@pytest.mark.parametrize("stride", [pytest.param(37, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("what", "handled"), [("save", "save"), ("save_async", "save"), ("save_async", "save_async")])
def test_a_signal_handler_that_saves_at_every_moment(ram: Path, what: str, handled: str, stride: int) -> None:
    """Of a save, or of the beginning of one in the background. It does not wait for what it has interrupted itself.

    But a thread that it has begun would, for a save that is committing.
    """
    large = {"x": torch.zeros(3 << 18), "y": torch.zeros(3 << 18)}  # for this, threads are started
    store = Store(ram / "store", keep_last=1)
    store.save(large)
    points = 0

    def save(how: str) -> None:
        if how == "save":
            store.save(large)
        else:
            store.save_async(large).result()

    def at_moment(moment: HandlerAt) -> None:
        torch.save(1, io.BytesIO())  # what torch has for each thread is made by the first
        store._engine.workers.close()
        store._engine.writer.close()
        sys.setprofile(moment)
        try:
            save(what)
        finally:
            sys.setprofile(None)
        store._background.wait()
        over.append(points)

    over: list[int] = []
    while True:
        moment = HandlerAt(1 + points * stride, lambda: save(handled))
        thread = threading.Thread(target=at_moment, args=(moment,), daemon=True)
        thread.start()
        thread.join(60)
        assert over[points:] == [points], f"it waits for ever, after a handler at moment {1 + points * stride}"
        if not moment.fired:
            break
        points += 1
    store.close()
    assert len(store.checkpoints()) == 1 and store.verify() == []
    assert points > 150 / stride


def test_a_fork_while_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child can save for itself, step the optimizer and leave; the parent's save goes on."""
    store = Store(tmp_path / "store")
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    gate, real = threading.Event(), HostCopy.copy_rest

    def later(self: HostCopy) -> None:
        assert gate.wait(60)
        real(self)

    monkeypatch.setattr(HostCopy, "copy_rest", later)
    pending = store.save_async({"p": parameter.data}, optimizer=optimizer)

    def in_child() -> bool:
        optimizer.step()
        with pytest.raises(UsageError):
            pending.result(0)
        store.close()
        gate.set()
        return Store(tmp_path / "child").save_async({"c": torch.ones(3)}).result(60).step is None

    assert in_fork(in_child) == 0
    assert not pending.done()
    gate.set()
    pending.result(60)
    assert torch.equal(store.load()["p"], torch.ones(1000))
    store.close()
    with Store(tmp_path / "child") as other:
        assert torch.equal(other.load()["c"], torch.ones(3))


def test_a_fork_knows_nothing_of_what_failed_before_it(valve: Valve) -> None:
    """Nor does it wait for a lock that a thread of its parent's had: a worker that loads data may read the store."""
    store = store_on(valve)
    valve.open.set()
    checkpoint = store.save(state(1))
    valve.trouble = BackendError("no space")
    failed, taken, enough = threading.Event(), threading.Event(), threading.Event()
    store.save_async(state(2)).add_done_callback(lambda _: failed.set())
    assert failed.wait(60)

    def hold() -> None:
        with store._background._lock:
            taken.set()
            assert enough.wait(60)

    def in_child() -> bool:
        signal.alarm(30)  # it may wait for ever
        valve.trouble = None
        return store.names() == {"latest": checkpoint.id} and store.save_async(state(3)).result(60).step is None

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert taken.wait(60)
        assert in_fork(in_child) == 0
    finally:
        enough.set()
        thread.join()
    with pytest.raises(BackendError, match="no space"):
        store.names()


def test_memory_of_the_parent_is_freed_in_a_fork_and_nothing_else(tmp_path: Path) -> None:
    """Although the fork has not got it: what came to lie in its place would be gone."""
    size = 64 << 20
    with Store(tmp_path / "store") as store:
        store.save_async({"x": torch.zeros(size, dtype=torch.uint8)}).result()

        def in_child() -> bool:
            own = [mmap.mmap(-1, size) for _ in range(20)]
            store.names()
            store.close()  # frees the parent's
            for memory in own:
                memory[:1] = memory[-1:] = b"x"
            return True

        assert in_fork(in_child) == 0
        assert store.save_async({"x": torch.ones(size, dtype=torch.uint8)}).result().load()["x"].all()


_LEAVE = """
import sys, threading, torch
from ckptstore import Store
store = Store(sys.argv[1], keep_last="all")
store.save_async({"x": torch.full((9 << 20,), 1, dtype=torch.uint8)}, step=1)
store.save_async({"x": torch.full((9 << 20,), 2, dtype=torch.uint8)}, step=2, when_busy="replace")
"""
_FAIL = """
def fails(*_):
    raise OSError(28, "the disk is full")
store.close()
type(store._engine.backend).open_writer = fails
store.save_async({"x": 1})
"""
_LATE = """
import atexit
store.close()
atexit.register(lambda: print(store.save_async({"x": torch.ones(1)}, step=3).result().step))
"""


def leave(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run([sys.executable, "-c", code, str(path)], env=env, capture_output=True, text=True, timeout=120)


def test_the_interpreter_waits_for_what_goes_on(tmp_path: Path) -> None:
    done = leave(tmp_path, _LEAVE)
    assert (done.returncode, done.stderr) == (0, "")
    with Store(tmp_path) as store:
        assert [c.step for c in store] == [1, 2]
        assert store.verify() == [] and not litter(store)


def test_a_failure_at_exit_is_told(tmp_path: Path) -> None:
    done = leave(tmp_path, _LEAVE + _FAIL)
    assert "StoreWarning: a save in the background failed, and nobody asked about it" in done.stderr
    assert "the disk is full" in done.stderr


def test_a_save_that_begins_at_exit(tmp_path: Path) -> None:
    done = leave(tmp_path, _LEAVE + _LATE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
    with Store(tmp_path) as store:
        assert store.checkpoint().step == 3


def test_giving_up_at_exit(tmp_path: Path) -> None:
    done = leave(tmp_path, _LEAVE + "store.close()\nprint(store.save_async({'x': torch.ones(50 << 20)}, step=3).cancel())\n")
    assert (done.returncode, done.stderr) == (0, "")
    with Store(tmp_path) as store:
        assert store.checkpoint().step == (2 if done.stdout == "True\n" else 3)
        assert store.verify() == [] and not litter(store)
