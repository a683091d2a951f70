"""Small durable steps on a POSIX file system, and its errors as ours."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
import threading
from contextlib import suppress
from types import TracebackType

from .errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    CkptStoreError,
    NoAtomicCreate,
    NotFound,
    PermissionDenied,
    StorageFull,
    Unreadable,
)

__all__ = [
    "NO_LINKS",
    "PARTIAL",
    "REFUSED",
    "Folders",
    "NewFile",
    "close_read",
    "create_temp",
    "fsync_dir",
    "link_new",
    "mapped_errors",
    "nearest_existing",
    "read_full",
    "start_writeback",
    "typed_error",
    "write_all",
    "write_past_cache",
    "wrong_kind",
]

PARTIAL = ".partial"
"""Names of unfinished files end in this; no finished file's name does."""

_FULL = "free space, inodes or quota there, or use another disk, and try again"
_HINTS: dict[int, tuple[type[BackendError], str]] = {
    errno.ENOSPC: (StorageFull, _FULL),
    errno.EDQUOT: (StorageFull, _FULL),
    errno.EFBIG: (
        StorageFull,
        "the file is larger than the file system or 'ulimit -f' allows; raise the limit or save smaller files",
    ),
    errno.EACCES: (PermissionDenied, "give this user the right to it, or use another folder"),
    errno.EPERM: (PermissionDenied, "give this user the right to it (see also lsattr), or use another folder"),
    errno.EROFS: (PermissionDenied, "the file system is mounted read-only; remount it, or use another one"),
    errno.EMFILE: (BackendError, "raise the limit with 'ulimit -n', or close files"),
    errno.ENOTCONN: (BackendError, "the file system's client has ended: mount it again"),
    errno.ESTALE: (
        BackendError,
        "the file system's server does not know the folder any more: is it still exported? Mount it again",
    ),
    errno.EIO: (BackendError, "the disk failed: look at the kernel's log, and use another disk"),
}
_DEFAULT_HINT = (BackendError, "check the folder and try again")

REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EBADF,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENAMETOOLONG,
    }
    | {errno.ENOENT, errno.ENOSPC, errno.ENOSYS, errno.ENOTDIR, errno.EOPNOTSUPP, errno.EPERM, errno.EROFS, errno.EXDEV}
)
"""errno values with which link() and rename() refuse before they change anything. Any other may come after the fact."""
NO_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""errno values with which link() says that the file system has none."""
_RENAME_NOREPLACE = 1  # <linux/fs.h>
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def typed_error(exc: OSError, doing: str, path: str | None = None, *, absent: bool = False) -> CkptStoreError:
    """Return our error for `exc`, met while `doing` something ("write") to `path`. See `mapped_errors`."""
    path = path or exc.filename or ""
    if absent and exc.errno == errno.ENOENT:
        return NotFound(exc.errno, "there is no such file", path)
    if doing == "read" and exc.errno == errno.EIO:
        return Unreadable(exc.errno, "the disk can no longer read this: look at the kernel's log, and use another disk", path)
    kind, hint = _HINTS.get(exc.errno or 0, _DEFAULT_HINT)
    return kind(exc.errno or errno.EIO, f"could not {doing}: {exc.strerror or exc}; {hint}", path)


class mapped_errors:
    """Turn any OSError of the block into ours, with errno kept, `path` (else the error's own) as its filename, and the original as cause.

    With `absent`, ENOENT means that the file itself is proven not to be there.

    Raises:
        StorageFull: ENOSPC, EDQUOT, EFBIG.
        PermissionDenied: EACCES, EPERM, EROFS.
        Unreadable: EIO while doing "read".
        NotFound: ENOENT, if `absent`.
        BackendError: everything else.
    """

    def __init__(self, doing: str, path: str | None = None, *, absent: bool = False) -> None:
        self._doing, self._path, self._absent = doing, path, absent

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(exc, OSError) and not isinstance(exc, CkptStoreError):
            raise typed_error(exc, self._doing, self._path, absent=self._absent) from exc


def wrong_kind(path: str, mode: int) -> Unreadable:
    """Return the error for an entry whose `st_mode` is not of the kind that belongs at `path`."""
    if stat.S_ISLNK(mode):
        return Unreadable(errno.ELOOP, "this is a symbolic link, and links inside a store are never followed; remove it", path)
    if stat.S_ISDIR(mode):
        return Unreadable(errno.EISDIR, "this is a folder where a file should be; move it away", path)
    if stat.S_ISREG(mode):
        return Unreadable(errno.ENOTDIR, "this is a file, not a folder; move it away or use another path", path)
    return Unreadable(errno.EINVAL, "this is a FIFO, a socket or a device; remove it", path)


def nearest_existing(path: str) -> str:
    """Return `path`, or the nearest folder above it that has an entry (which may be a dangling link)."""
    while not os.path.lexists(path) and (above := os.path.dirname(path)) != path:
        path = above
    return path


def write_all(fd: int, offset: int, view: memoryview) -> None:
    """Write all of `view` (C-contiguous, any format) at byte `offset`. Python itself repeats calls that a signal interrupted (PEP 475)."""
    if not view.nbytes:
        return
    view = view.cast("B")
    while view.nbytes:
        written = os.pwrite(fd, view, offset)  # Linux moves at most 0x7ffff000 bytes per call
        if not written:
            raise OSError(errno.EIO, "write accepted no bytes")
        view = view[written:]
        offset += written


def read_full(fd: int, offset: int, view: memoryview) -> int:
    """Fill `view` (C-contiguous, any format) from byte `offset`; return the bytes read, fewer only at the end of the file."""
    if not view.nbytes:
        return 0
    view = view.cast("B")
    done = 0
    while done < view.nbytes and (got := os.preadv(fd, [view[done:]], offset + done)):
        done += got
    return done


def close_read(fd: int) -> None:
    """Close what was only read from: an error that comes with that says nothing about what was read."""
    with suppress(OSError):
        os.close(fd)


def start_writeback(fd: int, end: int = 0) -> None:
    """Send the data of a file, up to byte `end` if one is given, on their way to the disk, without waiting for them to arrive.

    Only a hint: what goes wrong, the flush tells.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(end), _SYNC_FILE_RANGE_WRITE)


