"""Writing one checkpoint: several files, published together or not at all."""

from __future__ import annotations

import os
import platform
import socket
import stat
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any

from . import __version__
from .checkpoint import RNG_FILE, STATE_FILE, Checkpoint
from .checksum import sha256
from .engine import Engine
from .envelope import JSON, check_json
from .epoch import Writer
from .errors import CkptStoreError, CommitUnknown, UsageError, WeightsOnlyWarning
from .files import Files, TransactionFile
from .log import new_op
from .manifest import MANIFEST_LIMIT, FileEntry, Manifest, encode
from .naming import MANIFEST, check_name, check_step, data_key, new_id
from .posix import mapped_errors
from .record import Entry, Record
from .retention import Retention, expired

__all__ = ["Draft", "Transaction", "TransactionFile"]


@dataclass(frozen=True)
class Draft:
    """What a checkpoint is saved with besides its files; checked before anything is written."""

    name: str
    step: int | None
    metrics: Mapping[str, float]
    metadata: JSON
    sampler: JSON

    @classmethod
    def check(cls, name: str, step: int | None, metrics: Mapping[str, Any] | None, metadata: JSON, sampler: Any) -> Draft:
        """Check everything the user gave.

        Raises:
            InvalidName, UsageError: says what is wrong with which; nothing was touched.
        """
        try:
            # item(): 0-dim tensors and NumPy scalars; float() of a tensor that requires grad would warn.
            numbers = {k: float(v.item() if hasattr(v, "item") else v) for k, v in ({} if metrics is None else metrics).items()}
        except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as exc:
            raise UsageError(f"metrics must be numbers by name, as in {{'loss': 0.31}}: {exc}") from None
        if not all(isinstance(k, str) and len(k) <= 1024 for k in numbers):
            raise UsageError("metrics must have names of at most 1024 characters")
        if sampler is not None and not callable(getattr(sampler, "state_dict", None)):
            raise UsageError(f"sampler has no state_dict() (it is a {type(sampler).__name__}); pass one of ckptstore's samplers")
        return cls(
            name=check_name(name),
            step=check_step(step),
            metrics=numbers,
            metadata=check_json(metadata, "metadata"),
            sampler=None if sampler is None else check_json(sampler.state_dict(), "the sampler's state"),
        )


