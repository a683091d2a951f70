"""Power cuts, and disks that fill up or fail, below a whole store, on real file systems.

A file system in a file is shut down by the kernel at a chosen step, so that what had not been flushed by then is gone.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import mounted, require
from procs import Channel, Nursery, litter, nursery
from stores import write
from test_kill import Ledger, announced, save_parts

from ckptstore import Store
from ckptstore.errors import CkptStoreError

OPTIONS = {
    "ext4": "loop,noauto_da_alloc,errors=remount-ro",  # auto_da_alloc is a heuristic that hides a missing flush
    "xfs": "loop",
    "btrfs": "loop",  # a flush takes less along here than with the others, so a missing one of a folder shows
}
SIZES = {"ext4": 32 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}  # the smallest that their mkfs makes, but for ext4

STEPS = frozenset({"fsync", "pwrite", "link", "unlink", "remove", "rename", "replace", "mkdir", "rmdir"})


class Steps:
    """Counts the system calls that this process is about to make to change a file, and strikes before one of them."""

    def __init__(self, at: int | None, strike: Callable[[], object]) -> None:
        self.made = 0
        self._at = at
        self._strike = strike
        self._lock = threading.Lock()

    @property
    def struck(self) -> bool:
        return self._at is not None and self.made >= self._at

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__module__", None) == "posix" and function.__name__ in STEPS:
            with self._lock:
                self.made += 1
                if self.made == self._at:
                    self._strike()


@contextmanager
def striking(at: int | None, strike: Callable[[], object]) -> Iterator[Steps]:
    """Call `strike` before step number `at` of the block, in whichever thread makes it."""
    steps = Steps(at, strike)
    before = sys.getprofile()
    threading.setprofile(steps)
    sys.setprofile(steps)
    try:
        yield steps
    finally:
        sys.setprofile(before)
        threading.setprofile(before)


@dataclass(frozen=True)
class Disk:
    """A file system in a file."""

    kind: str
    image: Path

    @classmethod
    def new(cls, kind: str, image: Path, size: int | None = None) -> Disk:
        """Make an empty one."""
        require(shutil.which(f"mkfs.{kind}"), f"needs mkfs.{kind}")
        with image.open("wb") as file:
            file.truncate(size or SIZES[kind])
        subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True)
        return cls(kind, image)

    def copy(self, image: Path) -> Disk:
        """Copy what has been written to it so far."""
        subprocess.run(["cp", "--sparse=always", str(self.image), str(image)], check=True)
        return Disk(self.kind, image)

    @property
    def mount(self) -> Path:
        return self.image.with_suffix(".mount")

    @property
    def _left(self) -> Path:
        return self.image.with_suffix(".left")

    @contextmanager
    def plugged_in(self) -> Iterator[Path]:
        """Mount it for the length of the block; in the next such block, after a power cut, it is as the cut left it."""
        with mounted(self.mount, self.kind, OPTIONS[self.kind], str(self.image)):
            yield self.mount
        if self._left.exists():
            self._left.replace(self.image)

    def cut_power(self, mode: int) -> None:
        """From here on, nothing gets to the disk any more."""
        if self.kind == "btrfs":  # has no such call: go on later from what is on the disk now
            self.copy(self._left)
            return
        fd = os.open(self.mount, os.O_RDONLY)
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", mode))
        os.close(fd)


# -- power cuts

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN = XFS_IOC_GOINGDOWN = _IOR('X', 125, __u32)
LOG_FLUSHED, NOTHING_FLUSHED = 1, 2
"""The first keeps all metadata written so far, also that of files whose data is lost."""


def warm_up() -> None:
    """For the nursery: have everything imported that a save needs."""
    with Store("memory://warm") as store:
        write(store)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where a flush costs nothing."""
    with mounted(tmp_path / "ram", "tmpfs", "size=1g"):
        yield tmp_path / "ram"


@pytest.fixture(scope="module")
def warm() -> Iterator[Nursery]:
    yield from nursery(__name__)


def live(channel: Channel, kind: str, image: str, seed: int, at: int, mode: int) -> None:
    """Work until the power goes, at step number `at` or when all is done, saying what is about to be done and what has been."""
    disk = Disk(kind, Path(image))

    def end() -> None:
        disk.cut_power(mode)
        os._exit(0)

    with striking(at, end) as steps:
        try:
            work(channel, disk.mount, random.Random(seed))
        except CkptStoreError:
            if not steps.struck:
                raise
            threading.Event().wait()  # another thread has just cut the power, and is about to end us
    channel.send("end")
    end()


