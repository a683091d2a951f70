"""A few threads for one store, and jobs for them.

What signals raise (Ctrl-C, SIGTERM's ``sys.exit``) comes between any two calls of the main thread, also between taking a lock and having
taken it. The locks of `concurrent.futures`, and of `threading.Condition` and `threading.Event`, which are taken in Python, can stay taken
then, and a thread that wants one later waits for ever. So all that the threads and their callers share here is taken and given in C.
"""

from __future__ import annotations

import _thread
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

__all__ = ["Bell", "Job", "Workers", "clear_frames", "drain", "lock_of"]

_R = TypeVar("_R")
_Lock = TypeVar("_Lock")

_RING_AGAIN = 1.0
"""Seconds after which a waiter looks again by itself: whoever was to ring may have been interrupted."""


_owners: dict[int, tuple[weakref.ref[Any], Callable[[], Any]]] = {}


def lock_of(owner: object, kind: Callable[[], _Lock]) -> _Lock:
    """Return a lock, which `owner` keeps as ``_lock``: in a fork it gets a new one.

    A thread of the parent's may have had the old one when the process was forked, and in the fork nobody would ever give it back.
    """
    key, owners = id(owner), _owners

    def forget(_: object) -> None:
        owners.pop(key, None)

    owners[key] = weakref.ref(owner, forget), kind
    return kind()


def _in_fork() -> None:
    for found, kind in list(_owners.values()):
        owner = found()
        if owner is not None:
            owner._lock = kind()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(after_in_child=_in_fork)


def clear_frames(error: BaseException) -> None:
    """Clear the frames that `error`, and what it came from, has passed through: what they moved would last as long as it does."""
    chain: list[BaseException] = [error]
    for one in chain:
        traceback.clear_frames(one.__traceback__)
        chain += [e for e in (one.__cause__, one.__context__) if e is not None and not any(e is known for known in chain)]


class Job(Generic[_R]):
    """One call, and what came of it."""

    def __init__(self, call: Callable[..., _R], *args: Any) -> None:
        self._call: tuple[Callable[..., _R], tuple[Any, ...]] | None = (call, args)
        self._fate: dict[str, bool] = {}  # whoever puts "run" first, decides: setdefault() is one step
        self._over = threading.Lock()
        self._over.acquire()
        self._outcome: tuple[_R | None, BaseException | None] | None = None

    def run(self) -> None:
        """Make the call, unless it was cancelled. Raises nothing but what interrupts the main thread. In one thread only."""
        try:
            if self._fate.setdefault("run", True):
                assert self._call is not None
                call, args = self._call
                self._outcome = (call(*args), None)
        except BaseException as exc:  # it is the caller's
            self._outcome = (None, exc)
            clear_frames(exc)
        finally:
            self._call = call = args = None  # type: ignore[assignment]  # with the memory that it was to move
            self._over.release()

    def cancel(self) -> None:
        """See to it that the call is not made, if it has not been begun."""
        self._fate.setdefault("run", False)

    def done(self) -> bool:
        """Say whether the call is over, or never will be made."""
        return self._outcome is not None or self._fate.get("run") is False

    def wait(self) -> None:
        """Return when it is `done`."""
        if not self.done():
            with self._over:
                pass

    @property
    def interrupt(self) -> BaseException | None:
        """What the call raised, if that is no `Exception`: not for whoever asks for the result, but for the thread that it came to."""
        error = self._outcome[1] if self._outcome is not None else None
        return None if isinstance(error, Exception) else error

    def result(self) -> _R:
        """Wait for the call, and return or raise what it did. Raises RuntimeError if it was cancelled."""
        self.wait()
        if self._outcome is None:
            raise RuntimeError("what was to be done here was given up when something else had failed")
        result, error = self._outcome
        if error is not None:
            try:
                raise error
            finally:
                del error, self  # the traceback would keep what it is kept by
        return result  # type: ignore[return-value]


def drain(jobs: Iterable[Job[Any]], *, cancel: bool = True) -> None:
    """Wait until no job runs any more, whatever interrupts us: they hold views of memory that goes away with the caller.

    `cancel`: what has not been begun is not begun any more.
    """
    interrupt: BaseException | None = None
    pending = list(jobs)
    while pending:
        try:
            if cancel:
                for job in pending:
                    job.cancel()
            for job in pending:
                job.wait()
            break
        except BaseException as exc:  # a second Ctrl-C must not free the memory under a running thread
            interrupt = exc
    if interrupt is not None:
        raise interrupt


