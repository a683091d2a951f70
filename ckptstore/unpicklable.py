"""What torch.save cannot write, or would write and never read again; and which part of an object that is."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from operator import mul
from typing import Any

import torch

__all__ = ["check_reach", "check_storage", "check_tensor", "refusal"]

_REFUSALS = (pickle.PicklingError, TypeError, AttributeError, LookupError, ValueError, RuntimeError)
"""What the pickler and torch raise for an object they cannot write; `RecursionError` and `NotImplementedError` are RuntimeErrors."""
_OURS = frozenset({"ckptstore", "copyreg", "pickle", "torch"})
_MAX_DEPTH = 100


def check_storage(storage: Any) -> Any:
    """Return the untyped storage of `storage`, unless it ends in the middle of an element.

    torch.save writes all its bytes, but torch.load wants whole elements. Such a one lies under
    ``torch.zeros(10, dtype=torch.uint8)[:8].view(torch.float32)``. Seen in torch 2.13.

    Raises:
        pickle.PicklingError: says what to do.
    """
    untyped = getattr(storage, "_untyped_storage", storage)  # private; the public `untyped` warns that it will change
    item = 1 if untyped is storage else storage.dtype.itemsize
    if untyped.nbytes() % item:
        raise pickle.PicklingError(
            f"a tensor of {item}-byte elements lies in a storage of {untyped.nbytes()} bytes, which torch.load would refuse; "
            "save a clone() of it"
        )
    return untyped


def check_reach(stored: int, item: int, offset: int | torch.SymInt, shape: Sequence[int], stride: Sequence[int]) -> None:
    """Refuse a tensor, of elements of `item` bytes, that reaches beyond its storage of `stored` bytes: torch.load wants all of it.

    It has, for instance, after ``untyped_storage().resize_(0)``, by which memory is freed under a tensor that lives on. Seen in torch 2.13.

    Raises:
        pickle.PicklingError: says what to do.
    """
    if (offset + sum(map(mul, shape, stride)) - sum(stride) + 1) * item > stored and 0 not in shape:
        raise pickle.PicklingError(
            f"a tensor of shape {list(shape)} reaches beyond its storage of {stored} bytes, which torch.load would refuse; "
            "save it while its memory is there"
        )


def check_tensor(tensor: torch.Tensor) -> None:
    """Do as `check_reach` for a tensor of exactly this class, and refuse what else torch.load refuses. Seen in torch 2.13.

    A gradient, where the dtype has no storage class of its own; parameters of these do load. A quantized tensor that was viewed in
    another shape than the one that its scales are for.

    Raises:
        pickle.PicklingError: says what to do.
    """
    if tensor.layout is not torch.strided or tensor.is_nested or not (tensor.is_cpu or tensor.is_cuda):
        return
    if tensor.is_quantized:
        if "per_channel" in str(tensor.qscheme()):
            scales, axis = tensor.q_per_channel_scales().numel(), tensor.q_per_channel_axis()
            if tensor.shape[axis : axis + 1] != (scales,):
                raise pickle.PicklingError(
                    f"a quantized tensor of shape {list(tensor.shape)} has {scales} scales for its dimension {axis}, which torch.load "
                    "would refuse; save it in the shape that it was quantized in"
                )
        return
    stored = tensor.untyped_storage().nbytes()
    check_reach(stored, tensor.dtype.itemsize, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.requires_grad and tensor.dtype not in _WITH_GRADIENT:
        raise pickle.PicklingError(
            f"a tensor of {tensor.dtype} requires a gradient, and is no parameter, which torch.load would refuse; save a detach() of it"
        )


_WITH_GRADIENT = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64)


def refusal(exc: BaseException, obj: Any) -> str | None:
    """Explain `exc`, which pickling `obj` raised; None if it came from code of the user's (a ``__reduce__``, for instance)."""
    if not isinstance(exc, _REFUSALS) or any(package not in _OURS for package in _packages(exc)):
        return None
    if isinstance(exc, RecursionError):
        return f"torch.save cannot write obj: it is nested too deeply ({exc})"
    path, culprit = _find(obj)
    kind = f"{type(culprit).__module__}.{type(culprit).__qualname__}"
    return f"torch.save cannot write obj{path} ({kind}): {exc}"


def _packages(exc: BaseException) -> Iterator[str]:
    """Yield the top-level package of each Python frame that `exc` passed through. C code, as in the pickler, has none."""
    trace = exc.__traceback__
    while trace is not None:
        yield str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        trace = trace.tb_next


def _find(obj: Any) -> tuple[str, Any]:
    """Return path and value of the innermost part of `obj` that cannot be pickled alone."""
    path = ""
    for _ in range(_MAX_DEPTH):
        for step, part in _parts(obj):
            if not _can_pickle(part):
                path += step
                obj = part
                break
        else:
            break
    return path, obj


def _parts(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, dict):
        for key, value in obj.items():
            yield f"[{key!r}]" if isinstance(key, (str, int, float)) else f"[<{type(key).__name__}>]", value
    elif isinstance(obj, (list, tuple)):
        for index, value in enumerate(obj):
            yield f"[{index}]", value
    elif all(getattr(type(obj), hook, None) is getattr(object, hook, None) for hook in _HOOKS):
        for name, value in getattr(obj, "__dict__", {}).items():
            yield f".{name}", value


_HOOKS = ("__reduce_ex__", "__reduce__", "__getstate__")
"""With one of these of its own, an object is pickled by other things than its attributes."""


def _can_pickle(obj: Any) -> bool:
    try:
        _Probe(io.BytesIO(), protocol=2).dump(obj)
    except Exception:
        return False
    return True


class _Probe(pickle.Pickler):
    """Pickles everything but the bytes of tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            check_tensor(obj)
        return NotImplemented

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, (torch.TypedStorage, torch.UntypedStorage)):
            return None
        check_storage(obj)
        return "storage"