def work(channel: Channel, disk: Path, rng: random.Random) -> None:
    with Store(place(disk), keep_last=rng.choice((1, 2))) as store:
        store.acquire()
        start = max((c.step or 0 for c in store), default=0) + 1
        for step in range(start, start + 4):
            with announced(channel, "latest", step) as made:
                made += [save_parts(store, "latest", step, rng.choice((1, 2, 5)))]
            match rng.randrange(6):
                case 0 | 1:
                    with announced(channel, "best", step) as made:
                        made += [store.tag("best", "latest")]
                case 2 | 3:
                    with announced(channel, "export", step) as made:
                        made += [save_parts(store, "export", step)]
                case 4 if "export" in store:
                    with announced(channel, "export", step):
                        store.delete("export")
                case 5:
                    store.prune()
        store.gc()
        assert not litter(store)


def place(disk: Path) -> str:
    """Return the store's folder, which the first save has to make, together with those above it."""
    return str(disk / "runs" / "42")


def live_and_die(warm: Nursery, ledger: Ledger, disk: Disk, seed: int, at: int, mode: int) -> bool:
    """Work on `disk` until the power is cut; return whether everything was done before."""
    with disk.plugged_in():
        messages = warm.start(live, disk.kind, str(disk.image), seed, at, mode).rest()
    for message in messages:
        ledger.hear(message)
    return messages[-1:] == [["end"]]


@pytest.mark.parametrize(
    ("kind", "mode", "stride"),
    [
        pytest.param("ext4", NOTHING_FLUSHED, 19, id="ext4-sampled"),
        pytest.param("xfs", NOTHING_FLUSHED, 19, id="xfs-sampled"),
        pytest.param("btrfs", 0, 19, id="btrfs-sampled"),
        pytest.param("ext4", NOTHING_FLUSHED, 1, id="ext4", marks=pytest.mark.soak),
        pytest.param("ext4", LOG_FLUSHED, 1, id="ext4-log", marks=pytest.mark.soak),
        pytest.param("xfs", NOTHING_FLUSHED, 1, id="xfs", marks=pytest.mark.soak),
        pytest.param("xfs", LOG_FLUSHED, 1, id="xfs-log", marks=pytest.mark.soak),
        pytest.param("btrfs", 0, 1, id="btrfs", marks=pytest.mark.soak),
    ],
)
def test_power_cut_at_any_step(ram: Path, warm: Nursery, kind: str, mode: int, stride: int) -> None:
    """From an empty disk, and from one with a history whose next commits leave a hint and shrink old records."""
    empty = Disk.new(kind, ram / "empty")
    grown = empty.copy(ram / "grown")
    with grown.plugged_in() as folder, Store(place(folder), keep_last=1) as store:
        save_parts(store, "export", 1)
        for step in range(2, 12):
            save_parts(store, "latest", step)
        names = dict(store.names())
    for start, known, seed in ((empty, {}, 3), (grown, names, 5)):
        for at in count(1, stride):
            ledger = Ledger()
            ledger.names = {**known}
            disk = start.copy(ram / "disk")
            ended = live_and_die(warm, ledger, disk, seed, at, mode)
            with disk.plugged_in() as folder:
                ledger.check(place(folder))
                go_on(place(folder))
            if ended:
                break
        assert at > 100


def go_on(url: str) -> None:
    """Save on top of what there is, and clean up."""
    with Store(url, keep_last=1) as store:
        write(store, "next")
        store.gc()
        assert store.verify() == []
        assert not litter(store)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("cuts", [25, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_power_cuts_of_one_disk(ram: Path, warm: Nursery, kind: str, cuts: int) -> None:
    rng = random.Random(f"{kind} 20261123")
    disk = Disk.new(kind, ram / "disk")
    ledger = Ledger()
    for seed in range(cuts):
        live_and_die(warm, ledger, disk, seed, rng.randint(1, 150), rng.choice((LOG_FLUSHED, NOTHING_FLUSHED)))
        with disk.plugged_in() as folder:
            ledger.check(place(folder))
    assert ledger.done > cuts // 2
    assert ledger.cut_short > cuts // 3
