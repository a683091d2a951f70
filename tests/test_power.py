"""Power cuts, and disks that fill up or fail, below a whole store, on real file systems.

A file system in a file is shut down by the kernel at a chosen step, so that what had not been flushed by then is gone.
"""

from __future__ import annotations

import copy
import fcntl
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import evidence
import pytest
from conftest import mounted, require
from procs import Channel, Nursery, litter, nursery
from stores import contents, write
from test_kill import Ledger, announced, save_parts

from ckptstore import Store
from ckptstore.errors import BackendError, CkptStoreError, CommitUnknown, PermissionDenied, StorageFull

OPTIONS = {
    "ext4": "loop,noauto_da_alloc,errors=remount-ro",  # auto_da_alloc is a heuristic that hides a missing flush
    "xfs": "loop",
    "btrfs": "loop",  # a flush takes less along here than with the others, so a missing one of a folder shows
}
SIZES = {"ext4": 32 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}  # the smallest that their mkfs makes, but for ext4

STEPS = frozenset({"fsync", "pwrite", "link", "unlink", "remove", "rename", "replace", "mkdir", "rmdir"})


class Steps:
    """Counts the system calls that this process is about to make to change a file, and strikes before one of them."""

    def __init__(self, at: int, strike: Callable[[], object]) -> None:
        self.struck = False
        self._left = at
        self._strike = strike
        self._lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__module__", None) == "posix" and function.__name__ in STEPS:
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    self.struck = True
                    self._strike()

    def end(self) -> None:
        self._left = 0


@contextmanager
def striking(at: int, strike: Callable[[], object]) -> Iterator[Steps]:
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
        steps.end()  # threads begun in the block still call it


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

    def fail(self) -> None:
        """Let ext4 believe that it met an error."""
        device = os.stat(self.mount).st_dev
        block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{block}/trigger_fs_error").write_text("x")


# -- power cuts

SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN = XFS_IOC_GOINGDOWN = _IOR('X', 125, __u32)
LOG_FLUSHED, NOTHING_FLUSHED = 1, 2
"""The first keeps all metadata written so far, also that of files whose data is lost."""


def warm_up() -> None:
    """For the nursery: have everything imported that a save needs."""
    with Store("memory://warm") as store:
        write(store)


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
        pytest.param("ext4", NOTHING_FLUSHED, 29, id="ext4-sampled"),
        pytest.param("xfs", NOTHING_FLUSHED, 29, id="xfs-sampled"),
        pytest.param("btrfs", 0, 29, id="btrfs-sampled"),
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
    with evidence.experiment(f"power cut before every change, {kind}") as tally:
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
                    break  # there was no such change any more
                tally.points += 1
                tally.strike()
            assert at > 100


def go_on(url: str) -> None:
    """Save on top of what there is, and clean up."""
    with Store(url, keep_last=1) as store:
        write(store, "next")
        store.gc()
        assert store.verify() == []
        assert not litter(store)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
@pytest.mark.parametrize("cuts", [20, pytest.param(1000, marks=pytest.mark.soak)])
def test_many_power_cuts_of_one_disk(ram: Path, warm: Nursery, kind: str, cuts: int) -> None:
    rng = random.Random(f"{kind} 20261123")
    disk = Disk.new(kind, ram / "disk")
    ledger = Ledger()
    with evidence.experiment(f"power cuts of one disk at random moments, {kind}") as tally:
        for seed in range(cuts):
            tally.strike()
            live_and_die(warm, ledger, disk, seed, rng.randint(1, 150), rng.choice((LOG_FLUSHED, NOTHING_FLUSHED)))
            with disk.plugged_in() as folder:
                ledger.check(place(folder))
    assert ledger.done > cuts // 4
    assert ledger.cut_short > cuts // 3


# -- disks that fill up


@contextmanager
def small_disk(folder: Path, kind: str) -> Iterator[Path]:
    """Mount a disk with little room, of one sort or the other."""
    match kind:
        case "tmpfs":
            with mounted(folder / "small", "tmpfs", "size=4m,nr_inodes=500"):
                yield folder / "small"
        case "inodes":
            with mounted(folder / "small", "tmpfs", "size=64m,nr_inodes=160"):
                yield folder / "small"
        case "ext4":
            with Disk.new("ext4", folder / "small", 16 << 20).plugged_in() as disk:
                yield disk


SMALL = pytest.mark.parametrize("kind", ["tmpfs", "inodes", "ext4"])


