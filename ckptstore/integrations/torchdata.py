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


class LoaderState:
    """The state of a `StatefulDataLoader` as plain JSON, which `sampler=` of a store takes. Tensors in it, such as those of generators,
    stay what they are."""

    def __init__(self, loader: Any) -> None:
        if not callable(getattr(loader, "state_dict", None)) or not callable(getattr(loader, "load_state_dict", None)):
            raise UsageError(f"a {type(loader).__name__} has no state; use torchdata.stateful_dataloader.StatefulDataLoader")
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        return {BY: _VERSION, "loader": _packed(self._loader.state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` says, with the next iteration.

        Raises:
            StateMismatch: something else than a `LoaderState` made it, or the loader does not take it.
        """
        if BY not in state_dict:
            kind = state_dict.get("kind", "something else")
            raise StateMismatch(
                f"this is the state of a sampler of ckptstore ({kind}), not of a StatefulDataLoader; give resume that"
            )
        try:
            self._loader.load_state_dict(_unpacked(state_dict["loader"]))
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

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        return _Position(self._sampler)


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


def _packed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        data = base64.b64encode(raw.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        return {_TENSOR: [str(raw.dtype).removeprefix("torch."), list(raw.shape), data]}
    if isinstance(value, Mapping):
        return {key: _packed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
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
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_unpacked(item) for item in value]
    return value
