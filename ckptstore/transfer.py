"""The data path out: cuts files into chunks, hashes each while it is hot, and moves them in parallel. The way back is `reading`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from .checksum import combine, crc64nvme, sha256
from .manifest import CHUNK_LIMIT, FileEntry
from .protocol import Capabilities, PartWriter

__all__ = ["FileSink", "Workers", "drain"]

_R = TypeVar("_R")
_Sums = tuple[int, str]  # the CRC of a chunk, and its SHA-256 or nothing


class Workers:
    """A few threads for one store, started when first needed and again after a fork."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def submit(self, call: Callable[..., _R], *args: Any) -> Future[_R]:
        """Run ``call(*args)`` on one of the threads."""
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                self._pool, self._pid = ThreadPoolExecutor(self.count, "ckptstore"), os.getpid()
            with suppress(RuntimeError):  # no thread can be had: at the interpreter's exit, or at a limit of processes
                return self._pool.submit(call, *args)
        done: Future[_R] = Future()
        try:
            done.set_result(call(*args))
        except Exception as exc:
            done.set_exception(exc)
        return done

    @property
    def alive(self) -> bool:
        """Whether threads were started in this process; after a fork there are none, and what they were given never ends."""
        return self._pool is not None and self._pid == os.getpid()

    def map(self, call: Callable[[Any], _R], items: Iterable[Any]) -> Iterator[_R]:
        """Yield ``call(item)`` in order, running a bounded number ahead. Everything begun has ended when this is closed or raises."""
        items = iter(items)
        ahead = [self.submit(call, item) for item in islice(items, 2 * self.count)]
        try:
            while ahead:
                result = ahead[0].result()
                del ahead[0]
                ahead += [self.submit(call, item) for item in islice(items, 1)]
                yield result
        finally:
            drain(ahead)

    def close(self) -> None:
        """End the threads. Idempotent."""
        with self._lock:
            pool, self._pool = self._pool if self.alive else None, None
        if pool is not None:
            pool.shutdown()  # not under the lock, which the work that it waits for may want


def drain(futures: Iterable[Future[Any]]) -> None:
    """Wait until no future runs any more, whatever interrupts us: they hold views of memory that goes away with the caller."""
    pending = list(futures)
    for future in pending:
        future.cancel()
    interrupt: BaseException | None = None
    while not all(f.done() for f in pending):
        try:
            wait(pending)
        except BaseException as exc:  # a second Ctrl-C must not free the memory under a running thread
            interrupt = exc
    if interrupt is not None:
        raise interrupt


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
        self._chunks: list[tuple[int, Future[_Sums] | _Sums]] = []
        self._running: list[Future[_Sums]] = []

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of `data`. Raises what the storage raised, now or for earlier data."""
        view = memoryview(data)
        if not view.nbytes:  # nothing, of whatever shape
            return 0
        view = view.cast("B")
        if len(view) >= self._part() // 2:
            self._write_large(view)
        else:
            self._buffer += view
            if len(self._buffer) >= self._part():
                self._send_buffer()
        return len(view)

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

    def _send(self, piece: memoryview) -> Future[_Sums]:
        future = self._workers.submit(self._store, self._offset, piece, len(self._chunks))
        self._chunks.append((len(piece), future))
        self._running.append(future)
        self._offset += len(piece)
        return future

    def _store(self, offset: int, piece: memoryview, number: int) -> _Sums:
        sums = crc64nvme(piece), sha256(piece) if self._authentic else ""
        self.writer.write(offset, piece, number)
        return sums

    def _settle(self, futures: list[Future[_Sums]]) -> None:
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            unfinished = [f for f in futures if not f.done()]
            drain(unfinished)
        for future in futures:
            future.result()
        settled = set(futures)
        self._running = [f for f in self._running if f not in settled]
