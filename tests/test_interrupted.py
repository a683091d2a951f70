"""A save is interrupted, runs out of memory, fails in a thread, is forked, or its process leaves: nothing acknowledged is lost."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import evidence
import pytest
import rivals
from procs import Channel, Nursery, in_fork, litter, nursery
from stores import contents, write
from test_kill import Ledger, announced, save_parts

from ckptstore import Store
from ckptstore.checksum import crc64nvme
from ckptstore.transfer import FileSink

_LARGE = bytes(9 << 20)
_PATIENCE = 60.0
"""Seconds after which a thread that says nothing is taken to hang."""


class Interrupt(BaseException):
    """What nobody expects."""


def warm_up() -> None:
    """Have imported what the first save would be. Python has callbacks there that cannot raise: an interrupt that comes in one is lost,
    with no more than a message, and nothing would ever stop the child."""
    crc64nvme(b"")


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


@pytest.mark.parametrize("times", [pytest.param(30, id="sampled"), pytest.param(1000, id="full", marks=pytest.mark.soak)])
def test_signals_that_raise_at_random_moments(tmp_path: Path, saving: Nursery, times: int) -> None:
    rng = random.Random(20261124)
    url = str(tmp_path / "store")
    ledger = Ledger()
    stopped = 0
    with evidence.experiment("signals at random moments of a save") as tally:
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
        tally.points, tally.fired = times, stopped
    assert stopped == times


class HandlerAt:
    """Calls `handler` at the `at`-th moment of this thread at which Python would run the handler of a signal: as a function of Python's
    begins, and when one of C's is over, whose result is lost if the handler raises."""

    def __init__(self, at: int, handler: Callable[[], object]) -> None:
        self.fired = False
        self._left = at
        self._handler = handler

    def __call__(self, frame: Any, event: str, function: Any) -> None:
        if event in ("call", "c_return"):
            self._left -= 1
            if not self._left:
                self.fired = True
                sys.setprofile(None)
                self._handler()


def _raise_interrupt() -> None:
    raise KeyboardInterrupt


def save_large(store: Store, step: int) -> str:
    """Through the threads."""
    files = {"big": _LARGE, "small": b"%d" % step}
    return write(store, step=step, files=files)


LIFE: dict[str, Callable[[Store, int], object]] = {
    "save": lambda store, step: save_parts(store, "latest", step),
    "save large": save_large,
    "acquire": lambda store, step: store.acquire(),
    "tag": lambda store, step: store.tag("best", "latest"),
    "gc": lambda store, step: store.gc(),
}


def interrupt(at: int, change: Callable[[], object], then: Callable[[], object]) -> tuple[bool, BaseException | None]:
    """Make a change with an interrupt at the `at`-th moment, and then what must work all the same; return whether it came, and the error.

    In a thread of its own, so that one that waits for ever is found.
    """
    at_moment = HandlerAt(at, _raise_interrupt)
    told: list[BaseException | None] = []

    def work() -> None:
        sys.setprofile(at_moment)
        try:
            change()
            sys.setprofile(None)
            told.append(None)
        except BaseException as exc:
            sys.setprofile(None)  # it may be another error, which came before the moment
            told.append(exc)
        try:
            then()
            told.append(None)
        except BaseException as exc:
            told.append(exc)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    assert len(told) == 2, f"it waits for ever, after an interrupt at moment {at}: {told}"
    # Not raised as it is: an interrupt would end the whole run of the tests.
    assert told[1] is None, f"what came after an interrupt at moment {at}: {told}"
    return at_moment.fired, told[0]


@pytest.fixture
def fast(ram: Path) -> Iterator[Path]:
    """A folder in memory; what an interrupt kept from being closed, closes with the process otherwise."""
    yield ram
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith(f"{ram}/"):
                os.close(int(fd))


unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""Some interrupts come where Python can only say so, in a destructor for one."""


@unraisable
@pytest.mark.parametrize("stride", [pytest.param(11, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
@pytest.mark.parametrize("what", LIFE)
def test_an_interrupt_at_every_moment(fast: Path, what: str, stride: int) -> None:
    """Nothing acknowledged is lost, the same store goes on, and nobody waits for ever."""
    place = fast / "store"
    with Store(place, owner="first") as store:
        save_parts(store, "latest", 0)
    left = place / "data" / "e1-000000000000"  # by a job that was killed
    left.mkdir()
    (left / "a.bin").write_bytes(b"some bytes")
    store = Store(place, owner="job", keep_last=1)
    points = 0
    with evidence.experiment("an interrupt at every moment") as tally:
        for step in itertools.count(1):
            before = store.names()
            if what in ("acquire", "gc"):  # the one is made once, the other looks at more each time: always at the same
                store.close()
                if place != fast / "store":
                    shutil.rmtree(place)
                place = shutil.copytree(fast / "store", fast / str(step))
                store = Store(place, owner="job")
                if what == "gc":
                    store.acquire()
            elif step % 50 == 0:  # what may have been committed fills the memory, until it never can be
                store.close()
                store = Store(place, owner=f"job {step}", keep_last=1)
                store.acquire()
                store.gc()
            change = partial(LIFE[what], store, step)
            fired, error = interrupt(1 + points * stride, change, partial(save_parts, store, "next", step))
            assert error is None or (fired and isinstance(error, KeyboardInterrupt)), repr(error)
            with Store(place, acquire=False) as found:
                assert found.verify() == []
                names = found.names()
                assert found.checkpoint("next").step == step
                for name, there in before.items():
                    if names[name] != there and name != "next":
                        assert name == ("best" if what == "tag" else "latest")
                        assert found.checkpoint(name).step == (store.checkpoint("latest").step if what == "tag" else step)
            if not fired:
                assert what != "gc" or not (place / "data" / left.name).exists()
                break
            points += 1
            tally.strike()
        store.close()
        with Store(place, owner="last") as store:
            store.acquire()
            store.gc()
            assert not litter(store)
    assert points > 200 / stride


@pytest.fixture(scope="module")
def others_saving() -> Iterator[Nursery]:
    yield from nursery("rivals", __name__)


def interrupted_rival(channel: Channel, name: str, folder: str, at: int) -> None:
    """Save twice, the second time with an interrupt; what it leaves locked, as Python's logging does, goes with the process."""
    save = rivals.RIVALS[name].save
    save(Path(folder), 1)
    fired, error = interrupt(at, partial(save, Path(folder), 2), lambda: None)
    channel.send("over", fired, error is not None)


@pytest.mark.soak
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_an_interrupt_at_many_moments_of_others(fast: Path, others_saving: Nursery, name: str) -> None:
    """Only counted."""
    rival = rivals.RIVALS[name]
    points = violations = 0
    for n in range(400):
        folder = fast / str(n)
        folder.mkdir()
        child = others_saving.start(interrupted_rival, name, str(folder), 1 + 17 * n)
        fired, failed = child.expect("over")
        child.rest()
        if not fired:
            break
        points += 1
        violations += rivals.is_violation(rival, folder, 1 if failed else 2, 2 if failed else None)
        shutil.rmtree(folder)
    evidence.record("an interrupt at every moment", points=points, fired=points, violations=violations, subject=name)
    assert points > 5


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
        assert in_fork(lambda: write(Store(tmp_path, acquire=False), "child")) == 0
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
