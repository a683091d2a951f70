"""A file that is read piece by piece, by several threads, and opened once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["LastOpened"]


class _Open:
    """A descriptor that is closed when nobody refers to it any more."""

    def __init__(self, key: str, fd: int, size: int) -> None:
        self.key = key
        self.fd = fd
        self.size = size
        self._id = os.fstat(fd)

    def is_at(self, path: str) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.lstat(path), self._id)
        return False

    def __del__(self) -> None:
        with suppress(OSError):  # nothing was written through it
            os.close(self.fd)


class LastOpened:
    """Keeps the file that was read last, until it has been read to its end, or another one is read.

    A client of a shared file system that opens a file anew forgets what it has read ahead of it, and may ask its server again. No lock: of
    two threads that meet here, both open the file at worst.
    """

    def __init__(self) -> None:
        self._kept: _Open | None = None

    @contextmanager
    def use(self, key: str, path: str, open_file: Callable[[], tuple[int, int]], end: int) -> Iterator[tuple[int, int]]:
        """Lend descriptor and size of the file `key`, for reading up to byte `end`.

        Args:
            path: where it is; if that has become another file, so does `key`.
            open_file: opens it, and returns both.
        """
        file = self._kept
        if file is None or file.key != key or not file.is_at(path):
            file = self._kept = _Open(key, *open_file())
        try:
            yield file.fd, file.size
        except BaseException:
            self.drop()  # opening it anew may help
            raise
        if end >= file.size and self._kept is file:
            self.drop()

    def drop(self) -> None:
        """Keep nothing. Who reads it goes on."""
        self._kept = None
