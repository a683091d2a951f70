"""A store in a folder, through system calls: what every POSIX file system has in common.

Nothing below the root is reached through a symbolic link: each folder is opened relative to the one above it with O_NOFOLLOW, so a
link planted in the store cannot make us read, write or delete elsewhere. The root itself may be a link.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import ClassVar, Generic, TypeVar

from .errors import BackendError, InvalidName, InvalidURL
from .posix import Folders, NewFile, close_read, fsync_dir, mapped_errors, nearest_existing, read_full, write_all, wrong_kind
from .protocol import ObjectInfo

__all__ = ["MOVED", "FolderBackend", "FolderWriter", "absolute", "segments"]

MOVED = "this is not the folder it was before: was it moved, or its disk unmounted? Open the store anew if this is meant"

# O_NONBLOCK: opening a FIFO that somebody planted must not wait for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def segments(key: str) -> list[str]:
    """Return the parts of a key. Raises `InvalidName` if it could lead out of the root."""
    parts = key.split("/")
    if any(s in ("", ".", "..") or "\0" in s for s in parts):
        raise InvalidName(f"{key!r:.200} is not a key: it must be a relative path without empty, '.' or '..' parts")
    return parts


def absolute(location: str) -> str:
    """Return the absolute path of a folder given relative to the current one; `~` is not expanded. Touches nothing below it.

    Raises:
        InvalidURL: an empty path, or one with a NUL.
    """
    if not location or "\0" in location:
        raise InvalidURL("the path of a store must not be empty or contain NUL")
    path = location
    if not os.path.isabs(path):  # else it does not matter whether there is a current folder still
        with mapped_errors("find the current folder for", location):
            path = os.path.join(os.getcwd(), location)
    # normpath would change what "link/.." means.
    return path if ".." in path.split("/") else os.path.normpath(path)


class FolderBackend:
    """One folder. Keeps no descriptor and no thread between calls, so it survives a fork. How to create, subclasses say."""

    options: ClassVar[Mapping[str, str]] = {}
    reading: ClassVar[str] = "read"
    """What messages call it; "read" also says that EIO means a broken disk, and not only a bad moment."""
    hidden: ClassVar[re.Pattern[str]] = re.compile("(?!)")
    """Names that are not listed; none here."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.url = root
        self._prefix = os.path.join(root, "")
        # Folders whose entry in the folder above is known to be on disk: (path, device, inode). A folder that was merely *found* is not
        # known to be: whoever made it may have been killed before the flush, or is about to flush it in another thread.
        self._settled: set[tuple[str, int, int]] = set()
        self._root_id: tuple[int, int] | None = None

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        with mapped_errors(self.reading, self._path(key), absent=True):
            fd, size = self._open_file(key)
            try:
                if size > limit:
                    raise BackendError(errno.EFBIG, f"{size} bytes long, more than the {limit} that belong here", self._path(key))
                buffer = bytearray(size)
                got = read_full(fd, 0, memoryview(buffer))
                return bytes(memoryview(buffer)[:got])
            finally:
                close_read(fd)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        end = offset + buffer.nbytes
        with mapped_errors(self.reading, self._path(key), absent=True):
            with self._opened(key, end) as (fd, size):
                got = read_full(fd, offset, buffer)
            if got < buffer.nbytes:
                raise BackendError(errno.EIO, f"ends at byte {min(offset + got, size)}, expected {end}", self._path(key))

    @contextmanager
    def _opened(self, key: str, end: int) -> Iterator[tuple[int, int]]:
        """Lend descriptor and size of a file that is read up to byte `end`."""
        fd, size = self._open_file(key)
        try:
            yield fd, size
        finally:
            close_read(fd)

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        *above, name = segments(key)
        with mapped_errors("look at", self._path(key), absent=True), self._folders(above) as folders:
            found = os.stat(name, dir_fd=folders.fd, follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise wrong_kind(self._path(key), found.st_mode)
        return ObjectInfo(key, found.st_size)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Links, FIFOs, sockets and devices are listed with size 0, so that `delete` can remove them, and so are
        empty folders, with a final ``/``."""
        above = segments(prefix[:-1]) if prefix else []
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
                    if self.hidden.fullmatch(entry.name):
                        continue
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
            *above, name = segments(key.removesuffix("/"))
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
        return self._prefix + key if key else self.root

    def _folders(self, segments: Sequence[str], *, create: bool = False) -> Folders:
        """Open the root and the folders `segments` below it. FileNotFoundError means that one is proven to be missing."""
        folders = Folders(self.root, self._open_root(create))
        try:
            self._check_root(folders, create)
            for segment in segments:
                if not create:
                    folders.descend(segment)
                elif folders.make(segment):
                    self._settled.discard(folders.identity(-1))
        except BaseException:
            folders.close()
            raise
        return folders

    def _check_root(self, folders: Folders, create: bool) -> None:
        """Refuse to go on in another folder than before: a disk unmounted under us leaves an empty one under the same name."""
        _, *root_id = folders.identity(0)
        if self._root_id is None:
            self._root_id = (root_id[0], root_id[1])
            self._first_look()
        elif self._root_id != (root_id[0], root_id[1]):
            raise BackendError(errno.ESTALE, MOVED, self.root)

    def _first_look(self) -> None:
        """Do what is to be done once the root is there."""

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
        *above, name = segments(key)
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
        *above, name = segments(key)
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
        # ismount says no as well where it cannot look: the top is the end all the same.
        while path != os.path.dirname(path) and not os.path.ismount(path):
            path = os.path.dirname(path)
            try:
                fsync_dir(path)
            except PermissionError:
                if os.access(path, os.W_OK):
                    raise
                return  # nor may we write to it, so nothing that is missing there was made by us


_B = TypeVar("_B", bound=FolderBackend)


class FolderWriter(Generic[_B]):
    """A `PartWriter` on a `NewFile`, but for `start_finish` and `finish`, which subclasses have.

    Raises whatever making the file does, as OSError.
    """

    def __init__(self, backend: _B, key: str) -> None:
        self._backend = backend
        self._new = backend._new_file(key)
        self._key = key
        self._lock = threading.Lock()
        self._state = "open"
        self._writing = 0

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        with self._lock:
            if self._state != "failed":  # parts in other threads say themselves what is wrong with the disk
                self._require_open()
            self._writing += 1
        try:
            with mapped_errors("write", self._new.path):
                self._write(offset, data)
        except BaseException:
            with self._lock:
                if self._state == "open":
                    self._state = "failed"
            raise
        finally:
            with self._lock:
                self._writing -= 1
                self._release()

    def _write(self, offset: int, data: memoryview) -> None:
        write_all(self._new.fd, offset, data)

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        with self._lock:
            if self._state == "started":
                self._withdraw()
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
            self._backend._prune(segments(self._key)[:-1])

    def _withdraw(self) -> None:
        """Take back what `start_finish` did."""
        self._new.withdraw()
