"""A folder on a local disk (ext4, xfs, btrfs, …): ``file:///absolute/path`` or a plain path.

Nothing below the root is reached through a symbolic link: each folder is opened relative to the one above it with O_NOFOLLOW, so a
link planted in the store cannot make us read, write or delete elsewhere. The root itself may be a link.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar

from ckptstore.errors import Ambiguous, BackendError, InvalidName, InvalidOption, InvalidURL
from ckptstore.posix import (
    Folders,
    NewFile,
    fsync_dir,
    mapped_errors,
    nearest_existing,
    read_full,
    start_writeback,
    write_all,
    wrong_kind,
)
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

__all__ = ["LocalBackend"]

# O_NONBLOCK: opening a FIFO that somebody planted must not wait for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _segments(key: str) -> list[str]:
    segments = key.split("/")
    if any(s in ("", ".", "..") or "\0" in s for s in segments):
        raise InvalidName(f"{key!r:.200} is not a key: it must be a relative path without empty, '.' or '..' parts")
    return segments


class LocalBackend:
    """One folder of a local file system. Keeps no descriptor and no thread between calls, so it survives a fork."""

    options: ClassVar[Mapping[str, str]] = {}
    capabilities = Capabilities(atomic_create=True, durable=True, part_size=8 << 20, parallel=4)

    def __init__(self, root: str) -> None:
        self.root = root
        self.url = root
        # Folders whose entry in the folder above is known to be on disk: (path, device, inode). A folder that was merely *found* is not
        # known to be: whoever made it may have been killed before the flush, or is about to flush it in another thread.
        self._settled: set[tuple[str, int, int]] = set()
        self._root_id: tuple[int, int] | None = None
        # Names that were given, in which folder, and not flushed yet: one flush of a folder is enough for all that it has by then.
        self._unflushed: dict[NewFile, tuple[str, int, int]] = {}

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> LocalBackend:
        """Make a backend for the folder `location`, relative to the current one; `~` is not expanded. Touches nothing.

        Raises:
            InvalidOption: any option.
            InvalidURL: an empty path, or one with a NUL.
        """
        if options:
            raise InvalidOption(f"a local folder takes no option {min(options)!r}")
        if not location or "\0" in location:
            raise InvalidURL("the path of a store must not be empty or contain NUL")
        with mapped_errors("find the current folder for", location):
            path = os.path.join(os.getcwd(), location)
        # normpath would change what "link/.." means.
        return cls(path if ".." in path.split("/") else os.path.normpath(path))

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
            return _LocalWriter(self, self._new_file(key), _segments(key)[:-1])

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        with mapped_errors("read", self._path(key), absent=True):
            fd, size = self._open_file(key)
            try:
                if size > limit:
                    raise BackendError(errno.EFBIG, f"{size} bytes long, more than the {limit} that belong here", self._path(key))
                buffer = bytearray(size)
                got = read_full(fd, 0, memoryview(buffer))
                return bytes(memoryview(buffer)[:got])
            finally:
                os.close(fd)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        with mapped_errors("read", self._path(key), absent=True):
            fd, size = self._open_file(key)
            try:
                got = read_full(fd, offset, buffer)
            finally:
                os.close(fd)
            if got < buffer.nbytes:
                end = offset + buffer.nbytes
                raise BackendError(errno.EIO, f"ends at byte {min(offset + got, size)}, expected {end}", self._path(key))

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        *above, name = _segments(key)
        with mapped_errors("look at", self._path(key), absent=True), self._folders(above) as folders:
            found = os.stat(name, dir_fd=folders.fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise wrong_kind(self._path(key), found.st_mode)
        return ObjectInfo(key, found.st_size)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Links, FIFOs, sockets and devices are listed with size 0, so that `delete` can remove them, and so are
        empty folders, with a final ``/``."""
        above = _segments(prefix[:-1]) if prefix else []
        stack = [iter(self._scan(above, start_after))]
        while stack:
            for info in stack[-1]:
                if info.size >= 0:
                    yield info
                elif (inner := info.key + "/") > start_after or start_after.startswith(inner):
                    stack.append(iter(self._scan(info.key.split("/"), start_after)))
                    break
            else:
                stack.pop()

    def _scan(self, above: Sequence[str], start_after: str) -> Sequence[ObjectInfo]:
        """Return the entries of one folder, folders with size -1, in the order of the keys in them; none if the folder is missing."""
        path = self._path("/".join(above))
        prefix = "".join(f"{s}/" for s in above)
        found: list[tuple[str, ObjectInfo]] = []
        with mapped_errors("list", path):
            try:
                folders = self._folders(above)
            except FileNotFoundError:
                return []
            # Descriptors are closed before the first item is handed out: a caller may drop the iterator, or fork.
            with folders, os.scandir(folders.fd) as entries:
                empty = len(above) > 1  # the folders at the top stay
                for entry in entries:
                    empty = False
                    key = prefix + entry.name
                    if entry.is_dir(follow_symlinks=False):
                        # The final "/" sorts "a.b" before "a/b" as the keys do.
                        found.append((key + "/", ObjectInfo(key, -1)))
                    elif key > start_after:
                        try:
                            info = entry.stat(follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        found.append((key, ObjectInfo(key, info.st_size if stat.S_ISREG(info.st_mode) else 0)))
        if empty and prefix > start_after:
            return [ObjectInfo(prefix, 0)]  # left by somebody killed before the first file; so that `delete` can remove it
        return [info for _, info in sorted(found, key=lambda item: item[0])]

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`. A link is removed itself, never what it points to."""
        parents: set[tuple[str, ...]] = set()
        for key in keys:
            *above, name = _segments(key.removesuffix("/"))
            if key.endswith("/"):  # an empty folder, as `list` has it
                parents.add((*above, name))
                continue
            with mapped_errors("delete", self._path(key)), suppress(FileNotFoundError), self._folders(above) as folders:
                self._unlink(folders.fd, name, self._path(key))
            parents.add(tuple(above))
        for parent in sorted(parents, key=len, reverse=True):
            self._prune(list(parent))

    @staticmethod
    def _unlink(dir_fd: int, name: str, path: str) -> None:
        try:
            os.unlink(name, dir_fd=dir_fd)
        except OSError as exc:  # of a folder: EISDIR on Linux, EPERM elsewhere
            mode = os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                raise wrong_kind(path, mode) from exc
            raise

    def _prune(self, parent: Sequence[str]) -> None:
        """Remove folder `parent` and those above it while they are empty. The root stays."""
        with suppress(OSError):  # not empty, or not ours to remove: an empty folder does no harm
            while parent:
                *above, name = parent
                with self._folders(above) as folders:
                    os.rmdir(name, dir_fd=folders.fd)
                parent = above

    def close(self) -> None:
        """See `Backend.close`. There is nothing to release."""

    def _path(self, key: str) -> str:
        return os.path.join(self.root, key) if key else self.root

    def _folders(self, segments: Sequence[str], *, create: bool = False) -> Folders:
        """Open the root and the folders `segments` below it. FileNotFoundError means that one is proven to be missing."""
        folders = Folders(self.root, self._open_root(create))
        try:
            self._check_root(folders)
            for segment in segments:
                if not create:
                    folders.descend(segment)
                elif folders.make(segment):
                    self._settled.discard(folders.identity(-1))
        except BaseException:
            folders.close()
            raise
        return folders

    def _check_root(self, folders: Folders) -> None:
        """Refuse to go on in another folder than before: a disk unmounted under us leaves an empty one under the same name."""
        _, *root_id = folders.identity(0)
        if self._root_id is None:
            self._root_id = (root_id[0], root_id[1])
        elif self._root_id != (root_id[0], root_id[1]):
            why = (
                "this is not the folder it was before: was it moved, or its disk unmounted? Open the store anew if this is meant"
            )
            raise BackendError(errno.ESTALE, why, self.root)

    def _open_root(self, create: bool) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self.root, flags)
        except FileNotFoundError as exc:
            nearest = nearest_existing(self.root)
            if os.path.islink(nearest) and not os.path.exists(nearest):
                # Not an empty store: more likely a disk that is not mounted.
                raise BackendError(errno.ENOENT, "this link points to nothing; is its disk mounted?", nearest) from exc
            if not create:
                raise
            os.makedirs(self.root, exist_ok=True)
            return os.open(self.root, flags)
        except NotADirectoryError as exc:
            nearest = nearest_existing(self.root)
            raise wrong_kind(nearest, os.stat(nearest).st_mode) from exc

    def _open_file(self, key: str) -> tuple[int, int]:
        """Open a regular file for reading; return descriptor and size."""
        *above, name = _segments(key)
        with self._folders(above) as folders:
            try:
                fd = os.open(name, _FILE, dir_fd=folders.fd)
            except OSError as exc:
                mode = os.stat(name, dir_fd=folders.fd, follow_symlinks=False).st_mode
                if not stat.S_ISREG(mode):
                    raise wrong_kind(self._path(key), mode) from exc
                raise
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise wrong_kind(self._path(key), found.st_mode)
        except BaseException:
            os.close(fd)
            raise
        return fd, found.st_size

    def _new_file(self, key: str) -> NewFile:
        *above, name = _segments(key)
        attempts = 100
        while True:
            try:
                folders = self._folders(above, create=True)
                try:
                    return NewFile(folders, name, self._path(key))
                except BaseException:
                    folders.close()
                    raise
            except FileNotFoundError:
                # A `delete` elsewhere has just removed the folder because it was empty. Once our file is in it, none
                # can. (Six attempts were too few against a tight loop of deletes.)
                attempts -= 1
                if not attempts:
                    raise

    def _flush_name(self, new: NewFile) -> None:
        """Make the name of a published file durable, unless another flush of its folder has done so meanwhile."""
        folder = self._unflushed.get(new)
        if folder is not None:
            covered = [n for n, f in list(self._unflushed.items()) if f == folder]
            os.fsync(new.folders.fd)
            self._settle(new.folders)
            for n in covered:
                self._unflushed.pop(n, None)

    def _settle(self, folders: Folders) -> None:
        """Make sure that the entry of each of `folders` in the one above is on disk, from the top down."""
        top = folders.identity(0)
        if top not in self._settled:
            self._settle_root()
            self._settled.add(top)
        for i in range(1, len(folders.fds)):
            entry = folders.identity(i)
            if entry not in self._settled:
                os.fsync(folders.fds[i - 1])
                self._settled.add(entry)

    def _settle_root(self) -> None:
        """Flush the folders above the root. Once per backend, whoever made them: that one may have been killed before its flush."""
        path = os.path.realpath(self.root)
        while not os.path.ismount(path):
            path = os.path.dirname(path)
            try:
                fsync_dir(path)
            except PermissionError:
                if os.access(path, os.W_OK):
                    raise
                return  # nor may we write to it, so nothing that is missing there was made by us


class _LocalWriter:
    """See `PartWriter`."""

    def __init__(self, backend: LocalBackend, new: NewFile, above: Sequence[str]) -> None:
        self._backend = backend
        self._new = new
        self._above = above
        self._lock = threading.Lock()
        self._state = "open"
        self._writing = 0

    def write(self, offset: int, data: memoryview, number: int) -> None:
        """See `PartWriter.write`."""
        with self._lock:
            if self._state != "failed":  # parts in other threads say themselves what is wrong with the disk
                self._require_open()
            self._writing += 1
        try:
            with mapped_errors("write", self._new.path):
                write_all(self._new.fd, offset, data)
        except BaseException:
            with self._lock:
                if self._state == "open":
                    self._state = "failed"
            raise
        finally:
            with self._lock:
                self._writing -= 1
                self._release()

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
            self._backend._unflushed[self._new] = self._new.folders.identity(-1)
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
        self._state = "done"
        self._new.close()

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

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        with self._lock:
            if self._state == "started":
                self._backend._unflushed.pop(self._new, None)
                self._new.withdraw()
            if self._state != "done":
                self._state = "aborted"
            self._release()

    def _require_open(self) -> None:
        if self._state != "open":
            raise BackendError(errno.EBADF, f"this writer is {self._state}: only abort may follow", self._new.path)

    def _release(self) -> None:
        # A descriptor closed under a thread that is writing may already belong to another file, so the last one out closes it.
        if self._state == "aborted" and not self._writing:
            self._new.close()
            self._backend._prune(self._above)
