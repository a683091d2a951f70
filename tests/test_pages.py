"""New memory: large pages as long as there are some, and what is provided when it is read into."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest
from conftest import require

from ckptstore import pages, userfault
from ckptstore.pages import NewMemory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what is told to the kernel is for Linux")
MIB = 1 << 20


def new(size: int) -> tuple[memoryview, int]:
    view = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return view, ctypes.addressof(ctypes.c_char.from_buffer(view))


def asked(address: int) -> bool:
    """Say whether large pages were asked for, for the memory at an address: proc_pid_smaps(5)."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
        elif here and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no such memory")


@pytest.fixture(autouse=True)
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a machine whose memory is its own."""
    monkeypatch.setattr(pages, "_host_takes_free", lambda: False)


@pytest.fixture
def none_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as on a machine where memory is not provided with its contents."""
    monkeypatch.setattr(userfault, "_CALL", None)


def test_no_more_large_pages_are_asked_for_than_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_free", lambda: 16 * MIB)  # of which others may want a quarter
    some = [new(6 * MIB) for _ in range(4)]
    with NewMemory(view for view, _ in some) as memory:
        placed = [memory.is_placed(view) for view, _ in some]
    flags = [asked(-(-address // (2 * MIB)) * 2 * MIB) for _, address in some]
    assert flags[:2] == [True, True]
    assert not all(flags)
    assert not any(large and one for large, one in zip(flags, placed, strict=True))  # large ones are provided at once


def test_memory_that_is_there_is_left_as_it_is() -> None:
    view, address = new(8 * MIB)
    view[:] = bytes(range(256)) * (len(view) // 256)
    with NewMemory([view]) as memory:
        assert not memory.is_placed(view)
        memory.provide(view, view)
    assert not asked(address + 4 * MIB)
    assert view == bytes(range(256)) * (len(view) // 256)


def test_what_is_small_is_left_as_it_is() -> None:
    view, address = new(4 * MIB - 1)
    with NewMemory([view]) as memory:
        assert not memory.is_placed(view)
        memory.provide(view, view)
    assert not asked(address + 2 * MIB)
    assert not pages._is_there(address)


@pytest.mark.parametrize(
    ("device", "features", "taken"),
    [("0x0005", "011001", True), ("0x0005", "0110", False), ("0x0005", "011000", False), ("0x0002", "011001", False)],
)
def test_none_are_asked_for_where_they_may_be_the_hosts(
    device: str, features: str, taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "virtio0").mkdir()
    (tmp_path / "virtio0" / "device").write_text(f"{device}\n")
    (tmp_path / "virtio0" / "features").write_text(f"{features}\n")
    monkeypatch.undo()
    monkeypatch.setattr(pages, "_DEVICES", tmp_path)
    monkeypatch.setattr(pages, "_free", lambda: 16 * MIB)
    view, address = new(8 * MIB)
    with NewMemory([view]):
        pass
    assert asked(address + 4 * MIB) is not taken


def test_where_the_kernel_does_not_tell_none_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    view, address = new(8 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", unreadable)
        with NewMemory([view]) as memory:
            assert not memory.is_placed(view)  # nor whether that would be the end
    assert not asked(address + 4 * MIB)


@pytest.mark.usefixtures("none_placed")
def test_memory_is_there_once_it_is_provided() -> None:
    view, address = new(8 * MIB)
    other, elsewhere = new(8 * MIB)
    with NewMemory([view]) as memory:
        assert not memory.is_placed(view)
        memory.provide(view, view[3 * MIB : 5 * MIB + 1])
        memory.provide(other, other)
    assert pages._is_there(address + 3 * MIB)
    assert pages._is_there(address + 5 * MIB - 1)
    assert not pages._is_there(address + 7 * MIB)
    assert not pages._is_there(elsewhere)
    assert view == bytes(8 * MIB)


def test_memory_is_provided_with_what_is_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_free", lambda: 0)
    view, address = new(8 * MIB)
    data = memoryview(bytearray(b"data" * MIB))
    with NewMemory([view]) as memory:
        require(memory.is_placed(view), "this needs userfaultfd(2) with write protection, and no seccomp filter")
        memory.put(view[MIB + 1 : 5 * MIB + 1], data)
    assert not pages._is_there(address)
    assert not pages._is_there(address + 7 * MIB)
    assert view[MIB + 1 : 5 * MIB + 1] == data
    assert not any(view[: MIB + 1]) and not any(view[5 * MIB + 1 :])
