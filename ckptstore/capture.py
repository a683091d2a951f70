"""What is in a state at one moment, but for the bytes of its tensors.

Everything that is no tensor is pickled at once, so that later changes do not reach it. Of the tensors it is noted how each lies in its
storage; the storages are told to the caller, who copies them. From the copies the state is built anew, to be saved.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch

from .errors import NotSerializable
from .plaintensor import are_plain
from .snapshot import refuse_parts
from .unpicklable import refusal

__all__ = ["Capture"]

_PROTOCOL = torch.serialization.DEFAULT_PROTOCOL
"""That of torch.save: objects may pickle themselves differently with another."""


class Capture:
    """The structure of `obj`, which `snapshot.to_state` has made, as it is now.

    Raises:
        NotSerializable: `torch.save` could not write it, or it has only a part of a DTensor; see `snapshot.refuse_parts`.
        Exception: whatever a ``__reduce__`` or ``__getstate__`` inside `obj` raised.
    """

    def __init__(self, obj: Any) -> None:
        # The training waits, perhaps with thousands of tensors. So what must be known of each is asked for all of them in one go,
        # without Python between one and the next, and only if one is not plain is each looked at before it is taken for a leaf.
        tensors: list[torch.Tensor] = []
        bare: list[tuple[torch.UntypedStorage, torch.dtype | None]] = []
        self._structure = _pickled(obj, tensors, bare, careful=False)
        if not are_plain(tensors):
            tensors, bare = [], []
            self._structure = _pickled(obj, tensors, bare, careful=True)
        storages = [*map(torch.Tensor.untyped_storage, tensors), *(storage for storage, _ in bare)]
        keys = list(map(id, storages))  # torch returns the same object for the same storage while one is alive, and here it is
        unique = dict(zip(keys, storages, strict=True))
        self.storages = list(unique.values())
        """Each once. They are the live ones."""
        self.numbers = dict(zip(unique, range(len(unique)), strict=True))
        """The place of each in `storages`, by its id."""
        self._behind = list(
            map(self.numbers.__getitem__, keys)
        )  # of those of the tensors, then of those that stand for themselves
        self._layouts = [list(map(ask, tensors)) for ask in _LAYOUT]
        self._bare = [dtype for _, dtype in bare]

    def forget_live(self) -> None:
        """Let go of the live storages: they have been copied, or somebody else holds them."""
        self.storages, self.numbers = [], {}

    def rebuild(self, copies: Sequence[torch.UntypedStorage]) -> Any:
        """Return an object that `torch.save` writes as it would have written the state, over `copies` of the storages.

        Raises:
            NotSerializable: something in it can be pickled, but not unpickled.
        """
        behind = [copies[number] for number in self._behind]
        count = len(behind) - len(self._bare)
        tensors = zip(behind[:count], *self._layouts, strict=True)
        bare = zip(behind[count:], self._bare, strict=True)
        try:
            return _Unpickler(io.BytesIO(self._structure), tensors, bare).load()
        except Exception as exc:
            raise NotSerializable(f"something in the state can be pickled, but not loaded again: {exc}") from exc


_LAYOUT: tuple[Callable[[torch.Tensor], Any], ...] = (
    attrgetter("dtype"),
    torch.Tensor.storage_offset,
    attrgetter("shape"),
    torch.Tensor.stride,
)


def _pickled(obj: Any, tensors: list[torch.Tensor], bare: list[tuple[Any, Any]], *, careful: bool) -> bytes:
    """Return `obj` pickled, with a leaf for each tensor and each storage, which are added to the lists in the order of the leaves.

    Args:
        careful: look first whether a tensor is plain.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, _PROTOCOL)
    found, plain = tensors.append, torch.Tensor

    def reduced(part: Any) -> Any:
        if type(part) is plain and not (careful and not are_plain([part])):
            found(part)
            return _TENSOR
        if isinstance(part, torch.UntypedStorage):
            bare.append((part, None))
            return _STORAGE
        if isinstance(part, torch.TypedStorage):
            bare.append((part._untyped_storage, part.dtype))  # the public `untyped` warns that it will change
            return _STORAGE
        if hasattr(type(part), "full_tensor"):
            refuse_parts(obj)
        return NotImplemented

    pickler.reducer_override = reduced
    try:
        pickler.dump(obj)
    except NotSerializable:
        raise
    except Exception as exc:
        problem = refusal(exc, obj)
        if problem is None:
            raise
        raise NotSerializable(problem) from exc
    finally:
        del pickler.reducer_override  # which holds what is live
    return file.getvalue()


class _Pickler(pickle.Pickler):
    reducer_override: Any


def _tensor() -> Any:
    """Stand for the next tensor in the pickle, which only `_Unpickler` reads."""
    raise NotImplementedError


def _storage() -> Any:
    """Stand for the next storage."""
    raise NotImplementedError


_TENSOR, _STORAGE = (_tensor, ()), (_storage, ())


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Iterator[tuple[Any, ...]], bare: Iterator[tuple[Any, ...]]) -> None:
        super().__init__(file)

        # Not methods: the unpickler remembers what it has looked up, and so would keep itself, and the copies with it.
        def tensor() -> Any:
            copy, dtype, offset, shape, stride = next(tensors)
            return torch.empty(0, dtype=dtype, device="cpu").set_(copy, offset, shape, stride)

        def storage() -> Any:
            copy, dtype = next(bare)
            if dtype is None:
                return copy
            return torch.TypedStorage(wrap_storage=copy, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]

        self._leaves = {_tensor.__name__: tensor, _storage.__name__: storage}

    def find_class(self, module: str, name: str) -> Any:
        return self._leaves[name] if module == __name__ else super().find_class(module, name)
