"""A stored file as a file object, of which only checked bytes come out."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

from .manifest import FileEntry
from .protocol import Backend
from .reading import Chunks, Pass, check_size

__all__ = ["VerifiedFile"]


class VerifiedFile(io.RawIOBase):
    """A read-only, seekable file object over one stored file. Only checked bytes come out; holds one span of chunks in memory."""

    def __init__(self, backend: Backend, key: str, entry: FileEntry, check_kept: Callable[[], object] = lambda: None) -> None:
        check_size(backend, key, entry)
        self._source = (backend, key, entry)
        self._check_kept = check_kept
        self._chunks = Chunks(entry, key)
        self._position = 0
        self._chunk = (0, memoryview(b""))  # (offset, its bytes)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source[2].size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer` as far as one span reaches. Raises `DamagedFile` instead of returning bytes that fail their checksum."""
        backend, key, entry = self._source
        view = memoryview(buffer).cast("B")
        if self._position >= entry.size or not view:
            return 0
        start, chunk = self._chunk
        if not start <= self._position < start + len(chunk):
            number = self._chunks.of(self._position, self._position + 1)[0]
            ahead = range(number, len(entry.chunks))
            span = next(self._chunks.spans(ahead, backend.capabilities.part_size))
            start, chunk = span[0], memoryview(bytearray(span[1] - span[0]))
            bad = Pass(self._chunks, partial(backend.read_into, key), len(chunk), [(start, chunk)])(span)
            for damage in bad:
                low, high = damage.ranges[0]
                if low <= self._position < high:
                    self._check_kept()  # pruned meanwhile is no damage
                    raise damage
            if bad:
                chunk = chunk[: bad[0].ranges[0][0] - start]  # what is whole comes out first
            self._chunk = (start, chunk)
        piece = chunk[self._position - start :][: len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
