"""The local backend against a real disk: hostile entries, full and read-only disks, and who is flushed when."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from conftest import mounted

from ckptstore import folder, posix
from ckptstore.backends import local
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    AlreadyExists,
    BackendError,
    InvalidName,
    InvalidOption,
    InvalidURL,
    NotFound,
    PermissionDenied,
    StorageFull,
    StoreWarning,
    Unreadable,
)
from ckptstore.protocol import PartWriter


@pytest.fixture
def backend(tmp_path: Path) -> LocalBackend:
    return LocalBackend.open(str(tmp_path / "store"), {})


@pytest.fixture(autouse=True)
def _never_hang() -> Iterator[None]:
    """Opening a FIFO may block for ever; then SIGALRM ends the test run loudly."""
    signal.alarm(60)
    yield
    signal.alarm(0)


def _write(backend: LocalBackend, key: str, data: bytes) -> None:
    writer = backend.open_writer(key)
    writer.write(0, memoryview(data), 0)
    writer.finish()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())


# -- where the store is


def test_open_touches_nothing_and_reads_of_nothing_are_not_found(tmp_path: Path) -> None:
    backend = LocalBackend.open(str(tmp_path / "a" / "b"), {})
    assert [*backend.list("")] == []
    with pytest.raises(NotFound):
        backend.get("log/1", 10)
    backend.delete(["log/1"])
    assert not (tmp_path / "a").exists()


def test_location_is_made_absolute_once_and_tilde_is_literal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    backend = LocalBackend.open("~/x", {})
    monkeypatch.chdir("/")
    backend.put_if_absent("log/1", b"x")
    assert (tmp_path / "~" / "x" / "log" / "1").read_bytes() == b"x"
    assert backend.url == str(tmp_path / "~" / "x")


def test_dot_dot_behind_a_link_means_what_the_system_means(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "inner")
    LocalBackend.open(f"{tmp_path}/link/../store", {}).put_if_absent("log/1", b"x")
    assert (tmp_path / "real" / "store" / "log" / "1").exists()


@pytest.mark.parametrize(("location", "options"), [("", {}), ("a\0b", {}), ("x", {"cache": "1"})])
def test_bad_location_or_option(location: str, options: dict[str, str]) -> None:
    with pytest.raises(InvalidOption if options else InvalidURL):
        LocalBackend.open(location, options)


@pytest.mark.parametrize("below", ["", "/store", "/store/deeper"])
def test_a_file_in_the_place_of_the_root_is_said_to_be_one(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    backend = LocalBackend.open(f"{tmp_path}/file{below}", {})
    for call in _calls(backend, "log/1"):
        with pytest.raises(BackendError, match="this is a file, not a folder") as caught:
            call()
        assert caught.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_root_behind_a_dangling_link_is_not_an_empty_store(tmp_path: Path) -> None:
    (tmp_path / "disk").symlink_to(tmp_path / "not mounted")
    for location in ("disk", "disk/store"):
        for call in _calls(LocalBackend.open(str(tmp_path / location), {}), "log/1"):
            with pytest.raises(BackendError, match="is its disk mounted"):
                call()


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    backend = LocalBackend.open(str(tmp_path / "link"), {})
    backend.put_if_absent("log/1", b"x")
    assert backend.get("log/1", 1) == b"x"
    assert (tmp_path / "real" / "log" / "1").exists()


@pytest.mark.parametrize("key", ["", "/etc/x", "../x", "a/../../x", "a//b", "a/.", "a\0b"])
def test_keys_cannot_leave_the_root(tmp_path: Path, backend: LocalBackend, key: str) -> None:
    for call in _calls(backend, key):
        with pytest.raises(InvalidName):
            call()
    assert _files(tmp_path) == []


def _calls(backend: LocalBackend, key: str) -> list[Callable[[], object]]:
    """Every method of the backend, applied to one key."""
    return [
        lambda: backend.get(key, 100),
        lambda: backend.stat(key),
        lambda: backend.read_into(key, 0, memoryview(bytearray(1))),
        lambda: backend.put_if_absent(key, b"x"),
        lambda: backend.replace(key, b"x"),
        lambda: backend.open_writer(key),
        lambda: backend.delete([key]),
        lambda: [*backend.list(key + "/")],
    ]


# -- entries that somebody planted


def test_a_linked_folder_is_never_followed(tmp_path: Path, backend: LocalBackend) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "state.pt").write_bytes(b"secret")
    (outside / "deep" / "state.pt").write_bytes(b"secret")
    backend.put_if_absent("data/real/x", b"x")
    (tmp_path / "store" / "data" / "x").symlink_to(outside)
    for key in ("data/x/state.pt", "data/x/new", "data/x/deep/state.pt", "data/x/new/new"):
        for call in _calls(backend, key):
            with pytest.raises(BackendError, match=r"symbolic link.*remove it"):
                call()
    assert _files(outside) == ["deep/state.pt", "state.pt"]
    assert [(i.key, i.size) for i in backend.list("data/")] == [("data/real/x", 1), ("data/x", 0)]
    backend.delete(["data/x"])
    assert [i.key for i in backend.list("")] == ["data/real/x"]
    assert _files(outside) == ["deep/state.pt", "state.pt"]


def test_a_linked_file_is_never_followed(tmp_path: Path, backend: LocalBackend) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    backend.put_if_absent("log/1", b"x")
    for name, target in (("2", outside), ("3", tmp_path / "nothing")):
        (tmp_path / "store" / "log" / name).symlink_to(target)
        for call in _calls(backend, f"log/{name}")[:3]:
            with pytest.raises(BackendError, match="symbolic link"):
                call()
        with pytest.raises(AlreadyExists):
            backend.put_if_absent(f"log/{name}", b"x")
        writer = backend.open_writer(f"log/{name}")
        with pytest.raises(AlreadyExists):
            writer.finish()
        writer.abort()
    assert [(i.key, i.size) for i in backend.list("")] == [("log/1", 1), ("log/2", 0), ("log/3", 0)]
    backend.replace("log/2", b"mine")
    assert backend.get("log/2", 10) == b"mine"
    backend.delete(["log/3"])
    assert outside.read_bytes() == b"secret"
    assert _files(tmp_path) == ["outside", "store/log/1", "store/log/2"]


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_fifos_sockets_and_devices_are_refused_without_waiting(
    tmp_path: Path, backend: LocalBackend, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.put_if_absent("log/1", b"x")
    monkeypatch.chdir(tmp_path / "store" / "log")  # the path of a socket is at most 107 bytes long
    if kind == "fifo":
        os.mkfifo("2")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("2")
    else:
        try:
            os.mknod("2", stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root can make devices")
    for call in _calls(backend, "log/2")[:3]:
        with pytest.raises(BackendError, match="FIFO, a socket or a device"):
            call()
    assert [(i.key, i.size) for i in backend.list("log/")] == [("log/1", 1), ("log/2", 0)]
    backend.delete(["log/2"])
    assert _files(tmp_path) == ["store/log/1"]


def test_a_key_that_names_a_folder_is_an_error(tmp_path: Path, backend: LocalBackend) -> None:
    backend.put_if_absent("data/x/manifest.json", b"x")
    for call in (*_calls(backend, "data/x")[:3], _calls(backend, "data/x")[4], _calls(backend, "data/x")[6]):
        with pytest.raises(BackendError):
            call()
    assert _files(tmp_path) == ["store/data/x/manifest.json"]


def test_delete_removes_empty_folders_but_not_the_root(tmp_path: Path, backend: LocalBackend) -> None:
    for key in ("data/x/a/b/c", "data/x/a/d", "data/y/e"):
        backend.put_if_absent(key, b"x")
    backend.delete(["data/x/a/b/c"])
    assert not (tmp_path / "store/data/x/a/b").exists()
    assert (tmp_path / "store/data/x/a").exists()
    backend.delete(["data/x/a/d", "data/y/e"])
    assert [*(tmp_path / "store").iterdir()] == []


def test_names_of_255_bytes_and_deep_folders(backend: LocalBackend) -> None:
    key = "data/" + "d/" * 60 + "n" * 255
    backend.put_if_absent(key, b"x")
    assert [i.key for i in backend.list("")] == [key]
    assert backend.get(key, 1) == b"x"
    backend.delete([key])
    with pytest.raises(BackendError):
        backend.put_if_absent("n" * 256, b"x")


# -- disks that refuse


def test_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=1m"):
        backend = LocalBackend.open(str(tmp_path / "disk" / "store"), {})
        backend.put_if_absent("log/1", b"x")
        for call in (lambda: backend.put_if_absent("log/2", bytes(2 << 20)), lambda: backend.replace("log/1", bytes(2 << 20))):
            with pytest.raises(StorageFull, match="free space"):
                call()
        writer = backend.open_writer("data/x/state.pt")
        with pytest.raises(StorageFull) as caught:
            writer.write(0, memoryview(bytes(2 << 20)), 0)
        assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "disk/store/data/x/state.pt"))
        with pytest.raises(BackendError, match="only abort may follow"):
            writer.finish()
        writer.abort()
        assert _files(tmp_path / "disk") == ["store/log/1"]
        assert backend.get("log/1", 1) == b"x"


def test_no_inode_left(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "nr_inodes=6"):
        backend = LocalBackend.open(str(tmp_path / "disk"), {})
        with pytest.raises(StorageFull):
            for i in range(10):
                backend.put_if_absent(f"log/{i}", b"x")
        assert 1 <= len(_files(tmp_path / "disk")) < 6
        assert not any(name.endswith(".partial") for name in _files(tmp_path / "disk"))


def test_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=1m"):
        backend = LocalBackend.open(str(tmp_path / "disk"), {})
        backend.put_if_absent("log/1", b"x")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        calls = _calls(backend, "log/1")
        for call in (calls[3], calls[4], calls[5], calls[6]):
            with pytest.raises(PermissionDenied, match="read-only"):
                call()
        assert backend.get("log/1", 1) == b"x"


def test_what_may_not_be_looked_at_is_not_called_absent(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    backend = LocalBackend.open(str(tmp_path / "store"), {})
    backend.put_if_absent("log/1", b"x")
    (tmp_path / "store" / "log").chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # mode bits do not stop root
    try:
        for call in _calls(backend, "log/1"):
            with pytest.raises(PermissionDenied):
                call()
    finally:
        os.seteuid(user)
        (tmp_path / "store" / "log").chmod(0o755)


def test_file_too_large_for_the_process(tmp_path: Path) -> None:
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n" + _PUT.replace("b'x'", "bytes(2000)")
    assert _run(tmp_path, code)["error"] == "StorageFull"
    assert _files(tmp_path) == []


# -- threads, processes, descriptors


def test_the_disk_begins_while_a_large_file_is_written(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []

    def note(fd: int, end: int = 0) -> None:
        sent.append((end, os.fstat(fd).st_size))
        posix.start_writeback(fd, end)

    monkeypatch.setattr(local, "start_writeback", note)
    piece, writer = memoryview(bytes(range(251)) * 12_000), backend.open_writer("data/x/large")
    for number in range(10):  # 30 MB
        writer.write(number * len(piece), piece, number)
    assert all(end % (1 << 20) == 0 and size - (1 << 20) < end <= size for end, size in sent)
    assert [size // len(piece) for _, size in sent] == [3, 6, 9]
    writer.finish()
    assert sent[3:] == [(0, 10 * len(piece))]  # to its end
    assert backend.get("data/x/large", 1 << 25) == bytes(piece) * 10


def test_no_descriptor_is_left_open(tmp_path: Path, backend: LocalBackend) -> None:
    backend.put_if_absent("log/1", b"x")
    backend.put_if_absent("log/2", b"x")  # so that the folder stays
    (tmp_path / "store" / "link").symlink_to(tmp_path)
    before = os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else os.listdir("/dev/fd")
    for key in ("log/1", "log/new", "link/x", "log", "log/1/x", "no/x", ".."):
        for call in _calls(backend, key):
            try:
                result = call()
            except (BackendError, NotFound, InvalidName, AlreadyExists):
                continue
            if isinstance(result, local._LocalWriter):
                result.abort()
    _write(backend, "data/x", b"x")
    next(iter(backend.list("")))
    assert os.listdir("/proc/self/fd" if os.path.exists("/proc/self/fd") else "/dev/fd") == before


def _begin(backend: LocalBackend, key: str) -> PartWriter:
    writer = backend.open_writer(key)
    writer.write(0, memoryview(b"some"), 0)
    writer.start_finish()
    return writer


def test_an_interrupt_at_the_end_leaves_nothing_open(backend: LocalBackend) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = _begin(backend, "data/x/a")
    with mock.patch.object(posix.NewFile, "close", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        writer.finish()
    writer.abort()
    assert len(os.listdir("/proc/self/fd")) == before
    assert backend.get("data/x/a", 4) == b"some"


@pytest.mark.parametrize("first_ends", ["finish", "abort"])
def test_a_second_file_uses_the_folder_that_the_first_has_open(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, first_ends: str
) -> None:
    before = set(os.listdir("/dev/fd"))
    opened: list[object] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda *args, **more: (opened.append(args[0]), real(*args, **more))[1])
    first = _begin(backend, "data/a/1")
    opened.clear()
    second = _begin(backend, "data/a/2")
    assert len(opened) == 1, opened  # itself, and no folder
    getattr(first, first_ends)()
    second.finish()  # whatever became of the first
    third = backend.open_writer("data/a/3")  # nobody has it open any more
    assert len(opened) > 3
    third.abort()
    monkeypatch.undo()
    assert _files(Path(backend.root)) == ["data/a/1"] * (first_ends == "finish") + ["data/a/2"]
    assert set(os.listdir("/dev/fd")) == before


def test_a_part_may_have_any_format_and_no_dimension(backend: LocalBackend) -> None:
    writer = backend.open_writer("data/a/1")
    writer.write(0, memoryview(b"12345678").cast("d"), 0)
    writer.write(8, memoryview(b"9").cast("c", shape=[]), 1)
    writer.finish()
    assert backend.get("data/a/1", 99) == b"123456789"


def test_a_second_file_makes_a_folder_anew_that_was_removed(backend: LocalBackend) -> None:
    before = len(os.listdir("/dev/fd"))
    first = _begin(backend, "data/a/1")
    backend.delete(["data/a/1"])
    assert not (Path(backend.root) / "data/a").exists()
    second = _begin(backend, "data/a/2")
    second.finish()
    first.abort()
    assert backend.get("data/a/2", 9) == b"some"
    assert len(os.listdir("/dev/fd")) == before


def test_a_second_file_that_cannot_be_made_lets_go_of_the_folder(backend: LocalBackend) -> None:
    before = len(os.listdir("/dev/fd"))
    first = _begin(backend, "data/a/1")
    with mock.patch.object(local, "NewFile", side_effect=OSError(errno.EMFILE, "no more")), pytest.raises(BackendError):
        backend.open_writer("data/a/2")
    first.finish()
    assert len(os.listdir("/dev/fd")) == before


def test_a_name_that_is_given_while_its_folder_is_flushed_gets_a_flush_of_its_own(backend: LocalBackend) -> None:
    first = _begin(backend, "data/a/1")
    others: list[PartWriter] = []
    flushed: list[int] = []  # inodes
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        flushed.append(os.fstat(fd).st_ino)
        if stat.S_ISDIR(os.fstat(fd).st_mode) and not others:
            others.append(_begin(backend, "data/a/2"))

    with mock.patch.object(os, "fsync", fsync):
        first.finish()
        flushed.clear()
        others[0].finish()
    assert (Path(backend.root) / "data/a").stat().st_ino in flushed


def test_nothing_remembers_a_file_whose_flush_failed(backend: LocalBackend) -> None:
    before = len(os.listdir("/dev/fd"))
    writer = _begin(backend, "data/a/1")
    with mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "bad disk")), pytest.raises(BackendError):
        writer.finish()
    assert not backend._unflushed, "a later one would share its folder, and count on its flush"
    writer.abort()
    assert len(os.listdir("/dev/fd")) == before


def test_nothing_remembers_a_file_whose_abort_was_interrupted(backend: LocalBackend) -> None:
    writer = _begin(backend, "data/a/1")
    with mock.patch.object(posix.NewFile, "withdraw", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        writer.abort()
    assert not backend._unflushed
    writer.abort()


@pytest.mark.parametrize("how", ["get", "read_into", "reader", "open_file"])
def test_what_is_no_file_is_closed_again(backend: LocalBackend, how: str) -> None:
    backend.put_if_absent("log/1", b"x")
    before = len(os.listdir("/dev/fd"))
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: backend.get("log", 9),
        "read_into": lambda: backend.read_into("log", 0, memoryview(bytearray(1))),
        "reader": lambda: backend.reader("log").__enter__(),
        "open_file": lambda: backend.open_file("log"),
    }
    with pytest.raises(Unreadable):
        calls[how]()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    "create",
    [lambda backend: backend.put_if_absent("log/1", b"x"), lambda backend: _write(backend, "log/1", b"x")],
    ids=["put", "part"],
)
def test_after_an_error_as_a_file_is_closed_no_folder_is_flushed(
    backend: LocalBackend, create: Callable[[LocalBackend], None]
) -> None:
    """What a file has lost is told late by some file systems; a name that says it is whole must not become durable."""
    flushed: list[int] = []

    def fsync(fd: int) -> None:
        flushed.append(stat.S_IFMT(os.fstat(fd).st_mode))

    def close_file(new: posix.NewFile) -> None:
        fd, new.fd = new.fd, -1
        if fd >= 0:
            os.close(fd)
            raise OSError(errno.EDQUOT, "no quota left")

    with (
        mock.patch.object(os, "fsync", fsync),
        mock.patch.object(posix.NewFile, "close_file", close_file),
        pytest.raises(StorageFull),
    ):
        create(backend)
    assert flushed == [stat.S_IFREG]
    assert _files(Path(backend.root)) == []


def test_a_reader_leaves_nothing_open(backend: LocalBackend) -> None:
    backend.put_if_absent("log/1", b"x")
    before = len(os.listdir("/dev/fd"))
    with backend.reader("log/1") as read_into:
        assert len(os.listdir("/dev/fd")) == before + 1
        read_into(0, memoryview(bytearray(1)))
        with pytest.raises(BackendError, match="ends at byte 1, expected 2"):
            read_into(0, memoryview(bytearray(2)))
    assert len(os.listdir("/dev/fd")) == before


def test_deleting_the_last_file_of_a_folder_does_not_disturb_who_writes_there(backend: LocalBackend) -> None:
    stop = threading.Event()

    def delete() -> None:
        mine = LocalBackend.open(backend.root, {})
        while not stop.is_set():
            mine.delete(["data/x/y/other"])  # not there, so the folders are removed whenever they are empty

    thread = threading.Thread(target=delete)
    thread.start()
    try:
        for _ in range(100):
            _write(backend, "data/x/y/state.pt", b"x")
            backend.delete(["data/x/y/state.pt"])
    finally:
        stop.set()
        thread.join()


def test_abort_does_not_close_the_file_under_a_writing_thread(
    tmp_path: Path, backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow_write_all(fd: int, offset: int, view: memoryview) -> None:
        inside.set()
        go_on.wait()
        posix.write_all(fd, offset, view)  # would hit a closed descriptor, or somebody else's file

    monkeypatch.setattr(folder, "write_all", slow_write_all)
    writer = backend.open_writer("data/x")
    errors: list[BaseException] = []

    def write() -> None:
        try:
            writer.write(0, memoryview(b"x"), 0)
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=write)
    thread.start()
    inside.wait()
    before = len(os.listdir("/dev/fd"))
    writer.abort()
    go_on.set()
    thread.join()
    assert errors == []
    assert len(os.listdir("/dev/fd")) < before
    assert _files(tmp_path) == []


def test_processes_race_for_slots(tmp_path: Path) -> None:
    code = _HEAD + (
        "sys.stdin.readline()\nwon = []\nfor i in range(40):\n"
        "    try: backend.put_if_absent(f'log/{i}', str(os.getpid()).encode()); won.append(i)\n"
        "    except AlreadyExists: pass\nprint(json.dumps([os.getpid(), won]))\n"
    )
    racers = [_start(tmp_path, code) for _ in range(4)]
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners = dict(json.loads(racer.communicate()[0]) for racer in racers)
    assert sorted(i for won in winners.values() for i in won) == list(range(40))
    for pid, won in winners.items():
        assert all((tmp_path / "store" / "log" / str(i)).read_text() == str(pid) for i in won)


def test_survives_a_fork(tmp_path: Path) -> None:
    fork = "pid = os.fork()\nif not pid:\n    backend.put_if_absent('log/2', b'child')\n    os._exit(0)\nos.waitpid(pid, 0)\n"
    assert _run(tmp_path, _PUT + fork + "backend.put_if_absent('log/3', b'parent')\n")["error"] is None
    assert _files(tmp_path) == ["store/log/1", "store/log/2", "store/log/3"]


# -- children, for what needs a process of its own

_HEAD = """
import json, os, sys
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import AlreadyExists
backend = LocalBackend.open("store", {})
"""
_PUT = _HEAD + "backend.put_if_absent('log/1', b'x')\n"


def _start(place: Path, code: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(posix.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=place, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _run(place: Path, code: str) -> dict[str, object]:
    """Run `code` in a child; return the name of the error it ended with, if any."""
    env = {**os.environ, "PYTHONPATH": str(Path(posix.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, text=True, capture_output=True)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    return {"error": last[0].partition(":")[0].rpartition(".")[2] if done.returncode else None}


def test_another_folder_under_the_same_name_is_refused(tmp_path: Path) -> None:
    """A disk unmounted under a running job leaves an empty folder where the store was: nothing may be committed there."""
    backend = LocalBackend.open(str(tmp_path / "store"), {})
    backend.put_if_absent("log/1", b"1")
    (tmp_path / "store").rename(tmp_path / "away")
    (tmp_path / "store").mkdir()
    for use in (
        lambda: backend.put_if_absent("log/2", b"2"),
        lambda: backend.stat("log/1"),
        lambda: list(backend.list("")),
        lambda: backend.open_writer("data/x/y"),
    ):
        with pytest.raises(BackendError, match="not the folder it was before"):
            use()
    assert list((tmp_path / "store").iterdir()) == []
    (tmp_path / "store").rmdir()
    (tmp_path / "away").rename(tmp_path / "store")
    backend.put_if_absent("log/2", b"2")


def test_an_empty_folder_left_behind_is_listed_and_deleted(tmp_path: Path) -> None:
    backend = LocalBackend.open(str(tmp_path), {})
    (tmp_path / "data/x/y").mkdir(parents=True)
    (tmp_path / "data/z").mkdir()
    keys = [info.key for info in backend.list("data/")]
    assert keys == ["data/x/y/", "data/z/"]
    assert [info.key for info in backend.list("data/", "data/x/y/")] == ["data/z/"]
    backend.delete(keys)
    assert list(backend.list("")) == []
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())


def test_a_media_error_is_told_from_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO of a read is for good, and the layer above may fall back; EIO of a look-up proves nothing."""
    backend = LocalBackend.open(str(tmp_path), {})
    backend.put_if_absent("data/x", b"12345")

    def lost(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lost)
        with pytest.raises(Unreadable):
            backend.read_into("data/x", 0, memoryview(bytearray(5)))
        with pytest.raises(Unreadable):
            backend.get("data/x", 100)
    with monkeypatch.context() as patch, pytest.raises(BackendError) as caught:
        patch.setattr(os, "stat", lost)
        backend.stat("data/x")
    assert not isinstance(caught.value, Unreadable)


def test_where_the_top_cannot_be_looked_at_the_flushes_above_the_root_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ismount() says no when its own look fails."""
    looks = iter([False] * 100)
    monkeypatch.setattr(os.path, "ismount", lambda path: next(looks))
    backend = LocalBackend.open(str(tmp_path / "store"), {})
    backend.put_if_absent("log/1", b"x")
    assert backend.get("log/1", 10) == b"x"


# -- what the disk says late


def test_an_error_as_a_new_version_is_closed_leaves_the_old_one(backend: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quota, for one, may be told only then; a shrunk record that was cut short would look like a damaged one."""
    backend.replace("log/hint", b"old")
    close = os.close

    def refuse(fd: int) -> None:
        new = os.readlink(f"/proc/self/fd/{fd}").endswith(posix.PARTIAL)
        close(fd)
        if new:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(posix.os, "close", refuse)
    with pytest.raises(StorageFull):
        backend.replace("log/hint", b"new")
    monkeypatch.undo()
    assert backend.get("log/hint", 100) == b"old"
    assert _files(Path(backend.root)) == ["log/hint"]


def test_a_folder_that_other_hosts_may_write_to_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "file_system", lambda path: "nfs4")
    backend = LocalBackend.open(str(tmp_path), {})
    with pytest.warns(StoreWarning, match=f"nfs4.*shared://{tmp_path}"):
        assert list(backend.list("")) == []


