"""While a save is at each of its calls of the storage, the interpreter leaves, or the process is forked.

What was acknowledged stays; a save in the background is waited for by an interpreter that leaves in peace; parent and child both go on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import evidence
import pytest
import torch
from procs import in_fork, litter
from stores import contents, store_on, write

from ckptstore import Store
from ckptstore.backends.local import LocalBackend
from ckptstore.protocol import Backend
from ckptstore.testing import FaultyBackend

_T = TypeVar("_T")
_NUMEL = 30_000
"""Of a tensor of several parts. With more, torch would share the work among threads, which a fork has not got, and wait for them."""
_PATIENCE = 60


class AtCall(FaultyBackend):
    """Storage that does something when it is called for the n-th time, before the call or after it, and parts of 64 KiB."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.capabilities = replace(inner.capabilities, part_size=1 << 16, parallel=2)
        self._counting = threading.Lock()
        self._left = 0
        self._after = False
        self._then: Callable[[], object] = lambda: None

    def at(self, nth: int, then: Callable[[], object], *, after: bool = False) -> None:
        with self._counting:
            self._left, self._after, self._then = nth, after, then

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        with self._counting:
            self._left -= method != "close"
            here = self._left == 0 and method != "close"
        if here and not self._after:
            self._then()
        done = call()
        if here and self._after:
            self._then()
        return done


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((_NUMEL,), step), "step": step}


def is_whole(store: Store, step: int) -> bool:
    """Whether the checkpoint of a step is there, with all its bytes."""
    found = store.load(step=step)
    return found["step"] == step and torch.equal(found["w"], state(step)["w"])


# -- the interpreter leaves

WAYS = {"the end": 0, "an exit": 3, "os._exit": 0, "SIGTERM": -signal.SIGTERM}
"""How a process ends, and with which status."""

_LEAVES = f"""
import os, signal, sys, threading
import torch
from test_leaving import AtCall, LocalBackend, state, store_on
place, way, stride = sys.argv[1], sys.argv[2], int(sys.argv[3])
with store_on(AtCall(LocalBackend.open(place + "/warm", {{}}))) as store:
    store.save_async(state(1)).result()  # have all imported
while len(os.listdir("/proc/self/task")) > 1:
    pass  # the thread that saved is about to end
child, nth, after = 1, 1, False
while child:
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        fired = os.path.exists(f"{{place}}/{{nth}}-{{after}}.fired")
        print(f"{{nth}}-{{after}}", status, int(fired), flush=True)
        if not fired and after:
            os._exit(0)
        nth, after = (nth + stride, after) if fired else (1, True)
signal.alarm({_PATIENCE})
backend = AtCall(LocalBackend.open(f"{{place}}/{{nth}}-{{after}}", {{}}))
store = store_on(backend, keep_last="all", owner="job")
store.save(state(1), step=1)
reached, leaving = threading.Event(), threading.Event()
def hold():
    open(f"{{place}}/{{nth}}-{{after}}.fired", "w").close()
    reached.set()
    leaving.wait()
backend.at(nth, hold, after=after)
store.save_async(state(2), step=2).add_done_callback(lambda _: reached.set())
reached.wait()
if way == "os._exit":
    os._exit(0)
if way == "SIGTERM":
    os.kill(os.getpid(), signal.SIGTERM)
leaving.set()
if way == "an exit":
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("way", "stride"),
    [
        pytest.param("the end", 12, id="sampled"),
        *(pytest.param(way, 1, id=f"{way}, full", marks=pytest.mark.soak) for way in WAYS),
    ],
)
def test_the_interpreter_leaves_at_every_call(ram: Path, way: str, stride: int) -> None:
    """By its end or `sys.exit` it waits for the save; where it is cut off, the save is there, or it is not."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", _LEAVES, str(ram), way, str(stride)]
    wrong = []
    with evidence.experiment("the interpreter leaves at every call of a save in the background") as tally:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        assert (done.returncode, done.stderr) == (0, "")
        for line in done.stdout.splitlines():
            place, status, fired = line.split()
            if fired == "0":
                continue  # there was no such call any more
            tally.strike()
            with Store(ram / place, owner="next", keep_last="all") as store:
                steps = [checkpoint.step for checkpoint in store]
                waited = way in ("the end", "an exit")
                good = steps == [1, 2] if waited else steps in ([1], [1, 2])
                good = good and all(is_whole(store, step or 0) for step in steps) and store.verify() == []
                store.save(state(3), step=3)
                store.gc()
                good = good and is_whole(store, 3) and not litter(store)
            if not good or int(status) != WAYS[way]:
                wrong.append((place, status, steps))
                tally.violations += 1
    assert wrong == []
    assert tally.fired > 16 / stride


