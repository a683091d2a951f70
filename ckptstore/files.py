"""The files of a checkpoint that is being written, by this process and, in a distributed save, by others."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

from .checksum import ALGORITHM
from .engine import Engine
from .errors import AlreadyExists, CkptStoreError, DamagedFile, InvalidName, KeyMismatch, UsageError
from .manifest import FileEntry
from .naming import check_path, data_key, file_key
from .protocol import PartWriter
from .reading import check_size
from .transfer import FileSink

__all__ = ["Files", "TransactionFile"]

_SMALL = 1 << 20
"""Bytes. What is not longer in all is made durable together with the record, by one thread: others would take longer to wake up."""
_OPEN_FILES = 16
"""Files written but not yet made durable: they are finished together, in parallel, but each holds descriptors until then."""


class TransactionFile(io.BufferedIOBase):
    """A file of a transaction, open for writing. Left by an exception, it spoils the whole transaction: half a file is never published."""

    def __init__(self, files: Files, sink: FileSink, before_write: Callable[[], object] | None = None) -> None:
        self._files = files
        self._before_write = before_write
        self._sink = sink
        self._broken = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._closed

    def __del__(self) -> None:
        """Do nothing, where files close themselves: who has not closed it has perhaps not written it to its end."""

    def write(self, data: Any, /) -> int:
        """Append `data`; returns its length in bytes."""
        view = memoryview(data)
        with self._writing():
            return self._sink.write(view)

    def write_summed(self, data: memoryview, before: int, owner: object = None) -> int:
        """See `FileSink.write_summed`."""
        with self._writing():
            return self._sink.write_summed(data, before, owner)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        if self._closed:
            raise ValueError("write to a closed file")
        try:
            if self._before_write is not None:
                self._before_write()
            yield
        except BaseException:
            self._broken = True
            self._files.spoil(f"{self._sink.path} could not be written")
            raise

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._sink.size

    def flush(self) -> None:
        """Do nothing: files become durable, together, when the transaction commits."""

    def close(self) -> None:
        """Complete the file. Raises `UsageError` if it could not be written, as was said then."""
        if not self._closed:
            self._closed = True
            if self._broken:
                raise UsageError(f"{self._sink.path} could not be written, so nothing is published")
            self._files._complete(self._sink)

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
            self._closed = True
            self._files.spoil(f"{self._sink.path} was left by {kind.__name__}")


class Files:
    """The files below the folder of the checkpoint `checkpoint_id`, which is written once and by one save. For one thread at a time.

    `before_write` is called before each write; what it raises spoils the files.
    """

    def __init__(self, engine: Engine, checkpoint_id: str, before_write: Callable[[], object] | None = None) -> None:
        self._engine = engine
        self._before_write = before_write
        self._id = checkpoint_id
        self._sinks: dict[str, FileSink] = {}  # key -> being written
        self._written: list[tuple[PartWriter, str]] = []  # complete, not yet durable; with their keys
        self._files: dict[str, FileEntry] = {}  # by key, complete
        self._nbytes = 0  # of these: there may be tens of thousands, too many to count again and again
        self._folders: set[str] = set()
        self._spoilt: str | None = None

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        """What is complete."""
        return tuple(self._files.values())

    @property
    def unfinished(self) -> bool:
        """Whether something complete is not yet durable."""
        return bool(self._written)

    def open(self, path: str, *, fine: bool = False) -> TransactionFile:
        """Open a new file for writing bytes; `fine` as for `FileSink`.

        Raises:
            InvalidName: not a relative path, or taken.
        """
        key = self._take(path)
        backend = self._engine.backend
        writer = backend.open_writer(data_key(self._id, key))
        sink = FileSink(path, writer, self._engine.writer, backend.capabilities, digest=self._engine.digest, fine=fine)
        self._sinks[key] = sink
        return TransactionFile(self, sink, self._before_write)

    def adopt(self, entries: Sequence[FileEntry]) -> None:
        """Take in files that other processes have written, and made durable, below the same folder.

        Raises:
            InvalidName: a path is taken.
            UsageError: one is not there: the other process has another store.
            KeyMismatch: the other process had no `hmac_key`.
        """
        for entry, _ in zip(entries, self._engine.workers.map(self._check_adopted, entries), strict=True):
            self._files[self._take(entry.path)] = entry
            self._nbytes += entry.size

    def _check_adopted(self, entry: FileEntry) -> None:
        try:
            check_size(self._engine.backend, data_key(self._id, entry.key), entry)
        except DamagedFile as exc:
            why = f"nothing was published: another process says that it has written {entry.path}, and here {exc}"
            raise UsageError(f"{why}; all must name the same store, on storage that they share") from exc
        if self._engine.key and len(entry.digests) != len(entry.chunks):
            raise KeyMismatch(f"nothing was published: {entry.path} was written by a process without the hmac_key of this store")

    def _take(self, path: str) -> str:
        """Return the key of the new file `path`."""
        key = file_key(check_path(path))
        above = {key[:i] for i, c in enumerate(key) if c == "/"}
        if key in self._folders or any(k in self._sinks or k in self._files for k in (key, *above)):
            raise InvalidName(f"{path!r} is in this checkpoint already, as a file or as a folder")
        self._folders |= above
        return key

    def _complete(self, sink: FileSink) -> None:
        try:
            entry = sink.close()
            self._files[entry.key] = entry
            self._nbytes += entry.size
            del self._sinks[entry.key]
            self._written.append((sink.writer, entry.key))
            try:
                sink.writer.start_finish()
            except AlreadyExists:
                del self._files[entry.key]  # not ours, and so not to be dropped
                raise
            if len(self._written) >= _OPEN_FILES:
                self.finish()
        except BaseException:
            self.spoil(f"{sink.path} could not be written")
            raise

    def spoil(self, reason: str) -> None:
        """Note why these files must not be published."""
        self._spoilt = self._spoilt or reason

    def check(self) -> None:
        """Raise `UsageError` if these files must not be published: one is spoilt, or still open."""
        if self._spoilt:
            raise UsageError(f"nothing was published: {self._spoilt}")
        if self._sinks:
            names = ", ".join(sink.path for sink in self._sinks.values())
            raise UsageError(f"nothing was published: still open at the end of the transaction: {names}")

    def finish(self) -> None:
        """Make durable what is complete, in parallel, and note the checksums that the service recorded."""
        if self._is_small():
            checksums: Iterable[str | None] = [self._finish(written) for written in self._written]
        else:
            checksums = self._engine.workers.map(self._finish, self._written)
        for (_, key), checksum in zip(self._written, checksums, strict=True):
            if checksum and key in self._files:
                entry = self._files[key]
                if checksum.startswith(f"{ALGORITHM}:") and checksum != entry.checksum:
                    # What arrived is what was sent: the backend has compared that. It is not what was hashed.
                    what = f"{entry.path} changed in memory while it was saved, so nothing was published"
                    raise DamagedFile(f"{what}; let nothing write to tensors during a save", entry.path, [(0, entry.size)])
                self._files[key] = replace(entry, remote=checksum)
        self._written.clear()

    def _finish(self, written: tuple[PartWriter, str]) -> str | None:
        writer, key = written
        try:
            return writer.finish()
        except AlreadyExists:
            self._files.pop(key, None)  # not ours, and so not to be dropped
            raise

    def put_last(self, key: str, data: bytes) -> None:
        """Write `data` as the object `key`, which is no file of the checkpoint. If all is small, `finish` has still to be called."""
        writer = self._engine.backend.open_writer(data_key(self._id, key))
        self._written.append((writer, key))
        writer.write(0, memoryview(data), 0)
        writer.start_finish()
        if not self._is_small():
            self.finish()

    def _is_small(self) -> bool:
        return not self._engine.backend.capabilities.remote and self._nbytes < _SMALL

    def drop(self) -> None:
        """Drop what this process has written, of a checkpoint that will not be committed. Never raises for anything the storage does."""
        self.abort()
        with suppress(CkptStoreError):
            self._engine.backend.delete([data_key(self._id, key) for key in self._files])

    def abort(self) -> None:
        """Drop what is not durable yet. Never raises for anything the storage does."""
        for sink in self._sinks.values():
            sink.abort()
        for writer, _ in self._written:
            writer.abort()