def fill(disk: Path) -> None:
    """Take all space and all inodes."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    with suppress(OSError):
        for i in count():
            (disk / f"filler{i}").touch()


def empty(disk: Path) -> None:
    for file in disk.glob("filler*"):
        file.unlink()


def try_everything(store: Store, ledger: Ledger) -> list[tuple[str, CkptStoreError]]:
    """Do one of everything, whatever becomes of it; return the errors, each with the name that was to change."""
    errors: list[tuple[str, CkptStoreError]] = []
    changes: list[tuple[str, int, Callable[[], Any]]] = [
        ("", 0, store.acquire),
        ("latest", 20, lambda: save_parts(store, "latest", 20).id),
        ("best", 20, lambda: store.tag("best", "latest").id),
        ("latest", 21, lambda: save_parts(store, "latest", 21).id),
        ("", 0, store.prune),
        ("old", 3, lambda: store.delete("old") and None if "old" in store else None),
        ("", 0, store.gc),
    ]
    for name, step, change in changes:
        try:
            done = change()
        except CkptStoreError as exc:
            errors.append((name, exc))
            if name and isinstance(exc, CommitUnknown):
                ledger.begun = (name, step)
        else:
            if name:
                ledger.names[name] = done
    return errors


@pytest.fixture
def grown(ram: Path) -> Path:
    """A store whose next commits leave a hint, shrink old records and let checkpoints go."""
    with Store(ram / "grown", keep_last="all") as store:
        save_parts(store, "old", 3)
        for step in range(4, 16):
            save_parts(store, "latest", step)
    return ram / "grown"


def settle_in(grown: Path, disk: Path) -> Ledger:
    """Put a copy of the store on the disk."""
    shutil.copytree(grown, place(disk))
    ledger = Ledger()
    with Store(grown) as store:
        ledger.names = {**store.names()}
    return ledger


@SMALL
@pytest.mark.parametrize("stride", [pytest.param(13, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_disk_full_at_any_step(ram: Path, grown: Path, kind: str, stride: int) -> None:
    refused = 0
    with evidence.experiment("disk full before every change") as tally:
        for at in count(1, stride):
            tally.strike()
            with small_disk(ram, kind) as disk:
                ledger = settle_in(grown, disk)
                with Store(place(disk), keep_last=1) as store:
                    with striking(at, partial(fill, disk)) as steps:
                        errors = try_everything(store, ledger)
                    assert {type(e) for _, e in errors} <= {StorageFull}
                    refused += bool(errors)
                    ledger.check(place(disk))
                    store.gc()  # needs no space
                    assert not litter(store)
                    empty(disk)
                    assert try_everything(store, ledger) == []
                    assert not litter(store)
                ledger.check(place(disk))
            if not steps.struck:
                break
    assert refused >= 4


@SMALL
def test_saves_until_the_disk_is_full(ram: Path, kind: str) -> None:
    with small_disk(ram, kind) as disk:
        for start in (0, 100, 200):  # what a full disk forgets to free, the next round lacks
            for i in range(8):  # pruning takes a little room too: there is something else to remove first
                (disk / f"filler{i}").write_bytes(bytes(8192))
            with Store(place(disk), keep_last="all") as store:
                saved = {c.id for c in store}
                with pytest.raises(StorageFull):
                    for step in count(start):
                        saved.add(write(store, step=step, files={"a": bytes(300_000), "deep/b": b"%d" % step}))
            assert step > start + 5
            with Store(place(disk), keep_last=2) as store:
                assert {c.id for c in store} == saved
                assert store.checkpoint("latest").step == step - 1
                assert store.verify() == []
                assert contents(store, "latest") == {"a": bytes(300_000), "deep/b": b"%d" % (step - 1)}
                empty(disk)
                assert len(store.prune()) == len(saved) - 2
                store.gc()
                assert not litter(store)


@SMALL
def test_room_for_two_is_enough_to_keep_one(ram: Path, kind: str) -> None:
    """What a save lets go has made room when the next one begins."""
    with small_disk(ram, kind) as disk, Store(place(disk), keep_last=1) as store:
        free = os.statvfs(disk)
        for step in range(20):
            nbytes = free.f_bavail * free.f_frsize // 5
            write(store, step=step, files={"a": bytes(nbytes), "b": bytes(nbytes), **{f"{i}": b"" for i in range(40)}})
        assert store.verify() == []


@SMALL
def test_more_than_the_disk_can_hold(ram: Path, kind: str) -> None:
    with small_disk(ram, kind) as disk, Store(place(disk)) as store:
        first = write(store)
        too_much = {"a": bytes(20 << 20), "b": bytes(50 << 20)} | {f"{i}": b"" for i in range(200)}
        with pytest.raises(StorageFull):
            write(store, files=too_much)
        assert store.names() == {"latest": first}
        assert not litter(store)
        assert write(store) == store.names()["latest"]
        assert store.verify() == []


def test_file_size_limit(tmp_path: Path) -> None:
    """``ulimit -f``."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store(tmp_path / "store") as store:
        first = write(store)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(StorageFull, match="ulimit -f"):
                write(store, files={"a": b"x", "b": bytes(9 << 20)})
            assert store.names() == {"latest": first}
            assert not litter(store)
            write(store, "small", files={"a": bytes(1 << 20)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        write(store, files={"a": b"x", "b": bytes(9 << 20)})
        assert store.verify() == []


# -- disks that fail


@pytest.mark.parametrize("stride", [pytest.param(13, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_disk_turns_read_only_at_any_step(ram: Path, grown: Path, stride: int) -> None:
    """As ext4 does when it meets an error: what was not flushed by then is lost, and the process lives on."""
    start = Disk.new("ext4", ram / "start")
    with start.plugged_in() as folder:
        names = settle_in(grown, folder).names
    met = set()
    with evidence.experiment("disk turns read-only before every change") as tally:
        for at in count(1, stride):
            tally.strike()
            ledger = Ledger()
            ledger.names = {**names}
            disk = start.copy(ram / "disk")
            with disk.plugged_in() as folder:
                with Store(place(folder), keep_last=1) as store, striking(at, disk.fail) as steps:
                    errors = try_everything(store, ledger)
                copy.deepcopy(ledger).check(place(folder))
            with disk.plugged_in() as folder:
                before = {**ledger.names}
                ledger.check(place(folder))
                with Store(place(folder)) as store:
                    for name, error in errors:
                        if name and isinstance(error, CommitUnknown):
                            try:
                                assert store.resolve(error) == (ledger.names != before)
                            except CommitUnknown:  # it is there, and no flush of it ever succeeded: only saving again makes sure
                                assert error.durable is False
                                assert ledger.names != before
                go_on(place(folder))
            met |= {type(error) for _, error in errors}
            if not steps.struck:
                break
    assert PermissionDenied in met


def test_read_only_for_a_while(ram: Path) -> None:
    with mounted(ram / "disk", "tmpfs", "size=4m"), Store(place(ram / "disk")) as store:
        first = write(store)
        subprocess.run(["mount", "-o", "remount,ro", str(ram / "disk")], check=True)
        calls: list[Callable[[], object]] = [
            lambda: write(store),
            lambda: store.tag("best", first),
            lambda: store.delete(first),
        ]
        for call in calls:
            with pytest.raises(PermissionDenied, match="read-only"):
                call()
        with pytest.raises(PermissionDenied, match="read-only"):
            Store(place(ram / "disk")).acquire()
        for reader in (store, Store(place(ram / "disk"))):
            assert reader.names() == {"latest": first}
            assert contents(reader, "latest") == {"a.bin": b"some bytes"}
            assert reader.verify() == []
            reader.gc()
        subprocess.run(["mount", "-o", "remount,rw", str(ram / "disk")], check=True)
        assert write(store) == store.names()["latest"]
        assert not litter(store)


def test_disk_that_is_smaller_than_it_says(ram: Path) -> None:
    """Thinly provisioned: writes are taken, and fail when flushed; the page cache goes on showing what never got to the disk."""
    with mounted(ram / "pool", "tmpfs", "size=16m"):
        disk = Disk.new("ext4", ram / "pool" / "disk", 64 << 20)
        ledger = Ledger()
        failed = 0
        with disk.plugged_in() as folder, Store(place(folder), keep_last="all") as store:
            for step in range(20):
                try:
                    ledger.names["latest"] = write(store, step=step, files={"a": random.Random(step).randbytes(1_500_000)})
                except CommitUnknown:
                    ledger.begun = ledger.begun or ("latest", step)
                except BackendError:
                    failed += 1
        assert failed > 5
        subprocess.run(["mount", "-o", "remount,size=100m", str(ram / "pool")], check=True)
        with disk.plugged_in() as folder:
            acknowledged = ledger.names["latest"]
            ledger.check(place(folder))
            with Store(place(folder)) as store:
                assert acknowledged in store
            go_on(place(folder))