# -- the process is forked

SAVES: dict[str, Callable[[Store, int], object]] = {
    "save": lambda store, step: store.save(state(step), step=step),
    "save_async": lambda store, step: store.save_async(state(step), step=step).result(),
}


def child(backend: AtCall, store: Store, step: int) -> bool:
    """What a fork does: let go of what it has inherited, look, and save for itself."""
    signal.alarm(_PATIENCE)  # it may wait for ever
    backend._lock = backend._counting = threading.RLock()  # another thread may have had those of ours
    store.close()
    with Store(store.url, acquire=False, keep_last="all") as own:
        made = write(own, "child", {"a": b"%d" % step})
        return contents(own, made) == {"a": b"%d" % step} and is_whole(own, step - 1)


def fork(backend: AtCall, store: Store, step: int, status: list[int]) -> None:
    status.append(in_fork(partial(child, backend, store, step)))


@pytest.mark.parametrize("stride", [pytest.param(6, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
@pytest.mark.parametrize("what", SAVES)
def test_a_fork_at_every_call(ram: Path, what: str, stride: int) -> None:
    wrong = []
    with evidence.experiment("a fork at every call of a save") as tally:
        for after in (False, True):
            place = ram / str(after)
            backend = AtCall(LocalBackend.open(str(place), {}))
            with store_on(backend, keep_last="all", owner="job") as store:
                store.save(state(1), step=1)
                for step, nth in enumerate(range(1 + after, 10_000, stride), start=2):
                    status: list[int] = []
                    backend.at(nth, partial(fork, backend, store, step, status), after=after)
                    SAVES[what](store, step)
                    backend.at(0, lambda: None)
                    if not status:
                        break
                    tally.strike()
                    with Store(place, acquire=False, keep_last="all") as other:
                        good = is_whole(other, step) and other.checkpoint("latest").step == step
                        good = good and contents(other, "child") == {"a": b"%d" % step} and other.verify() == []
                    if not good or status != [0]:
                        wrong.append((after, nth, status))
                        tally.violations += 1
            with Store(place, owner="last", keep_last="all") as store:
                store.acquire()
                store.gc()
                assert not litter(store)
    assert wrong == []
    assert tally.fired > 16 / stride


@pytest.mark.parametrize("whose", ["workers", "writers", "log", "epoch", "engine"])
def test_a_fork_while_another_thread_has_a_lock(tmp_path: Path, whose: str) -> None:
    """Nobody would ever give it back there: the child has one of its own."""
    with Store(tmp_path, owner="job", keep_last="all") as store:
        write(store, step=1)
        engine = store._engine
        owner: Any = {
            "workers": engine.workers,
            "writers": engine.writer,
            "log": engine.log,
            "epoch": store._writer,
            "engine": engine,
        }
        taken, enough = threading.Event(), threading.Event()

        def hold() -> None:
            with owner[whose]._lock:
                taken.set()
                enough.wait(_PATIENCE)

        def in_child() -> bool:
            signal.alarm(_PATIENCE // 2)  # it may wait for ever
            store.acquire()
            made = write(store, "child", {"a": bytes(1 << 20)}, step=2)
            store.close()
            return contents(store, made) == {"a": bytes(1 << 20)}

        thread = threading.Thread(target=hold)
        thread.start()
        assert taken.wait(_PATIENCE)
        try:
            assert in_fork(in_child) == 0
        finally:
            enough.set()
            thread.join()
        assert {checkpoint.step for checkpoint in store} == {1, 2}
