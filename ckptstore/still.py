"""A state held still: taken at one moment, to be saved later by another thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from .capture import Capture
from .hostcopy import HostCopy
from .hostmemory import Buffers
from .overlap import Gate, Stable, stable_tensors
from .workers import Workers

__all__ = ["Place", "Still"]


class Place:
    """What the saves of one store use in turn: memory, threads, and the gate before the steps of the optimizers."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        self.gate = Gate()
        self.helpers = Workers(3)
        """They copy, too: one thread alone moves less than the memory could."""

    def close(self) -> None:
        """Take the hooks off the optimizers, and end the threads."""
        self.gate.remove()
        self.helpers.close()


class Still:
    """What `state` is now. Its structure is taken at once, its numbers by `copy`, except those that only a step of `optimizers` changes.

    Raises:
        NotSerializable: `torch.save` could not write it.
    """

    def __init__(self, state: Any, optimizers: Sequence[Optimizer]) -> None:
        self._stable = stable_tensors(optimizers) if optimizers else Stable()
        self._capture = Capture(state, frozenset(self._stable.keys))
        self._optimizers = optimizers
        self._live: Any = state  # let go of by the other thread: that takes a while, with thousands of tensors
        self._copy: HostCopy | None = None
        self._place: Place | None = None

    def copy(self, place: Place, checked: bool) -> None:
        """Copy what may change when this returns. The next step of an optimizer waits for the rest."""
        stable = self._stable
        numbers = list(map(self._capture.numbers.get, stable.keys))
        later = sorted({n for n in numbers if n is not None})
        self._place = place
        copy = self._copy = HostCopy(self._capture.storages, self._capture.devices, place.buffers, later, checked)
        if later:
            copy.watch(numbers, stable.tensors, stable.versions)
            place.gate.close_for(copy, self._optimizers)
        copy.copy_now(place.helpers)

    def finish_copy(self) -> None:
        """Copy the rest, and let the optimizers go on.

        Raises:
            ChangedWhileSaving: something was changed before it was copied.
        """
        assert self._copy is not None
        assert self._place is not None
        self._live, self._stable = None, Stable()
        self._capture.complete()
        self._copy.copy_rest()
        self._place.gate.open_for(self._copy)
        self._copy.check()

    def state(self) -> tuple[Any, dict[int, str]]:
        """Return what `torch.save` is to write, and where it is to say that storages were; see `torchfile.save`."""
        assert self._copy is not None
        copies, locations = self._copy.copies()
        return self._capture.rebuild(copies), locations

    def drop(self) -> None:
        """Give the memory back for the next one; nobody copies into it, and nobody reads it any more. Idempotent."""
        copy, self._copy = self._copy, None
        if copy is not None and self._place is not None:
            copy.abandon()
            self._place.gate.open_for(copy)
            copy.give_back(self._place.buffers)