@pytest.mark.filterwarnings("ignore::ckptstore.StoreWarning")
def test_a_file_that_is_not_to_be_mapped_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "file_system", lambda path: "nfs4")
    backend = LocalBackend.open(str(tmp_path), {})
    backend.put_if_absent("log/1", b"x")
    before = len(os.listdir("/dev/fd"))
    assert backend.open_file("log/1") is None
    assert len(os.listdir("/dev/fd")) == before


def test_who_takes_the_warning_for_an_error_gets_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "file_system", lambda path: "nfs4")
    backend = LocalBackend.open(str(tmp_path), {})
    with pytest.raises(StoreWarning):
        list(backend.list(""))
    assert list(backend.list("")) == []


def _flushed(monkeypatch: pytest.MonkeyPatch, fails: Path | None = None) -> list[Path]:
    """Return the list of the folders that are flushed from now on; the first flush of `fails` does."""
    flushed: list[Path] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            flushed.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
            if flushed[-1] == fails and flushed.count(fails) == 1:
                raise OSError(errno.EIO, "bad disk")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    return flushed


@pytest.mark.parametrize("place", ["above the root", "the root"])
def test_a_folder_whose_flush_failed_is_flushed_the_next_time(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    path = Path(backend.root) if place == "the root" else Path(backend.root).parent
    flushed = _flushed(monkeypatch, path)
    with pytest.raises(BackendError):
        backend.put_if_absent("a/1", b"x")
    backend.put_if_absent("a/1", b"x")
    assert flushed.count(path) == 2


def test_a_folder_above_that_may_be_written_to_and_cannot_be_flushed_is_an_error(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "fsync_dir", mock.Mock(side_effect=PermissionError(errno.EACCES, "not you")))
    with pytest.raises(PermissionDenied):
        backend.put_if_absent("a/1", b"x")


def test_what_cannot_be_deleted_is_called_a_folder_only_if_it_is_one(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.put_if_absent("a/1", b"x")
    with pytest.raises(Unreadable, match="this is a folder where a file should be"):
        backend.delete(["a"])
    monkeypatch.setattr(os, "unlink", mock.Mock(side_effect=PermissionError(errno.EACCES, "not you")))
    with pytest.raises(PermissionDenied):
        backend.delete(["a/1"])


def test_a_new_folder_with_the_number_of_one_that_was_removed_is_flushed(
    backend: LocalBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posix.Folders, "identity", lambda self, i: (self.paths[i], 0, 0))
    backend.put_if_absent("a/1", b"x")
    backend.delete(["a/1"])
    flushed = _flushed(monkeypatch)
    backend.put_if_absent("a/2", b"x")
    assert Path(backend.root) in flushed


def test_a_folder_that_goes_each_time_is_not_made_for_ever(backend: LocalBackend) -> None:
    gone = FileNotFoundError(errno.ENOENT, "gone")
    with mock.patch.object(folder, "NewFile", side_effect=gone) as made, pytest.raises(FileNotFoundError):
        backend._new_file("a/1")
    assert made.call_count == 100


@pytest.mark.parametrize("end", ["finish", "abort"])
def test_nothing_is_written_to_a_file_that_is_over(backend: LocalBackend, end: str) -> None:
    writer = _begin(backend, "data/a/1")
    getattr(writer, end)()
    with pytest.raises(BackendError, match="only abort may follow"):
        writer.write(4, memoryview(b"more"), 1)


def test_on_the_way_down_only_the_innermost_folder_is_held(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with posix.Folders(str(tmp_path), os.open(tmp_path, os.O_RDONLY)) as folders:
        folders.descend("a")
        folders.descend("b")
        assert [os.fstat(fd).st_ino for fd in folders.fds] == [(tmp_path / "a" / "b").stat().st_ino]


def test_a_folder_is_told_apart_from_one_whose_descriptor_it_got(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    with posix.Folders(str(tmp_path), os.open(tmp_path, os.O_RDONLY)) as folders:
        first, (root,) = folders.identity(0), folders.fds
        folders.descend("a")
        folders.descend("b")
        assert folders.fds == [root], "the number is free, and so given to the next"
        found = (tmp_path / "a" / "b").stat()
        assert folders.identity(0) == (str(tmp_path / "a" / "b"), found.st_dev, found.st_ino) != first


def test_a_disk_that_accepts_no_bytes_is_an_error_and_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([2, 0])
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: next(answers))
    with pytest.raises(OSError, match="accepted no bytes") as caught:
        posix.write_all(0, 0, memoryview(b"some bytes"))
    assert caught.value.errno == errno.EIO