def write_past_cache(fd: int) -> None:
    """Have the kernel hand what is written to this file on from the caller's memory, without a copy in its cache. Only a hint."""
    if hasattr(os, "O_DIRECT"):  # not everywhere
        with suppress(OSError):  # EINVAL: not on this file system
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)


def fsync_dir(path: str) -> None:
    """Flush the entries of the folder `path` to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def create_temp(name: str, dir_fd: int, mode: int = 0o666) -> tuple[str, int]:
    """Create an empty file beside `name` in the open folder; return its name and descriptor. `mode` is subject to the umask."""
    # The final name is there for people who look; it is cut so that the whole stays below 255 bytes.
    temp = f"{os.fsdecode(os.fsencode(name)[:200])}.{secrets.token_hex(8)}{PARTIAL}"
    return temp, os.open(temp, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, mode, dir_fd=dir_fd)


def link_new(temp: str, name: str, dir_fd: int, path: str) -> None:
    """Give the file `temp` the name `name` in the same open folder, unless that is taken. Not durable before the folder is flushed.

    `temp` may or may not be there afterwards. `path` is for messages.

    Raises:
        AlreadyExists: `name` is taken.
        NoAtomicCreate: the file system has neither hard links nor a rename that never replaces.
        Ambiguous: the answer leaves open whether it happened.
        OSError: it did not happen.
    """
    try:
        try:
            os.link(temp, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except OSError as exc:
            if exc.errno not in NO_LINKS:
                raise
            _rename_new(temp, name, dir_fd, path)
    except FileExistsError as exc:
        raise AlreadyExists(errno.EEXIST, "it exists already, and was left as it is", path) from exc
    except OSError as exc:
        if exc.errno in REFUSED or isinstance(exc, CkptStoreError):
            raise
        # durable=False: should it turn out to be there, nobody has flushed the folder.
        why = f"could not learn whether it was created: {exc.strerror}; look again later"
        raise Ambiguous(exc.errno, why, path, durable=False) from exc


def _rename_new(temp: str, name: str, dir_fd: int, path: str) -> None:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # Linux; glibc 2.28, musl 1.2.6
    except AttributeError:
        code = errno.ENOSYS
    else:
        if renameat2(dir_fd, os.fsencode(temp), dir_fd, os.fsencode(name), _RENAME_NOREPLACE) == 0:
            return
        code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        why = "this file system has neither hard links nor a rename that never replaces, so two jobs could both believe they committed"
        raise NoAtomicCreate(code, f"{why}; put the store on another file system", path)
    raise OSError(code, os.strerror(code), name)


def _join(folder: str, name: str) -> str:
    return f"{folder}{name}" if folder.endswith("/") else f"{folder}/{name}"  # os.path.join looks at more


class Folders:
    """Open folders from a root down to the one that holds a key, each opened relative to the one above and never through a link."""

    def __init__(self, root: str, root_fd: int) -> None:
        self.paths = [root]
        self.fds = [root_fd]
        self._identities: dict[int, tuple[str, int, int]] = {}  # by descriptor
        self._users = 1
        self._lock = threading.Lock()

    @property
    def fd(self) -> int:
        """The innermost folder."""
        return self.fds[-1]

    def descend(self, name: str) -> None:
        """Go into folder `name` of the innermost one, and let go of the ones above. Raises FileNotFoundError if it is not there."""
        fd = self._open(name)
        self._close()
        self.fds.append(fd)
        self.paths[:] = [_join(self.paths[-1], name)]

    def make(self, name: str) -> bool:
        """Go into folder `name` of the innermost one, making it if need be; return True if it was made. Those above stay open."""
        made = False
        try:
            fd = self._open(name)
        except FileNotFoundError:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.fd)
                made = True
            fd = self._open(name)
        self.fds.append(fd)
        self.paths.append(_join(self.paths[-1], name))
        return made

    def identity(self, i: int) -> tuple[str, int, int]:
        """Return what tells open folder number `i` from any other: its path, device and inode."""
        fd = self.fds[i]
        if fd not in self._identities:
            found = os.fstat(fd)
            self._identities[fd] = self.paths[i], found.st_dev, found.st_ino
        return self._identities[fd]

    def _open(self, name: str) -> int:
        try:
            return os.open(name, _FOLDER, dir_fd=self.fd)
        except OSError as exc:
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                mode = os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_mode
                raise wrong_kind(_join(self.paths[-1], name), mode) from exc
            raise

    def share(self) -> bool:
        """Say whether they are still open; if so, they stay so until `close` has been called once more."""
        with self._lock:
            self._users += 1 if self._users else 0
            return bool(self._users)

    def close(self) -> None:
        """Let go of them, once for each that has them."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self._close()

    def _close(self) -> None:
        self._identities.clear()
        while self.fds:
            with suppress(OSError):  # nothing was written through it
                os.close(self.fds.pop())

    def __enter__(self) -> Folders:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class NewFile:
    """An unfinished file under a temporary name in the folder where it belongs."""

    def __init__(self, folders: Folders, name: str, path: str, mode: int = 0o666) -> None:
        self.folders = folders
        self.name = name
        self.path = path
        self.temp, self.fd = create_temp(name, folders.fd, mode)
        self._id = os.fstat(self.fd)
        self._closed = False

    def publish(self) -> None:
        """Give it its final name, which must be free. Raises as `link_new`."""
        link_new(self.temp, self.name, self.folders.fd, self.path)
        self._drop_temp()

    def replace(self) -> None:
        """Give it its final name, in the place of what has that name now."""
        os.replace(self.temp, self.name, src_dir_fd=self.folders.fd, dst_dir_fd=self.folders.fd)
        self.temp = ""

    def withdraw(self) -> bool:
        """Take the final name away again if it is ours; return False if that cannot be done."""
        if self._closed:  # an interrupted block may end when it is dropped
            return True
        try:
            if self.is_same(os.stat(self.name, dir_fd=self.folders.fd, follow_symlinks=False)):
                os.unlink(self.name, dir_fd=self.folders.fd)
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def is_same(self, found: os.stat_result) -> bool:
        """Say whether `found` is this file, under whatever name."""
        return os.path.samestat(self._id, found)

    def close_file(self) -> None:
        """Close the descriptor; a late write error may surface here (EIO, EDQUOT)."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _drop_temp(self) -> None:
        if self.temp:
            with suppress(OSError):  # what stays is litter for the garbage collection, never a reason to fail
                os.unlink(self.temp, dir_fd=self.folders.fd)
                self.temp = ""

    def close(self) -> None:
        """Remove the temporary name and release every descriptor. Idempotent; never raises for what the disk does."""
        if self._closed:
            return
        self._closed = True
        with suppress(OSError):
            self.close_file()
        self._drop_temp()
        self.folders.close()

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
