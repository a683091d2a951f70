"""Bytes of storages, copied into memory of the host that is kept warm for the next time."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext, suppress

import torch

from .checksum import crc64nvme
from .errors import ChangedWhileSaving
from .hostmemory import Buffers
from .workers import Job, Workers, drain

__all__ = ["HostCopy"]

_SHORT = 1 << 18
"""Bytes. To copy less, the GIL is kept: letting go of it may cost more than the copy, if somebody else takes it."""

_PIECE = 1 << 23
"""Bytes that one thread copies before it looks for more."""

_HOST = torch.device("cpu")

_move_keeping_gil = ctypes.PyDLL(None).memmove
_move_keeping_gil.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_move_keeping_gil.restype = None


def _move(to: int, source: int, size: int) -> None:
    if size < _SHORT:
        _move_keeping_gil(to, source, size)
    else:
        ctypes.memmove(to, source, size)


def _move_all(moves: Sequence[tuple[int, int, int]], helpers: Workers) -> None:
    """Make some calls of `_move`, those that let go of the GIL together with `helpers`."""
    pieces = [
        (to + at, source + at, min(_PIECE, size - at))
        for to, source, size in moves
        if size >= _SHORT
        for at in range(0, size, _PIECE)
    ]
    queue = iter(pieces)  # next() is one step
    jobs: list[Job[None]] = []
    try:
        if len(pieces) > 1:
            for _ in range(min(helpers.count, torch.get_num_threads() - 1)):
                helpers.begin(jobs, _move_each, queue)
        _move_each(queue)
        for to, source, size in moves:
            if size < _SHORT:
                _move_keeping_gil(to, source, size)
        for job in jobs:
            job.result()
    finally:
        drain(jobs)


def _move_each(moves: Iterable[tuple[int, int, int]]) -> None:
    for move in moves:
        _move(*move)


class HostCopy:
    """Copies storages into a buffer: some at once, the others later, by another thread.

    `copy_now` is for the thread that made this, then `copy_rest` for the other; `wait` for whoever is about to change what is copied.

    Args:
        storages: what to copy; let go of once it is copied.
        devices: where they are.
        later: the numbers of those that nobody will change without a `wait` before.
        checked: compare the checksum of what will be copied later with that of what is there now.
    """

    def __init__(
        self,
        storages: Sequence[torch.UntypedStorage],
        devices: AbstractSet[torch.device],
        buffers: Buffers,
        later: Sequence[int],
        checked: bool,
    ) -> None:
        self._sources = list(storages)
        self._sizes = list(map(torch.UntypedStorage.nbytes, storages))
        self._starts, end = buffers.layout(self._sizes)
        devices = devices - {_HOST}
        self._locations: list[str | None] = [None] * len(storages)
        if devices:
            self._locations = [None if s.device == _HOST else torch.serialization.location_tag(s) for s in storages]
        self._streams = {device: _stream(device) for device in devices}
        self._later = later
        waiting = {*later}
        self._now = [n for n in range(len(storages)) if n not in waiting]
        self._watched: tuple[Sequence[int | None], Sequence[torch.Tensor], Sequence[int]] = [], [], []
        self._complete = False
        self._over = threading.Lock()  # not an Event: see `workers`
        self._over.acquire()
        self._problem: tuple[int, str] | None = None
        self._buffer = buffers.take(end, any(d.type == "cuda" for d in devices))
        self._checked = [n for n in later if self._sizes[n]] if checked else []
        self._sums: dict[int, int] = {}

    def watch(self, numbers: Sequence[int | None], tensors: Sequence[torch.Tensor], versions: Sequence[int]) -> None:
        """Find out later whether torch has changed one of `tensors` before it was copied: whether its version is another then.

        `numbers` are those of their storages, if any.
        """
        self._watched = numbers, tensors, versions

    def copy_now(self, helpers: Workers) -> None:
        """Copy what may change as soon as this returns, with as many threads as torch may use.

        What comes from a device is only under way then: what is given to that device's current stream from now on waits for it.
        """
        to, sizes = self._buffer.address, self._sizes
        if self._checked:
            self._copy([n for n in self._checked if self._locations[n] is not None])
            self._synchronize()
            self._sums = {
                n: crc64nvme(self._copied(n) if self._locations[n] else _memory(self._sources[n])) for n in self._checked
            }
        self._copy([n for n in self._now if self._locations[n] is not None])
        for device, stream in self._streams.items():
            if stream is not None:
                torch.cuda.current_stream(device).wait_stream(stream)
        host = [n for n in self._now if self._locations[n] is None]
        _move_all([(to + self._starts[n], self._sources[n].data_ptr(), sizes[n]) for n in host], helpers)
        if not self._later and not self._streams:
            self._let_go()

    def copy_rest(self) -> None:
        """Copy the rest; nothing is under way any more when this returns."""
        if not self._complete:
            self._copy(self._later)
            self._synchronize()
            for number, tensor, version in zip(*self._watched, strict=True):
                if tensor._version != version and number is not None:
                    self._problem = number, "torch has counted a change in place"
            self._let_go()

    def wait(self) -> None:
        """Return when nothing is left to copy."""
        if not self._complete:
            with self._over:
                pass

    def check(self) -> None:
        """Raise `ChangedWhileSaving` if something was changed before it was copied; call it when all is copied."""
        for n, before in self._sums.items():
            if self._problem is None and crc64nvme(self._copied(n)) != before:
                self._problem = n, "its checksum is not that of what was there when the save began"
        if self._problem is not None:
            number, why = self._problem
            raise ChangedWhileSaving(
                f"a parameter or a state of an optimizer ({self._sizes[number]} bytes, storage {number} of the file) was changed by "
                f"something else than a step before it was copied: {why}. Nothing was published. Change it before save_async or after the "
                "next step, or save without optimizer="
            )

    def abandon(self) -> None:
        """Have nobody wait for this any more: what it copied will not be used."""
        with suppress(RuntimeError):  # of a device that has failed: nothing comes from it any more
            self._synchronize()
        self._let_go()

    def copies(self) -> tuple[list[torch.UntypedStorage], dict[int, str]]:
        """Return the copies as storages, and for those from a device what torch.save is to say where they were, by `_cdata`."""
        found: list[torch.UntypedStorage] = []
        locations: dict[int, str] = {}
        for start, size, location in zip(self._starts, self._sizes, self._locations, strict=True):
            if size:
                copy = torch.frombuffer(self._buffer.view(start, size), dtype=torch.uint8).untyped_storage()
            else:
                copy = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
            found.append(copy)
            if location is not None:
                locations[copy._cdata] = location
        return found, locations

    def give_back(self, buffers: Buffers) -> None:
        """Return the buffer: nobody copies into it, and nobody reads it any more."""
        buffers.give_back(self._buffer)

    def _copied(self, number: int) -> memoryview:
        return self._buffer.view(self._starts[number], self._sizes[number])

    def _copy(self, numbers: Sequence[int]) -> None:
        elsewhere: dict[torch.device, list[int]] = {}
        for n in numbers:
            source, size = self._sources[n], self._sizes[n]
            if source.nbytes() != size:  # its memory may be gone
                self._problem = n, f"its storage has {source.nbytes()} bytes now"
            elif self._locations[n] is None:
                _move(self._buffer.address + self._starts[n], source.data_ptr(), size)
            elif size:
                elsewhere.setdefault(source.device, []).append(n)
        for device, theirs in elsewhere.items():
            self._copy_from(device, theirs)

    def _copy_from(self, device: torch.device, numbers: Sequence[int]) -> None:
        stream = self._streams[device]
        whole = torch.frombuffer(self._buffer.view(0, self._buffer.size), dtype=torch.uint8)
        bare = torch.empty(0, dtype=torch.uint8, device=device)
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            for n in numbers:
                start = self._starts[n]
                whole[start : start + self._sizes[n]].copy_(bare.set_(self._sources[n]), non_blocking=stream is not None)

    def _synchronize(self) -> None:
        for stream in self._streams.values():
            if stream is not None:
                stream.synchronize()

    def _let_go(self) -> None:
        self._sources, self._watched, self._streams = [], ([], [], []), {}
        if not self._complete:
            self._complete = True
            self._over.release()


def _memory(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return a stream to copy from `device` on, after what has been given to the device so far; None for devices that are not CUDA's."""
    if device.type != "cuda":
        return None
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream
