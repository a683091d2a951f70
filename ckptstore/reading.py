"""The data path back: reads files in parallel, and checks every chunk before anybody sees a byte of it."""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial

from .checksum import crc64nvme, digest_of, new_digest
from .errors import DamagedFile, NotFound, Unreadable
from .manifest import FileEntry
from .pages import NewMemory
from .protocol import Backend, LocalFiles, ObjectInfo
from .workers import Workers

__all__ = ["Chunks", "Pass", "Piece", "StoredFile", "check_size", "damaged_ranges", "opened", "read_chunk"]

Piece = tuple[int, memoryview]
"""The first byte of a part of a file, and the memory that it is to be read into."""

_BLOCK = 1 << 20
"""Bytes that are read at a time where that costs no request: what was read is then still in the processor's cache."""
Span = tuple[int, int, int, int]  # first byte, byte after the last, number of the first chunk, number after the last
_ReadInto = Callable[[int, memoryview], None]


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


class StoredFile:
    """One stored file. What comes out of it was checked, chunk by chunk; neighbouring chunks are read together.

    Args:
        key: where the file is.

    Raises:
        DamagedFile: it is missing, or of another size.
    """

    def __init__(self, backend: Backend, key: str, entry: FileEntry, workers: Workers) -> None:
        check_size(backend, key, entry)
        self.backend = backend
        self.key = key
        self.entry = entry
        self._workers = workers
        self._chunks = Chunks(entry, key)
        self._kept: dict[int, memoryview] = {}  # number of a chunk -> its bytes

    def read(self, offset: int, length: int) -> memoryview:
        """Return some bytes, which lie inside the file. Their chunks are kept; of a small file behind a network, all there are.

        Raises:
            DamagedFile
        """
        if not length:
            return memoryview(b"")
        numbers = self._chunks.of(offset, offset + length)
        storage = self.backend.capabilities
        small = storage.remote and self.entry.size <= storage.part_size  # one request
        missing = [n for n in (range(len(self.entry.chunks)) if small else numbers) if n not in self._kept]
        for n in missing:
            self._kept[n] = memoryview(bytearray(self.entry.chunks[n][0]))
        try:
            self._pass([(self._chunks.starts[n], self._kept[n]) for n in missing], missing)
        except BaseException:
            for n in missing:
                del self._kept[n]
            raise
        at = offset - self._chunks.starts[numbers[0]]
        if len(numbers) == 1:
            return self._kept[numbers[0]][at : at + length]
        return memoryview(b"".join(self._kept[n] for n in numbers))[at : at + length]

    def fill(self, pieces: Iterable[Piece], *, all_chunks: bool = True) -> None:
        """Read into all `pieces`, which lie inside the file and do not overlap. What is in them is only good if this returns.

        Args:
            all_chunks: check the whole file, not only the chunks that the pieces are in.

        Raises:
            DamagedFile
        """
        targets = sorted((p for p in pieces if len(p[1])), key=lambda piece: piece[0])
        numbers: Iterable[int] = range(len(self.entry.chunks))
        if not all_chunks:
            numbers = sorted({n for offset, view in targets for n in self._chunks.of(offset, offset + len(view))})
        offsets = [offset for offset, _ in targets]
        missing = []
        for n in numbers:
            if n in self._kept:
                start = self._chunks.starts[n]
                scatter(start, self._kept[n], targets[overlapping(offsets, start, start + self.entry.chunks[n][0])])
            else:
                missing.append(n)
        self._pass(targets, missing)

    def _pass(self, targets: list[Piece], numbers: Iterable[int]) -> None:
        with opened(self.backend, self.key) as (read_into, block), NewMemory(view for _, view in targets) as new:
            one = Pass(self._chunks, read_into, block, targets, new)
            jobs = list(_jobs(self._chunks.spans(numbers, block), self.backend.capabilities.part_size))

            def several(spans: list[Span]) -> None:
                for span in spans:
                    if damage := one(span):
                        raise damage[0]

            for _ in self._workers.map(several, jobs) if len(jobs) > 1 else map(several, jobs):
                pass

    def whole(self) -> memoryview:
        """Return all of it in memory.

        Raises:
            DamagedFile
        """
        if not self.entry.size:
            return memoryview(bytearray())
        # Anonymous memory: page-aligned, and given back to the system as soon as the view is gone.
        view = memoryview(mmap.mmap(-1, self.entry.size))
        self.fill([(0, view)])
        return view


