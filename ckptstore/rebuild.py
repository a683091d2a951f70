"""The objects in a ``.pt`` file of plain tensors and containers, made without torch's unpickler, in two steps.

torch's restricted unpickler is written in Python, and takes as long for a thousand tensors as reading them does. Here the one in C of the
standard library reads the pickle, and finds no name in it but those below, each of which makes a value that cannot do anything: where a
tensor belongs there is a `Hollow` one. So nobody can look into a tensor, or write to it, before its bytes are there and were checked. Only
then, and only for what is wanted, tensors are made.

Whatever is not understood here raises `NotPlain`, and is for torch to load, or to refuse.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from .archive import Record
from .opcodes import plain_ops

__all__ = ["Hollow", "NotPlain", "Place", "fill", "hollow", "hollows", "tensors_of"]


class NotPlain(Exception):
    """The file holds something else than plain tensors and containers, or may do so."""


class _Inert:
    """Something that a pickle can name, but not change."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise NotPlain


class _Kind(_Inert):
    """A class of storages; of untyped ones if `dtype` is None."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype


class _Stored(_Inert):
    """A storage."""

    __slots__ = ("device", "dtype", "record")

    def __init__(self, record: Record, dtype: torch.dtype | None, device: torch.device) -> None:
        self.record = record
        self.dtype = dtype
        self.device = device


class Hollow(_Inert):
    """Where a tensor will be."""

    __slots__ = ("_layout", "device", "dtype", "grad", "parameter", "record")

    def __init__(
        self,
        record: Record,
        device: torch.device,
        dtype: torch.dtype,
        layout: tuple[int, tuple[int, ...], tuple[int, ...]],
        grad: bool,
        parameter: bool,
    ) -> None:
        self.record = record
        self.device = device
        self.dtype = dtype
        self.grad = grad
        self.parameter = parameter
        self._layout = layout

    def as_parameter(self, grad: bool) -> Hollow:
        return Hollow(self.record, self.device, self.dtype, self._layout, grad, True)

    def made(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Return the tensor, a view of `storage`."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        if type(tensor) is not torch.Tensor:
            raise NotPlain  # somebody has torch make others, as FakeTensorMode does
        try:
            tensor.set_(storage, *self._layout)
        except (RuntimeError, TypeError, ValueError) as exc:
            raise NotPlain from exc  # numbers that no tensor can have
        if self.parameter:
            return torch.nn.Parameter(tensor, self.grad)
        if self.grad:
            tensor.requires_grad = True
        return tensor


class _Maker(_Inert):
    """A function that a pickle can call."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


def _tensor(
    stored: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any = None, metadata: Any = None
) -> Hollow:
    if type(stored) is not _Stored or hooks or metadata or not isinstance(grad, bool):
        raise NotPlain
    dtype = dtype or stored.dtype
    if not isinstance(dtype, torch.dtype) or (grad and not (dtype.is_floating_point or dtype.is_complex)):
        raise NotPlain
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise NotPlain
    last, count = offset, 1
    for n, step in zip(size, stride, strict=True):
        if type(n) is not int or type(step) is not int or n < 0 or step < 0:
            raise NotPlain
        last += (n - 1) * step
        count *= n
    if type(offset) is not int or offset < 0 or (count and (last + 1) * dtype.itemsize > stored.record.size):
        raise NotPlain
    return Hollow(stored.record, stored.device, dtype, (offset, size, stride), grad, False)


def _tensor_v2(stored: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any) -> Hollow:
    return _tensor(stored, offset, size, stride, grad, hooks)


def _parameter(data: Any, grad: Any, hooks: Any) -> Hollow:
    if type(data) is not Hollow or data.parameter or hooks or not isinstance(grad, bool):
        raise NotPlain
    if grad and not (data.dtype.is_floating_point or data.dtype.is_complex):
        raise NotPlain
    return data.as_parameter(grad)


def _ordered() -> OrderedDict[Any, Any]:
    return OrderedDict()


def _size(items: Any) -> torch.Size:
    if type(items) is not tuple or not all(type(n) is int for n in items) or len(items) > _MAX_DIMS:
        raise NotPlain
    return torch.Size(items)


def _device(*args: Any) -> torch.device:
    return torch.device(*args)


_MAX_DIMS = 64
_KINDS = {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    "ComplexDouble": torch.complex128, "ComplexFloat": torch.complex64,
}  # fmt: skip
_FOUND: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): _Maker(_ordered),
    ("torch", "Size"): _Maker(_size),
    ("torch", "device"): _Maker(_device),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): _Maker(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_parameter),
    ("torch.storage", "UntypedStorage"): _Kind(None),
    **{("torch", f"{name}Storage"): _Kind(dtype) for name, dtype in _KINDS.items()},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}


