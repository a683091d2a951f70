"""What does not change between two steps of an optimizer, and a gate before the steps.

Forward and backward read parameters and the optimizer's state; only a step writes them. So they can be copied meanwhile, if the next step
waits until that is done.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .errors import UsageError
from .hostcopy import HostCopy

__all__ = ["Gate", "Stable", "as_optimizers", "stable_tensors"]


def as_optimizers(given: Any) -> list[Optimizer]:
    """Return what the user gave for ``optimizer=``, one or several, as a list.

    Raises:
        UsageError: something in it is no optimizer.
    """
    found = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
    for one in found:
        if not isinstance(one, Optimizer):
            raise UsageError(f"optimizer must be a torch.optim.Optimizer or a list of them, not {type(one).__name__}")
    return found


class Stable(NamedTuple):
    """Tensors that only a step of an optimizer changes."""

    keys: Sequence[int] = ()
    """The ids of their storages."""
    tensors: Sequence[torch.Tensor] = ()
    versions: Sequence[int] = ()
    alive: Sequence[torch.UntypedStorage] = ()
    """Their storages, and maybe more: while there are these objects, no other has such an id."""


def stable_tensors(optimizers: Sequence[Optimizer]) -> Stable:
    """Return the tensors that only a step of `optimizers` changes: parameters and optimizer state.

    Left out are those whose storage holds something else as well, what shares memory with a gradient, and everything if this is called
    inside a step (by a closure, for one).
    """
    if _inside_a_step(optimizers):
        return Stable()
    # As in `capture`: the training waits, so one thing after the other is asked of all tensors at once.
    tensors = _tensors(optimizers)
    if not set(map(type, tensors)) <= _PLAIN:
        tensors = [t for t in tensors if type(t) in _PLAIN]
    try:
        storages, versions = list(map(_storage, tensors)), list(map(_version, tensors))
    except RuntimeError:  # some are sparse, or inference tensors
        tensors = [t for t in tensors if t.layout is torch.strided and not t.is_inference()]
        storages, versions = list(map(_storage, tensors)), list(map(_version, tensors))
    keys, sizes = list(map(id, storages)), list(map(torch.UntypedStorage.nbytes, storages))
    others = _gradients(optimizers)
    if sizes != list(map(_nbytes, tensors)):
        others |= _partly_held(tensors, keys, sizes)
    if not others.isdisjoint(keys):
        left = [i for i, key in enumerate(keys) if key not in others]
        keys, tensors, versions = ([column[i] for i in left] for column in (keys, tensors, versions))  # type: ignore[assignment]
    return Stable(keys, tensors, versions, storages)


def _gradients(optimizers: Sequence[Optimizer]) -> set[int]:
    """Return the ids of the storages of gradients."""
    gradients = [p.grad for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return {id(g.untyped_storage()) for g in gradients if g is not None and g.layout is torch.strided}


def _partly_held(tensors: Sequence[torch.Tensor], keys: Sequence[int], sizes: Sequence[int]) -> set[int]:
    """Return the ids of those storages of `tensors`, given with their ids and bytes, of which something is left to others."""
    held: dict[int, dict[tuple[int, int], int]] = {}
    for tensor, key in zip(tensors, keys, strict=True):
        held.setdefault(key, {})[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    whole = dict(zip(keys, sizes, strict=True))
    return {key for key, parts in held.items() if sum(parts.values()) < whole[key] and whole[key] not in parts.values()}


_storage, _nbytes = torch.Tensor.untyped_storage, attrgetter("nbytes")
_version = attrgetter("_version")  # as the notes on autograd tell of it
_PLAIN = {torch.Tensor, torch.nn.Parameter}
"""Others may have their numbers elsewhere."""


def _tensors(optimizers: Iterable[Optimizer]) -> list[torch.Tensor]:
    found: list[Any] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            found += group["params"]
        for state in optimizer.state.values():
            if isinstance(state, dict):
                found += state.values()
    if set(map(type, found)) <= _PLAIN:
        return found
    lists = [value for value in found if isinstance(value, (list, tuple))]  # LBFGS's history
    return [value for value in chain(found, *lists) if isinstance(value, torch.Tensor)]


def _inside_a_step(optimizers: Sequence[Optimizer]) -> bool:
    """Say whether a method of one of them is running in this thread."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if "self" in frame.f_code.co_varnames and any(frame.f_locals.get("self") is o for o in optimizers):
            return True
    return False


def _before_steps(optimizer: Optimizer, hook: Any) -> RemovableHandle:
    """Have `hook` called before each step of `optimizer`, or of the one that it wraps: wrappers such as accelerate's have no hooks."""
    try:
        return optimizer.register_step_pre_hook(hook)
    except AttributeError:  # Optimizer.__init__ has never been called
        inner = [
            one for one in vars(optimizer).values() if isinstance(one, Optimizer) and _parameters(one) == _parameters(optimizer)
        ]
        if len(inner) != 1:
            raise UsageError(
                f"nothing can be called before the steps of this {type(optimizer).__name__}; give the optimizers that it wraps"
            ) from None
        return _before_steps(inner[0], hook)


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class Gate:
    """Has the next step of each optimizer wait until what it would change is copied."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._copies: tuple[HostCopy, ...] = ()
        self._handles: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()

    def close_for(self, copy: HostCopy, optimizers: Iterable[Optimizer]) -> None:
        """Let no step of `optimizers` begin before `copy` is complete.

        Raises:
            UsageError: one has no hooks.
        """
        with self._lock:
            for optimizer in optimizers:
                # Once for all: torch.compile would compile a step anew each time its hooks change.
                if optimizer not in self._handles:
                    self._handles[optimizer] = _before_steps(optimizer, self._hook())
            self._copies = (*self._copies, copy)

    def open_for(self, copy: HostCopy) -> None:
        """Forget `copy`: it is complete, or nobody needs it any more."""
        with self._lock:
            self._copies = tuple(c for c in self._copies if c is not copy)

    def wait(self) -> None:
        """Return when nothing is left to copy. In a forked child at once: the thread that copies is its parent's."""
        if self._pid == os.getpid():
            for copy in self._copies:
                copy.wait()

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        with self._lock:
            for handle in self._handles.values():
                handle.remove()
            self._handles = WeakKeyDictionary()

    def _hook(self) -> Any:
        def before_step(optimizer: Any, args: Any, kwargs: Any) -> None:
            self.wait()

        # What torch.compiler.disable would set, which imports the whole compiler: a compiled step calls this, and looks not into it.
        before_step._torchdynamo_disable = True  # type: ignore[attr-defined]
        return before_step
