"""A folder on a file system that several hosts mount (NFS, Lustre, CephFS, GlusterFS, JuiceFS, …): ``shared:///absolute/path``.

It looks like a local disk and is not: a reply can be lost and the request sent again, so that a link that was made is answered with
EEXIST, or a rename with ENOENT; what one host has just created another one may not see for a while; an error of a write may come
with the flush or the close. So whether a name was given is judged by looking at what has that name, never by an answer, and what
cannot be seen is looked for again. No lock is used: a lock is not a fence.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

from ckptstore.backends import _shared_names
from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    InvalidOption,
    InvalidURL,
    NoAtomicCreate,
    NotFound,
)
from ckptstore.folder import MOVED, FolderBackend, FolderWriter, absolute, segments
from ckptstore.inorder import InOrder
from ckptstore.mounts import file_system, is_local, two_may_link, writes_past_cache
from ckptstore.openfile import LastOpened
from ckptstore.posix import (
    Folders,
    NewFile,
    mapped_errors,
    nearest_existing,
    start_writeback,
    write_all,
    write_past_cache,
)
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

__all__ = ["SharedBackend"]

_R = TypeVar("_R")

_SEEN = 1000
_LEAST_WRITE = 8 << 20
_MOST_WRITE = 1 << 30
_LOG = "log"  # a folder with it is a store
_HOW = "is its file system mounted? To begin a new store there, add create=1 to the URL"


class SharedBackend(FolderBackend):
    """One folder of a shared file system."""

    options: ClassVar[Mapping[str, str]] = {
        "create": "'1' begins a new store where there is none; without it, an empty mount point is refused",
        "write_size": "bytes per write, as in 32M (default: a multiple of the file system's block size, at least 8M)",
    }
    reading = "read over the network"
    # Removed files that somebody has open: an NFS client, or libfuse, gives them such a name, and removes them by itself.
    hidden = re.compile(r"\.(nfs|fuse_hidden)[0-9A-Fa-f]+")

    def __init__(self, root: str, *, create: bool = False, write_size: int | None = None) -> None:
        super().__init__(root)
        self._create = create
        self._write_size = write_size
        # Two parts at a time: while one is written the next is hashed.
        self.capabilities = Capabilities(
            atomic_create=True, durable=True, part_size=write_size or _LEAST_WRITE, parallel=2, probe=True
        )
        self._is_store = False
        self._last_read = LastOpened()
        self._kind: str | None = None  # of file system, once there is a store on it
        # Keys that were there. One that is missing now is looked for again: it is more likely that the cache is wrong.
        self._seen: dict[str, None] = {}

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> SharedBackend:
        """Make a backend for the folder at the absolute path `location`. Touches nothing.

        Raises:
            InvalidOption: unknown, or with a bad value.
            InvalidURL: not an absolute path.
        """
        for name in options:
            if name not in cls.options:
                raise InvalidOption(f"a shared folder takes no option {name!r}; it has: {', '.join(cls.options)}")
        if not location.startswith("/"):
            raise InvalidURL("a shared folder is named by its absolute path: shared:///mnt/lustre/run-42, with three slashes")
        create = options.get("create", "0").lower()
        if create not in ("0", "1", "false", "true"):
            raise InvalidOption(f"create must be 0 or 1, not {create!r:.100}")
        size = options.get("write_size")
        return cls(absolute(location), create=create in ("1", "true"), write_size=_size(size) if size else None)

    # --- creating

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`."""
        self._refuse_two_winners()
        with mapped_errors("create", self._path(key)), self._new_file(key) as new:
            write_all(new.fd, 0, memoryview(data))
            if ready:
                start_writeback(new.fd)
                ready()
            self._complete(new)
            try:
                self._link(new, key)
            except AlreadyExists:
                self._saw(key)
                raise
            self._saw(key)
            try:
                os.fsync(new.folders.fd)
            except OSError as exc:
                why = f"created, but the flush of its folder failed ({exc.strerror}), so it may be gone after a crash"
                raise Ambiguous(exc.errno, why, new.path, durable=False) from exc

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`. Not flushed, but closed: that is what tells other hosts of it."""
        pauses = iter(_shared_names.PAUSES)  # until its file can be made, and until that gets the name, together
        self._patiently(self._replace, key, data, pauses, pauses=pauses)

    def _replace(self, key: str, data: bytes, pauses: Iterator[float]) -> None:
        with mapped_errors("replace", self._path(key)), self._new_file(key, pauses) as new:
            write_all(new.fd, 0, memoryview(data))
            new.close_file()
            _shared_names.rename(new)

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        with mapped_errors("create", self._path(key)):
            return _SharedWriter(self, key)

    def _complete(self, new: NewFile) -> None:
        """Make all but the name durable. NFS tells of a full disk, or of a quota, as late as here."""
        os.fsync(new.fd)
        new.close_file()  # before the link: its error must count, and a file removed while open would stay as .nfs…
        self._settle(new.folders)

    def _publish(self, new: NewFile, key: str) -> None:
        """Give a data file its name. No two writers ever want the same, so that without hard links a rename does."""
        try:
            self._link(new, key)
        except NoAtomicCreate:
            if _shared_names.found(new.name, new.folders.fd):
                raise AlreadyExists(errno.EEXIST, "it exists already, and was left as it is", new.path) from None
            _shared_names.rename(new)
        os.fsync(new.folders.fd)

    def _link(self, new: NewFile, key: str) -> None:
        _shared_names.link(new, lambda: self._folders(segments(key)[:-1]))

    def _new_file(self, key: str, pauses: Iterable[float] | None = None) -> NewFile:
        for pause in _shared_names.PAUSES if pauses is None else pauses:
            try:
                return super()._new_file(key)
            except OSError as exc:
                # A folder that was just made, or removed, is not seen as it is yet; or a file was made, and its answer was lost.
                if isinstance(exc, CkptStoreError) or exc.errno not in (errno.ESTALE, errno.ENOENT, errno.EEXIST):
                    raise
            time.sleep(pause)
        return super()._new_file(key)

    # --- reading and removing

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        return self._patiently(super().get, key, limit, sure=True)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        self._patiently(super().read_into, key, offset, buffer, sure=True)

    @contextmanager
    def _opened(self, key: str, end: int) -> Iterator[tuple[int, int]]:
        with self._last_read.use(key, self._path(key), lambda: self._open_file(key), end) as found:
            yield found

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`. Nothing of the log is listed, where the next free slot is looked for; so an old slot may seem missing."""
        return self._patiently(super().stat, key, sure=segments(key)[0] != _LOG)

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        self._last_read.drop()  # a file removed while open would stay as .nfs…
        for key in keys:
            self._patiently(self._delete, key)
            self._seen.pop(key, None)

    def _delete(self, key: str) -> None:
        super().delete([key])

    def _scan(self, above: Sequence[str], start_after: str) -> Sequence[ObjectInfo]:
        return self._patiently(lambda _: super(SharedBackend, self)._scan(above, start_after), "")

    def _patiently(
        self, call: Callable[..., _R], key: str, *more: Any, sure: bool = False, pauses: Iterator[float] | None = None
    ) -> _R:
        """Return what ``call(key, *more)`` returns, tried again with the folders opened anew while what it says cannot be relied upon.

        A missing file is looked for twice, and longer if it was there before, or, to be `sure`, if it is listed, or a folder on the way.
        """
        looks = 0
        pauses = iter(_shared_names.PAUSES) if pauses is None else pauses
        while True:
            looks += 1
            try:
                result = call(key, *more)
            except NotFound:
                if looks > 1 and key not in self._seen and not (sure and self._lists(key)):
                    raise
                pause = next(pauses, None)
                if pause is None:
                    if self._lists(key):
                        why = "it is listed, but it, or what is in it, cannot be opened; look again later"
                        raise BackendError(errno.ESTALE, why, self._path(key)) from None
                    raise
            except BackendError as exc:
                # EBADF is what JuiceFS says of a file that was replaced elsewhere after we had opened it.
                pause = next(pauses, None) if exc.errno in (errno.ESTALE, errno.EBADF) else None
                if pause is None:
                    raise
            else:
                self._saw(key)
                return result
            time.sleep(pause)

    def _lists(self, key: str) -> bool:
        """Say whether `key` is listed, or the first folder on the way to it that cannot be opened."""
        *above, name = segments(key)
        with mapped_errors("list", self._path("/".join(above))), suppress(FileNotFoundError), self._folders(above) as folders:
            return name in os.listdir(folders.fd)
        return bool(above) and self._lists("/".join(above))

    def _saw(self, key: str) -> None:
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen[key] = None

    def close(self) -> None:
        """See `Backend.close`."""
        self._last_read.drop()

    # --- the root

    def _open_root(self, create: bool) -> int:
        try:
            return super()._open_root(False)
        except FileNotFoundError as exc:
            if os.path.lexists(self.root):
                raise OSError(errno.ESTALE, "it is there, but cannot be opened", self.root) from exc
            if not self._create:
                raise BackendError(errno.ENOENT, f"there is no such folder; {_HOW}", self.root) from exc
            if not create:
                raise
        self._refuse_local()
        return super()._open_root(True)

    def _check_root(self, folders: Folders, create: bool) -> None:
        """Refuse to begin a store that was not asked for, and to go on where it is no longer.

        A file system that was mounted again may have another device number, so that this alone means nothing.
        """
        _, *identity = folders.identity(0)
        root_id = (identity[0], identity[1])
        if self._root_id is None:
            self._size_writes(folders.fd)
        elif root_id != self._root_id and not _shared_names.found(_LOG, folders.fd):
            raise BackendError(errno.ESTALE, MOVED, self.root)
        if not self._is_store:
            found = _shared_names.found(_LOG, folders.fd)
            if not found and not self._create:
                raise BackendError(errno.ENOENT, f"there is no store in this folder; {_HOW}", self.root)
            if not found and create:
                self._refuse_local()
            self._is_store = create or found is not None
            self._kind = file_system(self.root) if self._is_store else None
        self._root_id = root_id

    def _refuse_local(self) -> None:
        kind = file_system(nearest_existing(self.root))
        if is_local(kind):
            why = f"this is on {kind}, a disk of this machine, and a new store was not begun; is the shared file system mounted?"
            how = f"Name a store on this disk file://{self.root}; if other hosts mount the disk, make the folder {self.root}/{_LOG} first"
            raise BackendError(errno.ENOENT, f"{why} {how}", self.root)

    def _refuse_two_winners(self) -> None:
        kind = self._file_system()
        if two_may_link(kind):
            why = f"on {kind} two hosts can both win a link(), so two jobs could both believe that they committed"
            how = "add single_writer=1 to the URL if you make sure that only one job ever writes"
            raise NoAtomicCreate(errno.EOPNOTSUPP, f"{why}; {how}", self.root)

    def _file_system(self) -> str | None:
        return self._kind if self._is_store else file_system(nearest_existing(self.root))  # it may be mounted yet

    def _size_writes(self, root_fd: int) -> None:
        """Write whole blocks, or stripes, of the file system, as it recommends them."""
        if not self._write_size:
            block = max(1, min(os.fstat(root_fd).st_blksize, _MOST_WRITE))
            self.capabilities = replace(self.capabilities, part_size=-(-_LEAST_WRITE // block) * block)


class _SharedWriter(FolderWriter[SharedBackend]):
    """See `PartWriter`. The file grows from its start to its end: clients gather such writes, and begin anew at any other."""

    def __init__(self, backend: SharedBackend, key: str) -> None:
        super().__init__(backend, key)
        self._in_order = InOrder(self._append)
        if writes_past_cache(backend._file_system()):
            write_past_cache(self._new.fd)

    def _write(self, offset: int, data: memoryview) -> None:
        self._in_order.write(offset, data)

    def _append(self, data: memoryview) -> None:
        write_all(self._new.fd, self._in_order.position, data)

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`."""
        start_writeback(self._new.fd)

    def finish(self) -> None:
        """See `PartWriter.finish`. A flush or a close that fails is final."""
        with self._lock:
            self._require_open()
            self._state = "failed"  # until proven otherwise
        new = self._new
        with mapped_errors("finish", new.path):
            try:
                self._in_order.close()
                self._backend._complete(new)
                self._backend._publish(new, self._key)
            except BaseException as exc:
                if not new.withdraw() and isinstance(exc, OSError):
                    why = f"could not be made durable ({exc.strerror}), nor be removed again; save once more"
                    raise Ambiguous(exc.errno, why, new.path, durable=False) from exc
                raise
        new.close()
        self._state = "done"  # not before: after an interrupt in between, `abort` would leave the file open


def _size(text: str) -> int:
    match = re.fullmatch("([1-9][0-9]{0,11})([KMG]?)", text)
    size = int(match[1]) << 10 * " KMG".index(match[2] or " ") if match else 0
    if not 1 << 20 <= size <= _MOST_WRITE:
        raise InvalidOption(f"write_size must be from 1M to 1G, as in 32M, not {text!r:.100}")
    return size
