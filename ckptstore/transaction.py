"""Writing one checkpoint: several files, published together or not at all."""

from __future__ import annotations

import os
import platform
import socket
import stat
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from types import TracebackType
from typing import Any

from . import __version__
from .checkpoint import RNG_FILE, STATE_FILE, Checkpoint
from .checksum import ALGORITHM, sha256
from .engine import Engine
from .envelope import JSON, check_json
from .epoch import Writer
from .errors import CkptStoreError, CommitUnknown, DamagedFile, InvalidName, UsageError, WeightsOnlyWarning
from .log import new_op
from .manifest import FileEntry, Manifest, encode
from .naming import MANIFEST, check_name, check_path, check_step, data_key, file_key, new_id
from .posix import mapped_errors
from .protocol import PartWriter
from .record import Entry, Record
from .retention import Retention, expired
from .transfer import FileSink

__all__ = ["Draft", "Transaction", "TransactionFile"]

_SMALL = 1 << 20
"""Bytes. What is not longer in all is made durable together with the record, by one thread: others would take longer to wake up."""
_OPEN_FILES = 16
"""Files written but not yet made durable: they are finished together, in parallel, but each holds descriptors until then."""


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
            numbers = {k: float(v.item() if hasattr(v, "item") else v) for k, v in (metrics or {}).items()}
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


