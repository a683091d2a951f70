"""The data path out: cuts files into chunks, hashes each while it is hot, and moves them in parallel. The way back is `reading`."""

from __future__ import annotations

from .checksum import combine, crc64nvme, sha256
from .manifest import CHUNK_LIMIT, FileEntry
from .protocol import Capabilities, PartWriter
from .workers import Job, Workers, drain

__all__ = ["FileSink"]

_Sums = tuple[int, str]  # the CRC of a chunk, and its SHA-256 or nothing


class FileSink:
    """A write-only file object that sends what it gets to a `PartWriter` in checked chunks.

    Small writes are gathered into chunks of the storage's part size; a large one is cut and sent from the caller's own memory, and is
    done with when `write` returns, because torch may free that memory then (a CUDA tensor's host copy, for one). Used by one thread.
    """

    def __init__(
        self, path: str, writer: PartWriter, workers: Workers, storage: Capabilities, *, authentic: bool = False
    ) -> None:
        self.path = path
        self._authentic = authentic
        self.writer = writer
        self._workers = workers
        self._storage = storage
        self._buffer = bytearray()
        self._offset = 0  # bytes handed on, without the buffer
        self._chunks: list[tuple[int, Job[_Sums] | _Sums]] = []
        self._running: list[Job[_Sums]] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of `data`. Raises what the storage raised, now or for earlier data."""
        view = memoryview(data)
        if not view.nbytes:  # nothing, of whatever shape
            return 0
        view = view.cast("B")
        if len(view) >= self._part() // 2:
            try:
                self._write_large(view)
            except BaseException:
                drain(self._running, cancel=False)  # they move the caller's memory
                raise
        else:
            self._buffer += view
            if len(self._buffer) >= self._part():
                self._send_buffer()
        return len(view)

    @property
    def size(self) -> int:
        """Bytes taken so far."""
        return self._offset + len(self._buffer)

    def _write_large(self, view: memoryview) -> None:
        start = 0
        if self._buffer:
            start = max(0, self._least() - len(self._buffer))
            self._buffer += view[:start]
            if len(self._buffer) >= self._least():
                self._send_buffer()
        pieces = []
        while len(view) - start >= max(1, self._least()):
            piece = view[start : start + self._part()]
            pieces.append(self._send(piece))
            start += len(piece)
        self._buffer += view[start:]
        self._settle(pieces)

    def _part(self) -> int:
        """Return the size of the next part. Where their number is limited they grow: 10 000 from 5 MiB on make 5 TiB."""
        growth = 1 + max(0, len(self._chunks) - 1000) // 36 if self._storage.max_parts else 1
        return min(self._storage.part_size * growth, CHUNK_LIMIT)

    def _least(self) -> int:
        """Return the size below which no part may be but the last. One that has grown must be whole, lest 10 000 be too few."""
        part = self._part()
        return part if part > self._storage.part_size else self._storage.min_part

    def flush(self) -> None:
        """Do nothing: durability comes with the commit."""

    def close(self) -> FileEntry:
        """Send what is left and return the file's sizes and checksums. The file is not published yet."""
        if not self._chunks and self._buffer:  # one small chunk: not worth a thread
            self._chunks.append((len(self._buffer), self._store(0, memoryview(self._buffer), 0)))
            self._offset = len(self._buffer)
        else:
            self._send_buffer()
            self._settle(self._running)
        sums = [found if isinstance(found, tuple) else found.result() for _, found in self._chunks]
        chunks = tuple((n, crc) for (n, _), (crc, _) in zip(self._chunks, sums, strict=True))
        digests = tuple(digest for _, digest in sums if digest)
        return FileEntry(self.path, self._offset, combine(chunks), chunks, digests=digests)

    def abort(self) -> None:
        """Drop the file. Never raises for anything the storage does."""
        drain(self._running)
        self.writer.abort()

    def _send_buffer(self) -> None:
        if self._buffer:
            full, self._buffer = self._buffer, bytearray()
            while len(self._running) > self._workers.count:
                self._settle(self._running[:1])
            self._send(memoryview(full))

    def _send(self, piece: memoryview) -> Job[_Sums]:
        job = self._workers.begin(self._running, self._store, self._offset, piece, len(self._chunks))
        self._chunks.append((len(piece), job))
        self._offset += len(piece)
        return job

    def _store(self, offset: int, piece: memoryview, number: int) -> _Sums:
        sums = crc64nvme(piece), sha256(piece) if self._authentic else ""
        self.writer.write(offset, piece, number)
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
