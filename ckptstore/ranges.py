"""Reading parts of a file: only the chunks that they touch, and every one checked."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from .errors import DamagedFile
from .manifest import FileEntry
from .protocol import Backend
from .reading import check_size, read_chunk
from .workers import Workers

__all__ = ["read_ranges"]

_TOGETHER = 1 << 26
"""Bytes of a file that are read together, of which several parts may be wanted."""


def read_ranges(
    backend: Backend, key: str, entry: FileEntry, workers: Workers, ranges: Iterable[tuple[int, int]]
) -> Iterator[memoryview]:
    """Yield the bytes of each (offset, length) of `ranges`, which are in ascending order and do not overlap, every one checked.

    Several chunks are read at a time, in memory of about the longest range or `_TOGETHER`, whichever is more.

    Raises:
        DamagedFile: also if a range reaches beyond the file's end, or into the one before.
    """
    check_size(backend, key, entry)
    starts = [0, *accumulate(length for length, _ in entry.chunks)]

    for batch in _batches(ranges, entry, starts):
        first, last = _chunk_at(starts, batch[0][0]), _chunk_at(starts, sum(batch[-1]) - 1)
        base = starts[first]
        whole = memoryview(mmap.mmap(-1, starts[last + 1] - base))

        def fetch(number: int, base: int = base, whole: memoryview = whole) -> None:
            read_chunk(backend, key, entry, starts[number], number, whole[starts[number] - base : starts[number + 1] - base])

        if first == last:
            fetch(first)
        else:
            for _ in workers.map(fetch, range(first, last + 1)):
                pass
        for offset, length in batch:
            yield whole[offset - base : offset - base + length]


def _chunk_at(starts: list[int], offset: int) -> int:
    return bisect_right(starts, offset) - 1


def _batches(ranges: Iterable[tuple[int, int]], entry: FileEntry, starts: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Group ranges whose chunks are the same, or next to each other, and are not too many to hold."""
    batch: list[tuple[int, int]] = []
    end = 0
    for offset, length in ranges:
        if offset < end or length <= 0 or offset + length > entry.size:
            why = f"{entry.path} has no part of its own of {length} bytes at {offset}"
            raise DamagedFile(why, entry.path, [(offset, offset + length)])
        if batch:
            apart = _chunk_at(starts, offset) > _chunk_at(starts, end - 1) + 1
            if apart or offset + length - batch[0][0] > _TOGETHER:
                yield batch
                batch = []
        batch.append((offset, length))
        end = offset + length
    if batch:
        yield batch
