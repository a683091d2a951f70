"""Epochs and fencing: which job may commit.

A job acquires the store by committing a record with the next epoch; from then on, every commit of an earlier epoch is refused by the
log itself, because it would have to build on that record. Cooperating writers commit in whatever epoch is current and fence nobody.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from .errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    CommitUnknown,
    DamagedRecord,
    FallbackWarning,
    Fenced,
    NoAtomicCreate,
    UsageError,
)
from .log import Head, Log, new_op
from .naming import DATA, epoch_of, id_of_key, is_id
from .owner import default_owner
from .protocol import Backend
from .record import Record
from .workers import lock_of

__all__ = ["Writer"]

_PROBES = 4
_PAST_OWNERS = 64
"""How many earlier owners a record remembers: late ranks of a fenced launch are told so, instead of fencing the newer job."""


class Writer:
    """The right of one `Store` to change a store. Thread-safe."""

    def __init__(
        self, backend: Backend, log: Log, *, owner: str | None, cooperate: bool, single_writer: bool, epoch: int | None = None
    ) -> None:
        self._backend = backend
        self._log = log
        self._owner = owner
        self.cooperates = cooperate
        """Whether it commits in whatever epoch is current."""
        self._single_writer = single_writer
        self._lock = lock_of(self, threading.RLock)  # a handler of a signal that came meanwhile may want to save
        self._probed = single_writer or not backend.capabilities.probe
        self._fenced: str | None = None
        self.epoch = epoch
        """The acquired epoch; None before, and always for a cooperating writer."""

    @property
    def owner(self) -> str:
        """Who acquires; found out when first needed."""
        if self._owner is None:
            self._owner = default_owner()
        return self._owner

    def acquire(self) -> Record:
        """Make this job the only one that may commit, and return the state it took over. Idempotent for one owner.

        Raises:
            Fenced: a newer job has acquired since this owner did.
            CommitUnknown, BackendError
        """
        self._check_backend()
        with self._lock:
            if self._fenced:
                raise Fenced(self._fenced)
            if self.epoch is not None:
                head = self._log.head()
                self._check(head, self.epoch)
                return head.record
            record = self._log.commit(self._take_over, new_op())
            self.epoch = record.epoch
            return record

    def _take_over(self, head: Head) -> Record | None:
        state = head.record
        if state.owner == self.owner and not head.damaged:
            return None
        if self.owner in state.past_owners:
            raise Fenced(
                f"this launch ({self.owner}) owned the store before, and {state.owner} has acquired it since; stop this job"
            )
        found: tuple[str, ...] = ()
        if head.damaged or not head.slot:
            # A damaged record may have committed a checkpoint, and may have been an acquisition itself: its data is kept, and the
            # epoch skips every one it may have used. Without any record, data of an acquired epoch shows that there were some.
            known = state.checkpoints.ids() | set(state.retired) | set(state.spared)
            ids = {id_of_key(info.key) for info in self._backend.list(DATA)}
            found = tuple(sorted(i for i in ids if is_id(i) and i not in known and (head.damaged or epoch_of(i) > 0)))
        if head.damaged:
            message = f"{self._backend.url}: {head.damaged[0]}; going on from commit record {state.n}"
            more = f". It may have named {', '.join(found)}, kept: tag(name, id) brings one back" if found else ""
            warnings.warn(message + more, FallbackWarning, stacklevel=2)
        return replace(
            state,
            epoch=state.epoch + 1 + len(head.damaged),
            owner=self.owner,
            spared=state.spared + found,
            past_owners=(*state.past_owners, *([state.owner] if state.owner else []))[-_PAST_OWNERS:],
        )

    def join(self, owner: str, epoch: int) -> None:
        """Belong to the job of another rank, which has acquired the store in `epoch`: what that one may do, this one may."""
        with self._lock:
            self._owner, self.epoch = owner, epoch

    def begin(self) -> int:
        """Return the epoch that a change belongs to which begins now, acquiring first unless cooperating.

        Raises:
            Fenced: a newer job has acquired the store.
            BackendError: also when the outcome of the acquisition is unknown. That of the change is not, and must not be confused with it.
        """
        if not self.cooperates:
            if self.epoch is not None:
                return self._own_epoch()
            try:
                return self.acquire().epoch
            except CommitUnknown as exc:
                why = "whether the store was acquired could not be learnt, and nothing else was begun; try again"
                raise BackendError(f"{why}: {exc}") from exc
        self._check_backend()
        head = self._log.head()
        self._check(head, None)
        return head.record.epoch

    def _own_epoch(self) -> int:
        if self._fenced:
            raise Fenced(self._fenced)
        assert self.epoch is not None
        return self.epoch

    def commit(
        self,
        change: Callable[[Record], Record | None],
        op: str,
        epoch: int | None = None,
        ready: Callable[[], object] | None = None,
    ) -> Record:
        """Commit `change` of the newest state; see `Log.commit` for what errors mean.

        `epoch` is the one that new data was written in; None when there is none, so that a cooperating writer may commit in any epoch.

        Raises:
            Fenced: a newer job has acquired the store.
            DamagedRecord: the newest record is damaged, and only acquiring may pass it over.
        """
        self._check_backend()
        if epoch is None:
            # Only a save builds on the newest state known here and lets the log correct it: it never gives up because of what it sees.
            # Others would: a name that is not there, nothing to prune, while the log has gone on, or belongs to another job.
            self._log.head()
        if not self.cooperates:
            epoch = self.begin()

        def fenced_change(head: Head) -> Record | None:
            self._check(head, epoch)
            return change(head.record)

        try:
            return self._log.commit(fenced_change, op, ready)
        except BackendError as exc:
            self.tell_if_fenced(epoch, exc)
            raise

    def tell_if_fenced(self, epoch: int | None, error: CkptStoreError) -> None:
        """Raise `Fenced` from `error`, met while changing something in `epoch`, if a newer job has acquired the store.

        Its garbage collection may be what the storage's error came from; and whatever came of it, this job must stop.
        """
        try:
            self._check(self._log.head(), epoch)
        except Fenced as fenced:
            raise fenced from error
        except CkptStoreError:
            pass  # the first error says more

    def resolve(self, unknown: CommitUnknown | str) -> bool:
        """See `Store.resolve`."""
        parts = (unknown.op_id if isinstance(unknown, CommitUnknown) else str(unknown)).split("-")
        if len(parts) not in (2, 3) or not (parts[0].isascii() and parts[0].isdigit() and len(parts[0]) <= 12 and parts[1]):
            raise UsageError(f"{unknown!r:.100} is no CommitUnknown, and not the op_id of one")
        slot, op = int(parts[0]), parts[1]
        answer = self._log.took_effect(op, slot)
        if answer is None:
            if slot == self._log.head().slot + 1:
                self.commit(lambda state: state, new_op())
            answer = self._log.took_effect(op, slot)  # also if it was taken between the two looks
        if answer is None:
            raise DamagedRecord(f"commit record {slot} is not there, although it should be by now; is this the right store?")
        if answer and parts[2:]:
            why = f"commit {slot} is visible, but was never confirmed to be durable; save once more"
            raise CommitUnknown(why, op, slot, False)
        return answer

    def _check(self, head: Head, epoch: int | None) -> None:
        if head.damaged:
            raise DamagedRecord(
                f"{head.damaged[0]}. Nothing was changed; the next job that resumes or acquires the store passes it over"
            )
        state = head.record
        if epoch is None or (state.epoch == epoch and (self.cooperates or state.owner == self.owner)):
            return
        if self.cooperates:
            raise Fenced(
                f"{state.owner} acquired the store while this was being written, and may have collected the data; save again"
            )
        self._fenced = (
            f"{state.owner} has acquired the store (epoch {state.epoch}, ours is {epoch}); nothing was published; stop this job"
        )
        raise Fenced(self._fenced)

    def _check_backend(self) -> None:
        if not (self._backend.capabilities.atomic_create or self._single_writer):
            raise NoAtomicCreate(
                f"{self._backend.url} has no create-if-absent, so two jobs could both believe they committed; "
                "add single_writer=1 to the URL if you make sure that only one job ever writes"
            )
        if not self._probed:
            self._probe()
            self._probed = True

    def _probe(self) -> None:
        """Create an object twice: a service that lets the second one pass ignores the condition that everything stands on.

        Raises:
            NoAtomicCreate
            BackendError: there was no answer, or nothing can be written.
        """
        key, created = f"probe/{new_op()}", False
        unanswered: Ambiguous | None = None
        try:
            for _ in range(_PROBES):
                try:
                    self._backend.put_if_absent(key, b"is create-if-absent obeyed here?\n")
                except AlreadyExists:
                    return
                except Ambiguous as exc:
                    unanswered = exc
                    continue
                if created:
                    raise NoAtomicCreate(
                        f"{self._backend.url} overwrites what it was asked to create only if absent, so two jobs could both believe "
                        "they committed; add single_writer=1 to the URL if you make sure that only one job ever writes"
                    )
                created = True
            self._backend.replace(key, b"an ordinary write says plainly if it is not allowed\n")
            raise BackendError(f"could not find out whether create-if-absent is obeyed: {unanswered}") from unanswered
        finally:
            with suppress(CkptStoreError):
                self._backend.delete([key])
