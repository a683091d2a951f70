"""New memory, of large pages if there are any, and provided in as few steps as the system knows when something is read into it.

Memory that nobody has touched is provided page by page, as it is written to, which takes longer than to read the data. In pages of 2 MiB
it takes next to nothing, while the kernel has such pages free. When it has not, it makes some, and whoever touches the memory waits: two
seconds for a GiB where other memory had to be moved out of the way. So no more are asked for than are free; and none where free pages may
be the host's. Small pages are provided many at a time, together with what is to be in them if the system knows how to (see `userfault`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from .userfault import Placing, address_of

__all__ = ["NewMemory"]

_LARGE = 2 << 20
_HUGEPAGE, _POPULATE_WRITE = 14, 23  # <asm-generic/mman-common.h>; Python does not name the second
_WORTHWHILE = 4 << 20
"""Bytes from which on it pays to ask whether they are there: that takes as long as to read 20 KiB."""
_DEVICES = Path("/sys/bus/virtio/devices")
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_quick = ctypes.PyDLL(None)  # keeps the GIL: it takes longer to get it back than to ask what is asked here
if _libc is not None:
    _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    _quick.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class NewMemory:
    """What nobody has touched of some memory that is about to be filled. All that is done about it is hints: it can be filled without.

    Args:
        views: that memory, of which only what is large is looked at: memory that was freed and is used again mostly is there already.
    """

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._placing = Placing()
        self._placed: dict[int, bool] = {}  # where a new view begins -> whether it is provided with its contents
        large = _LargePages()
        try:
            for view in views:
                if _is_new(view):
                    self._placed[address_of(view)] = not large.ask(view) and self._placing.register(view)
        except BaseException:
            self._placing.close()
            raise

    def __enter__(self) -> NewMemory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._placing.close()

    def is_placed(self, view: memoryview) -> bool:
        """Say whether parts of one of the views are best filled with `put`, by who has their contents elsewhere."""
        return bool(self._placed) and self._placed.get(address_of(view), False)

    def provide(self, view: memoryview, part: memoryview) -> None:
        """Have the kernel provide the memory of a part of one of the views, if it is new, in one call instead of at each first touch."""
        if self._placed and address_of(view) in self._placed:
            _provide(part)

    def put(self, part: memoryview, data: memoryview) -> None:
        """Fill a part of a view for which `is_placed` says so."""
        self._placing.put(part, data)


class _LargePages:
    """Those that are free now, for one load."""

    def __init__(self) -> None:
        self._left: int | None = None

    def ask(self, view: memoryview) -> bool:
        """Ask for large pages for new memory, if there are enough; say whether that was done."""
        if self._left is None:
            self._left = 0 if _host_takes_free() else _free() // 4 * 3  # others want some too
        address = address_of(view)
        first, end = -(-address // _LARGE) * _LARGE, (address + len(view)) // _LARGE * _LARGE
        if _libc is None or end - first > self._left:
            return False
        self._left -= end - first
        return int(_libc.madvise(first, end - first, _HUGEPAGE)) == 0


def _host_takes_free() -> bool:
    """Say whether this is a virtual machine that gives its large free pages to its host: to have them back takes longer than all else.

    So a GiB took up to two seconds, too, and small pages, which mostly come from smaller pieces that the host has not taken, half of one.
    """
    with suppress(OSError):
        for device in _DEVICES.iterdir():  # a balloon, and its feature 5: virtio 1.3, section 5.5
            if (device / "device").read_text().strip() == "0x0005" and (device / "features").read_text()[5:6] == "1":
                return True
    return False


def _free() -> int:
    """Return how many bytes the kernel has free in pieces of a large page or more."""
    total = 0
    with suppress(OSError, ValueError):
        for line in Path("/proc/buddyinfo").read_text().splitlines():  # proc(5): of each zone, how many pieces of 2**n pages
            counts = map(int, line.split()[4:])
            total += sum(n * (mmap.PAGESIZE << order) for order, n in enumerate(counts) if mmap.PAGESIZE << order >= _LARGE)
    return total


def _is_new(view: memoryview) -> bool:
    """Say whether `view` is large, and nobody has touched it."""
    return _libc is not None and len(view) >= _WORTHWHILE and not _is_there(address_of(view) + len(view) // 2)


def _provide(view: memoryview) -> None:
    if _libc is not None:
        address = address_of(view)
        first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + len(view)) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(first, max(0, end - first), _POPULATE_WRITE)  # before Linux 5.14 nothing comes of it


def _is_there(address: int) -> bool:
    """Say whether the page at `address` has been provided."""
    there = ctypes.c_ubyte()
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    return _quick.mincore(page, mmap.PAGESIZE, ctypes.byref(there)) == 0 and there.value & 1 == 1
