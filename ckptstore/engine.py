"""What checkpoints, transactions and the store share: one backend, its log, its threads, and reading what they hold."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from .checksum import sha256
from .errors import CheckpointNotFound, CkptStoreError, DamagedManifest, FallbackWarning, NotFound, Unreadable
from .key import Key
from .log import Head, Log
from .manifest import MANIFEST_LIMIT, Manifest, decode
from .naming import MANIFEST, data_key, id_of_key
from .protocol import Backend
from .record import Entry, Record
from .workers import Job, Workers, lock_of

__all__ = ["Engine"]


class Engine:
    """One store's moving parts. Thread-safe."""

    def __init__(self, backend: Backend, key: Key | None = None, digest: str = "") -> None:
        self.backend = backend
        self.key = key
        self.digest = digest or ("sha256" if key else "")
        """The kind of cryptographic checksum that chunks get, one of `checksum.DIGESTS`, or empty."""
        self.log = Log(backend, key)
        self.workers = Workers(backend.capabilities.parallel)
        self.writer = self.workers if backend.capabilities.remote or self.digest == "sha256" else Workers(1)
        """Write files. One thread: a file on this machine takes one write at a time, and while that lasts, what comes next is hashed. But
        parts travel to a service side by side, and SHA-256 takes longer than writing."""
        self.verdicts: dict[str, bool] = {}
        """Checkpoints read back here since the last commit: whole or not. The next commit writes it down."""
        self.deleted: set[str] = set()
        """Retired checkpoints whose data is gone for sure. The next commit forgets them."""
        self.unfinished: set[str] = set()
        """Ids of distributed saves begun here of which it is not known yet what came of them."""
        self._abandoned: set[str] = set()
        self._lock = lock_of(self, threading.RLock)  # a handler of a signal that comes meanwhile may want to save
        self._late = Workers(1)  # one thread: training goes on beside it
        self._jobs = _Jobs()
        self._keys: dict[str, list[str]] = {}
        self._warned: set[str] = set()

    def head(self) -> Head:
        """Return the newest state, with a warning if a damaged record was passed over."""
        head = self.log.head()
        for message in head.damaged:
            if message not in self._warned:
                self._warned.add(message)
                warnings.warn(
                    f"{self.backend.url}: {message}; using commit record {head.record.n}", FallbackWarning, stacklevel=4
                )
        return head

    def manifest(self, entry: Entry) -> Manifest:
        """Read and check the manifest of a committed checkpoint.

        Raises:
            DamagedManifest: missing, or not the one that was committed.
        """
        try:
            data = self.backend.get(data_key(entry.id, MANIFEST), MANIFEST_LIMIT)
        except NotFound:
            raise DamagedManifest(f"the manifest of {entry.id} is missing") from None
        except Unreadable as exc:
            raise DamagedManifest(f"the manifest of {entry.id} cannot be read: {exc}") from exc
        if sha256(data) != entry.manifest:
            raise DamagedManifest(f"the manifest of {entry.id} is not the one that was committed")
        return decode(data, entry.id, self.key)

    def unrecorded(self, checkpoint_id: str) -> Entry:
        """Make an entry for data that no record names, from its manifest alone, which is checked against its own checksum, or our key."""
        try:
            data = self.backend.get(data_key(checkpoint_id, MANIFEST), MANIFEST_LIMIT)
        except NotFound:
            raise DamagedManifest(f"{checkpoint_id} has no manifest: it was never completed") from None
        found = decode(data, checkpoint_id, self.key)
        return Entry(
            id=checkpoint_id,
            step=found.step,
            name=found.name,
            created=found.created,
            nbytes=found.nbytes,
            manifest=sha256(data),
            metrics=found.metrics,
        )

    def check_kept(self, checkpoint_id: str) -> None:
        """Raise `CheckpointNotFound` if the store does not keep this checkpoint (any more)."""
        state = self.log.head().record
        if state.entry(checkpoint_id) is None and checkpoint_id not in state.spared:
            raise CheckpointNotFound(f"{self.backend.url} does not keep {checkpoint_id} any more: it was pruned or deleted")

    def remember_keys(self, checkpoint_id: str, keys: list[str]) -> None:
        """Note the keys of a checkpoint written here, so that pruning it needs no listing."""
        self._keys[checkpoint_id] = keys

    def delete_data(self, checkpoint_id: str) -> None:
        """Delete everything below a checkpoint's folder. Idempotent. The caller knows that it can never be committed (again)."""
        keys = self._keys.get(checkpoint_id)
        if keys is None:
            keys = [info.key for info in self.backend.list(data_key(checkpoint_id))]
        self.backend.delete(keys)
        self._keys.pop(checkpoint_id, None)

    def abandon(self, checkpoint_id: str) -> None:
        """Note that a distributed save begun here came to nothing: it can never be committed any more."""
        self.unfinished.discard(checkpoint_id)
        self._abandoned.add(checkpoint_id)

    def delete_abandoned(self) -> None:
        """Delete what distributed saves that came to nothing have left, as far as it can be now; the rest is for a later job."""
        while self._abandoned:
            with suppress(CkptStoreError):
                self.delete_data(self._abandoned.pop())

    def delete_each(self, keys: Sequence[str]) -> None:
        """Delete what can be deleted of `keys`, checkpoint by checkpoint, and then raise the first error there was."""
        first: CkptStoreError | None = None
        for _, group in groupby(keys, id_of_key):
            try:
                self.backend.delete(list(group))
            except CkptStoreError as exc:
                first = first or exc
        if first is not None:
            raise first

    def committed(self, record: Record) -> None:
        """Take note of a commit made here, and begin to delete what is retired, in the background: training need not wait for it.

        What fails stays in the record's `retired` and is tried again after the next commit.
        """
        for checkpoint_id, verdict in list(self.verdicts.items()):
            entry = record.entry(checkpoint_id)
            if entry is None or entry.verified == verdict:
                self.verdicts.pop(checkpoint_id, None)  # on the record now; somebody else may judge anew
        ids = set(record.retired)
        with self._lock:
            self.deleted.intersection_update(ids)  # the others are off the record
            todo = sorted(ids - self.deleted)
        if todo:
            deletion = self.workers.submit(self._delete_all, todo)
            with self._lock:
                self._begun().deletions.append(deletion)

    def _delete_all(self, ids: list[str]) -> None:
        for checkpoint_id in ids:
            with suppress(CkptStoreError):
                self.delete_data(checkpoint_id)
                self.deleted.add(checkpoint_id)  # without the lock: who has it, and was interrupted, may wait for us in `settle`

    def settle(self) -> None:
        """Wait for the deletions begun before: the next change starts from a quiet store, with the space they free."""
        with self._lock:
            begun = self._begun()
            deletions, begun.deletions = begun.deletions, []
        for deletion in deletions:
            deletion.wait()  # what failed, for whatever reason, is still on the record

    def _begun(self) -> _Jobs:
        """Return what was begun in this process; to be called with the lock."""
        if self._jobs.pid != os.getpid():  # a fork has our lists, but not the threads: what they were given never ends here
            self._jobs = _Jobs()
        return self._jobs

    def check_later(self, check: Callable[[], None]) -> None:
        """Begin a check in the background; what it raises, `raise_late` will."""
        job = self._late.submit(check)
        with self._lock:
            self._begun().checks.append(job)

    def raise_late(self, *, wait: bool = False) -> None:
        """Raise, once, what a check in the background has raised so far, or with `wait`, will raise."""
        with self._lock:
            begun = self._begun()
            ended = [job for job in begun.checks if wait or job.done()]
            begun.checks = [job for job in begun.checks if job not in ended]
        for job in ended:
            job.result()

    def write_down(self, state: Record) -> Record:
        """Return `state` with what was learnt here since the last commit: verdicts, and deletions that are done."""
        with self._lock:
            gone = set(self.deleted)
        return state.but(
            checkpoints=state.checkpoints.put(*self._judged(state)),
            retired=tuple(i for i in state.retired if i not in gone),
        )

    def _judged(self, state: Record) -> Iterator[Entry]:
        """Yield the checkpoints of which something else has been found than `state` says."""
        for checkpoint_id, verdict in list(self.verdicts.items()):
            entry = state.entry(checkpoint_id)
            if entry is not None and entry.verified != verdict:
                yield replace(entry, verified=verdict)

    def close(self) -> None:
        """Wait for the checks in the background, and release threads and connections. Idempotent. Raises what a check has found."""
        try:
            self.raise_late(wait=True)
        finally:
            for workers in (self._late, self.writer, self.workers):
                workers.close()
            with suppress(CkptStoreError):
                self.backend.close()


class _Jobs:
    """What one process has begun in the background and not waited for yet."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.deletions: list[Job[None]] = []
        self.checks: list[Job[None]] = []
