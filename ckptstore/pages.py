"""New memory, of large pages if there are any, and provided in one go before something is read into it.

Memory that nobody has touched is provided page by page, as it is written to, which takes longer than to read the data. In pages of 2 MiB
it takes next to nothing, while the kernel has such pages free. When it has not, it makes some, and whoever touches the memory waits: two
seconds for a GiB where other memory had to be moved out of the way. So no more are asked for than are free.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["LargePages", "provide"]

_LARGE = 2 << 20
_HUGEPAGE, _POPULATE_WRITE = 14, 23  # <asm-generic/mman-common.h>; Python does not name the second
_WORTHWHILE = 64 << 10
"""Bytes from which on it pays to ask whether they are there."""
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_first_byte = ctypes.c_char.from_buffer
if _libc is not None:
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class LargePages:
    """Those that are free now, for one load: hints, of which it does not matter what comes of them."""

    def __init__(self) -> None:
        self._left: int | None = None

    def ask(self, address: int, size: int) -> None:
        """Ask for large pages for the memory at `address`, if there are enough, and nothing is there yet."""
        first, end = -(-address // _LARGE) * _LARGE, (address + size) // _LARGE * _LARGE
        if _libc is None or end <= first or _is_there(first):
            return
        if self._left is None:
            self._left = _free() // 4 * 3  # others want some too
        if end - first <= self._left:
            self._left -= end - first
            _libc.madvise(first, end - first, _HUGEPAGE)


def _free() -> int:
    """Return how many bytes the kernel has free in pieces of a large page or more."""
    total = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/buddyinfo").read_text().splitlines():  # proc(5): of each zone, how many pieces of 2**n pages
            counts = map(int, line.split()[4:])
            total += sum(n * (mmap.PAGESIZE << order) for order, n in enumerate(counts) if mmap.PAGESIZE << order >= _LARGE)
    return total


def provide(view: memoryview) -> None:
    """Have the kernel provide the memory of `view`, which is to be overwritten, in one call instead of at each page's first touch."""
    if _libc is None or len(view) < _WORTHWHILE:
        return
    address = ctypes.addressof(_first_byte(view))
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE
    if not _is_there(end - mmap.PAGESIZE):
        _libc.madvise(first, end - first, _POPULATE_WRITE)  # before Linux 5.14 nothing comes of it


def _is_there(address: int) -> bool:
    """Say whether the page at `address` has been provided: memory that was freed and is used again mostly has."""
    assert _libc is not None
    there = ctypes.create_string_buffer(1)
    return _libc.mincore(address, mmap.PAGESIZE, there) == 0 and there.raw[0] & 1 == 1
