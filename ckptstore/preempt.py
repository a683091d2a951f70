"""Being told to stop: a signal becomes a question that the training loop asks, and that all ranks answer alike."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from .errors import UsageError

__all__ = ["Preemption", "preemption"]

_ECHO = 2.0
"""Seconds within which a signal that comes again is the same one: Slurm sends it to every process, and torchrun passes it on as well."""


def preemption(
    signals: Iterable[int] = (signal.SIGTERM, signal.SIGUSR1), *, grace: float = 30.0, process_group: Any = None
) -> Preemption:
    """Return a context manager that turns signals into ``requested()``::

        with ckptstore.preemption() as guard:
            for batch in sampler.track(loader):
                train(batch)
                if guard.requested():
                    store.save(state, step=step, sampler=sampler)
                    break

    Inside the block a signal only leaves a note, so that no step and no save is torn apart. A second one, 2 s or more after the first,
    does what it would have done outside. Enter it in the main thread.

    Args:
        signals: those that ask to stop.
        grace: seconds from a signal to the end that its sender makes (Slurm's ``KillWait``, Kubernetes's grace period: 30, unless set).
        process_group: whose ranks decide together, if not the default group's; made with any backend.

    Raises:
        UsageError: what cannot be handled, or is handled by code in C already.
    """
    return Preemption(signals, grace, process_group)


class Preemption:
    """Whether this job was asked to stop. Get one from `preemption`."""

    def __init__(self, signals: Iterable[int], grace: float, process_group: Any) -> None:
        try:
            self._signals = tuple(signal.Signals(number) for number in signals)
        except (TypeError, ValueError) as exc:
            raise UsageError(f"preemption takes signals, such as signal.SIGTERM: {exc}") from None
        if signal.SIGKILL in self._signals or signal.SIGSTOP in self._signals:
            raise UsageError("no process can handle SIGKILL or SIGSTOP; leave them out of signals")
        if isinstance(grace, bool) or not isinstance(grace, (int, float)) or not 0 <= grace < math.inf:
            raise UsageError(f"grace must be a number of seconds from 0 on, not {grace!r:.100}")
        self._grace = float(grace)
        self._group = process_group
        self._talk: Any = None  # the gloo group in which the ranks decide; made by the first question
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._first: float | None = None  # when the first signal came here
        self._deadline: float | None = None  # when the first rank's time is up

    def requested(self) -> bool:
        """Say whether to save and stop now. True once, true ever after.

        In a process group, all ranks must ask equally often, and get the same answer at the same step, whichever of them was
        signalled: it is a collective operation (of one number, on the CPU).
        """
        if self._deadline is None:
            left = self._agreed(math.inf if self._first is None else self._first + self._grace - time.monotonic())
            if left < math.inf:
                self._deadline = time.monotonic() + left
        return self._deadline is not None

    @property
    def seconds_left(self) -> float:
        """Seconds until `grace` is over, 0 afterwards; in a process group of the rank with the least, as of ``requested()``.

        Without a signal, the longest time that threads can wait: what takes a timeout takes this, as in
        ``store.save_async(...).result(timeout=guard.seconds_left)``.
        """
        deadline = self._deadline
        if deadline is None:
            if self._first is None:
                return threading.TIMEOUT_MAX
            deadline = self._first + self._grace
        return max(0.0, deadline - time.monotonic())

    def _agreed(self, left: float) -> float:
        """Return the least of what the ranks have."""
        dist = sys.modules.get("torch.distributed")  # where nobody has imported it, there is no group
        if dist is None or not dist.is_available() or not dist.is_initialized():
            return left
        import torch

        if self._talk is None and self._group is not None:
            self._talk = _talks.get(self._group)
        if self._talk is None:
            # A group of its own: on the CPU, for the GPU must not be waited for at every step; and it does not get in the way of others.
            ranks = dist.get_process_group_ranks(self._group) if self._group is not None else None
            self._talk = dist.new_group(ranks, backend="gloo", use_local_synchronization=ranks is not None)
            if self._group is not None:
                _talks[self._group] = self._talk
        number = torch.tensor(left, dtype=torch.float64, device="cpu")
        dist.all_reduce(number, op=dist.ReduceOp.MIN, group=self._talk)
        return float(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if os.getpid() != self._pid:  # a fork, such as a worker that loads data
            if number == signal.SIGTERM:  # that is how its parent ends it
                self._as_usual(number)
        elif self._first is None:
            self._first = now
            around = getattr(self._before.get(signal.Signals(number)), "__self__", None)
            if isinstance(around, Preemption) and around._first is None:
                around._note(number, _frame)  # whoever goes on after this block is asked to stop as well
        elif now - self._first >= _ECHO:
            self._as_usual(number)

    def _as_usual(self, number: int) -> None:
        self._put_back()
        signal.raise_signal(number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if self in _entered:
            _entered.remove(self)

    def __enter__(self) -> Preemption:
        if self._before:
            raise UsageError("this preemption guard is in use; make another one")
        if threading.current_thread() is not threading.main_thread():
            raise UsageError("signals can be handled in the main thread only; enter preemption() there")
        before = {number: signal.getsignal(number) for number in self._signals}
        for number, handler in before.items():
            if handler is None:
                raise UsageError(
                    f"{number.name} is handled by code in C (faulthandler?), which Python could not put back; leave it out"
                )
        self._pid = os.getpid()
        self._before = before
        _entered.append(self)
        try:
            for number in before:
                signal.signal(number, self._note)
        except BaseException:  # the handler of another signal may raise at any moment
            self._put_back()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._put_back()
        talk, self._talk = self._talk, None
        if talk is not None and self._group is None:
            import torch.distributed as dist

            if dist.is_initialized():  # else it has gone with all the others
                dist.destroy_process_group(talk)


_talks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The groups in which those of a given group decide, kept with it: torch gives the next one of the same ranks the name of one that is
gone, under which the addresses of that are still found."""
_entered: list[Preemption] = []
"""Those whose block is under way, the innermost last."""
_mask = threading.local()


def _hold() -> None:
    """Have a SIGTERM wait while this process forks: Python forgets, in the child, what came before it was done with the fork."""
    held = any(signal.SIGTERM in guard._before for guard in _entered)
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]) if held else None


def _go_on() -> None:
    if _mask.before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _in_fork() -> None:
    """Let SIGTERM do in a child, such as a worker that loads data, what it would have done outside: that is how its parent ends it."""
    try:
        for guard in reversed(_entered):
            if signal.getsignal(signal.SIGTERM) == guard._note:
                signal.signal(signal.SIGTERM, guard._before[signal.SIGTERM])
        _entered.clear()
    finally:
        _go_on()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no forks
    os.register_at_fork(before=_hold, after_in_parent=_go_on, after_in_child=_in_fork)