class Transaction:
    """Writes one checkpoint. Use it as a context manager: leaving normally commits, leaving by an exception publishes nothing.

    Get one from `Store.transaction`; after the block, `checkpoint` is the committed checkpoint. For one thread at a time.
    """

    def __init__(self, engine: Engine, writer: Writer, retention: Retention, draft: Draft) -> None:
        self._engine = engine
        self._writer = writer
        self._retention = retention
        self._draft = draft
        self._epoch = 0
        self._state = "new"
        self._files = Files(engine, "")
        self._unsafe: dict[str, list[str]] = {}
        self._versions = {"ckptstore": __version__, "python": platform.python_version(), "host": _host()}
        self._checkpoint: Checkpoint | None = None
        self._before_write: Callable[[], object] = _nothing
        self._before_commit: Callable[[], object] = _nothing
        self.id = ""
        """Id of the checkpoint being written; known inside the block."""
        self.by = ""
        """The library in whose way it is written, if that is not `Store.save`'s: named to whoever loads it in another way."""
        self.pins: tuple[str, ...] = ()
        """Further names that shall point to it, from the same commit on."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The committed checkpoint. Raises `UsageError` before the block has been left normally."""
        if self._checkpoint is None:
            raise UsageError("the transaction has not committed")
        return self._checkpoint

    def __enter__(self) -> Transaction:
        if self._state != "new":
            raise UsageError("a transaction can be used once; ask the store for another one")
        self._engine.settle()
        self._epoch = self._writer.begin()
        self.id = new_id(self._epoch, self._draft.step)
        self._files = Files(self._engine, self.id, self._before_write)
        self._state = "open"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._state = "ended"
        if error is not None:
            self._give_up(error)
            return
        try:
            manifest, data = self._write_manifest()
        except BaseException as exc:
            self._give_up(exc)
            raise
        self._commit(manifest, data)

    def save(self, obj: Any, path: str = STATE_FILE) -> None:
        """Write `obj` with `torch.save`; values with a ``state_dict()`` are saved by it.

        What ``weights_only=True`` will refuse to load is recorded and warned about now (`WeightsOnlyWarning`).

        Raises:
            NotSerializable: `torch.save` cannot write it; the transaction publishes nothing.
        """
        from .snapshot import refuse_parts, to_state

        state = to_state(obj)
        refuse_parts(state)
        self.save_state(state, path)

    def save_state(self, state: Any, path: str, locations: Mapping[int, str] | None = None) -> None:
        """Write what `snapshot.to_state` has made; `locations` as for `torchfile.save`."""
        import torch

        from . import torchfile

        with self._open(path, fine=True) as file:
            unsafe = torchfile.save(state, file, locations)
        self._versions["torch"] = torch.__version__
        if unsafe:
            self._unsafe[path] = list(unsafe)
            message = (
                f"{path} holds {', '.join(unsafe)}, which only weights_only=False will load; save tensors and plain containers"
            )
            warnings.warn(message, WeightsOnlyWarning, stacklevel=4)

    def watch(self, before_write: Callable[[], object], before_commit: Callable[[], object]) -> None:
        """Have the one called before each write, the other when all but the record is durable. What they raise ends the transaction.

        Before the block is entered.
        """
        self._before_write, self._before_commit = before_write, before_commit

    def save_rng(self) -> None:
        """Write the Python, NumPy and torch random generators; `Store.resume` restores them."""
        from . import rng

        self.save(rng.capture(), RNG_FILE)

    def add_file(self, path: str, source: str | os.PathLike[str]) -> None:
        """Copy the file `source` into the checkpoint as `path`. A symbolic link is followed; anything but a regular file is refused."""
        if "\0" in os.fsdecode(source):
            raise UsageError(f"{os.fsdecode(source)!r:.200} is not a path: it contains NUL")
        with mapped_errors("read", os.fspath(source), absent=True):
            # Never blocks on a FIFO, and looks at what was opened, not at what was there before.
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise UsageError(f"{os.fspath(source)} is not a regular file")
        with open(fd, "rb", buffering=0) as file, self.open(path) as out:
            while block := self._read(file, source):
                out.write(block)

    def _read(self, file: Any, source: str | os.PathLike[str]) -> bytes:
        with mapped_errors("read", os.fspath(source)):
            block: bytes = file.read(self._engine.backend.capabilities.part_size)
        return block

    def add_tree(self, folder: str | os.PathLike[str], into: str = "") -> None:
        """Copy all files below `folder` into the checkpoint, below `into` if given. Empty folders are not kept.

        Raises:
            UsageError: `folder` is no folder, or holds a link to a folder, or something that is neither file nor folder, or this store.
        """
        root = os.fspath(folder)
        if not os.path.isdir(root):
            raise UsageError(f"{root} is not a folder")
        try:
            with mapped_errors("read", root):
                self._add_tree(root, into)
        except BaseException:
            self._files.spoil(f"{root} was added only in part")
            raise

    def _add_tree(self, root: str, into: str) -> None:
        backend = self._engine.backend
        store = getattr(getattr(backend, "inner", backend), "root", None)  # if it is a folder
        own = os.stat(store) if isinstance(store, str) and os.path.isdir(store) else None
        for parent, folders, files in os.walk(root, onerror=_raise):
            # It would copy all checkpoints into this one, and this one into itself, until names are too long or the disk is full.
            if os.path.basename(parent) == self.id or (own and os.path.samestat(own, os.stat(parent))):
                raise UsageError(
                    f"{parent} belongs to this store, which cannot be added to itself; add what is beside it by itself"
                )
            folders.sort()
            for name in folders:
                if os.path.islink(os.path.join(parent, name)):
                    raise UsageError(f"{os.path.join(parent, name)} links to a folder; add what it points to by itself")
            for name in sorted(files):
                source = os.path.join(parent, name)
                inside = os.path.relpath(source, root).replace(os.sep, "/")
                self.add_file(f"{into}/{inside}" if into else inside, source)

    def open(self, path: str, mode: str = "wb") -> TransactionFile:
        """Open a new file of the checkpoint for writing bytes.

        Raises:
            InvalidName: not a relative path, or taken.
        """
        if mode != "wb":
            raise UsageError(f"files of a transaction are opened with 'wb', not {mode!r}; wrap it in io.TextIOWrapper for text")
        return self._open(path)

    def _open(self, path: str, *, fine: bool = False) -> TransactionFile:
        if self._state != "open":
            raise UsageError("the transaction is not open; use it in a with block")
        return self._files.open(path, fine=fine)

    def adopt(self, entries: Sequence[FileEntry], unsafe: Mapping[str, list[str]]) -> None:
        """Take in files that other processes of this save have written, and made durable, below ``data/<id>/``.

        `unsafe`: by path, the classes that ``weights_only=True`` refuses.

        Raises:
            InvalidName: a path is taken.
            UsageError, KeyMismatch: the other process has another store, or no `hmac_key`.
        """
        self._files.adopt(entries)
        self._unsafe.update(unsafe)

    def _write_manifest(self) -> tuple[Manifest, bytes]:
        self._files.check()
        if self._engine.backend.capabilities.remote:
            self._files.finish()  # the manifest has the service's checksums
        if self.by:
            self._versions["by"] = self.by
        manifest = Manifest(
            id=self.id,
            name=self._draft.name,
            step=self._draft.step,
            created=time.time(),
            files=self._files.entries,
            metrics=self._draft.metrics,
            metadata=self._draft.metadata,
            sampler=self._draft.sampler,
            unsafe=self._unsafe,
            writer=self._versions,
        )
        data = encode(manifest, self._engine.key)
        if len(data) > MANIFEST_LIMIT:
            raise UsageError(
                f"nothing was published: metadata, the sampler's state and the list of files take {len(data)} bytes, more than the "
                f"{MANIFEST_LIMIT} that are read back; save what is large as a file"
            )
        self._files.put_last(MANIFEST, data)
        return manifest, data

    def _commit(self, manifest: Manifest, data: bytes) -> None:
        entry = Entry(
            id=self.id,
            step=manifest.step,
            name=manifest.name,
            created=manifest.created,
            nbytes=manifest.nbytes,
            manifest=sha256(data),
            metrics=manifest.metrics,
        )

        names = dict.fromkeys((entry.name, *map(check_name, self.pins)), entry.id)

        def publish(state: Record) -> Record:
            state = self._engine.write_down(state)
            state = state.but(checkpoints=state.checkpoints.put(entry), names={**state.names, **names})
            gone = expired(state, self._retention)
            if self._writer.cooperates:  # beside the job that owns the store: its rules are not for that job's checkpoints
                gone = {i for i in gone if (e := state.entry(i)) and e.name == entry.name}
            return state.without(gone)

        keys = [data_key(self.id, f.key) for f in manifest.files] + [data_key(self.id, MANIFEST)]
        self._engine.remember_keys(self.id, keys)
        try:
            record = self._writer.commit(publish, new_op(), self._epoch, self._make_durable)
        except CommitUnknown:
            raise  # it may have been committed: its data stays
        except _NotDurable as exc:
            failure = exc.error
        except BaseException as exc:
            failure = exc
        else:
            self._checkpoint = Checkpoint(self._engine, entry, manifest)
            self._engine.committed(record)
            return
        if self._files.unfinished or isinstance(
            failure, CkptStoreError
        ):  # else, after Ctrl-C for one, it may have been committed
            self._give_up(failure)
        raise failure

    def _make_durable(self) -> None:
        try:
            self._files.finish()
            self._before_commit()
        except BaseException as exc:
            raise _NotDurable(exc) from exc

    def _give_up(self, error: BaseException) -> None:
        self._discard()
        if isinstance(error, CkptStoreError):
            self._writer.tell_if_fenced(self._epoch, error)

    def _discard(self) -> None:
        """Drop everything: it is proven that this id was not and will not be committed. What fails here is collected by a later job."""
        self._files.abort()
        with suppress(CkptStoreError):
            self._engine.delete_data(self.id)


class _NotDurable(Exception):
    """Carries what went wrong with the files past those who would take it for an answer about the record."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


@cache
def _host() -> str:
    return socket.gethostname()


def _raise(error: OSError) -> None:
    raise error


def _nothing() -> None:
    pass
