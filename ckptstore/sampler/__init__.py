"""Samplers that can be stopped anywhere and go on at the very next sample, on any number of ranks."""

from ._errors import AdvancedTooFarError, HasNotResetProgressError, SamplerMismatch
from ._grouped import InterruptableDistributedGroupedBatchSampler
from ._sampler import InterruptableDistributedSampler, InterruptableSampler

__all__ = [
    "AdvancedTooFarError",
    "HasNotResetProgressError",
    "InterruptableDistributedGroupedBatchSampler",
    "InterruptableDistributedSampler",
    "InterruptableSampler",
    "SamplerMismatch",
]
