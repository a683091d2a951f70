"""What a store is made of, and how it becomes this job's."""

from __future__ import annotations

from contextlib import suppress

from .background import Background
from .engine import Engine
from .epoch import Writer
from .errors import CkptStoreError, UsageError
from .gc import find_garbage
from .retention import Retention
from .transaction import Draft, Transaction

__all__ = ["Owned"]


class Owned:
    """What the methods of `Store` stand on, those in this module's neighbours too: its parts, which it sets, and their owner."""

    _engine: Engine
    _writer: Writer
    _background: Background
    _retention: Retention
    _acquires: bool
    """False: this is a cooperating writer."""
    _acquired: bool
    """Whether it has been, so that what dead jobs left behind has been collected."""

    def acquire(self) -> None:
        """Make this job the owner of the store: nothing an older job does takes effect any more. Idempotent.

        `resume`, and otherwise the first change, does it by itself. Also collects what dead jobs left behind.

        Raises:
            Fenced: a newer job has acquired it since this one did.
            UsageError: this is a cooperating writer.
        """
        self._background.wait()
        if not self._acquires:
            raise UsageError("this Store was opened with acquire=False; open one without it to take over")
        self._writer.acquire()
        self._collect_once()

    def _acquire_for_change(self) -> None:
        if self._acquires:
            self._writer.begin()
            self._collect_once()

    def _collect_once(self) -> None:
        if not self._acquired:
            self._acquired = True
            with suppress(CkptStoreError):  # acquired it is all the same; a later job, or gc, collects what stays
                head = self._engine.log.head()
                if head.slot > 1:
                    self._engine.delete_each(find_garbage(self._engine.backend, head).keys)
                    self._engine.deleted.update(head.record.retired)  # so that the next commit forgets them

    def _begin(self, draft: Draft) -> Transaction:
        self._background.wait()
        return self._begin_now(draft)

    def _begin_now(self, draft: Draft) -> Transaction:
        """Begin even while something is being saved in the background: this may be that."""
        self._engine.raise_late()
        self._acquire_for_change()
        return Transaction(self._engine, self._writer, self._retention, draft)
