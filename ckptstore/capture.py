"""What is in a state at one moment, but for the bytes of its tensors.

Everything that is no tensor is pickled at once, so that later changes do not reach it. Of the tensors it is noted how each lies in its
storage; the storages are told to the caller, who copies them. From the copies the state is built anew, to be saved.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .errors import NotSerializable
from .unpicklable import refusal

__all__ = ["Capture"]

_PROTOCOL = torch.serialization.DEFAULT_PROTOCOL
"""That of torch.save: objects may pickle themselves differently with another."""


class Capture:
    """The structure of `obj`, which `snapshot.to_state` has made, as it is now.

    Raises:
        NotSerializable: `torch.save` could not write it.
        Exception: whatever a ``__reduce__`` or ``__getstate__`` inside `obj` raised.
    """

    def __init__(self, obj: Any) -> None:
        self.storages: list[torch.UntypedStorage] = []
        """Each once, in the order of the state. They are the live ones."""
        self._numbers: dict[int, int] = {}  # id of a storage -> its number
        self._leaves: list[tuple[Any, ...]] = []
        file = io.BytesIO()
        try:
            _Pickler(file, self).dump(obj)
        except Exception as exc:
            problem = refusal(exc, obj)
            if problem is None:
                raise
            raise NotSerializable(problem) from exc
        self._structure = file.getvalue()

    def forget_live(self) -> None:
        """Let go of the live storages: they have been copied, or somebody else holds them."""
        self.storages, self._numbers = [], {}

    def rebuild(self, copies: Sequence[torch.UntypedStorage]) -> Any:
        """Return an object that `torch.save` writes as it would have written the state, over `copies` of the storages.

        Raises:
            NotSerializable: something in it can be pickled, but not unpickled.
        """
        try:
            return _Unpickler(io.BytesIO(self._structure), self._leaves, copies).load()
        except Exception as exc:
            raise NotSerializable(f"something in the state can be pickled, but not loaded again: {exc}") from exc

    def _tensor(self, tensor: torch.Tensor) -> int:
        # Once for each tensor while the training waits: every call counts.
        leaves, numbers, storage = self._leaves, self._numbers, tensor.untyped_storage()
        key = id(storage)  # torch returns the same object for the same storage while one is alive, and here it is
        number = numbers.get(key)
        if number is None:
            number = numbers[key] = len(numbers)
            self.storages.append(storage)
        leaves.append((number, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride()))
        return len(leaves) - 1

    def _bare(self, storage: torch.UntypedStorage, dtype: torch.dtype | None) -> int:
        number = self._numbers.setdefault(id(storage), len(self._numbers))
        if number == len(self.storages):
            self.storages.append(storage)
        self._leaves.append((number, dtype))
        return len(self._leaves) - 1


_attributes: Callable[[torch.Tensor], Any] = getattr(object, "__getstate__", lambda tensor: tensor.__dict__)
"""Attributes that the user has set, if any. From Python 3.11 on without making an empty dictionary for each tensor, which takes a while."""
_has_names: Callable[[torch.Tensor], bool] = getattr(torch.Tensor, "has_names", lambda tensor: False)
"""Gone from torch 2.13 on, with the names."""


def _is_plain(tensor: torch.Tensor) -> bool:
    """Say whether a tensor of exactly this class is told by its storage and how it lies in it. torch takes all others apart itself."""
    return (
        (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not (_attributes(tensor) or _has_names(tensor))
    )


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, found: Capture) -> None:
        super().__init__(file, _PROTOCOL)
        self._found = found

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            return (_leaf, (self._found._tensor(obj),)) if _is_plain(obj) else NotImplemented
        if isinstance(obj, torch.UntypedStorage):
            return _leaf, (self._found._bare(obj, None),)
        if isinstance(obj, torch.TypedStorage):
            return _leaf, (self._found._bare(obj._untyped_storage, obj.dtype),)  # the public `untyped` warns that it will change
        return NotImplemented


def _leaf(number: int) -> Any:
    """Stand for a tensor or storage in the pickle, which only `_Unpickler` reads."""
    raise NotImplementedError


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, leaves: Sequence[tuple[Any, ...]], copies: Sequence[torch.UntypedStorage]) -> None:
        super().__init__(file)
        self._leaves = leaves
        self._copies = copies

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (__name__, _leaf.__name__):
            return self._leaf
        return super().find_class(module, name)

    def _leaf(self, number: int) -> Any:
        index, dtype, *layout = self._leaves[number]
        copy = self._copies[index]
        if layout:
            return torch.empty(0, dtype=dtype, device="cpu").set_(copy, *layout)
        if dtype is None:
            return copy
        return torch.TypedStorage(wrap_storage=copy, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
