"""A folder on a local disk (ext4, xfs, btrfs, …): ``file:///absolute/path`` or a plain path."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from ckptstore.errors import Ambiguous, BackendError, InvalidOption, StoreWarning
from ckptstore.folder import FolderBackend, FolderWriter, absolute
from ckptstore.mounts import file_system, is_shared
from ckptstore.posix import NewFile, mapped_errors, read_full, start_writeback, write_all
from ckptstore.protocol import Capabilities, PartWriter

__all__ = ["LocalBackend"]

_SMALL = 1 << 20
"""Bytes: a file that is not longer takes no time worth saving to be written to the disk by its flush."""
_BATCH = 8 << 20
"""Bytes: after so many, what was written is sent on its way to the disk."""
_GRAIN = 1 << 20
"""Bytes: a file is sent up to a multiple of this, for where it ends now, the next write changes the same page."""


class LocalBackend(FolderBackend):
    """One folder of a local file system."""

    options: ClassVar[Mapping[str, str]] = {}
    capabilities = Capabilities(atomic_create=True, durable=True, part_size=8 << 20, parallel=4)

    def __init__(self, root: str) -> None:
        super().__init__(root)
        # Names that were given, in which folder, and not flushed yet: one flush of a folder is enough for all that it has by then.
        self._unflushed: dict[NewFile, tuple[str, int, int]] = {}
        self._kind: str | None = None  # of file system, once it was looked at

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> LocalBackend:
        """Make a backend for the folder `location`, relative to the current one; `~` is not expanded. Touches nothing.

        Raises:
            InvalidOption: any option.
            InvalidURL: an empty path, or one with a NUL.
        """
        if options:
            raise InvalidOption(f"a local folder takes no option {min(options)!r}")
        return cls(absolute(location))

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`. The first flush in `ready` takes the new file along, so that its own is over at once."""
        with mapped_errors("create", self._path(key)), self._new_file(key) as new:
            write_all(new.fd, 0, memoryview(data))
            if ready:
                start_writeback(new.fd)
                ready()
            os.fsync(new.fd)
            new.close_file()
            self._settle(new.folders)
            # From here on others may see the object, and after a power cut it may be there or not.
            new.publish()
            try:
                os.fsync(new.folders.fd)
            except OSError as exc:
                why = f"created, but the flush of its folder failed ({exc.strerror}), so it may be gone after a power cut"
                raise Ambiguous(exc.errno, why, new.path, durable=False) from exc

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`. Nothing is flushed: after a power cut a hint or an old slot may be old, new or empty, all harmless."""
        with mapped_errors("replace", self._path(key)), self._new_file(key) as new:
            write_all(new.fd, 0, memoryview(data))
            new.close_file()
            new.replace()

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        with mapped_errors("create", self._path(key)):
            return _LocalWriter(self, key)

    @contextmanager
    def reader(self, key: str) -> Iterator[Callable[[int, memoryview], None]]:
        """See `LocalFiles.reader`."""
        path = self._path(key)
        with mapped_errors("read", path, absent=True):
            fd, _ = self._open_file(key)

        def read_into(offset: int, buffer: memoryview) -> None:
            with mapped_errors("read", path):
                got = read_full(fd, offset, buffer)
            if got < buffer.nbytes:
                raise BackendError(errno.EIO, f"ends at byte {offset + got}, expected {offset + buffer.nbytes}", path)

        try:
            yield read_into
        finally:
            os.close(fd)

    def open_file(self, key: str) -> int | None:
        """See `LocalFiles.open_file`. What other hosts can change is not mapped: its pages may change, or go, under the reader."""
        with mapped_errors("read", self._path(key), absent=True):
            fd, _ = self._open_file(key)
        if is_shared(self._kind):
            os.close(fd)
            return None
        return fd

    def _first_look(self) -> None:
        kind = self._kind = file_system(self.root)
        if is_shared(kind):
            why = "several hosts may write there, and it can fail in ways that a local disk does not"
            warnings.warn(f"{self.root} is on {kind}: {why}; name it shared://{self.root}", StoreWarning, stacklevel=8)

    def _new_file(self, key: str) -> NewFile:
        """Make it in the folder that another has open, if one does: a checkpoint has several files."""
        above, _, name = key.rpartition("/")
        parent = self._path(above)
        for other, (path, *_) in list(self._unflushed.items()):
            if path == parent and other.folders.share():
                try:
                    return NewFile(other.folders, name, self._path(key))
                except FileNotFoundError:
                    other.folders.close()  # removed meanwhile: make it again
                except BaseException:
                    other.folders.close()
                    raise
        return super()._new_file(key)

    def _flush_name(self, new: NewFile) -> None:
        """Make the name of a published file durable, unless another flush of its folder has done so meanwhile."""
        folder = self._unflushed.get(new)
        if folder is not None:
            covered = [n for n, f in list(self._unflushed.items()) if f == folder]
            os.fsync(new.folders.fd)
            self._settle(new.folders)
            for n in covered:
                self._unflushed.pop(n, None)


class _LocalWriter(FolderWriter[LocalBackend]):
    """See `PartWriter`."""

    _waiting = 0
    """Bytes written and not yet sent on their way, more or less: threads do not wait for each other to count."""

    def _write(self, offset: int, data: memoryview) -> None:
        """Write, and have the disk begin while the next bytes are hashed and written: the flush then waits for little."""
        super()._write(offset, data)
        self._waiting += data.nbytes
        if self._waiting >= _BATCH:
            self._waiting = 0
            start_writeback(self._new.fd, (offset + data.nbytes) // _GRAIN * _GRAIN)

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`.

        The file gets its name *before* the flushes: on ext4 and xfs the first flush then takes the data, the new name and the new
        folders to disk in one commit of the journal, for all files that got so far. Nobody reads a data file before the record that
        names it is committed, so a power cut in between only leaves litter.
        """
        with self._lock:
            self._require_open()
            self._state = "failed"  # until proven otherwise
        with self._finishing():
            self._new.publish()
            others = bool(self._backend._unflushed)
            self._backend._unflushed[self._new] = self._new.folders.identity(-1)
            # A first small file is flushed before anything else is to be written but a few more. Started now, it would be in the way of
            # those: on ext4 a 4 KiB save then takes a tenth longer.
            if others or os.fstat(self._new.fd).st_size > _SMALL:
                start_writeback(self._new.fd)
        self._state = "started"

    def finish(self) -> None:
        """See `PartWriter.finish`. A flush that fails takes the name away again, and is final."""
        if self._state != "started":
            self.start_finish()
        self._state = "failed"
        with self._finishing():
            os.fsync(self._new.fd)
            self._new.close_file()
            self._backend._flush_name(self._new)
        self._new.close()
        self._state = "done"  # not before: after an interrupt in between, `abort` would leave the file open

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        new = self._new
        with mapped_errors("finish", new.path):
            try:
                yield
            except BaseException as exc:
                self._backend._unflushed.pop(new, None)
                if not new.withdraw() and isinstance(exc, OSError):
                    why = f"could not be made durable ({exc.strerror}), nor be removed again; save once more under another name"
                    raise Ambiguous(exc.errno, why, new.path, durable=False) from exc
                raise

    def _withdraw(self) -> None:
        self._backend._unflushed.pop(self._new, None)
        super()._withdraw()
