"""Checkpoints for PyTorch that are whole, durable, verified and fenced.

::

    store = ckptstore.Store("runs/42?keep_last=3")
    store.save({"model": model, "optimizer": optimizer}, "latest", step=step)
    state = store.load("latest")

Everything but the errors is imported when first used, so that ``import ckptstore`` stays quick and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from . import errors
from .errors import *  # noqa: F403  (every error there is public)

__version__ = "0.1.0"

__all__ = [
    "AdvancedTooFarError",
    "Checkpoint",
    "HasNotResetProgressError",
    "InterruptableDistributedGroupedBatchSampler",
    "InterruptableDistributedSampler",
    "InterruptableSampler",
    "PendingSave",
    "Preemption",
    "SamplerMismatch",
    "Store",
    "Transaction",
    "__version__",
    "atomic_torch_save",
    "preemption",
]
__all__ += errors.__all__

# Type checkers read the first branch and so know every name; with a module-level __getattr__ they would let any typo pass.
if TYPE_CHECKING:
    from .atomic import atomic_torch_save
    from .background import PendingSave
    from .checkpoint import Checkpoint
    from .preempt import Preemption, preemption
    from .sampler import (
        AdvancedTooFarError,
        HasNotResetProgressError,
        InterruptableDistributedGroupedBatchSampler,
        InterruptableDistributedSampler,
        InterruptableSampler,
        SamplerMismatch,
    )
    from .store import Store
    from .transaction import Transaction
else:
    _LAZY = {
        "AdvancedTooFarError": "sampler",
        "Checkpoint": "checkpoint",
        "HasNotResetProgressError": "sampler",
        "InterruptableDistributedGroupedBatchSampler": "sampler",
        "InterruptableDistributedSampler": "sampler",
        "InterruptableSampler": "sampler",
        "PendingSave": "background",
        "Preemption": "preempt",
        "SamplerMismatch": "sampler",
        "Store": "store",
        "Transaction": "transaction",
        "atomic_torch_save": "atomic",
        "preemption": "preempt",
    }

    def __getattr__(name):
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
