"""The shared backend on a real shared file system, through two mounts that cache for themselves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import mounted
from juicefs_rig import SharedFolder
from procs import Channel, Nursery, litter, nursery
from stores import write

from ckptstore import Store
from ckptstore.backends import shared as shared_module
from ckptstore.backends.shared import SharedBackend, _SharedWriter
from ckptstore.errors import (
    AlreadyExists,
    BackendError,
    CkptStoreError,
    InvalidOption,
    InvalidURL,
    NotFound,
    PermissionDenied,
    StorageFull,
    StoreWarning,
)
from ckptstore.log import slot_key
from ckptstore.mounts import file_system, is_local, is_shared
from ckptstore.protocol import Backend
from ckptstore.record import Record, decode
from ckptstore.sampler import InterruptableSampler
from ckptstore.testing import BackendConformance

pytest_plugins = ("juicefs_fixtures",)


class TestShared(BackendConformance):
    """What one mount is told, the other one shows."""

    rounds = 2
    many = 200

    @pytest.fixture(autouse=True)
    def _folder(self, shared: SharedFolder) -> None:
        self.shared = shared
        self.opened = 0

    def make_backend(self, place: Path) -> Backend:
        self.opened += 1
        return SharedBackend.open(str((self.shared.a, self.shared.b)[self.opened % 2] / "run"), {"create": "1"})

    @property
    def root(self) -> Path:
        return self.shared.b / "run"

    def raw_get(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.exists() else None

    def raw_put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_keys(self) -> Sequence[str]:
        return [str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir()]


@pytest.fixture(scope="module")
def warm() -> Iterator[Nursery]:
    yield from nursery("procs", __name__)


# -- two hosts


def training_job(channel: Channel, url: str) -> None:
    """Draw two batches of samples, save, and draw one more before it is killed."""
    import torch

    sampler = InterruptableSampler(range(20), seed=3)
    samples = iter(sampler)
    drawn = [next(samples) for _ in range(7)]
    sampler.advance(7)
    Store(url).save({"w": torch.arange(3.0)}, step=7, sampler=sampler, rng=True)
    channel.send("saved", drawn)
    next(samples)
    signal.pause()


def test_a_job_resumes_on_another_host_at_the_very_next_sample(shared: SharedFolder, warm: Nursery) -> None:
    import torch

    on_a, on_b = shared.urls()
    old = warm.start(training_job, on_a)
    [drawn] = old.expect("saved")
    old.kill()
    sampler = InterruptableSampler(range(20), seed=3)
    state = {"w": torch.zeros(3)}
    with Store(on_b) as new:
        checkpoint = new.resume(state, sampler=sampler)
    assert checkpoint is not None
    assert checkpoint.step == 7
    assert torch.equal(state["w"], torch.arange(3.0))
    assert drawn + list(sampler) == list(InterruptableSampler(range(20), seed=3))


def racing_creator(channel: Channel, location: str, rounds: int) -> None:
    """Create one key after another at the same moments as somebody else, and tell which ones were created."""
    backend = SharedBackend.open(location, {})
    won = []
    for n in range(rounds):
        channel.send("ready")
        channel.recv()
        try:
            backend.put_if_absent(f"log/{n}", f"{os.getpid()}".encode())
            won.append(n)
        except AlreadyExists:
            assert backend.get(f"log/{n}", 100) != f"{os.getpid()}".encode()
    channel.send("won", os.getpid(), won)


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_of_two_hosts_exactly_one_creates(shared: SharedFolder, warm: Nursery, rounds: int) -> None:
    (shared.a / "run" / "log").mkdir(parents=True)
    hosts = [warm.start(racing_creator, str(place / "run"), rounds) for place in (shared.a, shared.b)]
    for _ in range(rounds):
        for host in hosts:
            host.expect("ready")
        for host in hosts:
            host.send("go")
    won = dict(host.expect("won") for host in hosts)
    assert sorted(n for mine in won.values() for n in mine) == list(range(rounds))
    assert min(len(mine) for mine in won.values()) > rounds // 20, "they did race"
    for pid, mine in won.items():
        assert all((shared.b / "run" / "log" / str(n)).read_text() == str(pid) for n in mine)


def racing_saver(channel: Channel, url: str, saves: int) -> None:
    """Save beside others, and tell what was acknowledged."""
    with Store(url, acquire=False) as store:
        channel.recv()
        channel.send("saved", [write(store, f"name-{os.getpid()}", step=step) for step in range(saves)])


@pytest.mark.parametrize("saves", [50, pytest.param(500, marks=pytest.mark.soak)])
def test_two_hosts_race_for_commits(shared: SharedFolder, warm: Nursery, saves: int) -> None:
    on_a, on_b = shared.urls(keep_last="all")
    with Store(on_a) as owner:
        first = write(owner)
        hosts = [warm.start(racing_saver, url, saves) for url in (on_a, on_b)]
        for host in hosts:
            host.send("go")
        acknowledged = [i for host in hosts for i in host.expect("saved")[0]]
        assert len(set(acknowledged)) == 2 * saves
    for url in (on_b, on_a):
        with Store(url) as reader:
            assert {c.id for c in reader} == {first, *acknowledged}, "none is lost"
            assert reader.verify() == [], "none is dangling"
    backend = SharedBackend.open(str(shared.b / "run"), {})
    records = [decode(backend.get(slot_key(n), 1 << 24), n) for n in range(1, 2 * saves + 3)]
    assert len({record.op for record in records}) == len(records)
    newest = records[-1]
    assert isinstance(newest, Record)
    assert len(newest.checkpoints) == 2 * saves + 1


def stop_at(point: str) -> None:
    """Have this process stop itself, once, when it gets to `point` of a save."""
    owner, method, after = {
        "before the first file": (SharedBackend, "open_writer", False),
        "in the middle of a file": (_SharedWriter, "write", True),
        "before a file is durable": (_SharedWriter, "finish", False),
        "before the record": (SharedBackend, "put_if_absent", False),
        "before the link": (SharedBackend, "_link", False),
        "after the link": (SharedBackend, "_link", True),
    }[point]
    inner = getattr(owner, method)
    stops = [signal.SIGSTOP]

    def outer(self: Any, *args: Any) -> Any:
        is_record = method != "_link" or args[1].startswith("log/")
        if is_record and not after and stops:
            os.kill(os.getpid(), stops.pop())
        result = inner(self, *args)
        if is_record and after and stops:
            os.kill(os.getpid(), stops.pop())
        return result

    setattr(owner, method, outer)


def old_job(channel: Channel, url: str, point: str) -> None:
    """Save, save again with a stop in the middle, and when continued try everything."""

    def outcome(call: Callable[[], object]) -> str:
        try:
            call()
        except CkptStoreError as exc:
            return type(exc).__name__
        return "done"

    store = Store(url)
    first = write(store, step=1)
    channel.send("saved", first)
    stop_at(point)
    result = outcome(lambda: write(store, step=2))
    tries = [lambda: write(store), lambda: store.tag("best", first), store.prune, store.acquire]
    channel.send("result", result, [outcome(call) for call in tries])


@pytest.mark.parametrize(
    "point",
    [
        "before the first file",
        "in the middle of a file",
        "before a file is durable",
        "before the record",
        "before the link",
        "after the link",
    ],
)
def test_a_host_that_was_stopped_changes_nothing_when_continued(shared: SharedFolder, warm: Nursery, point: str) -> None:
    on_a, on_b = shared.urls(keep_last="all")
    old = warm.start(old_job, on_a, point)
    old.expect("saved")
    old.wait_stopped()
    new = Store(on_b)
    new.acquire()
    committed = point == "after the link"
    assert new.checkpoint().step == (2 if committed else 1)
    write(new, step=10)
    before = new.names()
    old.proceed()
    result, again = old.expect("result")
    assert result == ("done" if committed else "Fenced")
    assert set(again) == {"Fenced"}
    with Store(on_a) as reader:
        assert reader.checkpoint().step == 10
        assert reader.names() == before
    new.gc()
    assert new.verify() == []
    assert litter(new) == []
    new.close()


# -- what is on the way of a save


def test_a_save_lists_no_folder_and_maps_no_memory(shared: SharedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(shared.urls()[0]) as store:
        for step in range(10):
            write(store, step=step)

        def refuse(*_: object) -> None:
            raise AssertionError("a folder was listed")

        monkeypatch.setattr(os, "scandir", refuse)
        monkeypatch.setattr(os, "listdir", refuse)
        for step in range(10, 30):
            write(store, step=step)
        store._engine.settle()
        assert [c.step for c in store] == [28, 29]


def test_writes_are_as_long_as_asked_for_or_as_the_file_system_recommends(
    shared: SharedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    block = shared.a.stat().st_blksize
    assert block == 65536
    for options, expected in (({"write_size": "3M"}, 3 << 20), ({}, 8 << 20)):
        sizes.clear()
        with Store(shared.urls(**options)[0], owner="me") as store:
            write(store, files={"big": bytes(20 << 20)})
        assert sizes.count(expected) >= 2
        assert sum(size for size in sizes if size >= 1 << 20) == 20 << 20
    monkeypatch.setattr(shared_module, "_LEAST_WRITE", (8 << 20) + 1)
    backend = SharedBackend.open(str(shared.a / "run"), {})
    backend.stat("log/000000000001")
    assert backend.capabilities.part_size == (8 << 20) + block


def test_what_was_deleted_here_is_not_waited_for(shared: SharedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SharedBackend.open(str(shared.a / "run"), {"create": "1"})
    backend.put_if_absent("data/x/a", b"a")
    backend.delete(["data/x/a"])
    pauses: list[float] = []
    monkeypatch.setattr(shared_module.time, "sleep", pauses.append)
    with pytest.raises(NotFound):
        backend.get("data/x/a", 1)
    assert sum(pauses) == 0


# -- where there is no store


def fails(url: str, act: Callable[[Store], object] = write) -> BackendError:
    """Return the one-line error of a change to a store."""
    with Store(url) as store, pytest.raises(BackendError) as caught:
        act(store)
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_not_there_or_not_mounted_is_no_new_store(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "run", tmp_path / "a" / "b"):
        for act in (write, lambda s: s.resume({}), lambda s: s.acquire()):
            assert "is its file system mounted? To begin a new store there, add create=1" in str(fails(f"shared://{place}", act))
        error = str(fails(f"shared://{place}?create=1"))
        assert "a disk of this machine" in error
        assert "is the shared file system mounted?" in error
    assert "is its file system mounted" in str(fails(f"shared://{tmp_path}/run", lambda s: s.load()))
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_begun_when_asked_for_and_found_without(shared: SharedFolder) -> None:
    place = shared.a / "deep" / "run"
    fails(f"shared://{place}")
    with Store(f"shared://{place}?create=1") as store:
        made = write(store)
    with Store(f"shared://{place}") as store:
        assert write(store) != made
    fails(f"shared://{shared.a}/deep")


def test_a_disk_that_other_hosts_mount_may_have_a_store_that_was_made_by_hand(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with Store(f"shared://{tmp_path}") as store:
        write(store)


def test_a_file_system_that_goes_away_and_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "_PAUSES", (0.0,))
    place = tmp_path / "mnt"
    image = tmp_path / "elsewhere"
    (image / "run" / "log").mkdir(parents=True)
    with mounted(place, "none", "bind", str(image)):
        store = Store(f"shared://{place}/run", owner="me")
        first = write(store)
    (place / "run").mkdir()
    for act in (lambda: write(store), lambda: store.tag("x", first), store.load):
        with pytest.raises(BackendError, match="not the folder it was before"):
            act()
    (place / "run").rmdir()
    with pytest.raises(BackendError, match="is its file system mounted"):
        write(store)
    with mounted(place, "none", "bind", str(image)):
        assert write(store) != first
        store.close()


def test_a_file_system_that_is_mounted_again_as_another_device_is_the_same_store(tmp_path: Path) -> None:
    (tmp_path / "run" / "log").mkdir(parents=True)
    with Store(f"shared://{tmp_path}/run", owner="me") as store:
        first = write(store)
        (tmp_path / "run").rename(tmp_path / "old")
        shutil.copytree(tmp_path / "old", tmp_path / "run")  # other inodes
        second = write(store)
        assert {c.id for c in store} == {first, second}


def test_no_permission_and_no_quota(shared: SharedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    url = shared.urls()[0]
    with Store(url) as store:
        write(store)
    (shared.a / "run" / "log").chmod(0o555)
    os.seteuid(65534)
    try:
        assert isinstance(fails(url), PermissionDenied)
    finally:
        os.seteuid(0)

    def over_quota(fd: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", over_quota)
    error = fails(url)
    assert isinstance(error, StorageFull)
    assert "quota" in str(error)


@pytest.mark.parametrize(
    ("location", "options"),
    [("run", {}), ("", {}), ("host/run", {}), ("/x", {"create": "yes"}), ("/x", {"write_size": "1"}), ("/x", {"cache": "1"})],
)
def test_bad_locations_and_options(location: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidOption if options else InvalidURL):
        SharedBackend.open(location, options)


# -- a plain path


def test_a_plain_path_on_a_shared_file_system_is_warned_about_once(shared: SharedFolder) -> None:
    with pytest.warns(StoreWarning, match=f"fuse.juicefs.*shared://{shared.a}/run") as caught, Store(shared.a / "run") as store:
        write(store)
        write(store)
    assert len(caught) == 1
    with warnings.catch_warnings(), Store(shared.urls()[1]) as store:
        warnings.simplefilter("error")
        write(store)


def test_kinds_of_file_systems(tmp_path: Path, shared: SharedFolder) -> None:
    assert file_system(str(shared.b / "not" / "there")) == "fuse.juicefs"
    with mounted(tmp_path / "odd name", "ramfs", "size=1m"):
        assert file_system(f"{tmp_path}/odd name/x") == "ramfs"
        assert file_system(f"{tmp_path}/odd name more") == file_system(str(tmp_path)) != "ramfs"
    for kind in ("nfs", "nfs4", "lustre", "ceph", "fuse.glusterfs", "fuse", "beegfs"):
        assert is_shared(kind)
        assert not is_local(kind)
    for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuse.fuse-overlayfs"):
        assert is_local(kind)
        assert not is_shared(kind)
    assert not is_shared(None)
    assert not is_local(None)
