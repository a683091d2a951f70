"""The system calls of the library, gone wrong as those of a shared file system do: the answer lies, or comes late, or is old."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["SickOS", "error_after", "error_before", "half", "hide_new_names", "old_listing", "silly_rename"]

Call = Callable[..., Any]
Trouble = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Gets a system call and its arguments, and does something else."""

CALLS = [
    "close",
    "fsync",
    "link",
    "listdir",
    "lstat",
    "mkdir",
    "open",
    "preadv",
    "pwrite",
    "replace",
    "rmdir",
    "scandir",
    "stat",
    "unlink",
]
_real = {name: getattr(os, name) for name in CALLS}


def error_before(number: int) -> Trouble:
    """The call fails and does nothing; but a descriptor is gone, whatever close() says (close(2))."""

    def trouble(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call is _real["close"]:
            call(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    return trouble


def error_after(number: int) -> Trouble:
    """The call succeeds and says that it failed."""

    def trouble(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call(*args, **kwargs)
        raise OSError(number, os.strerror(number))

    return trouble


def half(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write or read one byte of what was asked for."""
    fd, data, offset = args
    return call(fd, data[:1] if isinstance(data, memoryview) else [data[0][:1]], offset)


def silly_rename(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Remove a file as an NFS client does that has it open."""
    fd = kwargs["dir_fd"]
    if _real["stat"](args[0], dir_fd=fd, follow_symlinks=False).st_nlink > 1:
        return call(*args, **kwargs)
    return os.rename(args[0], f".nfs{secrets.token_hex(12)}", src_dir_fd=fd, dst_dir_fd=fd)


class _OldEntry:
    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.name = entry.name
        self._folder, self._stat = entry.is_dir(follow_symlinks=False), entry.stat(follow_symlinks=False)

    def is_dir(self, *, follow_symlinks: bool) -> bool:
        return self._folder

    def stat(self, *, follow_symlinks: bool) -> os.stat_result:
        return self._stat


def old_listing(root: str) -> Trouble:
    """Listings show what was there when this was called, and nothing else."""
    before: dict[int, list[_OldEntry]] = {}
    for folder, _, _ in os.walk(root):
        with os.scandir(folder) as entries:
            before[os.stat(folder).st_ino] = [_OldEntry(e) for e in entries]

    def trouble(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entries = before.get(os.fstat(args[0]).st_ino, [])
        if call is _real["listdir"]:
            return [e.name for e in entries]

        @contextmanager
        def listing() -> Iterator[Iterator[_OldEntry]]:
            yield iter(entries)

        return listing()

    return trouble


def hide_new_names(root: str, looks: int) -> Trouble:
    """What was not there when this was called is not seen for the first `looks` looks, unless it was made here."""
    known = {os.path.join(folder, name) for folder, folders, files in os.walk(root) for name in [*folders, *files]}
    seen: Counter[str] = Counter()

    def trouble(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fd = kwargs.get("dst_dir_fd", kwargs.get("dir_fd"))
        name = args[1] if call is _real["link"] else args[0]
        path = name if fd is None else os.path.join(os.readlink(f"/proc/self/fd/{fd}"), name)
        looked_for = call in (_real["stat"], _real["lstat"], _real["open"]) and not name.endswith((".partial", "."))
        if looked_for and path.startswith(root + "/") and path not in known:
            seen[path] += 1
            if seen[path] <= looks:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        result = call(*args, **kwargs)
        known.add(path)
        return result

    return trouble


class SickOS:
    """Stands between the library and `os`. `decide` says for each call what becomes of it; None: nothing special.

    Flushes are not passed on: what is tested here is what is said about them.
    """

    def __init__(self) -> None:
        self.decide: Callable[[str, int], Trouble | None] = lambda name, nth: None
        self.seen: Counter[str] = Counter()

    def start(self, decide: Callable[[str, int], Trouble | None]) -> None:
        """Count from one again, and let `decide` decide from a call's name and number."""
        self.seen.clear()
        self.decide = decide

    def heal(self) -> None:
        """Let everything pass."""
        self.decide = lambda name, nth: None

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        real = _real[name]
        if not sys._getframe(2).f_globals["__name__"].startswith("ckptstore."):
            return real(*args, **kwargs)
        self.seen[name] += 1
        trouble = self.decide(name, self.seen[name])
        if name == "fsync":
            real = _no_flush
        return trouble(real, args, kwargs) if trouble else real(*args, **kwargs)

    @contextmanager
    def installed(self) -> Iterator[SickOS]:
        """Put it in the place of `os` for the length of the block."""
        with mock.patch.multiple(os, **{name: self._stand_in(name) for name in CALLS}):
            yield self

    def _stand_in(self, name: str) -> Call:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return self._run(name, *args, **kwargs)

        return stand_in


def _no_flush(fd: int) -> None:
    pass