class Workers:
    """A few threads for one store, started when first needed and again after a fork. Thread-safe."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = lock_of(self, threading.RLock)  # a handler of a signal that comes meanwhile may want to save
        self._crew: _Crew | None = None

    def submit(self, call: Callable[..., _R], *args: Any) -> Job[_R]:
        """Run ``call(*args)`` on one of the threads."""
        return self.begin([], call, *args)

    def begin(self, jobs: list[Job[_R]], call: Callable[..., _R], *args: Any) -> Job[_R]:
        """Run ``call(*args)`` on one of the threads; `jobs` has the job before it begins, so that an interrupt does not lose it."""
        job = Job(call, *args)
        try:
            jobs.append(job)
            with self._lock:
                crew = self._crew
                if crew is None or not self.alive:
                    crew = self._crew = _Crew()
                if crew.hire(self.count):
                    crew.jobs.put(job)
                    crew.do_what_is_left()
                    return job
        except BaseException:
            job.cancel()  # it may not have been handed over, and who waits for it would wait for ever
            raise
        job.run()
        if job.interrupt is not None:
            raise job.interrupt
        return job

    @property
    def alive(self) -> bool:
        """Whether threads were started in this process; after a fork there are none, and what they were given never ends."""
        return self._crew is not None and self._crew.pid == os.getpid()

    def map(self, call: Callable[[Any], _R], items: Iterable[Any]) -> Iterator[_R]:
        """Yield ``call(item)`` in order, running a bounded number ahead. Everything begun has ended when this is closed or raises."""
        items = iter(items)
        ahead: list[Job[_R]] = []
        try:
            for item in islice(items, 2 * self.count):
                self.begin(ahead, call, item)
            while ahead:
                result = ahead[0].result()
                del ahead[0]
                for item in islice(items, 1):
                    self.begin(ahead, call, item)
                yield result
        finally:
            drain(ahead)

    def close(self) -> None:
        """End the threads, when they have done what they were given. Idempotent."""
        with self._lock:
            crew, self._crew = self._crew if self.alive else None, None
        if crew is not None:
            crew.dismiss()  # not under the lock, which the work that it waits for may want


class _Crew:
    """The threads of one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.jobs: SimpleQueue[Job[Any] | None] = SimpleQueue()
        self._dismissed = False
        self._threads: list[threading.Thread] = []
        # At the interpreter's exit, or when the store was dropped without closing it.
        weakref.finalize(self, _dismiss, self.pid, self.jobs, self._threads)

    def dismiss(self) -> None:
        """End the threads, when they have done what they were given."""
        self._dismissed = True
        _dismiss(self.pid, self.jobs, self._threads, wait=True)

    def do_what_is_left(self) -> None:
        """Do here what came after the threads had been dismissed: by a handler of a signal, while they were being given something."""
        while self._dismissed:
            try:
                job = self.jobs.get_nowait()
            except Empty:
                self.jobs.put(None)
                break
            if job is not None:
                job.run()
                if job.interrupt is not None:
                    raise job.interrupt

    def hire(self, most: int) -> bool:
        """Start one more thread, up to `most`; say whether there is any. There may be a limit, or the interpreter be leaving."""
        if len(self._threads) < most:
            answer: SimpleQueue[None] = SimpleQueue()
            with suppress(RuntimeError):
                # Not here: Thread.start() waits for an Event.
                _thread.start_new_thread(_start, (answer, self.jobs, self._threads))
                answer.get()
        return bool(self._threads)


def _start(answer: SimpleQueue[None], jobs: SimpleQueue[Job[Any] | None], threads: list[threading.Thread]) -> None:
    try:
        thread = threading.Thread(target=_work, args=(jobs,), name=f"ckptstore_{len(threads)}", daemon=True)
        with suppress(RuntimeError):
            thread.start()
            threads.append(thread)
    finally:
        answer.put(None)


def _work(jobs: SimpleQueue[Job[Any] | None]) -> None:
    while (job := jobs.get()) is not None:
        job.run()
        del job
    jobs.put(None)  # for the next one


def _dismiss(pid: int, jobs: SimpleQueue[Job[Any] | None], threads: list[threading.Thread], *, wait: bool = False) -> None:
    if pid == os.getpid():
        jobs.put(None)
        if wait or not threading.main_thread().is_alive():  # the interpreter leaves: what was begun is done first
            for thread in threads:
                thread.join()


class Bell:
    """What a `threading.Condition` is for, but an interrupted thread leaves it usable."""

    def __init__(self) -> None:
        self._waiting: list[SimpleQueue[None]] = []

    def until(self, attempt: Callable[[], bool]) -> None:
        """Make `attempt`, again after each `ring`, until it returns True."""
        while not attempt():
            mine: SimpleQueue[None] = SimpleQueue()
            self._waiting.append(mine)
            try:
                if attempt():  # what was rung before nobody heard
                    return
                with suppress(Empty):
                    mine.get(timeout=_RING_AGAIN)
            finally:
                self._waiting.remove(mine)

    def ring(self) -> None:
        """Have all waiters look again."""
        for one in list(self._waiting):
            one.put(None)
