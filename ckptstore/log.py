"""The log: who comes next, decided by one create-if-absent per commit.

Slots are numbered from 1 without gaps and never deleted, so "which is the newest?" can be asked by galloping from any slot known to
exist, and a writer that was stopped for an hour finds its slot taken. The hint object only saves steps: it may be stale, missing or
wrong. Everything a caller must know about an error is in its type: `CommitUnknown` (nobody knows), anything else from `commit`
that is a `CkptStoreError` (proven not to have happened).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from .bases import Bases
from .checksum import sha256
from .errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    CommitUnknown,
    DamagedRecord,
    Forged,
    KeyMismatch,
    NewerFormat,
    NotFound,
    Unreadable,
)
from .key import Key
from .protocol import Backend
from .record import EMPTY, RECORD_LIMIT, Record, Tombstone, decode, encode, encode_tombstone
from .workers import lock_of

__all__ = ["HINT", "LOG", "Head", "Log", "new_op", "slot_key", "slot_of"]

LOG = "log/"
HINT = "log/hint"
_ATTEMPTS = 4
"""How often identical bytes are sent while the answer stays ambiguous."""
_WHOLE = 8
"""The newest slots are kept whole: they are what a damaged newest record falls back to."""
_HINT_EVERY = 16
"""A hint that is this many slots behind costs a reader four more probes; a hint with every commit would cost every save a rename. Over
a network it is the other way round."""
_SHRINK_ABOVE = 4096
"""Shrinking a record below one disk block frees nothing."""


def new_op() -> str:
    """Return a new operation id."""
    return secrets.token_hex(16)


def slot_key(n: int) -> str:
    """Return the key of slot `n`; padded, so that keys sort as numbers do."""
    return f"{LOG}{n:012d}"


def slot_of(key: str) -> int | None:
    """Return the slot that a key below ``log/`` belongs to, whatever follows the number; None if there is no number."""
    digits = key[len(LOG) : len(LOG) + 12]
    return int(digits) if len(digits) == 12 and digits.isascii() and digits.isdigit() else None


@dataclass(frozen=True)
class Head:
    """The newest state of a store."""

    slot: int
    """Newest slot taken; 0 in an empty store."""
    record: Record
    """Newest whole record: that of `slot`, unless it is damaged."""
    digest: str | None = None
    """SHA-256 of the record's bytes."""
    damaged: tuple[str, ...] = ()
    """One message per damaged slot newer than `record`."""


