"""How far an epoch has come, counted so that it does not depend on how many ranks there are.

An epoch is one global sequence of items (samples, or batches), the same on every rank. W ranks take it W items at a time, in lockstep,
rank r the r-th of each W. So what they have consumed together is a prefix of the sequence, and one number says how long it is. Any
number of ranks can share out the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import BatchSampler, DataLoader

from ckptstore.errors import UsageError

from ._errors import AdvancedTooFarError, HasNotResetProgressError, SamplerMismatch

__all__ = ["Interruptable", "whole"]

T = TypeVar("T")

_FORMAT = 1


def whole(value: object, what: str, least: int | None = None) -> int:
    """Return `value` as a plain int, which JSON takes; NumPy's and torch's whole numbers are taken too.

    Raises:
        UsageError: it is none, or less than `least`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" from {least} on"
        raise UsageError(f"{what} must be a whole number{bound}, not {value!r:.100}")
    return number


class Interruptable(Generic[T]):
    """What all interruptable samplers share. A subclass gives `_sequence`, `_length` and `_identity`."""

    epoch: int
    num_replicas: int
    rank: int
    drop_last: bool
    _kind = "samples"
    """Names the rule by which the sequence is made."""
    _unit = "samples"
    _held = False
    """Whether no epoch is taken, for a loader is being asked for a batch: those of Fabric and Accelerate set one that they count from 0."""

    def _sequence(self) -> list[T]:
        """Return the items of the current epoch, before any padding."""
        raise NotImplementedError

    def _length(self) -> int:
        """Return the number of items in an epoch, before any padding; the same in every epoch."""
        raise NotImplementedError

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a state to mean the same sequence."""
        raise NotImplementedError

    def _begin(self) -> None:
        self._start = 0  # items that all ranks together had consumed when this sampler took over
        self._taken = 0  # items that this rank has consumed since

    @property
    def consumed(self) -> int:
        """Items of this epoch that all ranks together have consumed, without padding."""
        return min(self._start + self._taken * self.num_replicas, self._length())

    @property
    def progress(self) -> int:
        """Items of this epoch that each rank has consumed; if the number of ranks has changed, as if it had always been this one."""
        return -(-self.consumed // self.num_replicas)

    def _left(self, start: int) -> int:
        """Return how many items each rank still gets when `start` are consumed."""
        left = self._length() - start
        return left // self.num_replicas if self.drop_last else -(-left // self.num_replicas)

    def __len__(self) -> int:
        """Return the items of a whole epoch on each rank, as torch's samplers do, however many are left: schedulers are built on it."""
        return self._left(0)

    def __iter__(self) -> Iterator[T]:
        """Yield what is left of the current epoch on this rank. Does not count anything as consumed, so loaders may run ahead."""
        sequence = self._sequence()
        consumed = self.consumed
        mine = sequence[consumed + self.rank :: self.num_replicas]
        wanted = self._left(consumed)
        # Padding comes from the start of the epoch, as in torch.utils.data.DistributedSampler. The rest takes up `left` places of the
        # dealt-out sequence, so what this rank lacks are the places from there on.
        left = len(sequence) - consumed
        for i in range(len(mine), wanted):
            mine.append(sequence[(i * self.num_replicas + self.rank - left) % len(sequence)])
        return iter(mine[:wanted])

    def advance(self, n: int) -> None:
        """Count `n` more items as consumed on this rank (samples; batches for a batch sampler). All ranks must do the same.

        Raises:
            AdvancedTooFarError: the epoch does not have as many.
        """
        more, left = whole(n, f"the number of {self._unit} to advance by", 0), self._left(self.consumed)
        if more > left:
            raise AdvancedTooFarError(
                f"{more} {self._unit} more, when this rank has {left} left in epoch {self.epoch}; "
                "was something counted twice, or the progress not reset after the last epoch?"
            )
        self._taken += more

    def set_epoch(self, epoch: int) -> None:
        """Go to `epoch`: each has an order of its own. The epoch that is under way may be set again, and goes on.

        Raises:
            HasNotResetProgressError: another epoch is under way; call `reset_progress` first, or use `in_epoch`.
        """
        epoch = whole(epoch, "an epoch", 0)
        if self._held:
            return
        if self.consumed and epoch != self.epoch:
            raise HasNotResetProgressError(
                f"epoch {self.epoch} is under way ({self.consumed} of {self._length()} {self._unit} consumed): "
                f"call reset_progress() before set_epoch({epoch}), or use 'with sampler.in_epoch(epoch)'"
            )
        # From here on it is known that the user means to go on where this epoch stands: see `track`.
        self.epoch, self._start, self._taken = epoch, self.consumed, 0

    def reset_progress(self) -> None:
        """Count nothing of the current epoch as consumed."""
        self._begin()

    @contextmanager
    def in_epoch(self, epoch: int) -> Iterator[None]:
        """Run one epoch, or what is left of it after a resume.

        Left normally, also by ``break`` or ``return``, the epoch is over, and the next one is up. Left by an exception, the progress
        stays, so that it can be saved.

        Raises:
            HasNotResetProgressError: another epoch is under way.
        """
        self.set_epoch(epoch)
        yield
        self.reset_progress()
        self.epoch += 1

    def track(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the batches of `loader`, which draws from this sampler, and count each as consumed when it is handed out.

        So a save in the body of the loop belongs after the step on the batch in hand.

        Raises:
            UsageError: the loader draws from something else, or its batches cannot be counted, or the loop body counted too.
            HasNotResetProgressError: this sampler has counted this epoch to its end, and no epoch was entered since.
        """
        size = self._batch_items(loader)
        over = self._taken > 0  # not so after a resume or set_epoch: then there may rightly be nothing left
        # A loader that is started draws a seed from torch's generator. In the run that was not stopped it did so at the start of the
        # epoch; drawn again in mid-epoch, it would leave dropout and the like with other numbers than there.
        with torch.random.fork_rng(devices=[], enabled=self.consumed > 0):
            batches = iter(loader)
        while True:
            self._held = True
            try:
                batch = next(batches)
            except StopIteration:
                break
            finally:
                self._held = False
            over = False
            # Not the batch's own length: what a collate function makes of the samples is not ours to know.
            self.advance(min(size, self._left(self.consumed)))
            counted = self.consumed
            yield batch
            if self.consumed != counted:
                raise UsageError(
                    "the progress was changed inside a loop over track(), which counts each batch itself: leave out the advance(), "
                    "and start a new loop after load_state_dict() or reset_progress()"
                )
        if over:
            raise HasNotResetProgressError(
                f"epoch {self.epoch} has been consumed, so there is nothing to loop over: run each epoch in 'with sampler.in_epoch(epoch)'"
            )

    def _batch_items(self, loader: DataLoader[Any]) -> int:
        """Return how many items of this sampler make up a batch of `loader`."""
        if getattr(loader, "num_workers", 0) > 1 and not getattr(loader, "in_order", True):
            # What was handed out is then no prefix of the epoch, and a resume would repeat some samples and miss others.
            raise UsageError(
                "this loader hands out batches in any order, so no number says which were consumed; use in_order=True"
            )
        # Any: samplers of the user's own may be anything, and so may what is passed for a loader.
        batches: Any = getattr(loader, "batch_sampler", None)
        source: Any = getattr(loader, "sampler", None) if batches is None else batches
        if source is self:
            return 1
        # A subclass may form its batches in another way.
        if type(batches) is BatchSampler:
            source = batches.sampler
            if source is self:
                return int(batches.batch_size)
        raise UsageError(
            "this loader does not draw from this sampler, or by batches that cannot be counted; give it sampler=, or call advance()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return where the epoch stands, as plain JSON: the same on every rank, and independent of the number of ranks."""
        return {
            "format": _FORMAT,
            "kind": self._kind,
            "epoch": self.epoch,
            "consumed": self.consumed,
            "length": self._length(),
            "unit": self._unit,
            "padding": "drop" if self.drop_last else "wrap",
            **self._identity(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` says. A state of only ``progress`` (per rank) and ``epoch`` is taken too, for this number of ranks.

        Raises:
            SamplerMismatch: it was saved over data of another length, with another seed or rule, or is no state at all.
            AdvancedTooFarError: it has consumed more than there is.
        """
        if not isinstance(state_dict, Mapping):
            raise SamplerMismatch(f"a sampler's state is a dict, not {type(state_dict).__name__}")
        epoch = _count(state_dict, "epoch")
        if "consumed" in state_dict:
            if _count(state_dict, "format", 1) > _FORMAT:
                raise SamplerMismatch("this sampler state was saved by a newer ckptstore; upgrade it")
            for key, mine in self.state_dict().items():
                theirs = state_dict.get(key)
                # The types too: for Python, 1 == True == 1.0.
                if key not in ("format", "epoch", "consumed") and (theirs != mine or type(theirs) is not type(mine)):
                    raise SamplerMismatch(
                        f"the state was saved with {key} {theirs!r:.100}, and this sampler has {mine!r:.100}; "
                        "give it the same, or start a new epoch with a new sampler"
                    )
            consumed = _count(state_dict, "consumed")
        else:
            progress = _count(state_dict, "progress")
            if progress > len(self):
                raise AdvancedTooFarError(
                    f"the state has consumed {progress} {self._unit} on each rank, of {len(self)} in an epoch"
                )
            consumed = min(progress * self.num_replicas, self._length())
        if consumed > self._length():
            raise AdvancedTooFarError(f"the state has consumed {consumed} of {self._length()} {self._unit}")
        self.epoch, self._start, self._taken = epoch, consumed, 0


def _count(state: Mapping[str, Any], key: str, least: int = 0) -> int:
    value = state.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SamplerMismatch(f"this is no sampler state: its {key} is {value!r:.100}")
    return value
