"""What a sampler refuses."""

from __future__ import annotations

from ckptstore.errors import CkptStoreError, StateMismatch

__all__ = ["AdvancedTooFarError", "HasNotResetProgressError", "SamplerMismatch"]


class AdvancedTooFarError(CkptStoreError, ValueError):
    """More was counted as consumed than the epoch has; the sampler was left as it was."""


class HasNotResetProgressError(CkptStoreError, RuntimeError):
    """Another epoch was entered in the middle of one; reset the progress first, or use ``with sampler.in_epoch(epoch)``."""


class SamplerMismatch(StateMismatch):
    """The state was saved by a sampler over other data, or with another seed or rule; the sampler was left as it was."""