def _jobs(spans: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """Group spans up to `limit` bytes together: to hand one over to another thread costs as much as to read a small one."""
    job: list[Span] = []
    total = 0
    for span in spans:
        if job and total + span[1] - span[0] > limit:
            yield job
            job, total = [], 0
        job.append(span)
        total += span[1] - span[0]
    if job:
        yield job


class Chunks:
    """Where the chunks of a file are."""

    def __init__(self, entry: FileEntry, key: str) -> None:
        self.entry = entry
        self.key = key
        self.starts: list[int] = []
        offset = 0
        for length, _ in entry.chunks:
            self.starts.append(offset)
            offset += length

    def of(self, start: int, stop: int) -> range:
        """Return the numbers of the chunks that some bytes, at least one, are in."""
        return range(bisect_right(self.starts, start) - 1, bisect_right(self.starts, stop - 1))

    def spans(self, numbers: Iterable[int], limit: int) -> Iterator[Span]:
        """Yield the chunks of these ascending numbers, neighbours together up to `limit` bytes."""
        span: Span | None = None
        for n in numbers:
            start, stop = self.starts[n], self.starts[n] + self.entry.chunks[n][0]
            if span is not None and span[3] == n and stop - span[0] <= limit:
                span = (span[0], stop, span[2], n + 1)
                continue
            if span is not None:
                yield span
            span = (start, stop, n, n + 1)
        if span is not None:
            yield span

    def compare(self, number: int, crc: int, digest: str) -> list[DamagedFile]:
        """Return what is wrong with a chunk of these checksums, if anything is."""
        if crc == self.entry.chunks[number][1] and (not self.entry.digest or digest == self.entry.digests[number]):
            return []
        low, high = self.starts[number], self.starts[number] + self.entry.chunks[number][0]
        return [DamagedFile(f"{self.key} fails its checksum in bytes {low}–{high - 1}", self.entry.path, [(low, high)])]


@contextmanager
def opened(backend: Backend, key: str) -> Iterator[tuple[_ReadInto, int]]:
    """Lend what reads the object, and how much is read at a time."""
    if not isinstance(backend, LocalFiles):
        yield partial(backend.read_into, key), backend.capabilities.part_size
        return
    with ExitStack() as stack:
        read_into: _ReadInto = partial(backend.read_into, key)
        with suppress(NotFound, Unreadable):  # each read will say so
            read_into = stack.enter_context(backend.reader(key))
        yield read_into, _BLOCK


class Pass:
    """Reads spans of chunks, in any thread: checks them, and puts what belongs into the targets there."""

    def __init__(
        self,
        chunks: Chunks,
        read_into: _ReadInto,
        block: int,
        targets: list[Piece] | None = None,
        new: NewMemory | None = None,
    ) -> None:
        self._chunks = chunks
        self._read_into = read_into
        self._block = block
        self._targets = targets or []
        self._offsets = [offset for offset, _ in self._targets]
        self._new = new
        # Each thread's memory for what is only looked at, or copied: used again and again, for new memory costs as much as reading does.
        self._own = threading.local()

    def __call__(self, span: Span) -> list[DamagedFile]:
        """Return what is wrong with each chunk that is not what was committed."""
        start, stop, first, after = span
        entry, key = self._chunks.entry, self._chunks.key
        try:
            return self._several(span) if after - first > 1 else self._one(start, stop, first)
        except NotFound:
            return [DamagedFile(f"{key} is missing", entry.path, [(0, entry.size)])]
        except Unreadable as exc:
            if after - first > 1:  # which of them?
                return [bad for one in self._chunks.spans(range(first, after), 0) for bad in self(one)]
            damage = DamagedFile(f"{key} cannot be read in bytes {start}–{stop - 1}: {exc}", entry.path, [(start, stop)])
            damage.__cause__ = exc
            return [damage]

    def _several(self, span: Span) -> list[DamagedFile]:
        start, stop, first, after = span
        bad = []
        view = self._read(start, stop)
        for n in range(first, after):
            at = self._chunks.starts[n] - start
            chunk = view[at : at + self._chunks.entry.chunks[n][0]]
            bad += self._chunks.compare(n, crc64nvme(chunk), digest_of(self._chunks.entry.digest, chunk))
        return bad

    def _one(self, start: int, stop: int, number: int) -> list[DamagedFile]:
        """Do it for one chunk, which may be large: block by block."""
        crc, digest = 0, new_digest(self._chunks.entry.digest) if self._chunks.entry.digest else None
        for low in range(start, stop, self._block):
            view = self._read(low, min(low + self._block, stop))
            crc = crc64nvme(view, crc)
            if digest:
                digest.update(view)
        return self._chunks.compare(number, crc, digest.hexdigest() if digest else "")

    def _read(self, start: int, stop: int) -> memoryview:
        """Return some bytes of the file, which are in the targets now. Good until the next call in this thread."""
        here = self._targets[overlapping(self._offsets, start, stop)]
        here = [(offset, view) for offset, view in here if offset + len(view) > start]
        direct: memoryview | None = None
        if len(here) == 1 and here[0][0] <= start and stop <= here[0][0] + len(here[0][1]):
            offset, whole = here[0]
            direct = whole[start - offset : stop - offset]
            if self._new is None or not self._new.is_placed(whole):
                if self._new is not None:
                    self._new.provide(whole, direct)
                self._read_into(start, direct)
                return direct
        buffer: memoryview = getattr(self._own, "buffer", _NOTHING)
        if len(buffer) < stop - start:
            buffer = self._own.buffer = memoryview(mmap.mmap(-1, max(stop - start, self._block)))
        view = buffer[: stop - start]
        self._read_into(start, view)
        if self._new is not None and direct is not None:
            self._new.put(direct, view)
        else:
            scatter(start, view, here)
        return view


_NOTHING = memoryview(b"")


def overlapping(offsets: list[int], start: int, stop: int) -> slice:
    """Return which of the pieces at these ascending offsets may have bytes from `start` to `stop`."""
    return slice(max(0, bisect_right(offsets, start) - 1), bisect_right(offsets, stop - 1))


def scatter(start: int, data: memoryview, targets: Iterable[Piece]) -> None:
    """Copy what of `data`, which begins at byte `start`, belongs into each of `targets`."""
    stop = start + len(data)
    for offset, view in targets:
        low, high = max(start, offset), min(stop, offset + len(view))
        if low < high:
            view[low - offset : high - offset] = data[low - start : high - start]


def read_chunk(backend: Backend, key: str, entry: FileEntry, offset: int, number: int, into: memoryview) -> None:
    """Fill `into` with chunk `number`, at `offset`, and check it.

    Raises:
        DamagedFile: it fails its checksum, the disk has lost it, or the file went missing.
    """
    one = Pass(Chunks(entry, key), partial(backend.read_into, key), len(into), [(offset, into)])
    if damage := one((offset, offset + len(into), number, number + 1)):
        raise damage[0]


def damaged_ranges(
    backend: Backend,
    key: str,
    entry: FileEntry,
    workers: Workers | None,
    progress: Callable[[int], object] | None = None,
    lent: tuple[_ReadInto, int] | None = None,
) -> list[tuple[int, int]]:
    """Read the whole file in bounded memory and return the (start, stop) byte ranges that are not what was committed.

    A missing file is one range; bytes beyond the end are a range too. `progress` is called with the number of bytes just done. Without
    `workers`, the calling thread does it alone. With what `opened` has `lent` before, the file may have lost its name since.
    """
    try:
        size = backend.stat(key).size
    except (NotFound, Unreadable):
        if lent is None:
            return [(0, entry.size)]
        size = entry.size
    chunks = Chunks(entry, key)
    there = [n for n, start in enumerate(chunks.starts) if start + entry.chunks[n][0] <= size]
    bad: list[tuple[int, int]] = []
    with nullcontext(lent) if lent else opened(backend, key) as (read_into, block):
        one = Pass(chunks, read_into, block)
        jobs = list(_jobs(chunks.spans(there, block), backend.capabilities.part_size))

        def several(spans: list[Span]) -> list[DamagedFile]:
            return [damage for span in spans for damage in one(span)]

        for job, found in zip(jobs, (workers.map if workers and len(jobs) > 1 else map)(several, jobs), strict=True):
            bad += [one for damage in found for one in damage.ranges]
            if progress is not None:
                progress(job[-1][1] - job[0][0])
    if len(there) < len(chunks.starts):
        cut = chunks.starts[len(there)]
        bad.append((cut, entry.size))
        if progress is not None:
            progress(entry.size - cut)
    if size > entry.size:
        bad.append((entry.size, size))
    return _merged(bad)


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] >= start:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged
