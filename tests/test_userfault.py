"""New memory that is provided with its contents: it holds what was put there, and is like any other, whether the kernel helps or not."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import require

from ckptstore import userfault
from ckptstore.userfault import Placing, address_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="userfaultfd(2) is Linux's")
MIB = 1 << 20
DATA = memoryview(bytearray(os.urandom(MIB + 17)))


def new(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def is_registered(view: memoryview) -> bool:
    """Say whether the middle of `view` is registered with a userfaultfd: proc_pid_smaps(5)."""
    here, address = False, address_of(view) + len(view) // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
        elif here and line.startswith("VmFlags:"):
            return not {"um", "uw"}.isdisjoint(line.split())
    raise AssertionError("no such memory")


def pages_there(view: memoryview) -> int:
    """Return how many pages of `view`, which begins with one, are there: mincore(2)."""
    there = (ctypes.c_ubyte * (len(view) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address_of(view)), ctypes.c_size_t(len(view)), there) == 0
    return sum(one & 1 for one in there)


@pytest.fixture
def placing() -> Iterator[Placing]:
    one = Placing()
    require(one.register(new(MIB)), "this needs userfaultfd(2) with write protection, and no seccomp filter")
    yield one
    one.close()


@pytest.mark.parametrize(("low", "high"), [(0, MIB), (1, MIB + 1), (4096, 8192), (4095, 8193), (100, 200), (4000, 4200)])
def test_what_was_put_is_there_and_nothing_else(placing: Placing, low: int, high: int) -> None:
    view = new(2 * MIB)
    assert placing.register(view)
    placing.put(view[low:high], DATA[17 : 17 + high - low])
    assert view[low:high] == DATA[17 : 17 + high - low]
    first, end = low // mmap.PAGESIZE, -(-high // mmap.PAGESIZE)
    assert pages_there(view) == end - first  # before somebody looks at the others
    assert not any(view[:low]) and not any(view[high:])


def test_the_kernel_provides_whole_pages_with_their_contents(placing: Placing, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[int, int]] = []

    class Watched(userfault._Copy):
        def __del__(self) -> None:
            copied.append((self.size, self.copied))

    monkeypatch.setattr(userfault, "_Copy", Watched)
    view = new(2 * MIB)
    assert placing.register(view)
    placing.put(view[100 : MIB + 117], DATA)
    assert copied == [(MIB - mmap.PAGESIZE, MIB - mmap.PAGESIZE)]
    assert view[100 : MIB + 117] == DATA


@pytest.mark.parametrize("touched", [0, MIB // 2, MIB - 1])
def test_what_is_there_already_is_written_to_as_well(placing: Placing, touched: int) -> None:
    view = new(MIB)
    assert placing.register(view)
    view[touched] = 1  # nobody waits: nothing is intercepted
    placing.put(view, DATA[:MIB])
    assert view == DATA[:MIB]


def test_registered_memory_is_like_any_other(placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    view = new(2 * MIB)
    assert placing.register(view) and is_registered(view)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        assert file.readinto(view[5:]) == len(DATA)  # by the kernel
    assert view[5 : 5 + len(DATA)] == DATA
    pid = os.fork()
    if not pid:
        os._exit(not (view[5 : 5 + len(DATA)] == DATA and not is_registered(view)))
    assert os.waitpid(pid, 0)[1] == 0


def test_closed_it_lets_go_of_all_and_leaves_no_descriptor(placing: Placing) -> None:
    view = new(2 * MIB)
    before = len(os.listdir("/proc/self/fd"))
    own = Placing()
    assert own.register(view) and is_registered(view)
    own.close()
    own.close()
    assert not is_registered(view)
    assert len(os.listdir("/proc/self/fd")) == before
    view[0] = 1  # nobody waits for anybody, here neither
    own.put(view[3 : MIB + 3], DATA[:MIB])
    assert view[3 : MIB + 3] == DATA[:MIB]


def test_interrupted_while_it_is_closed_it_has_let_go_of_all(placing: Placing, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [new(2 * MIB) for _ in range(3)]
    before = len(os.listdir("/proc/self/fd"))
    own = Placing()
    assert all(own.register(view) for view in views)
    asked: list[int] = []
    ask = userfault._ask

    def interrupted(file: Any, what: int, how: Any) -> bool:
        asked.append(what)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ask(file, what, how)

    monkeypatch.setattr(userfault, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.close()
    assert len(os.listdir("/proc/self/fd")) == before
    for view in views:
        assert not is_registered(view)
        view[0] = 1


def test_memory_that_cannot_be_registered_is_filled_nevertheless(placing: Placing, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2 * MIB))
    with (tmp_path / "file").open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 2 * MIB))  # shared, and a file's
        assert not placing.register(view)
        placing.put(view[9 : MIB + 9], DATA[:MIB])
        assert view[9 : MIB + 9] == DATA[:MIB] and not any(view[MIB + 9 :])


@pytest.mark.parametrize("why", ["filter", "untold", "machine", "call", "version"])
def test_where_there_is_none_memory_is_filled_as_ever(why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nSeccomp:\t2\nSeccomp_filters:\t1\n" if why == "filter" else "Seccomp:\t0\n")
    monkeypatch.setattr(userfault, "_STATUS", tmp_path / "none" if why == "untold" else status)
    if why == "machine":
        monkeypatch.setattr(userfault, "_CALL", None)
    elif why == "call":
        monkeypatch.setattr(userfault, "_CALL", 1023)  # of no Linux
    elif why == "version":
        monkeypatch.setattr(userfault, "_VERSION", 0)
    asked = []
    if why in ("filter", "untold"):  # there the question itself may be the end
        monkeypatch.setattr(userfault, "_libc", type("Libc", (), {"syscall": lambda *a: asked.append(a), "ioctl": asked.append}))
    before = len(os.listdir("/proc/self/fd"))
    one, view = Placing(), new(2 * MIB)
    assert not one.register(view)
    assert not asked and len(os.listdir("/proc/self/fd")) == before
    one.put(view[1 : MIB + 1], DATA[:MIB])
    assert view[1 : MIB + 1] == DATA[:MIB] and not any(view[MIB + 1 :])
