"""Batches from within groups."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence, Sized
from itertools import cycle, islice
from typing import Any

from torch.utils.data import DistributedSampler

from ckptstore.errors import UsageError

from ._progress import Interruptable, whole
from ._sampler import epoch_order, replicas

__all__ = ["InterruptableDistributedGroupedBatchSampler"]


class InterruptableDistributedGroupedBatchSampler(Interruptable[list[int]], DistributedSampler[list[int]]):
    """A batch sampler whose batches each hold samples of one group only, such as pictures of similar shape.

    Every batch has `batch_size` samples, and every rank gets the same number of batches. The samples of a group that do not fill a
    batch are completed with others of the same group, or left out with `drop_last`. Progress is counted in batches.

    Args:
        group_ids: the group of each sample of `dataset`.
        batch_size: samples in a batch.
    """

    _kind = "grouped batches"
    _unit = "batches"

    def __init__(
        self,
        dataset: Sized,
        group_ids: Sequence[int],
        batch_size: int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if len(group_ids) != len(dataset):
            raise UsageError(f"group_ids has {len(group_ids)} entries for {len(dataset)} samples")
        world, rank = replicas(num_replicas, rank)
        DistributedSampler.__init__(self, dataset, world, rank, bool(shuffle), whole(seed, "seed"), bool(drop_last))  # type: ignore[arg-type]
        self.batch_size = batch_size = whole(batch_size, "batch_size", 1)
        self.group_ids = [whole(group, "a group id") for group in group_ids]
        sizes = Counter(self.group_ids).values()
        self._batches = sum(n // batch_size if drop_last else -(-n // batch_size) for n in sizes)
        self._digest = hashlib.sha256(json.dumps(self.group_ids).encode()).hexdigest()
        self._begin()

    def __iter__(self) -> Iterator[list[int]]:
        return Interruptable.__iter__(self)

    def advance(self, n: int = 1) -> None:
        """Count `n` more batches as consumed on this rank. All ranks must do the same.

        Raises:
            AdvancedTooFarError: the epoch does not have as many.
        """
        Interruptable.advance(self, n)

    def _length(self) -> int:
        return self._batches

    def _sequence(self) -> list[list[int]]:
        open_batches: dict[int, list[int]] = {}
        members: dict[int, list[int]] = {}
        batches: list[list[int]] = []
        for index in epoch_order(len(self.group_ids), self.shuffle, self.seed, self.epoch):
            group = self.group_ids[index]
            members.setdefault(group, []).append(index)
            batch = open_batches.setdefault(group, [])
            batch.append(index)
            if len(batch) == self.batch_size:
                batches.append(open_batches.pop(group))
        if not self.drop_last:
            for group, batch in open_batches.items():
                batches.append(batch + list(islice(cycle(members[group]), self.batch_size - len(batch))))
        return batches

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "dataset": len(self.group_ids),
            "batch_size": self.batch_size,
            "groups": self._digest,
        }
