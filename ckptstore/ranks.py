"""What the ranks of one job agree on, over a process group of `torch.distributed`. Everything here must be called by all its ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Generic, TypeVar, cast

from .errors import CkptStoreError, RankFailed, UsageError

__all__ = ["Ranks", "portable", "ranks_of", "told", "whole_state"]

_R = TypeVar("_R")
_M = TypeVar("_M", bound=Callable[..., Any])


def portable(error: BaseException) -> BaseException:
    """Return `error` if it survives being pickled, as it must to be told to other ranks; else one of ours that says the same.

    One that does not would be raised in the middle of a collective, on one rank, and leave the others waiting.
    """
    with suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return CkptStoreError(f"{type(error).__module__}.{type(error).__qualname__}: {error}")


def told(method: _M) -> _M:
    """Let only what is `portable` out of `method`: DCP tells the other ranks, and would leave them waiting if it could not."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException as exc:
            error = portable(exc)
            if error is exc:
                raise
            raise error from exc

    return cast(_M, call)


@dataclass(frozen=True)
class _Outcome(Generic[_R]):
    """What one rank has to say: a value, or why there is none."""

    value: _R | None = None
    error: BaseException | None = None


class Ranks:
    """The ranks of one process group.

    Args:
        group: a `torch.distributed.ProcessGroup`, such as ``torch.distributed.group.WORLD``.

    Raises:
        UsageError: it is none, or this process does not belong to it.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise UsageError("process_group= needs torch.distributed to be initialised: call init_process_group first")
        if not isinstance(group, dist.ProcessGroup):
            raise UsageError(
                f"process_group= takes a process group of torch.distributed that this process belongs to, not a {type(group).__name__}"
            )
        self._dist = dist
        self._group = group
        self.rank: int = dist.get_rank(group)
        """This process's rank in the group."""

    def all(self, call: Callable[[], _R]) -> list[_R | BaseException]:
        """Call on every rank; return on every rank what came of it on each, an exception where it raised one."""
        mine: _Outcome[_R] = _attempt(call)
        outcomes: list[Any] = [None] * self._dist.get_world_size(self._group)
        self._dist.all_gather_object(outcomes, _sendable(mine), group=self._group)
        outcomes[self.rank] = mine
        return [o.value if o.error is None else o.error for o in outcomes]

    def together(self, call: Callable[[], _R]) -> list[_R]:
        """Call on every rank and return all results, by rank.

        Raises:
            BaseException: what `call` raised here.
            RankFailed: it raised on another rank; carries that as its cause.
        """
        outcomes = self.all(call)
        self.raise_first(outcomes)
        return outcomes  # type: ignore[return-value]

    def raise_first(self, outcomes: list[Any]) -> None:
        """Raise this rank's own error among what `all` returned, or else `RankFailed` for the first other there is."""
        mine = outcomes[self.rank]
        if isinstance(mine, BaseException):
            raise mine
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                raise RankFailed(
                    f"rank {rank} failed, and so all ranks give up: {type(outcome).__name__}: {outcome}"
                ) from outcome

    def on_first(self, call: Callable[[], _R]) -> _R:
        """Call on the group's rank 0 only, and return on all ranks what it returned.

        Raises:
            BaseException: on all ranks, what it raised on rank 0.
        """
        outcome: _Outcome[_R] = _attempt(call) if self.rank == 0 else _Outcome()
        box: list[Any] = [_sendable(outcome)]
        self._dist.broadcast_object_list(box, src=self._dist.get_global_rank(self._group, 0), group=self._group)
        if self.rank != 0:
            outcome = box[0]
        if outcome.error is not None:
            raise outcome.error
        return outcome.value  # type: ignore[return-value]


def ranks_of(group: Any, everybody: bool) -> Ranks | None:
    """Return the ranks of `group`; if none is given, those of the whole job if `everybody` is meant and it has several, else None."""
    if group is None and everybody:
        import torch.distributed as dist

        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return None if group is None else Ranks(group)


def whole_state(obj: Any, ranks: Ranks) -> Any:
    """Return the state of `obj`, which rank 0 is to save for all; each rank's ``state_dict()`` is called, some of which are collective.

    Raises:
        NotSerializable: rank 0 has only its own part of a sharded tensor.
        RankFailed: a ``state_dict()`` failed on another rank.
    """
    from . import snapshot

    states: list[Any] = []

    def take() -> None:
        states.append(snapshot.to_state(obj))
        snapshot.refuse_parts(states[0])

    ranks.together(take)
    return states[0]


def _attempt(call: Callable[[], _R]) -> _Outcome[_R]:
    try:
        return _Outcome(call())
    except BaseException as exc:  # the others are waiting for an answer, even at a Ctrl-C
        return _Outcome(error=exc)


def _sendable(outcome: _Outcome[_R]) -> _Outcome[_R]:
    return outcome if outcome.error is None else _Outcome(error=portable(outcome.error))
