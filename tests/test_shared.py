"""The shared backend on a real shared file system, through two mounts that cache for themselves."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import mounted
from juicefs_rig import SharedFolder
from stores import write

from ckptstore import Store
from ckptstore.backends import _shared_names
from ckptstore.backends import shared as shared_module
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import (
    BackendError,
    InvalidOption,
    InvalidURL,
    NotFound,
    PermissionDenied,
    StorageFull,
    StoreWarning,
)
from ckptstore.mounts import file_system, is_local, is_shared

pytest_plugins = ("juicefs_fixtures",)


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


def test_writes_are_in_order_and_as_long_as_asked_for_or_as_the_file_system_recommends(
    shared: SharedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    places: list[int] = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        if len(data) >= 1 << 20:
            places.append(offset)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    block = shared.a.stat().st_blksize
    assert block == 65536
    for options, expected in (({"write_size": "3M"}, 3 << 20), ({}, 8 << 20)):
        sizes.clear()
        places.clear()
        with Store(shared.urls(**options)[0], owner="me") as store:
            write(store, files={"big": bytes(20 << 20)})
        assert places == sorted(places)
        assert sizes.count(expected) >= 2
        assert sum(size for size in sizes if size >= 1 << 20) == 20 << 20
    monkeypatch.setattr(shared_module, "_LEAST_WRITE", (8 << 20) + 1)
    backend = SharedBackend.open(str(shared.a / "run"), {})
    backend.stat("log/000000000001")
    assert backend.capabilities.part_size == (8 << 20) + block


def test_juicefs_gets_files_from_their_memory_of_whatever_length_and_place(
    shared: SharedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    past_cache: set[bool] = set()
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        past_cache.add(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = random.Random(0).randbytes(3 << 20)
    lengths = [1, 4095, 4096, 4097, 0, 1 << 20, 511, (1 << 20) + 13]
    backend = SharedBackend.open(f"{shared.a}/run", {"create": "1"})
    writer = backend.open_writer("data/x")
    end = 0
    for number, length in enumerate(lengths):
        writer.write(end, memoryview(data)[end : end + length], number)
        end += length
    writer.finish()
    assert past_cache == {True}
    for place in (shared.a, shared.b):
        assert (place / "run/data/x").read_bytes() == data[:end]
    past_cache.clear()
    (tmp_path / "log").mkdir()
    other = SharedBackend.open(str(tmp_path), {}).open_writer("data/x")
    other.write(0, memoryview(data), 0)
    other.finish()
    assert past_cache == {False}, "not where nobody has tried it"


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
    monkeypatch.setattr(_shared_names, "PAUSES", (0.0,))
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
