"""Memory of the host to copy into: kept warm for the next time, and page-locked where a CUDA device copies."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch

__all__ = ["Buffer", "Buffers"]

_ALIGNMENT = 64
_HUGE_PAGES, _WIPE_ON_FORK = 14, 18  # madvise(2); Python does not name the second


class Buffer:
    """Memory of the host, in pages as large as the system has them; page-locked for CUDA, if wanted, if that can be."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = size
        self.pinned = pinned
        self._memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # A forked child has no use for it. Shared with one, every page that is written here would be copied first; and if it were just
        # not there, the child, freeing it, would free whatever else of its own has come to lie at this address.
        for advice in (_HUGE_PAGES, _WIPE_ON_FORK) if sys.platform == "linux" else ():
            with suppress(OSError):
                self._memory.madvise(advice)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if pinned:
            _pin(self, size)

    def view(self, start: int, size: int) -> memoryview:
        """Return the bytes from `start` on."""
        return memoryview(self._memory)[start : start + size]


def _pin(buffer: Buffer, size: int) -> None:
    """Page-lock the memory of `buffer` until it is collected. Where that is refused, copies are right as well, only slower.

    Not by ``torch.empty(pin_memory=True)``, which takes the next power of two, up to twice the bytes, and keeps them for ever.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if int(cudart.cudaHostRegister(buffer.address, size, 0)) == 0:
        weakref.finalize(buffer, _unpin, cudart, buffer.address, os.getpid()).atexit = False
    else:
        with suppress(RuntimeError):
            torch.arange(1, device="cuda")  # CUDA remembers the error, and torch raises it at its next call


def _unpin(cudart: Any, address: int, pid: int) -> None:
    if os.getpid() == pid:  # a forked child has neither that memory nor CUDA
        cudart.cudaHostUnregister(address)


class Buffers:
    """The buffers of one store. One that has been given back is kept for the next save: its pages need not be made again."""

    def __init__(self) -> None:
        self._free: Buffer | None = None
        self._layout: tuple[list[int], list[int], int] = [], [], 0

    def layout(self, sizes: list[int]) -> tuple[list[int], int]:
        """Return where in a buffer things of these sizes begin, one behind the other, and the size of all; remembers the last answer."""
        known, starts, end = self._layout
        if known != sizes:
            *starts, end = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0)
            self._layout = sizes, starts, end
        return starts, end

    def take(self, size: int, pinned: bool) -> Buffer:
        """Return a buffer of at least `size` bytes."""
        free, self._free = self._free, None
        if free is None or free.size < size or free.pinned != pinned:
            free = None  # before the other is made: both together might be too much
            free = Buffer(max(size, 1), pinned)
        return free

    def give_back(self, buffer: Buffer) -> None:
        """Let the next save have `buffer`."""
        if self._free is None or self._free.size < buffer.size:
            self._free = buffer