class Log:
    """The commit log of one store. Thread-safe."""

    def __init__(self, backend: Backend, key: Key | None = None) -> None:
        self._backend = backend
        self._key = key
        self._store: str | None = None  # with a key: what the first record calls the store, as soon as it is known
        self._lock = lock_of(self, threading.RLock)
        self._head = Head(0, EMPTY)
        self._sizes: dict[int, tuple[int, str]] = {}  # slot -> (bytes, op) of records committed here and still whole
        self._hint = (0, "")  # as last read: a slot, and the SHA-256 of its record
        self._bases = Bases(backend)

    def head(self) -> Head:
        """Return the newest state.

        Raises:
            DamagedRecord: there are records, and not one of those kept whole can be read.
            KeyMismatch: they can, but not one was written with our key; or with one, and we have none.
            NewerFormat, BackendError
        """
        with self._lock:
            while True:
                slot = self._newest()
                if slot == self._head.slot and not self._head.damaged:  # what could not be read may be readable now
                    return self._head
                head = self._read_back_from(slot)
                if head is not None:
                    self._head = head
                    return head
                # The slot was shrunk while we looked, so newer ones exist: look again from there.

    def damaged(self) -> list[str]:
        """Read the records that are kept whole, and return one message per damaged one, newest first."""
        head = self.head()
        found = list(head.damaged)
        for n in range(head.record.n - 1, max(head.slot - _WHOLE, 0), -1):
            try:
                self._decode(self._get(n), n)
            except (DamagedRecord, NotFound, Unreadable) as exc:
                found.append(str(exc))
        return found + self._bases.damage(head.record)

    def commit(self, change: Callable[[Head], Record | None], op: str, ready: Callable[[], object] | None = None) -> Record:
        """Make `change` of the newest state the next record, and return that record.

        `change` gets the head and returns the new state (`n`, `op` and `prev` are filled in here), or None when nothing is left to do. It
        is called again with a newer head whenever somebody else's commit came first, and may raise to give up. `ready` is called before
        each try, as `Backend.put_if_absent` does; what it raises must be none of our errors, lest it be taken for the storage's answer.

        Raises:
            CommitUnknown: whether it took effect could not be learnt.
            CkptStoreError: any other: it did not take effect and never will.
        """
        with self._lock:
            head = self._head if self._head.slot and not self._head.damaged else self.head()
            while True:
                try:
                    draft = change(head)
                    if draft is None:
                        return head.record
                    record = draft.but(n=head.slot + 1, op=op, prev=head.digest)
                    if self._key and record.store is None:
                        record = replace(record, store=new_op())
                    record, data = self._encode(record)
                except DamagedRecord:
                    # Of a state that is long past, the base may be gone; that of the newest is there.
                    newest = self.head()
                    if newest.slot == head.slot:
                        raise
                    head = newest
                    continue
                try:
                    self._require(head.slot)
                    created = self._create(record.n, data, op, ready)
                except CommitUnknown:
                    raise
                except CkptStoreError:
                    self._bases.drop(record)
                    raise
                if created:
                    self._head = Head(record.n, record, sha256(data))
                    self._sizes[record.n] = (len(data), op)
                    self._tidy(record.n, self._head.digest)
                    self._bases.tidy(record)
                    return record
                self._bases.drop(record)
                head = self.head()
                if head.slot < record.n:
                    raise CommitUnknown(
                        f"slot {record.n} was taken and then not found; the storage contradicts itself", op, record.n
                    )

    def _require(self, last: int) -> None:
        """Raise `BackendError` if the record to build on is gone, for nobody would find what comes after it: the log was deleted under us.

        Not over a network, where it would be a request more for each commit, and who looks for the newest record lists them.
        """
        if last and not self._backend.capabilities.remote and not self._taken(last):
            raise BackendError(
                f"commit record {last}, on which the next one was to build, is gone: was {self._backend.url} emptied, or put back to an "
                "older copy? Nothing was committed; open the store anew if this is meant"
            )

    def _encode(self, record: Record) -> tuple[Record, bytes]:
        data = encode(record, self._key)
        based = self._bases.make(record, len(data))
        if based is not record:
            record, data = based, encode(based, self._key)
        if len(data) > RECORD_LIMIT:
            raise BackendError(f"the store keeps too many checkpoints: its record has {len(data)} bytes; prune or delete some")
        return record, data

    def took_effect(self, op: str, slot: int) -> bool | None:
        """Say whether operation `op` took slot `slot`: None while the slot is free, so that it still may.

        Raises:
            DamagedRecord, BackendError: cannot be told.
        """
        try:
            found = self._decode(self._backend.get(slot_key(slot), RECORD_LIMIT), slot)
        except NotFound:
            return None
        return found.op == op

    def _create(self, n: int, data: bytes, op: str, ready: Callable[[], object] | None) -> bool:
        """Create slot `n`. True: it is ours. False: somebody else's. CommitUnknown: nobody knows; other errors: it is not ours."""
        ambiguous: Ambiguous | None = None
        for _ in range(_ATTEMPTS):
            try:
                self._backend.put_if_absent(slot_key(n), data, ready)
                return True
            except AlreadyExists:
                pass  # perhaps by an earlier attempt of ours whose answer was lost, or by a packet sent twice
            except Ambiguous as exc:
                ambiguous = exc
            except BackendError:
                if ambiguous is not None:
                    continue  # this attempt failed for sure, but an earlier one is still open
                with suppress(CkptStoreError):
                    if self.took_effect(op, n) is False:  # lost all the same, and then perhaps our leftovers to somebody's gc
                        return False
                raise
            try:
                taken = self.took_effect(op, n)
            except (KeyMismatch, NewerFormat):
                raise  # so it cannot be ours
            except DamagedRecord:
                if ambiguous is None:  # we never got near it: somebody else's, and damaged since
                    return False
                raise CommitUnknown(f"slot {n} is taken, but its record is damaged", op, n) from ambiguous
            except CkptStoreError as exc:
                raise CommitUnknown(f"slot {n} is taken, but it cannot be read who took it: {exc}", op, n) from exc
            if taken is False:
                return False
            if taken and ambiguous is not None and not ambiguous.durable:
                # Flushing again and believing the answer is how fsync errors get lost; only a human can judge this disk.
                message = f"commit {n} is visible, but the storage did not confirm that it is durable: {ambiguous}"
                raise CommitUnknown(message, op, n, durable=False) from ambiguous
            if taken:
                return True
        raise CommitUnknown(f"no answer whether commit {n} took effect: {ambiguous}", op, n) from ambiguous

    def _newest(self) -> int:
        known = self._head.slot
        if not known and self._backend.capabilities.remote:
            return self._listed()
        if self._taken(known + 1):
            known += 1
        elif known:
            return known
        hint = self._read_hint()
        if known < hint:
            with suppress(BackendError):
                known = hint if self._taken(hint) else known
        known = self._climb(known)
        while self._taken(known + 2):  # somebody has removed a record: what was committed after it counts all the same
            known = self._climb(known + 2)
        return known

    def _listed(self) -> int:
        """Find the newest slot by one listing of what came after the hint. What it does not show yet, the next commit will meet."""
        hint = self._read_hint()
        newest = 0
        for info in self._backend.list(LOG, slot_key(hint - 1) if hint > 1 else ""):
            slot = slot_of(info.key)
            if slot is not None and info.key == slot_key(slot):
                newest = slot
        return newest or self._climb(0)

    def _read_hint(self) -> int:
        with suppress(NotFound, BackendError, ValueError):
            slot, _, digest = self._backend.get(HINT, 128).decode("ascii").partition(" ")
            if 0 < int(slot) < 10**12:
                self._hint = (int(slot), digest)
                return int(slot)
        return 0

    def _climb(self, known: int) -> int:
        """Return a slot from `known` on that is taken (or 0) and has a free one above it."""
        step = 1
        while self._taken(known + step):
            known += step
            step *= 2
        high = known + step  # free
        while high - known > 1:
            middle = (known + high) // 2
            if self._taken(middle):
                known = middle
            else:
                high = middle
        return known

    def _taken(self, n: int) -> bool:
        try:
            self._backend.stat(slot_key(n))
        except NotFound:
            return False
        return True

    def _read_back_from(self, slot: int) -> Head | None:
        damaged: list[str] = []
        forged = False
        for n in range(slot, max(slot - _WHOLE, 0), -1):
            try:
                data = self._get(n)
                record = self._decode(data, n)
            except (DamagedRecord, NotFound, Unreadable) as exc:
                damaged.append(str(exc))
                forged = forged or isinstance(exc, Forged)
                continue
            if isinstance(record, Tombstone):
                if self._taken(slot + 1):
                    return None
                unseen = n + _WHOLE
                damaged.append(
                    f"commit record {n} was shrunk when {unseen} was there, and that is not to be seen (yet: a cache may be old)"
                )
                break
            digest = sha256(data)
            # Who left the hint knew the record before it: that spares the look at it.
            known = self._key is None and self._hint in ((n, digest), (n - 1, record.prev))
            if not known and not self._belongs(record):
                damaged.append(f"commit record {n} does not continue commit record {n - 1}: it was put there from another store")
                continue
            record = self._bases.attach(record, self._head.record)
            return Head(slot, record, digest, tuple(damaged))
        else:
            if len(damaged) == slot and self._key is None:  # back to the beginning: the state before the first commit serves
                return Head(slot, EMPTY, None, tuple(damaged))
        if forged:
            raise KeyMismatch(
                f"not one of the newest commit records is authentic ({damaged[0]}). Nothing was changed. "
                "Check hmac_key; a store that was made without one is opened without"
            )
        raise DamagedRecord(f"none of the newest commit records can be read; newest first: {'; '.join(damaged)}")

    def _get(self, n: int) -> bytes:
        """Read what slot `n` holds; twice, because one bad moment of a disk must not have a job that acquires pass it over for good."""
        with suppress(Unreadable):
            return self._backend.get(slot_key(n), RECORD_LIMIT)
        return self._backend.get(slot_key(n), RECORD_LIMIT)

    def _decode(self, data: bytes, n: int) -> Record | Tombstone:
        """Read what slot `n` holds; with a key, only if it was written for this store, which the first slot tells."""
        found = decode(data, n, self._key)
        if self._key is not None and n > 1:
            if self._store is None:
                with suppress(DamagedRecord, NotFound, Unreadable):
                    self._store = decode(self._backend.get(slot_key(1), RECORD_LIMIT), 1, self._key).store
            if self._store not in (None, found.store):
                raise Forged(f"commit record {n} is not authentic: it was written for another store")
        return found

    def _belongs(self, record: Record) -> bool:
        """Say whether `record` is this store's, as far as the records before it can tell."""
        before = self._whole(record.n - 1)
        if before is None or record.prev in (before[1], None):
            return True
        older = [self._whole(n) for n in range(record.n - 2, max(record.n - _WHOLE, 0), -1)]
        if any(found and found[1] == record.prev for found in older):
            return True  # an acquisition that passed over those between, which could not be read then
        # One of the two is foreign. It is the earlier one if that does not continue its own predecessor.
        return bool(older and older[0] and older[0][1] != before[0].prev)

    def _whole(self, n: int) -> tuple[Record, str | None] | None:
        """Return record `n` and its SHA-256, None if there is no such record any more, or not a whole one."""
        if n == self._head.record.n:
            return self._head.record, self._head.digest
        with suppress(DamagedRecord, NotFound, Unreadable):
            data = self._backend.get(slot_key(n), RECORD_LIMIT)
            record = self._decode(data, n)
            if isinstance(record, Record):
                return record, sha256(data)
        return None

    def _tidy(self, n: int, digest: str | None) -> None:
        """After commit `n`: leave a hint, and shrink one old slot. Both may fail or be lost without harm."""
        if n % _HINT_EVERY == 0 or self._backend.capabilities.remote:
            with suppress(CkptStoreError):
                self._backend.replace(HINT, f"{n} {digest}".encode())
        old = n - _WHOLE
        if old < 1:
            return
        with suppress(CkptStoreError):
            size, op = self._sizes.pop(old) if old in self._sizes else self._size_and_op(old)
            if size > _SHRINK_ABOVE:
                tombstone = encode_tombstone(old, op, self._head.record.store, self._key)
                self._backend.replace(slot_key(old), tombstone)

    def _size_and_op(self, n: int) -> tuple[int, str]:
        data = self._backend.get(slot_key(n), RECORD_LIMIT)
        return len(data), self._decode(data, n).op