class TransactionFile:
    """A file of a transaction, open for writing. Left by an exception, it spoils the whole transaction: half a file is never published."""

    def __init__(self, transaction: Transaction, sink: FileSink) -> None:
        self._transaction = transaction
        self._sink = sink
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append `data`; returns its length in bytes."""
        if self.closed:
            raise ValueError("write to a closed file")
        view = memoryview(data)
        try:
            return self._sink.write(view)
        except BaseException:
            self._transaction._spoil(f"{self._sink.path} could not be written")
            raise

    def flush(self) -> None:
        """Do nothing: files become durable, together, when the transaction commits."""

    def close(self) -> None:
        """Complete the file."""
        if not self.closed:
            self.closed = True
            self._transaction._complete(self._sink)

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def __enter__(self) -> TransactionFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.closed = True
            self._transaction._spoil(f"{self._sink.path} was left by {kind.__name__}")


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
        self._spoilt: str | None = None
        self._sinks: dict[str, FileSink] = {}  # key -> being written
        self._written: list[tuple[PartWriter, str]] = []  # complete, not yet durable; with their keys
        self._files: dict[str, FileEntry] = {}  # by key, complete
        self._folders: set[str] = set()
        self._unsafe: dict[str, list[str]] = {}
        self._versions = {"ckptstore": __version__, "python": platform.python_version(), "host": _host()}
        self._checkpoint: Checkpoint | None = None
        self.id = ""
        """Id of the checkpoint being written; known inside the block."""

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
        import torch

        from . import snapshot, torchfile

        state = snapshot.to_state(obj)
        with self.open(path) as file:
            unsafe = torchfile.save(state, file)
        self._versions["torch"] = torch.__version__
        if unsafe:
            self._unsafe[path] = list(unsafe)
            message = (
                f"{path} holds {', '.join(unsafe)}, which only weights_only=False will load; save tensors and plain containers"
            )
            warnings.warn(message, WeightsOnlyWarning, stacklevel=3)

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
            UsageError: `folder` is no folder, or holds a link to a folder, or something that is neither file nor folder.
        """
        root = os.fspath(folder)
        if not os.path.isdir(root):
            raise UsageError(f"{root} is not a folder")
        try:
            with mapped_errors("read", root):
                self._add_tree(root, into)
        except BaseException:
            self._spoil(f"{root} was added only in part")
            raise

    def _add_tree(self, root: str, into: str) -> None:
        for parent, folders, files in os.walk(root, onerror=_raise):
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
        if self._state != "open":
            raise UsageError("the transaction is not open; use it in a with block")
        if mode != "wb":
            raise UsageError(f"files of a transaction are opened with 'wb', not {mode!r}; wrap it in io.TextIOWrapper for text")
        key = file_key(check_path(path))
        above = {key[:i] for i, c in enumerate(key) if c == "/"}
        if key in self._folders or any(k in self._sinks or k in self._files for k in (key, *above)):
            raise InvalidName(f"{path!r} is in this checkpoint already, as a file or as a folder")
        backend = self._engine.backend
        writer = backend.open_writer(data_key(self.id, key))
        sink = FileSink(path, writer, self._engine.workers, backend.capabilities, authentic=self._engine.key is not None)
        self._sinks[key] = sink
        self._folders |= above
        return TransactionFile(self, sink)

    def _complete(self, sink: FileSink) -> None:
        try:
            entry = sink.close()
            self._files[entry.key] = entry
            del self._sinks[entry.key]
            self._written.append((sink.writer, entry.key))
            sink.writer.start_finish()
            if len(self._written) >= _OPEN_FILES:
                self._finish_written()
        except BaseException:
            self._spoil(f"{sink.path} could not be written")
            raise

    def _spoil(self, reason: str) -> None:
        self._spoilt = self._spoilt or reason

    def _finish_written(self) -> None:
        if self._is_small():
            checksums: Iterable[str | None] = [writer.finish() for writer, _ in self._written]
        else:
            checksums = self._engine.workers.map(lambda item: item[0].finish(), self._written)
        for (_, key), checksum in zip(self._written, checksums, strict=True):
            if checksum and key in self._files:
                entry = self._files[key]
                if checksum.startswith(f"{ALGORITHM}:") and checksum != entry.checksum:
                    # What arrived is what was sent: the backend has compared that. It is not what was hashed.
                    what = f"{entry.path} changed in memory while it was saved, so nothing was published"
                    raise DamagedFile(f"{what}; let nothing write to tensors during a save", entry.path, [(0, entry.size)])
                self._files[key] = replace(entry, remote=checksum)
        self._written.clear()

    def _is_small(self) -> bool:
        return not self._engine.backend.capabilities.remote and sum(f.size for f in self._files.values()) < _SMALL

    def _write_manifest(self) -> tuple[Manifest, bytes]:
        if self._spoilt:
            raise UsageError(f"nothing was published: {self._spoilt}")
        if self._sinks:
            names = ", ".join(sink.path for sink in self._sinks.values())
            raise UsageError(f"nothing was published: still open at the end of the transaction: {names}")
        if self._engine.backend.capabilities.remote:
            self._finish_written()  # the manifest has the service's checksums
        manifest = Manifest(
            id=self.id,
            name=self._draft.name,
            step=self._draft.step,
            created=time.time(),
            files=tuple(self._files.values()),
            metrics=self._draft.metrics,
            metadata=self._draft.metadata,
            sampler=self._draft.sampler,
            unsafe=self._unsafe,
            writer=self._versions,
        )
        data = encode(manifest, self._engine.key)
        writer = self._engine.backend.open_writer(data_key(self.id, MANIFEST))
        self._written.append((writer, MANIFEST))
        writer.write(0, memoryview(data), 0)
        writer.start_finish()
        if not self._is_small():
            self._finish_written()
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

        def publish(state: Record) -> Record:
            state = self._engine.write_down(state)
            state = replace(state, checkpoints=state.checkpoints.put(entry), names={**state.names, entry.name: entry.id})
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
        if self._written or isinstance(failure, CkptStoreError):  # else, after Ctrl-C for one, it may have been committed
            self._give_up(failure)
        raise failure

    def _make_durable(self) -> None:
        try:
            self._finish_written()
        except BaseException as exc:
            raise _NotDurable(exc) from exc

    def _give_up(self, error: BaseException) -> None:
        self._discard()
        if isinstance(error, CkptStoreError):
            self._writer.tell_if_fenced(self._epoch, error)

    def _discard(self) -> None:
        """Drop everything: it is proven that this id was not and will not be committed. What fails here is collected by a later job."""
        for sink in self._sinks.values():
            sink.abort()
        for writer, _ in self._written:
            writer.abort()
        with suppress(CkptStoreError):
            self._engine.delete_data(self.id)


class _NotDurable(Exception):
    """Carries what went wrong with the files past those who would take it for an answer about the record."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


@cache
def _host() -> str:
    return socket.gethostname()


def _raise(error: OSError) -> None:
    raise error
