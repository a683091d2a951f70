"""The store: save, load, resume, and keeping house."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from .asynchronous import Asynchronous
from .background import Background
from .checkpoint import STATE_FILE, Checkpoint, Damage
from .distributed import Distributed
from .engine import Engine
from .envelope import JSON
from .epoch import Writer
from .errors import (
    CheckpointNotFound,
    CommitUnknown,
    InvalidURL,
    UsageError,
)
from .gc import Garbage, find_garbage, unfinished_records
from .key import Key, find_key, refuse_key_in_url
from .log import new_op
from .lookup import existing, find, first_whole, rescue
from .naming import check_name
from .options import split_options
from .record import Record
from .registry import backend_class
from .restore import restore_newest
from .retention import expired
from .transaction import Draft, Transaction
from .url import parse_url
from .wrapper import SingleWriter

__all__ = ["Store"]


class Store(Asynchronous, Distributed):
    """A place for the checkpoints of one training run.

    Thread-safe; may be pickled to worker processes, which then belong to the same job (not with an `hmac_key` given as bytes); a
    context manager that closes it.

    Args:
        url: a path or URL as text, with options after ``?`` ("runs/42?keep_last=3", "file:///data/run-42", "memory://name"); an
            `os.PathLike` is taken literally. None: the environment variable ``CKPTSTORE_URL``.
        acquire: True: before its first change, the store is acquired, so that no older job can change it any more (fencing). False: a
            cooperating writer beside the job that owns the store: it saves and tags in the current epoch and fences nobody.
        owner: who acquires; the same for all processes of one launch and new for every launch. Found out from torchrun's or Slurm's
            variables if not given, else unique to this object.
        hmac_key: authenticates what is written, and refuses what is not authentic: bytes, or the path (`os.PathLike`) of a file that has
            them. None: the environment variable ``CKPTSTORE_HMAC_KEY``, or the file that ``CKPTSTORE_HMAC_KEY_FILE`` names, if set.
        options: as in the URL; they win over it. See `ckptstore.options.STORE_OPTIONS`.

    Raises:
        InvalidURL, UnknownScheme, InvalidOption: nothing was touched. The storage is touched by the first method that needs it.
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        acquire: bool = True,
        owner: str | None = None,
        hmac_key: bytes | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if url is None and not (url := os.environ.get("CKPTSTORE_URL")):
            raise InvalidURL("which store? Give its path or URL, or set CKPTSTORE_URL")
        self._setup(url, acquire, owner, options, None, hmac_key)

    def _setup(
        self,
        url: str | os.PathLike[str],
        acquire: bool,
        owner: str | None,
        options: Mapping[str, Any],
        epoch: int | None,
        hmac_key: bytes | os.PathLike[str] | Key | None,
    ) -> None:
        if owner is not None and (not isinstance(owner, str) or not 0 < len(owner) <= 512):
            raise UsageError("owner must be a text of 1 to 512 characters")
        parsed = parse_url(url)
        refuse_key_in_url(parsed.options)
        key = find_key(hmac_key)
        backend_type = backend_class(parsed.scheme)
        chosen = split_options({**parsed.options, **options}, backend_type.options)
        self._retention = chosen.retention
        backend = backend_type.open(parsed.location, chosen.backend)
        if chosen.single_writer and (backend.capabilities.probe or not backend.capabilities.atomic_create):
            backend = SingleWriter(backend)
        if backend.capabilities.remote:
            from .retry import Persistent

            backend = Persistent(backend, chosen.retry_seconds)
        if parsed.scheme == "file":  # a pickled store shall find the same folder from another current one
            url, options = Path(os.path.abspath(parsed.location)), {**parsed.options, **options}
        self._arguments = (url, options)
        self._acquires = acquire
        self._engine = Engine(backend, key, chosen.digest)
        self._writer = Writer(
            backend, self._engine.log, owner=owner, cooperate=not acquire, single_writer=chosen.single_writer, epoch=epoch
        )
        self._acquired = epoch is not None
        self._background = Background()

    # --- writing

    def save(
        self,
        obj: Any,
        name: str = "latest",
        *,
        step: int | None = None,
        sampler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: JSON = None,
        rng: bool = False,
        process_group: Any = None,
    ) -> Checkpoint:
        """Save `obj` as a new checkpoint and let `name` point to it. Atomic, and durable on return.

        Each call saves a checkpoint of its own and waits for no other process. So of a distributed job call it on one rank; or on each
        under a name of its own; or on all with `process_group`. (Without, what all save under one name are as many checkpoints.)

        Args:
            obj: anything `torch.save` takes; values with a ``state_dict()`` are saved by it. Becomes the file ``state.pt``.
            step: a whole number that finds the checkpoint again.
            sampler: its ``state_dict()`` is saved alongside.
            metrics: numbers by name, for `keep_best` and for people.
            metadata: plain JSON, kept as it is.
            rng: also save the Python, NumPy and torch random generators; `resume` restores them.
            process_group: a group of `torch.distributed`, **all of whose ranks** make this call: any that does not leaves the others
                waiting until the group's time is up. Each calls its ``state_dict()``; rank 0 saves; all return or raise the same.

        Raises:
            RankFailed: a ``state_dict()`` failed on another rank of `process_group`; nothing was published.
            Fenced: a newer job has acquired the store.
            CommitUnknown: it may or may not have been committed; see `resolve`.
            NotSerializable, UsageError, BackendError, or whatever a ``state_dict()`` raised: nothing was published.
        """
        more: Any = {"step": step, "sampler": sampler, "metrics": metrics, "metadata": metadata}
        if process_group is not None:
            return self._save_together(process_group, obj, lambda state: self.save(state, name, rng=rng, **more))
        with self.transaction(name, **more) as tx:
            tx.save(obj)
            if rng:
                tx.save_rng()
        return tx.checkpoint

    def transaction(
        self,
        name: str = "latest",
        *,
        step: int | None = None,
        sampler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: JSON = None,
    ) -> Transaction:
        """Return a context manager that writes several files as one checkpoint; see `Transaction`. Arguments as for `save`."""
        return self._begin(Draft.check(name, step, metrics, metadata, sampler))

    def tag(self, name: str, target: str | Checkpoint) -> Checkpoint:
        """Let `name` point to a checkpoint, which retention then never removes. `target` is a name, an id or a `Checkpoint`.

        The id of data that a damaged record may have named (see `gc`) brings it back, if it is whole.

        Raises:
            CheckpointNotFound, InvalidName, Fenced, CommitUnknown
        """
        self._background.wait()
        check_name(name)
        wanted = target.id if isinstance(target, Checkpoint) else target
        if not isinstance(wanted, str):
            raise UsageError("tag takes a name, an id or a Checkpoint to point to")
        rescued = rescue(self._engine, wanted)

        def change(state: Record) -> Record:
            state = self._engine.write_down(state)
            if rescued is not None and rescued.id in state.spared:
                spared = tuple(i for i in state.spared if i != rescued.id)
                state = replace(state, checkpoints=state.checkpoints.put(rescued), spared=spared)
            entry = find(self.url, state, wanted)
            return replace(state, names={**state.names, name: entry.id})

        record = self._writer.commit(change, new_op())
        self._engine.committed(record)
        return Checkpoint(self._engine, find(self.url, record, name))

    def delete(self, target: str | Checkpoint) -> str | None:
        """Delete a checkpoint, given by id, as a `Checkpoint`, or by its name, and return the id of the one that went.

        By name: when other names point to the same checkpoint, only the name goes, and None is returned. By id: all its names go too.

        Raises:
            CheckpointNotFound, Fenced, CommitUnknown
        """
        self._background.wait()
        wanted = target.id if isinstance(target, Checkpoint) else target
        if not isinstance(wanted, str):
            raise UsageError("delete takes a name, an id or a Checkpoint")
        gone: str | None = None

        def change(state: Record) -> Record:
            nonlocal gone
            state = self._engine.write_down(state)
            gone = wanted
            if wanted in state.spared:
                return replace(state, spared=tuple(i for i in state.spared if i != wanted), retired=(*state.retired, wanted))
            entry = find(self.url, state, wanted)
            others = {n: i for n, i in state.names.items() if n != wanted}
            if wanted in state.names and entry.id in others.values():
                gone = None
                return replace(state, names=others)
            gone = entry.id
            return state.without({entry.id})

        self._engine.committed(self._writer.commit(change, new_op()))
        self._engine.settle()
        return gone

    def prune(self) -> list[str]:
        """Apply the retention rules now, as every save does, and return the ids of the checkpoints that went."""
        self._background.wait()
        gone: list[str] = []

        def change(state: Record) -> Record | None:
            written = self._engine.write_down(state)
            ids = expired(written, self._retention)
            gone[:] = sorted(ids)
            return written.without(ids) if ids or written != state else None

        self._engine.committed(self._writer.commit(change, new_op()))
        self._engine.settle()
        return gone

    def gc(self) -> Garbage:
        """Delete what can never be committed: leftovers of older jobs and of checkpoints that retention let go. Acquires nothing.

        Raises:
            DamagedRecord: the newest record is damaged; acquire first.
        """
        self._background.wait()
        self._engine.settle()
        head = self._engine.log.head()
        garbage = find_garbage(self._engine.backend, head)
        self._engine.delete_each([*garbage.keys, *unfinished_records(self._engine.backend, head)])
        self._engine.deleted.update(head.record.retired)
        return garbage

    def resolve(self, unknown: CommitUnknown | str) -> bool:
        """Settle a `CommitUnknown`, or its `op_id`: True if the operation took effect, False if it did not and never will.

        While its slot is free it could still arrive, so an empty commit takes the slot first.

        Raises:
            UsageError: not an `op_id`.
            Fenced, CommitUnknown, DamagedRecord, BackendError: it cannot be told now.
        """
        self._background.wait()
        return self._writer.resolve(unknown)

    # --- reading

    def load(
        self,
        target: str | Checkpoint | None = None,
        *,
        step: int | None = None,
        file: str = STATE_FILE,
        map_location: Any = None,
        weights_only: bool = True,
        mmap: bool = False,
        verify: Literal["full", "lazy"] = "full",
    ) -> Any:
        """Return a saved object, every byte checked before it was parsed.

        By name ("latest" if nothing is given), a damaged checkpoint is passed over, with a `FallbackWarning`, for the newest older one
        that was saved under that name and is whole. By id, `Checkpoint` or `step` there is no falling back.

        Args:
            mmap, verify: map the file, which must be on a local disk, instead of reading it; see `Checkpoint.load`.

        Raises:
            CheckpointNotFound, StoreNotFound
            Damaged: nothing whole is left; or what was loaded before with ``verify="lazy"`` is not.
            UnsafeContent: see `Checkpoint.load`.
        """
        self._background.raise_failure()
        self._engine.raise_late()

        def read(checkpoint: Checkpoint) -> Any:
            return checkpoint.load(file, map_location=map_location, weights_only=weights_only, mmap=mmap, verify=verify)

        if isinstance(target, Checkpoint):
            target = target.id
        return first_whole(self._engine, target, step, read)[1]

    def resume(
        self,
        objects: Any,
        name: str = "latest",
        *,
        sampler: Any = None,
        map_location: Any = "cpu",
        weights_only: bool = True,
        rng: bool = True,
        process_group: Any = None,
    ) -> Checkpoint | None:
        """Acquire the store, then restore `objects` in place from the newest whole checkpoint saved under `name`.

        Returns the checkpoint it resumed from, or None when the store is empty: start from the beginning then. What could not be looked
        up or read is an error, never None.

        Each call finds its own way and waits for no other process; for ranks to agree on one checkpoint, there is `process_group`.

        Args:
            objects: like the object that was saved: values with ``load_state_dict`` get their state, tensors are copied into, other values
                in dicts and lists are replaced. What the checkpoint has beyond it is ignored.
            sampler: gets its state back. Required to be in the checkpoint if given.
            rng: restore the random generators if the checkpoint has them.
            process_group: a group of `torch.distributed`, **all of whose ranks** make this call, as for `save`. Rank 0 acquires the store
                and looks for all, and raises for all; all read; if one finds damage, all fall back to the same older one.

        Raises:
            RankFailed: something else than damage came in the way on another rank of `process_group`.
            StateMismatch: the state does not fit the objects.
            CheckpointNotFound: there are checkpoints, but none was saved under `name`.
            Damaged: there are, and not one is whole; it is not for a program to start over then.
        """
        self._engine.raise_late()
        ranks = self._take_over(process_group)
        checkpoint = restore_newest(self._engine, check_name(name), objects, sampler, map_location, weights_only, rng, ranks)
        self._note_resumed(checkpoint, ranks)
        return checkpoint

    def checkpoint(self, target: str | None = None, *, step: int | None = None) -> Checkpoint:
        """Return a checkpoint by name ("latest" if nothing is given), by id, or by step (the newest with that step).

        Raises:
            CheckpointNotFound, StoreNotFound
        """
        self._background.raise_failure()
        return Checkpoint(self._engine, find(self.url, existing(self._engine).record, target, step))

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        self._background.raise_failure()
        return [Checkpoint(self._engine, entry) for entry in self._engine.head().record.checkpoints]

    def names(self) -> dict[str, str]:
        """Return what every name points to: name -> id."""
        self._background.raise_failure()
        return dict(sorted(self._engine.head().record.names.items()))

    def verify(self, target: str | Checkpoint | None = None, progress: Callable[[int], object] | None = None) -> list[Damage]:
        """Read every byte of one checkpoint, or of all, and return what is damaged: an empty list if everything is whole.

        Damage to one of the newest commit records counts too, even while a newer one is whole. A checkpoint that is pruned meanwhile
        is none, but asked for by itself it raises `CheckpointNotFound`. `progress` is called with the number of bytes just done.
        """
        self._background.raise_failure()
        if target is not None:
            return (target if isinstance(target, Checkpoint) else self.checkpoint(target)).verify(progress)
        found = [Damage("", "", (), message) for message in self._engine.log.damaged()]
        for entry in self._engine.log.head().record.checkpoints:
            with suppress(CheckpointNotFound):
                found += Checkpoint(self._engine, entry).verify(progress)
        return found

    # --- the rest

    @property
    def url(self) -> str:
        """Where the store is, for messages; never with a secret in it."""
        return self._engine.backend.url

    def __contains__(self, target: object) -> bool:
        wanted = target.id if isinstance(target, Checkpoint) else target
        state = self._engine.head().record
        return isinstance(wanted, str) and (wanted in state.names or state.entry(wanted) is not None)

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.checkpoints())

    def __repr__(self) -> str:
        return f"<Store {self.url}>"

    def __getstate__(self) -> dict[str, Any]:
        url, options = self._arguments
        owner = self._writer.owner if self._acquires else None
        key = self._engine.key  # pickled as where it came from
        return {
            "url": url,
            "acquire": self._acquires,
            "owner": owner,
            "options": options,
            "epoch": self._writer.epoch,
            "hmac_key": key,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._setup(**state)
