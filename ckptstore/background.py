"""Saves that go on in the background, one at a time and in the order in which they were asked for."""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from _thread import start_new_thread
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .checkpoint import RNG_FILE, STATE_FILE, Checkpoint
from .errors import CkptStoreError, StoreWarning, UsageError
from .transaction import Draft, Transaction
from .workers import Bell, clear_frames

if TYPE_CHECKING:
    from .still import Place, Still

__all__ = ["Background", "PendingSave"]


_GIVEN_UP, _COMMITTING = "given up", "committing"
_LOOK_AGAIN = 1.0
"""Seconds: another waiter may have been interrupted when it had the lock."""


class PendingSave(Future[Checkpoint]):
    """A save that `Store.save_async` has begun: a `concurrent.futures.Future` of its `Checkpoint`, done when that is committed and durable.

    Its exception is what `Store.save` would have raised. If nobody asks for it, the next call on the store, or its `close`, raises it.
    Cancelled (`cancelled()` is True, `result()` raises `CancelledError`) means: given up, skipped or replaced, and not published. Callbacks
    are called in the thread that saved, when the store is ready for the next save.
    """

    def __init__(self, changed: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._changed = changed
        self._fate: dict[str, object] = {}  # decided once: setdefault() is one step
        # A Future's own lock can stay taken when Ctrl-C interrupts the main thread (see `workers`), and the thread that saves would wait
        # for ever: so what the main thread does often and long, to ask and to wait, it does without.
        self._told = False
        self._over = threading.Lock()
        self._over.acquire()
        self.add_done_callback(_tell)
        self._pid = os.getpid()
        self.seen = False
        """Whether somebody has asked for the outcome since it is known."""

    def cancel(self) -> bool:
        """Give up what has not been committed. Returns at once.

        True: nothing of this save has been or will be published, and what it wrote is deleted. The thread ends after the piece of data
        it is at; `Store.close` and the interpreter's exit wait for that. False: too late. It is done, or its commit is under way.
        """
        if self.done() or self._fate.setdefault("is", _GIVEN_UP) != _GIVEN_UP:
            return self.cancelled()
        me = object()
        if super().cancel() and self._fate.setdefault("told by", me) is me:
            self.set_running_or_notify_cancel()  # for those who wait for several futures
        self._changed()
        return True

    def done(self) -> bool:
        """Say whether it is committed, or has failed, or was cancelled."""
        return self._told or self.cancelled()

    def cancelled(self) -> bool:
        """Say whether it was given up, skipped or replaced."""
        return self._fate.get("is") == _GIVEN_UP

    def running(self) -> bool:
        """Say whether it is not done."""
        return not self.done()

    def result(self, timeout: float | None = None) -> Checkpoint:
        """Wait up to `timeout` seconds for the save, and return its checkpoint.

        Raises:
            TimeoutError: it is not done yet, and goes on. See `cancel`.
            CancelledError: it was given up, skipped or replaced.
            UsageError: it was begun in the process that forked this one.
            CkptStoreError, Exception: as `Store.save`.
        """
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait like `result`, and return what it raises if the save failed, or None."""
        self._wait(timeout)
        return super().exception(0)

    def check(self, *, committing: bool = False) -> None:
        """Raise `GivenUp` if it was given up; once this has returned with `committing`, it cannot be any more."""
        fate = self._fate.setdefault("is", _COMMITTING) if committing else self._fate.get("is")
        if fate == _GIVEN_UP:
            raise GivenUp("this save was given up")

    def _wait(self, timeout: float | None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not self.done():
            if self._pid != os.getpid():
                raise UsageError("this save was begun before a fork, and only the parent process can wait for it")
            left = _LOOK_AGAIN if end is None else min(_LOOK_AGAIN, end - time.monotonic())
            if self._over.acquire(timeout=max(0, left)):
                self._over.release()
            if left <= 0:
                break
        if self.cancelled():
            raise CancelledError
        if self._told:
            self.seen = True
            _unseen.discard(self)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a PendingSave cannot be pickled; wait for its result(), or send the name or step under which to look for it"
        )


def _tell(pending: Future[Checkpoint]) -> None:
    assert isinstance(pending, PendingSave)
    pending._told = True
    pending._over.release()


class GivenUp(CkptStoreError):
    """Ends a save that was cancelled. Never leaves this module."""


class _Job:
    """One save, from the call on."""

    def __init__(self, pending: PendingSave, begin: Callable[[Draft], Transaction], draft: Draft) -> None:
        self.pending = pending
        self.begin = begin
        self.draft = draft
        self.still: Still | None = None
        self.rng: Any = None
        self.taker = threading.get_ident()
        self.started: list[int] = []
        """When it is taken, and has a thread of its own or its turn in the queue: that thread."""
        self.pid = os.getpid()
        self._owner: dict[str, object] = {}

    @property
    def thread(self) -> int:
        """The one that is busy with it."""
        return self.started[0] if self.started else self.taker

    def claim(self) -> bool:
        """Say whether the caller is the first to ask: the one who ends it."""
        me = object()
        return self._owner.setdefault("is", me) is me


class Background:
    """The background saves of one store. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a handler of a signal that comes meanwhile may want to save
        self._bell = Bell()
        self._jobs: list[_Job] = []  # those that are started in the order in which they save
        self._failed: list[tuple[PendingSave, BaseException]] = []
        self._place: Place | None = None
        self._pid = os.getpid()

    def save(
        self,
        begin: Callable[[Draft], Transaction],
        obj: Any,
        draft: Draft,
        *,
        when_busy: str,
        rng: bool,
        optimizer: Any,
        checked: bool,
    ) -> PendingSave:
        """Take `obj` as it is now, begin to save it, and return; see `Store.save_async`.

        `begin` returns the transaction for a draft, and acquires the store first if need be.
        """
        from . import rng as generators
        from .overlap import as_optimizers
        from .snapshot import to_state
        from .still import Place, Still

        if when_busy not in ("wait", "skip", "replace"):
            raise UsageError(f"when_busy must be 'wait', 'skip' or 'replace', not {when_busy!r:.100}")
        optimizers = [] if optimizer is None else as_optimizers(optimizer)
        if checked and not optimizers:
            raise UsageError("checked=True is about what is copied later, and without optimizer= all is copied at once")
        self._forget_parents()
        self.raise_failure()
        job = _Job(PendingSave(self._bell.ring), begin, draft)
        try:
            if when_busy == "skip" and self._others():
                job.pending.cancel()
                return job.pending
            self._bell.until(lambda: self._enter(job, when_busy))
            self.raise_failure()
            place = self._place = self._place or Place()
            job.still = Still(to_state(obj), optimizers)
            job.rng = generators.capture() if rng else None
            self._give_up_queued()
            job.still.copy(place, checked)
            self._start(job)
        except BaseException:
            job.pending.cancel()
            if job.claim():  # else its thread has been started
                self._end(job)
                _live.discard(job)
            raise
        return job.pending

    def wait(self) -> None:
        """Wait until no save goes on, and raise the failure of one that nobody has asked about."""
        self._forget_parents()
        self._bell.until(lambda: not self._others())
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what a save in the background failed with, once, if nobody has asked about it."""
        self._forget_parents()
        with self._lock:
            while self._failed:
                pending, error = self._failed.pop(0)
                if not pending.seen:
                    pending.seen = True
                    _unseen.discard(pending)
                    raise error

    def close(self) -> None:
        """Wait until no save goes on, give the memory back, and take the hooks off the optimizers."""
        self._forget_parents()
        self._bell.until(lambda: not self._others())
        place, self._place = self._place, None
        if place is not None:
            place.close()

    def _enter(self, job: _Job, when_busy: str) -> bool:
        with self._lock:
            if when_busy == "wait" and self._others():
                return False
            self._jobs.append(job)
            return True

    def _others(self) -> list[_Job]:
        """Return the saves that somebody else than this thread is busy with. Its own, which a handler or the like has interrupted, would
        never end if it waited for it."""
        return [job for job in list(self._jobs) if job.thread != threading.get_ident()]

    def _give_up_queued(self) -> None:
        """Give up what waits its turn, and wait until its memory is free."""
        queued = [job for job in list(self._jobs) if job.started][1:]
        for job in queued:
            job.pending.cancel()
        self._bell.until(lambda: not any(job in self._others() for job in queued if job.pending.cancelled()))

    def _start(self, job: _Job) -> None:
        with self._lock:
            self._jobs.remove(job)
            self._jobs.append(job)  # behind those that were started first
        _live.add(job)
        try:
            if _exiting:
                raise RuntimeError("nobody would wait for the thread")
            # Thread.start() waits for an Event, which an interrupt would leave locked. From here on this thread waits for it like all
            # others: in one step, for a handler of a signal in between would wait for ever for what it has kept from starting.
            job.started.extend(map(start_new_thread, (self._run,), ((job,),)))
        except RuntimeError:  # no thread can be had: at the interpreter's exit, or at a limit of processes
            self._run(job)

    def _run(self, job: _Job) -> None:
        if not job.claim():
            return
        if not job.started:
            job.started.append(threading.get_ident())
        checkpoint: Checkpoint | None = None
        failure: BaseException | None = None
        try:
            checkpoint = self._save(job)
        except BaseException as exc:
            clear_frames(exc)
            failure = None if job.pending.cancelled() else exc
        self._end(job, failure)
        if not job.pending.cancelled():
            with suppress(InvalidStateError):  # given up just now
                if checkpoint is not None:
                    job.pending.set_result(checkpoint)
                elif failure is not None:
                    job.pending.set_exception(failure)
        del failure  # which knows this frame
        _live.discard(job)
        _ended.ring()

    def _save(self, job: _Job) -> Checkpoint:
        assert job.still is not None
        job.still.finish_copy()
        self._bell.until(lambda: job.pending.cancelled() or self._is_next(job))
        job.pending.check()
        transaction = job.begin(job.draft)
        transaction.watch(job.pending.check, lambda: job.pending.check(committing=True))
        with transaction as tx:
            state, locations = job.still.state()
            tx.save_state(state, STATE_FILE, locations)
            del state
            if job.rng is not None:
                tx.save_state(job.rng, RNG_FILE)
        return tx.checkpoint

    def _is_next(self, job: _Job) -> bool:
        with self._lock:
            return next(j for j in self._jobs if j.started) is job

    def _end(self, job: _Job, failure: BaseException | None = None) -> None:
        if job.still is not None:
            job.still.drop()
            job.still = None
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)
            if failure is not None:
                self._failed.append((job.pending, failure))
                _unseen.add(job.pending)
        self._bell.ring()

    def _forget_parents(self) -> None:
        """After a fork: the threads, and what they are doing, are the parent's; and it may have held the lock."""
        if self._pid != os.getpid():
            self.__dict__.update(Background().__dict__)


_live: set[_Job] = set()
_ended = Bell()
_unseen: set[PendingSave] = set()
_exiting = False


def _at_exit() -> None:
    """Wait for what goes on, and tell what failed and would otherwise go unnoticed."""
    global _exiting
    _exiting = True
    _ended.until(lambda: not any(job.pid == os.getpid() for job in list(_live)))
    for pending in [p for p in list(_unseen) if p._pid == os.getpid()]:
        warnings.warn(
            f"a save in the background failed, and nobody asked about it: {pending.exception()!r}", StoreWarning, stacklevel=1
        )


# The private one is called before pools of threads are shut down, on which backends and we rely; the other one after.
try:
    threading._register_atexit(_at_exit)  # type: ignore[attr-defined]
except (AttributeError, RuntimeError):
    atexit.register(_at_exit)
