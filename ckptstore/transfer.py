"""The data path out: cuts files into chunks, hashes each while it is hot, and moves them in parallel. The way back is `reading`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from .checksum import combine, crc32, crc64nvme, digest_of
from .manifest import CHUNK_LIMIT, FileEntry
from .protocol import Capabilities, GatheringWriter, PartWriter
from .workers import Job, Workers, drain

__all__ = ["FileSink"]

_Sums = list[tuple[int, int, str]]  # of each chunk of a part: its length in bytes, its CRC, and its digest or nothing
_CUTS = 10_000
"""After so many chunks within parts they get larger, so that they stay few in a file of terabytes."""
_Piece = tuple[memoryview, object]  # with what keeps its memory


class FileSink:
    """A write-only file object that sends what it gets to a `PartWriter` in checked chunks.

    Small writes are gathered into chunks of the storage's part size; a large one is cut and sent from the caller's own memory. Where parts
    may have any size, a chunk may be several of them, each written from where it lies. Where they are limited, each but the last is as long
    as it should be, gathered from wherever its bytes lie. Used by one thread.

    With a single worker, which then does nothing but write, the caller hashes: one file takes one write at a time, and while it does, there
    is time for the next part's sums.

    With `digest`, one of `DIGESTS`, chunks get that besides. With `fine`, a part has several chunks, cut between writes: who wants one
    tensor of many need not read, and check, eight megabytes.
    """

    def __init__(
        self,
        path: str,
        writer: PartWriter,
        workers: Workers,
        storage: Capabilities,
        *,
        digest: str = "",
        fine: bool = False,
    ) -> None:
        self.path = path
        self._digest = digest
        self.writer = writer
        self._workers = workers
        self._storage = storage
        self._any_size = not (storage.min_part or storage.max_parts)
        self._worthwhile = storage.part_size // 128
        """Bytes. Shorter pieces are copied together, for each write costs something."""
        self._alone = storage.part_size // 8
        """Bytes. What is as long begins a chunk, so that this tensor can be read, and checked, without the ones before."""
        self._pieces: list[_Piece] = []  # of the next part
        self._copied = bytearray()  # what comes behind them
        self._gathered = 0  # bytes of the next part
        self._fine = fine
        self._cuts = [0]  # where the chunks of the next part begin
        self._cut_count = 0
        self._offset = 0  # bytes handed on
        self._parts = 0  # handed on
        self._sums: list[Job[_Sums] | _Sums] = []
        self._running: list[Job[_Sums]] = []

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._offset + self._gathered

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of `data`. Raises what the storage raised, now or for earlier data.

        Done with `data` when it returns, because torch may free that memory then (a CUDA tensor's host copy, for one).
        """
        view = memoryview(data)
        self._take(view, None, None)
        return view.nbytes

    def write_summed(self, data: memoryview, before: int, owner: object = None) -> int:
        """Do as `write`, and return the CRC-32 of `data` behind bytes whose CRC-32 is `before`, computed while other threads write.

        With an `owner`, which keeps the memory of `data`, and in which nothing changes until `close` or `abort` returns, it does not wait.
        """
        return self._take(data, before, owner)

    def _take(self, view: memoryview, crc: int | None, owner: object) -> int:
        if not view.nbytes:  # nothing, of whatever shape
            return crc or 0
        view = view.cast("B")
        if self._fine:
            self._begin_chunk(len(view))
        if len(view) < self._least_uncopied(lasting=owner is not None):
            self._copy(view)
            return 0 if crc is None else crc32(view, crc)
        try:
            crc = self._cut(view, crc, owner) if self._any_size else self._fill(view, crc, owner)
            if owner is None:
                if self._any_size:
                    self._send()
                self._settle(self._running)
        except BaseException:
            self._pieces.clear()
            drain(self._running)  # they move the caller's memory
            raise
        return crc

    def _begin_chunk(self, coming: int) -> None:
        """Cut, if there is enough in front of so many bytes: small tensors share a chunk, others have one but for a little before."""
        waiting = self._gathered - self._cuts[-1]
        grain = self._worthwhile * (1 + self._cut_count // _CUTS)
        if waiting >= grain or (waiting > grain // 256 and coming >= grain):
            self._cuts.append(self._gathered)
            self._cut_count += 1

    def _least_uncopied(self, *, lasting: bool) -> int:
        if lasting:
            return self._worthwhile
        # Of what does not fill a limited part, nothing could be sent now.
        return self._alone if self._any_size else max(self._alone, self._part() - self._gathered)

    def _cut(self, view: memoryview, crc: int | None, owner: object) -> int:
        """Take `view` from where it lies; return its CRC-32 as `write_summed`, if `crc` is not None."""
        if len(view) >= self._alone:
            self._send()
        for start in range(0, len(view), self._part()):
            piece = view[start : start + self._part()]
            if self._gathered + len(piece) > self._part() + self._worthwhile:
                self._send()
            self._append(piece, owner)
            if crc is not None:
                crc = crc32(piece, crc)
        return crc or 0

    def _fill(self, view: memoryview, crc: int | None, owner: object) -> int:
        """Do as `_cut` where parts are limited: fill the next part, send it, and so on."""
        while view:
            piece = view[: self._part() - self._gathered]
            view = view[len(piece) :]
            full = self._gathered + len(piece) == self._part()
            if len(piece) < self._worthwhile or not (full or owner is not None):
                self._copy(piece)
            else:
                self._append(piece, owner)
                if full:
                    self._send()
            if crc is not None:
                crc = crc32(piece, crc)
        return crc or 0

    def _append(self, piece: memoryview, owner: object) -> None:
        self._seal()
        self._pieces.append((piece, owner))
        self._gathered += len(piece)

    def _copy(self, view: memoryview) -> None:
        if self._any_size and self._gathered + len(view) > self._part() + self._worthwhile:
            self._send()  # not before: a few more bytes, of the next header, are welcome
        self._copied += view
        self._gathered += len(view)
        if not self._any_size and self._gathered >= self._part():
            self._send()

    def _seal(self) -> None:
        if self._copied:
            copied, self._copied = self._copied, bytearray()
            self._pieces.append((memoryview(copied), None))

    def _part(self) -> int:
        """Return the size of the next part. Where their number is limited they grow: 10 000 from 5 MiB on make 5 TiB."""
        growth = 1 + max(0, len(self._sums) - 1000) // 36 if self._storage.max_parts else 1
        return max(self._storage.min_part, min(self._storage.part_size * growth, CHUNK_LIMIT))

    def flush(self) -> None:
        """Do nothing: durability comes with the commit."""

    def close(self) -> FileEntry:
        """Send what is left and return the file's sizes and checksums. The file is not published yet."""
        if not self._sums and self._gathered:  # one small chunk: not worth a thread
            self._seal()
            self._sums.append(self._store(0, self._pieces, 0, self._cuts))
        else:
            self._send()
            self._settle(self._running)
        sums = [one for found in self._sums for one in (found if isinstance(found, list) else found.result())]
        chunks = tuple((length, crc) for length, crc, _ in sums)
        digests = tuple(digest for _, _, digest in sums) if self._digest else ()
        return FileEntry(self.path, self.size, combine(chunks), chunks, digests=digests, digest=self._digest)

    def abort(self) -> None:
        """Drop the file. Never raises for anything the storage does."""
        drain(self._running)
        self.writer.abort()

    def _send(self) -> None:
        self._seal()
        if not self._pieces:
            return
        while len(self._running) > self._workers.count:
            self._settle(self._running[:1])
        pieces, self._pieces = self._pieces, []
        cuts, self._cuts = self._cuts, [0]
        sums = self._hash(pieces, cuts) if self._workers.count == 1 else None
        job = self._workers.begin(self._running, self._store, self._offset, pieces, self._parts, cuts, sums)
        self._sums.append(job)
        self._parts += len(pieces) if self._any_size else 1
        self._offset += self._gathered
        self._gathered = 0

    def _store(self, offset: int, pieces: list[_Piece], number: int, cuts: Sequence[int], sums: _Sums | None = None) -> _Sums:
        """Write consecutive pieces, in which chunks begin at `cuts`, counted from their first byte, and hash them if that is to be done."""
        # All is hashed before the first write: where pieces go in order, threads wait there, and need not hash then.
        sums = sums or self._hash(pieces, cuts)
        views = [view for view, _ in pieces]
        if self._any_size:
            for view in views:
                self.writer.write(offset, view, number)
                offset += len(view)
                number += 1
        else:
            crc = combine((length, crc) for length, crc, _ in sums)
            if self._storage.gathers:
                cast(GatheringWriter, self.writer).write_pieces(offset, views, number, crc)
            else:
                self.writer.write(offset, views[0] if len(views) == 1 else memoryview(b"".join(views)), number, crc)
        return sums

    def _hash(self, pieces: list[_Piece], cuts: Sequence[int]) -> _Sums:
        sums: _Sums = []
        for chunk in _cut(pieces, cuts):
            crc = 0
            for view in chunk:
                crc = crc64nvme(view, crc)
            sums.append((sum(map(len, chunk)), crc, digest_of(self._digest, *chunk)))
        return sums

    def _settle(self, jobs: list[Job[_Sums]]) -> None:
        try:
            for job in jobs:
                job.result()
        except BaseException:
            drain(jobs)
            raise
        settled = set(jobs)
        self._running = [j for j in self._running if j not in settled]


def _cut(pieces: Sequence[_Piece], cuts: Sequence[int]) -> Iterator[list[memoryview]]:
    """Yield the parts of consecutive pieces that make up each of the chunks that begin at `cuts`."""
    chunk: list[memoryview] = []
    ends = iter([*cuts[1:], sum(len(view) for view, _ in pieces)])
    at, end = 0, next(ends)
    for view, _ in pieces:
        while view:
            part = view[: end - at]
            view = view[len(part) :]
            chunk.append(part)
            at += len(part)
            if at == end:
                yield chunk
                chunk, end = [], next(ends, at)