Place = Callable[[Any], torch.device | None]
"""Says of where something was, as torch writes it ("cpu", "cuda:0"), where it is to be; None if that is for torch to say."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, records: Mapping[str, Record], place: Place) -> None:
        super().__init__(io.BufferedReader(io.BytesIO(data), len(data) + 1))  # which can be looked into ahead
        self._records = records
        self._place = place
        self._storages: dict[str, _Stored] = {}

    def find_class(self, module: str, name: str, /) -> Any:
        return _FOUND[module, name]

    def persistent_load(self, pid: Any, /) -> _Stored:
        what, kind, key, location, count = pid
        if what != "storage" or type(kind) is not _Kind or type(key) is not str or type(count) is not int:
            raise NotPlain
        stored = self._storages.get(key)
        if stored is None:
            device = self._place(location)
            if device is None:
                raise NotPlain
            stored = self._storages[key] = _Stored(self._records[f"data/{key}"], kind.dtype, device)
        if kind.dtype is not stored.dtype or count * (kind.dtype.itemsize if kind.dtype else 1) != stored.record.size:
            raise NotPlain
        return stored


def hollow(data: bytes, records: Mapping[str, Record], size: int, place: Place) -> Any:
    """Return what the pickle `data` holds, with a `Hollow` where a tensor belongs.

    Args:
        records: of the file, by their paths.
        size: bytes of the file, to which the memory that this takes is in proportion.
        place: where tensors are to be.

    Raises:
        NotPlain
    """
    if not plain_ops(data, size):
        raise NotPlain
    try:
        return _Unpickler(data, records, place).load()
    except (MemoryError, NotPlain):
        raise
    except Exception as exc:  # malformed in some way, for which others have the words
        raise NotPlain from exc


def hollows(value: Any) -> Iterator[Hollow]:
    """Yield what is to be a tensor in plain containers, some of them perhaps more than once. Raises `NotPlain` for anything else."""
    queue, seen = [value], set[int]()
    while queue:
        node = queue.pop()
        kind = type(node)
        if kind is Hollow:
            yield node
        elif kind in _CONTAINERS:
            if id(node) not in seen:
                seen.add(id(node))
                queue.extend(node.values() if isinstance(node, dict) else node)
                if isinstance(node, dict):
                    queue.extend(key for key in node if type(key) not in (str, int))
                if kind is OrderedDict and node.__dict__:
                    queue.append(node.__dict__)
        elif kind not in _OTHERS:
            raise NotPlain


_CONTAINERS = (dict, OrderedDict, list, tuple)
_OTHERS = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a part of what `fill` returned, some of them perhaps more than once."""
    queue, seen = [value], set[int]()
    while queue:
        node = queue.pop()
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            queue.extend(node.values() if isinstance(node, dict) else node)
            if isinstance(node, OrderedDict):
                queue.append(node.__dict__)


def fill(value: Any, storages: Mapping[int, torch.UntypedStorage]) -> Any:
    """Put tensors where they belong in `value`, in place, and return it, for it may be one itself, or a tuple.

    Args:
        storages: by the first byte of their records.

    Raises:
        NotPlain: the value is made of something else than `hollows` lets pass, or tensors are in tuples in a way that is not plain.
    """
    return _Filling(storages).filled(value)


class _Filling:
    def __init__(self, storages: Mapping[int, torch.UntypedStorage]) -> None:
        self._storages = storages
        self._done: dict[int, Any] = {}
        self._kept: list[Any] = []  # what was replaced: its address must not come to be another's
        self._queue: list[Any] = []

    def filled(self, value: Any) -> Any:
        result = self._new(value)
        while self._queue:
            node = self._queue.pop()
            if type(node) is list:
                for i, item in enumerate(node):
                    if type(item) not in _OTHERS:
                        node[i] = self._new(item)
            else:
                for key, item in node.items():  # whose keys stay
                    if type(key) not in _OTHERS and (type(key) is not tuple or self._new(key) is not key):
                        raise NotPlain
                    if type(item) not in _OTHERS:
                        node[key] = self._new(item)
                if type(node) is OrderedDict and node.__dict__:
                    self._new(node.__dict__)
        return result

    def _new(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind in _OTHERS:
            return value
        known = self._done.get(id(value))
        if known is not None:
            return known
        if kind is Hollow:
            result: Any = value.made(self._storages[value.record.start])
        elif kind is tuple:
            if depth > _MAX_DEPTH:  # or it holds itself
                raise NotPlain
            items = [self._new(item, depth + 1) for item in value]
            result = tuple(items) if any(new is not old for new, old in zip(items, value, strict=True)) else value
        elif kind in _CONTAINERS:
            result = value
            self._queue.append(value)
        else:
            raise NotPlain
        self._done[id(value)] = result
        self._kept.append(value)
        return result


_MAX_DEPTH = 100
