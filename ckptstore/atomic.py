"""`atomic_torch_save`: `torch.save` to a path, but a crash leaves either the old file or the new one. Needs no store."""

from __future__ import annotations

import errno
import io
import os
import stat
from typing import IO, Any, cast

from .errors import Ambiguous, NotFound, UsageError
from .posix import Folders, NewFile, mapped_errors, write_all
from .snapshot import refuse_parts

__all__ = ["atomic_torch_save"]


def atomic_torch_save(obj: object, path: str | os.PathLike[str], **torch_save_kwargs: Any) -> None:
    """Do what ``torch.save(obj, path)`` does, atomically and durably.

    On return the new file survives a power cut. On any error the old file is as it was; errors of `obj` itself pass through unchanged.
    The new file is written beside the old one (never in ``$TMPDIR``, which may be on another disk), so there must be room for both.
    An existing file's permission bits are kept. If `path` is a symbolic link, the file it points to is replaced.

    Raises:
        UsageError: `path` is not a path, or is something other than a regular file.
        NotSerializable: there is a DTensor in `obj` of which this process has only a part.
        NotFound: its folder does not exist.
        StorageFull, PermissionDenied, BackendError: the disk would not take it.
        Ambiguous: the new file is in place, but its folder could not be flushed: a power cut may bring the old one back.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(path := os.fspath(path), str) or not path or "\0" in path:
        raise UsageError("atomic_torch_save needs a path (str or os.PathLike); give the path, or use torch.save for an open file")
    refuse_parts(obj)
    with mapped_errors("save", path):
        new, mode = _open_beside(os.path.realpath(path), path)
    with new:
        _torch_save(obj, new.fd, path, torch_save_kwargs)
        with mapped_errors("save", path):
            if mode is not None and mode != stat.S_IMODE(os.fstat(new.fd).st_mode):
                os.fchmod(new.fd, mode)
            os.fsync(new.fd)
            new.close_file()
            new.replace()
            try:
                os.fsync(new.folders.fd)
            except OSError as exc:
                why = f"saved, but the flush of its folder failed ({exc.strerror}): a power cut may bring the old file back; save again"
                raise Ambiguous(exc.errno, why, path, durable=False) from exc


def _open_beside(target: str, path: str) -> tuple[NewFile, int | None]:
    """Begin a new file beside `target`; return it and the permission bits of the file that is there, if one is."""
    folder, name = os.path.split(target)
    try:
        found = os.lstat(target)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise NotFound(errno.ENOENT, "this folder does not exist; create it first", folder) from None
        mode = None
    else:
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is a folder, a device or a loop of links; give the path of a file")
        mode = stat.S_IMODE(found.st_mode)
    if path.endswith("/"):
        raise UsageError(f"{path} names a folder; give the path of a file")
    folders = Folders(folder, os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    try:
        # Never wider than the old file's mode, not even for a moment: it may be private.
        return NewFile(folders, name, path, 0o666 if mode is None else mode & 0o777), mode
    except BaseException:
        folders.close()
        raise


def _torch_save(obj: object, fd: int, path: str, kwargs: dict[str, Any]) -> None:
    import torch  # 2 s: not before the call is known to make sense

    sink = _Sink(fd)
    try:
        torch.save(obj, cast("IO[bytes]", sink), **kwargs)
    except Exception as exc:
        if sink.error is None:
            raise
        # torch turns "disk full" and Ctrl-C alike into "RuntimeError: unexpected pos 704 vs 598".
        with mapped_errors("write", path):
            raise sink.error from exc


class _Sink(io.RawIOBase):
    """Writes all of what it is given, and remembers the error that stopped it.

    It has no `fileno`, so that torch's legacy format comes through `write` too.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0
        self.error: BaseException | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        view = memoryview(data)
        try:
            write_all(self._fd, self._end, view)
        except BaseException as exc:
            self.error = self.error or exc
            raise
        self._end += view.nbytes
        return view.nbytes
