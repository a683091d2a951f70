"""torchdata's `StatefulDataLoader` on a store: its state is saved as a sampler's, and our samplers work inside it.

::

    loader = StatefulDataLoader(data, batch_size=16, num_workers=4, sampler=InLoader(sampler))
    store.resume(progress, sampler=LoaderState(loader))
    ...
    store.save(progress, step=step, sampler=LoaderState(loader))
"""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Sampler

from ..errors import StateMismatch, UsageError
from ..sampler._progress import Interruptable
from ._library import require_version

__all__ = ["InLoader", "LoaderState"]

BY = "torchdata"
_VERSION = require_version("torchdata", "torchdata", (0, 11), 1)
_TENSOR = "torchdata tensor"
_TUPLE = "torchdata tuple"
_FINISHED = "_iterator_finished"
_REPLAYED = "_steps_since_snapshot"
"""How many batches are drawn again, and dropped, before the loader goes on: ``snapshot_every_n_steps`` with workers."""
_OTHERS = ("dataset_state", "fetcher_state", "_worker_snapshots")
"""What a loader's state has of data sets, which may hold samplers of their own."""


class LoaderState:
    """The state of a `StatefulDataLoader` as plain JSON, which `sampler=` of a store takes. Tensors and tuples in it, such as those of
    generators, stay what they are."""

    def __init__(self, loader: Any) -> None:
        if not callable(getattr(loader, "state_dict", None)) or not callable(getattr(loader, "load_state_dict", None)):
            raise UsageError(f"a {type(loader).__name__} has no state; use torchdata.stateful_dataloader.StatefulDataLoader")
        self._loader = loader
        batches = getattr(loader, "batch_sampler", None)
        inside = (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
        if any(isinstance(sampler, Interruptable) for sampler in inside):
            # The loader would take the sampler's own state, in which nobody has counted, for all that it needs to go on.
            raise UsageError("this loader does not count for the sampler in it: give it sampler=InLoader(sampler)")
        self._ours = next((sampler for sampler in inside if isinstance(sampler, InLoader)), None)

    def state_dict(self) -> dict[str, Any]:
        if self._ours is None:
            return {BY: _VERSION, "loader": _packed(self._loader.state_dict())}
        loaded = self._ours.loaded
        state = self._loader.state_dict() if loaded is None else loaded
        return {BY: _VERSION, "loader": _packed(state), "dealt": self._dealt(self._ours)}

    def _dealt(self, ours: InLoader) -> list[int | None]:
        return [ours.ranks, getattr(self._loader, "batch_size", None)]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` says, with the next iteration.

        A sampler of ours in it says the epoch from now on, which is the next one if the state was saved after the end of one.

        Raises:
            StateMismatch: something else than a `LoaderState` made it, or the loader, or our sampler in it, does not take it.
        """
        if BY not in state_dict:
            kind = state_dict.get("kind", "something else")
            raise StateMismatch(
                f"this is the state of a sampler of ckptstore ({kind}), not of a StatefulDataLoader; give resume that"
            )
        try:
            state = _unpacked(state_dict["loader"])
            if self._ours is not None:
                dealt, saved = self._dealt(self._ours), state_dict.get("dealt")
                if state.get(_REPLAYED) and not state.get(_FINISHED) and saved not in (dealt, None):
                    raise StateMismatch(
                        f"this state was saved between two snapshots (snapshot_every_n_steps), with {saved[0]} ranks and a batch size "
                        f"of {saved[1]}, and can only go on so, not with {dealt[0]} and {dealt[1]}"
                    )
                state = self._ours.go_on(state)
            self._loader.load_state_dict(state)
        except StateMismatch:
            raise
        except (AssertionError, KeyError, TypeError, ValueError) as exc:
            raise StateMismatch(f"the loader does not take the saved state: {exc}") from exc


class InLoader(Sampler[Any]):
    """One of our samplers for a `StatefulDataLoader`, which then keeps the count: neither ``track`` nor ``advance`` is needed.

    What the loader's workers have fetched ahead is not counted. The state is the sampler's own, so it does not depend on the number of
    ranks. Between epochs call ``sampler.set_epoch``, which is also told the epoch when a state is loaded.
    """

    def __init__(self, sampler: Interruptable[Any]) -> None:
        if not isinstance(sampler, Interruptable):
            raise UsageError(f"InLoader takes one of ckptstore's samplers, not a {type(sampler).__name__}")
        self._sampler = sampler
        self.loaded: dict[str, Any] | None = None
        """The state that the loader was given last, until it iterates."""

    @property
    def ranks(self) -> int:
        """How many share the samples."""
        return self._sampler.num_replicas

    def __len__(self) -> int:
        return len(self._sampler)

    def set_epoch(self, epoch: int) -> None:
        """Do as the sampler's ``set_epoch``: Lightning calls it before each epoch."""
        self._sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        self.loaded = None
        return _Position(self._sampler)

    def go_on(self, state: dict[str, Any]) -> dict[str, Any]:
        """Have the sampler say the epoch in which a loader with this `state` goes on, and return what to give to the loader.

        The loader looks at it only when it iterates, and if the state is from the end of an epoch it begins anew then: with the next one.

        Raises:
            SamplerMismatch, AdvancedTooFarError: it is not of a sampler like this one; nothing was changed.
        """
        given = copy.deepcopy(state)
        for position in _positions(given):
            start = copy.copy(self._sampler)
            start.load_state_dict(position)
            if state.get(_FINISHED):
                start.reset_progress()
                start.epoch += 1
                position.update(start.state_dict())
                if _REPLAYED in given:
                    given[_REPLAYED] = 0
            self._sampler.reset_progress()
            self._sampler.set_epoch(start.epoch)
        self.loaded = state
        return given


class _Position(Iterator[Any]):
    """Where the loader is. It asks for the state of what gives it samples, if that has one."""

    def __init__(self, sampler: Interruptable[Any]) -> None:
        self._sampler = sampler
        self._begin(copy.copy(sampler))

    def _begin(self, start: Interruptable[Any]) -> None:
        self._start = start
        self._items = iter(start)
        self._yielded = 0

    def __next__(self) -> Any:
        item = next(self._items)
        self._yielded += 1
        return item

    def state_dict(self) -> dict[str, Any]:
        here = copy.copy(self._start)
        here.advance(self._yielded)
        return here.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        start = copy.copy(self._sampler)
        start.load_state_dict(state_dict)
        self._sampler.reset_progress()
        self._sampler.set_epoch(start.epoch)
        self._begin(start)


def _positions(value: Any) -> Iterator[dict[str, Any]]:
    """Find the states that a `_Position` has made in that of a loader, which differs with the number of workers."""
    if isinstance(value, dict):
        if {"kind", "epoch", "consumed"} <= value.keys():
            yield value
        else:
            for key, item in value.items():
                if key not in _OTHERS:
                    yield from _positions(item)


def _packed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        data = base64.b64encode(raw.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        return {_TENSOR: [str(raw.dtype).removeprefix("torch."), list(raw.shape), data]}
    if isinstance(value, Mapping):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(item) for item in value]}
    if isinstance(value, list):
        return [_packed(item) for item in value]
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        kind, shape, data = value[_TENSOR]
        dtype = getattr(torch, kind)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"there is no type {kind!r:.100} of tensors")
        raw = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.uint8)
        return raw.view(dtype).reshape(shape).clone()
    if isinstance(value, dict) and _TUPLE in value:
        return tuple(_unpacked(item) for item in value[_TUPLE])
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    return value
