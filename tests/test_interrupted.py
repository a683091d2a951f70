"""A save is interrupted, runs out of memory, fails in a thread, is forked, or its process leaves: nothing acknowledged is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evidence
import pytest
from procs import Channel, Nursery, litter, nursery
from stores import contents, write
from test_kill import Ledger, announced, save_parts

from ckptstore import Store
from ckptstore.transfer import FileSink

_LARGE = bytes(9 << 20)


class Interrupt(BaseException):
    """What nobody expects."""


@pytest.fixture(scope="module")
def saving() -> Iterator[Nursery]:
    yield from nursery(__name__)  # without torch


def interrupted(channel: Channel, url: str, seed: int) -> None:
    """Save on and on in one process, while signals come that raise; go on after each."""

    def raise_it(number: int, frame: Any) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(143)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rng = random.Random(seed)
    store = Store(url, keep_last=2)
    store.acquire()
    channel.send("ready")
    step = seed * 1000
    signal.signal(signal.SIGINT, raise_it)
    signal.signal(signal.SIGTERM, raise_it)
    try:
        while True:
            step += 1
            with announced(channel, "latest", step) as made:
                made.append(save_parts(store, "latest", step, rng.randrange(1, 4)))
    except (KeyboardInterrupt, SystemExit):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send("stopped")
    with announced(channel, "latest", step + 1) as made:  # the same object goes on
        made.append(save_parts(store, "latest", step + 1))
    store.close()


@pytest.mark.soak
@pytest.mark.parametrize("times", [1000])
def test_signals_that_raise_at_random_moments(tmp_path: Path, saving: Nursery, times: int) -> None:
    rng = random.Random(20261124)
    url = str(tmp_path / "store")
    ledger = Ledger()
    stopped = 0
    for n in range(1, times + 1):
        child = saving.start(interrupted, url, n)
        child.expect("ready")
        for _ in range(rng.randrange(1, 8)):
            ledger.hear(child.recv())
        threading.Event().wait(rng.random() * 0.01)
        child.signal(rng.choice([signal.SIGINT, signal.SIGTERM]))
        for message in child.rest():
            stopped += message == ["stopped"]
            ledger.hear(message)
        ledger.check(url)
        with Store(url) as store:
            store.acquire()  # what may have been committed is litter only once it never can be
            store.gc()
            assert not litter(store)
    evidence.record("signals at random moments of a save", points=times, fired=stopped, violations=0)
    assert stopped == times


@pytest.mark.parametrize("error", [MemoryError("no memory"), Interrupt(), KeyboardInterrupt(), OSError(5, "not ours")], ids=repr)
@pytest.mark.parametrize("threaded", [False, True], ids=["sink", "writer thread"])
def test_an_error_from_within(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, threaded: bool) -> None:
    """It reaches the caller as it is, nothing is published, and the next save works."""
    with Store(tmp_path / "store", keep_last="all") as store:
        first = write(store)
        with Store(tmp_path / "other") as other:
            writer = type(other._engine.backend.open_writer("data/e1-000000000000/x"))
        victim, method = (writer, "write") if threaded else (FileSink, "write")
        real = getattr(victim, method)
        left = [2]

        def fails(*args: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise error
            return real(*args)

        monkeypatch.setattr(victim, method, fails)
        with pytest.raises(type(error)), store.transaction() as tx, tx.open("big") as file:
            for _ in range(4):
                file.write(_LARGE)
        assert left[0] <= 0
        monkeypatch.undo()
        assert store.names() == {"latest": first}
        second = write(store, files={"big": _LARGE})
        assert [c.id for c in store] == [first, second]
        assert contents(store, "latest") == {"big": _LARGE}
        assert not litter(store)


def test_a_fork_in_mid_save(tmp_path: Path) -> None:
    """The child goes its own way, and harms nothing; the parent finishes."""
    store = Store(tmp_path, keep_last="all")
    first = write(store)
    with store.transaction() as tx, tx.open("big") as file:
        file.write(_LARGE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks with threads, which is what this is about
            child = os.fork()
        if not child:
            status = 1
            try:
                status = 0 if write(Store(tmp_path, acquire=False), "child") else 2
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        file.write(_LARGE)
    assert store.names() == {"latest": tx.id, "child": store.names()["child"]}
    assert contents(store, "latest") == {"big": 2 * _LARGE}
    assert next(c.id for c in store) == first
    assert store.verify() == []
    store.close()


_EXIT = """
import sys, threading
from ckptstore import Store
store = Store(sys.argv[1])
def save():
    with store.transaction("late") as tx, tx.open("big") as file:
        for i in range(1000):
            file.write(bytes(1 << 20))
            if i == 5:
                busy.set()
busy = threading.Event()
threading.Thread(target=save, daemon=True).start()
busy.wait()
"""


def test_the_interpreter_leaves_while_a_thread_saves(tmp_path: Path) -> None:
    """A thread that nobody waits for is cut off with the process: nothing is published."""
    with Store(tmp_path) as store:
        first = write(store)
    done = subprocess.run([sys.executable, "-c", _EXIT, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with Store(tmp_path, owner="next") as store:
        assert store.names() == {"latest": first}
        write(store, "next")
        store.gc()
        assert store.verify() == []
        assert not litter(store)
