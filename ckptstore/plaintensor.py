"""Tensors that are told by their storage and how they lie in it, as nearly all are: which those are, and how torch pickles them."""

from __future__ import annotations

import copyreg
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

import torch

from .unpicklable import check_reach

__all__ = ["are_plain", "have_attributes", "reduction"]

_is_cpu = attrgetter("is_cpu")
_dtype = attrgetter("dtype")
_attributes: Callable[[torch.Tensor], Any] = getattr(object, "__getstate__", lambda tensor: tensor.__dict__)
"""Attributes that the user has set, if any. From Python 3.11 on without making an empty dictionary for each tensor, which takes a while."""
_NUMBERS = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)
"""Those that are neither quantized nor complex, and so never conjugated: nearly all there are."""
_has_names: Callable[[torch.Tensor], bool] | None = getattr(torch.Tensor, "has_names", None)
"""Gone from torch 2.13 on, with the names."""
_EXCEPTIONS: tuple[Callable[[torch.Tensor], Any], ...] = (
    attrgetter("requires_grad"),
    attrgetter("is_nested"),
    torch.Tensor.is_neg,
    _attributes,
    *((_has_names,) if _has_names is not None else ()),
)


def are_plain(tensors: Sequence[torch.Tensor]) -> bool:
    """Say whether tensors of exactly this class are told by their storage and how they lie in it. torch takes all others apart itself."""
    dtypes = set(map(_dtype, tensors))
    return (
        (all(map(_is_cpu, tensors)) or all(t.is_cpu or t.is_cuda for t in tensors))
        and set(map(attrgetter("layout"), tensors)) <= {torch.strided}
        and not any(t.is_quantized or t.is_conj() for t in tensors if dtypes - _NUMBERS)
        and not any(any(map(exception, tensors)) for exception in _EXCEPTIONS)
    )


def have_attributes(tensors: Sequence[torch.Tensor]) -> bool:
    """Say whether the user has set an attribute of one of them."""
    return any(map(_attributes, tensors))


def reduction(tensor: torch.Tensor) -> Any:
    """Return what torch's ``__reduce_ex__`` makes of a tensor of exactly this class, or NotImplemented: then torch is to be asked.

    It asks each tensor about all that it might be, which takes three times as long.

    Raises:
        pickle.PicklingError: torch could not load it; see `check_reach`.
    """
    if (
        tensor.is_cpu
        and tensor.dtype in _NUMBERS
        and tensor.layout is torch.strided
        and not (tensor.requires_grad or tensor.is_nested or tensor.is_neg() or _attributes(tensor))
        and not (_has_names is not None and _has_names(tensor))
        and torch.Tensor not in copyreg.dispatch_table
        and _is_as_torchs()
    ):
        return _reduction(tensor)
    return NotImplemented


def _reduction(tensor: torch.Tensor) -> Any:
    untyped, dtype = tensor.untyped_storage(), tensor.dtype
    layout = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    check_reach(untyped.nbytes(), dtype.itemsize, *layout)
    storage = torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]
    no_hooks: OrderedDict[Any, Any] = OrderedDict()
    return torch._utils._rebuild_tensor_v2, (storage, *layout, False, no_hooks)


@cache
def _is_as_torchs() -> bool:
    """Compare the two on a few samples: what torch calls, and with what, is its own affair, though files depend on it."""
    theirs: Callable[[torch.Tensor, int], Any] = torch.Tensor.__reduce_ex__
    try:
        return all(
            _comparable(_reduction(sample)) == _comparable(theirs(sample, torch.serialization.DEFAULT_PROTOCOL))
            for dtype in _NUMBERS
            for sample in (
                torch.ones((), dtype=dtype, device="cpu"),
                torch.ones(3, 4, dtype=dtype, device="cpu")[1:, ::2].t(),
                torch.ones(0, dtype=dtype, device="cpu"),
            )
        )
    except Exception:
        return False


def _comparable(reduced: Any) -> Any:
    call, (storage, *arguments) = reduced
    return call, type(storage), storage.dtype, storage._untyped_storage._cdata, pickle.dumps(arguments)
