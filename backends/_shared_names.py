"""Giving a file its name where answers lie: what became of a link or a rename is judged by looking, never by what the call returned.

A request that was sent twice is answered for the second time: a link that was made with EEXIST, a rename with ENOENT. Or the name is
there, and a cache does not know it yet. Inode numbers and the count of links tell, sooner or later.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from contextlib import suppress

from ckptstore.errors import AlreadyExists, Ambiguous, NoAtomicCreate
from ckptstore.posix import NO_LINKS, REFUSED, Folders, NewFile

__all__ = ["PAUSES", "found", "link", "rename"]

PAUSES = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each new look at what contradicts itself. JuiceFS keeps the old inode of a replaced file for 1 s, NFS looks at a folder
again when it is opened anew, which is what each look does."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def link(new: NewFile, folders_anew: Callable[[], Folders]) -> None:
    """Give a complete file its name, unless that is taken.

    Args:
        folders_anew: opens the file's folder again, for when what it was opened as is stale.

    Raises:
        AlreadyExists: it is the name of another file.
        NoAtomicCreate: there are no hard links here.
        Ambiguous: what can be seen does not tell.
        OSError: it did not happen, and will not.
    """
    error = _try_link(new)
    for pause in PAUSES:
        ours = _has_name(new)
        if ours:
            return
        if ours is not None:
            raise AlreadyExists(errno.EEXIST, "it exists already, and was left as it is", new.path) from error
        if error and error.errno in NO_LINKS:
            why = "this file system has no hard links, so two jobs could both believe that they committed"
            how = "add single_writer=1 to the URL if you make sure that only one job ever writes"
            raise NoAtomicCreate(error.errno, f"{why}; {how}", new.path) from error
        if error and error.errno in REFUSED and error.errno != errno.EEXIST:
            raise error
        time.sleep(pause)
        if error and error.errno == errno.ESTALE:  # it was the folder that we hold
            with suppress(OSError):  # then the next try tells
                folders, new.folders = new.folders, folders_anew()
                folders.close()
            error = _try_link(new)
    why = f"could not learn whether it was created ({error.strerror if error else 'it is not to be seen'}); look again later"
    raise Ambiguous(error.errno if error else errno.EIO, why, new.path) from error


def _try_link(new: NewFile) -> OSError | None:
    fd = new.folders.fd
    try:
        os.link(new.temp, new.name, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
    except OSError as exc:
        return exc
    return None


def _has_name(new: NewFile) -> bool | None:
    """Say whether the name is this file's (True) or another one's (False); None if it is not to be seen.

    Raises:
        Ambiguous: the file has two names, and the name has another file: inode numbers mean nothing here, or two writers won.
    """
    try:
        fd = os.open(".", _FOLDER, dir_fd=new.folders.fd)  # looked up anew, not as cached
        try:
            named, temp = found(new.name, fd), found(new.temp, fd)
        finally:
            os.close(fd)
    except OSError:
        return None
    if named and new.is_same(named):
        return True
    linked = temp is not None and temp.st_nlink > 1  # nobody but us has ever linked it
    if named and linked:
        raise Ambiguous(errno.EIO, "it has two names, but under its own there is another file", new.path)
    return False if named else True if linked else None


def rename(new: NewFile) -> None:
    """Give the file its name, in the place of what has it. Only the inode tells whether that was done.

    Raises:
        Ambiguous: it may come to be yet.
        OSError: it did not happen.
    """
    try:
        new.replace()
    except OSError as exc:
        named = None
        with suppress(OSError):
            named = found(new.name, new.folders.fd)
        if named and new.is_same(named):
            new.temp = ""
        elif exc.errno in REFUSED | {errno.ESTALE}:
            raise
        else:
            raise Ambiguous(exc.errno, f"could not learn whether it was replaced: {exc.strerror}", new.path) from exc


def found(name: str, dir_fd: int) -> os.stat_result | None:
    """Return what is under `name` in the open folder, None if nothing is to be seen."""
    with suppress(FileNotFoundError):
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    return None
