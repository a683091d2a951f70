"""Samplers of single samples."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler, Sampler

from ckptstore.errors import UsageError

from ._progress import Interruptable, whole

__all__ = ["InterruptableDistributedSampler", "InterruptableSampler", "epoch_order", "replicas"]


def epoch_order(length: int, shuffle: bool, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch: that of `torch.utils.data.DistributedSampler`."""
    if not shuffle:
        return list(range(length))
    generator = torch.Generator()
    generator.manual_seed(seed + epoch)
    order: list[int] = torch.randperm(length, generator=generator, device="cpu").tolist()
    return order


def replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """Return number of ranks and rank: as given, else of the process group, else one rank.

    Raises:
        UsageError: there is no such rank, or several ranks and nothing that says which this is.
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_replicas is None:
        if not group and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            warnings.warn(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no process group, so this sampler draws all samples in this "
                "process: call init_process_group() before you make it, or give num_replicas and rank",
                RuntimeWarning,
                stacklevel=3,
            )
        num_replicas = torch.distributed.get_world_size() if group else 1
    world = whole(num_replicas, "num_replicas", 1)
    if rank is None:
        if world > 1 and not group:
            raise UsageError(
                f"num_replicas is {world}, but without a process group nothing says which rank this is; give rank too"
            )
        rank = torch.distributed.get_rank() if group else 0
    mine = whole(rank, "rank", 0)
    if mine >= world:
        raise UsageError(f"there is no rank {mine} of {world}: ranks count from 0")
    return world, mine


class InterruptableDistributedSampler(Interruptable[int], DistributedSampler[int]):
    """`torch.utils.data.DistributedSampler` that can be stopped and resumed within an epoch, on another number of ranks if need be.

    Draws the same samples in the same order. Arguments as there, but without a process group it is a sampler for one process.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        world, rank = replicas(num_replicas, rank)
        DistributedSampler.__init__(self, dataset, world, rank, bool(shuffle), whole(seed, "seed"), bool(drop_last))  # type: ignore[arg-type]
        self._size = len(dataset)
        self._begin()

    def __iter__(self) -> Iterator[int]:
        return Interruptable.__iter__(self)

    def _length(self) -> int:
        return self._size

    def _sequence(self) -> list[int]:
        return epoch_order(self._size, self.shuffle, self.seed, self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle}


class InterruptableSampler(Interruptable[int], Sampler[int]):
    """The same for one process, whatever process group there is: each rank that has data of its own uses one.

    `num_replicas`, `rank` and `drop_last` make no difference; they are there so that the two can be exchanged.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.dataset = dataset
        self.shuffle = bool(shuffle)
        self.seed = whole(seed, "seed")
        self.epoch = 0
        self.num_replicas, self.rank, self.drop_last = 1, 0, False
        self._size = len(dataset)
        self._begin()

    def _length(self) -> int:
        return self._size

    def _sequence(self) -> list[int]:
        return epoch_order(self._size, self.shuffle, self.seed, self.epoch)

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle}
