"""The data path back: reads files in parallel, and checks every chunk before anybody sees a byte of it."""

from __future__ import annotations

import io
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

from .checksum import crc64nvme, sha256
from .errors import DamagedFile, NotFound, Unreadable
from .manifest import FileEntry
from .protocol import Backend, ObjectInfo
from .workers import Workers

__all__ = ["VerifiedFile", "check_size", "damaged_ranges", "read_file"]


def check_size(backend: Backend, key: str, entry: FileEntry) -> ObjectInfo:
    """Compare the stored size with the manifest's, so that nothing is allocated on the manifest's word alone; return what is stored.

    Raises:
        DamagedFile: missing, of another size, or no file at all.
    """
    try:
        found = backend.stat(key)
    except NotFound:
        raise DamagedFile(f"{key} is missing", entry.path, [(0, entry.size)]) from None
    except Unreadable as exc:
        raise DamagedFile(f"{key} cannot be read: {exc}", entry.path, [(0, entry.size)]) from exc
    if found.size != entry.size:
        low, high = sorted((found.size, entry.size))
        raise DamagedFile(f"{key} has {found.size} bytes instead of {entry.size}", entry.path, [(low, high)])
    return found


def _spans(entry: FileEntry) -> Iterator[tuple[int, int, int]]:
    """Yield where each chunk begins, its length, and its number."""
    offset = 0
    for number, (length, _) in enumerate(entry.chunks):
        yield offset, length, number
        offset += length


def read_chunk(backend: Backend, key: str, entry: FileEntry, offset: int, number: int, into: memoryview) -> None:
    """Fill `into` with chunk `number`, at `offset`, and check it.

    Raises:
        DamagedFile: it fails its checksum, the disk has lost it, or the file went missing.
    """
    span = (offset, offset + len(into))
    try:
        backend.read_into(key, offset, into)
    except NotFound:
        raise DamagedFile(f"{key} is missing", entry.path, [(0, entry.size)]) from None
    except Unreadable as exc:
        raise DamagedFile(f"{key} cannot be read in bytes {span[0]}–{span[1] - 1}: {exc}", entry.path, [span]) from exc
    if crc64nvme(into) != entry.chunks[number][1] or (entry.digests and sha256(into) != entry.digests[number]):
        raise DamagedFile(f"{key} fails its checksum in bytes {span[0]}–{span[1] - 1}", entry.path, [span])


def read_file(backend: Backend, key: str, entry: FileEntry, workers: Workers) -> memoryview:
    """Return the whole file in memory, every byte checked.

    Raises:
        DamagedFile
    """
    check_size(backend, key, entry)
    if not entry.size:
        return memoryview(bytearray())
    # Anonymous memory: page-aligned, and given back to the system as soon as the view is gone.
    whole = memoryview(mmap.mmap(-1, entry.size))

    def fetch(span: tuple[int, int, int]) -> None:
        offset, length, number = span
        read_chunk(backend, key, entry, offset, number, whole[offset : offset + length])

    if len(entry.chunks) == 1:
        fetch((0, entry.size, 0))
    else:
        for _ in workers.map(fetch, _spans(entry)):
            pass
    return whole


def damaged_ranges(
    backend: Backend, key: str, entry: FileEntry, workers: Workers, progress: Callable[[int], object] | None = None
) -> list[tuple[int, int]]:
    """Read the whole file in bounded memory and return the (start, stop) byte ranges that are not what was committed.

    A missing file is one range; bytes beyond the end are a range too. `progress` is called with the number of bytes just done.
    """
    try:
        size = backend.stat(key).size
    except (NotFound, Unreadable):
        return [(0, entry.size)]

    def examine(span: tuple[int, int, int]) -> list[tuple[int, int]]:
        offset, length, number = span
        if offset + length > size:
            return [(offset, offset + length)]
        try:
            read_chunk(backend, key, entry, offset, number, memoryview(bytearray(length)))
        except DamagedFile:
            return [(offset, offset + length)]
        return []

    bad: list[tuple[int, int]] = []
    for span, found in zip(_spans(entry), workers.map(examine, _spans(entry)), strict=True):
        bad += found
        if progress is not None:
            progress(span[1])
    if size > entry.size:
        bad.append((entry.size, size))
    return _merged(bad)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


class VerifiedFile(io.RawIOBase):
    """A read-only, seekable file object over one stored file. Only checked bytes come out; holds one chunk in memory."""

    def __init__(self, backend: Backend, key: str, entry: FileEntry, check_kept: Callable[[], object] = lambda: None) -> None:
        check_size(backend, key, entry)
        self._source = (backend, key, entry)
        self._check_kept = check_kept
        self._starts = [offset for offset, _, _ in _spans(entry)]
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
        """Fill `buffer` as far as one chunk reaches. Raises `DamagedFile` instead of returning bytes that fail their checksum."""
        backend, key, entry = self._source
        view = memoryview(buffer).cast("B")
        if self._position >= entry.size or not view:
            return 0
        start, chunk = self._chunk
        if not start <= self._position < start + len(chunk):
            index = bisect_right(self._starts, self._position) - 1
            start, (length, _) = self._starts[index], entry.chunks[index]
            chunk = memoryview(bytearray(length))
            try:
                read_chunk(backend, key, entry, start, index, chunk)
            except DamagedFile:
                self._check_kept()  # pruned meanwhile is no damage
                raise
            self._chunk = (start, chunk)
        piece = chunk[self._position - start :][: len(view)]
        view[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
