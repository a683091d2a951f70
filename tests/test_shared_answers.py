"""What the shared backend makes of each lie of a shared file system, one by one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sick_os import SickOS, error_after, error_before
from stores import contents, write

from ckptstore import Store
from ckptstore.backends import _shared_names
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import AlreadyExists, Ambiguous, BackendError, NoAtomicCreate, NotFound

FILES = {"a": b"first", "b/c": b"second" * 1000, "d": b""}
PATHS = ("link", "listdir", "lstat", "mkdir", "open", "replace", "rmdir", "scandir", "stat", "unlink")


@pytest.fixture(autouse=True)
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[SickOS]:
    monkeypatch.setattr(_shared_names, "PAUSES", (0.0,) * len(_shared_names.PAUSES))
    with SickOS().installed() as it:
        yield it


def backend_at(folder: Path) -> SharedBackend:
    return SharedBackend.open(str(folder), {})


def test_all_is_flushed_and_closed_before_the_link_and_the_folder_after_it(tmp_path: Path, sick: SickOS) -> None:
    steps: list[str] = []

    def note(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        name = os.readlink(f"/proc/self/fd/{args[0]}") if isinstance(args[0], int) else str(args[0])
        kind = "temp" if name.endswith(".partial") else os.path.relpath(name, tmp_path)
        steps.append(f"{call.__name__.strip('_').replace('no_flush', 'fsync')} {kind}")
        return call(*args, **kwargs)

    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("log/1", b"settles what is above")
    sick.start(lambda name, nth: note if name in ("pwrite", "fsync", "close", "link") else None)
    backend.put_if_absent("log/2", b"2", lambda: steps.append("ready"))
    put = [step for step in steps if not step.startswith("close") or step == "close temp"]
    assert put == ["pwrite temp", "ready", "fsync temp", "close temp", "link temp", "fsync log"]
    steps.clear()
    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"a"), 0)
    writer.start_finish()
    writer.finish()
    finish = [step for step in steps if not step.startswith("close") or step == "close temp"]
    assert finish == ["pwrite temp", "fsync temp", "close temp", "fsync .", "fsync data", "link temp", "fsync data/x"]


def test_removed_files_that_somebody_has_open_are_neither_listed_nor_deleted(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("data/x/a", b"a")
    odd = tmp_path / "data" / "x" / f".nfs{0:024x}"
    odd.write_bytes(b"somebody has it open")
    assert [info.key for info in backend.list("")] == ["data/x/a"]
    backend.delete(["data/x/a"])
    assert [info.key for info in backend.list("")] == []
    assert odd.exists()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_hard_links_only_a_single_writer_may_write(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    sick.start(lambda name, nth: error_before(number) if name == "link" else None)
    with Store(f"shared://{tmp_path}") as store, pytest.raises(NoAtomicCreate, match=r"hard links.*single_writer=1"):
        write(store)
    with Store(f"shared://{tmp_path}?single_writer=1") as store:
        made = write(store, files=FILES)
        assert contents(store, made) == FILES


def test_a_link_that_replaces_is_found_out(tmp_path: Path, sick: SickOS) -> None:
    def replacing(call: Callable[..., object], args: tuple[str, str], kwargs: dict[str, int]) -> None:
        fd = kwargs["dst_dir_fd"]
        with suppress(FileNotFoundError):
            os.unlink(args[1], dir_fd=fd)
        os.link(*args, src_dir_fd=fd, dst_dir_fd=fd)

    (tmp_path / "log").mkdir()
    sick.start(lambda name, nth: replacing if name == "link" else None)
    with Store(f"shared://{tmp_path}") as store, pytest.raises(NoAtomicCreate, match="single_writer=1"):
        write(store)


def test_two_links_that_both_say_that_they_won(tmp_path: Path, sick: SickOS) -> None:
    """The file under the name is looked at, whatever was said."""

    def lie(call: Callable[..., object], args: tuple[str, str], kwargs: dict[str, int]) -> None:
        with suppress(FileExistsError):
            os.link(*args, **kwargs)

    (tmp_path / "log").mkdir()
    first, second = backend_at(tmp_path), backend_at(tmp_path)
    sick.start(lambda name, nth: lie if name == "link" else None)
    first.put_if_absent("log/1", b"first")
    with pytest.raises(AlreadyExists):
        second.put_if_absent("log/1", b"second")
    assert second.get("log/1", 10) == b"first"


def test_a_link_that_was_made_and_a_name_that_has_another_file_contradict_each_other(tmp_path: Path, sick: SickOS) -> None:
    """Another host may have replaced it, and believe that it has won."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)

    def replaced(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(args[0], "elsewhere", **kwargs)
        (tmp_path / "log" / "1").write_bytes(b"another")

    sick.start(lambda name, nth: replaced if name == "link" else None)
    with pytest.raises(Ambiguous, match="it has two names, but under its own there is another file"):
        backend.put_if_absent("log/1", b"1")


@pytest.mark.parametrize("number", [errno.EEXIST, errno.EIO])
def test_the_count_of_links_tells_when_the_name_is_not_seen_yet(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    made = error_after(number)

    def hidden(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if args[0] == "1":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: made if name == "link" else hidden if name == "stat" else None)
    backend.put_if_absent("log/1", b"1")
    assert backend.get("log/1", 1) == b"1"


def test_what_became_of_a_link_is_looked_up_in_the_folder_opened_anew(tmp_path: Path, sick: SickOS) -> None:
    """Through a folder that was opened before, a host may still see what it had cached."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    made = error_after(errno.EIO)
    fresh: list[int] = []

    def opened(call: Callable[..., int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        fresh.append(call(*args, **kwargs))
        return fresh[-1]

    def cached(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if kwargs.get("dir_fd") not in fresh:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: None if not sick.seen["link"] else {"link": made, "open": opened, "stat": cached}.get(name))
    backend.put_if_absent("log/1", b"1")
    assert fresh
    assert backend.get("log/1", 1) == b"1"


def test_a_folder_that_has_become_stale_is_opened_anew_for_the_link(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    stale: list[int] = []

    def link(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        stale[:] = stale or [os.dup(kwargs["dst_dir_fd"]), kwargs["dst_dir_fd"]]
        if kwargs["dst_dir_fd"] in stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: link if name == "link" else None)
    backend.put_if_absent("log/1", b"1")
    assert backend.get("log/1", 1) == b"1"
    os.close(stale[0])


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO])
def test_a_rename_that_was_made_counts(tmp_path: Path, sick: SickOS, number: int) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    sick.start(lambda name, nth: error_after(number) if name == "replace" else None)
    backend.replace("hint", b"new")
    assert backend.get("hint", 3) == b"new"
    assert sorted(os.listdir(tmp_path)) == ["hint", "log"]


@pytest.mark.parametrize(
    ("method", "known", "times", "found"),
    [
        ("stat", "created", 4, True),
        ("stat", "met", 4, True),
        ("stat", False, 1, True),
        ("stat", False, 2, False),  # the newest slot is found by looking at what is not there
        ("stat", True, 4, True),
        ("get", False, 4, True),  # its folder lists it
        ("get", True, 4, True),
        ("get", False, 10**6, None),
        ("stat", True, 10**6, None),
    ],
)
def test_what_is_missing_is_looked_for_again(
    tmp_path: Path, sick: SickOS, method: str, known: bool | str, times: int, found: bool | None
) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    (backend if known == "created" else backend_at(tmp_path)).put_if_absent("log/1", b"1")
    if known == "met":
        with pytest.raises(AlreadyExists):
            backend.put_if_absent("log/1", b"2")
    elif known is True:
        backend.stat("log/1")
    left = times

    def missing(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        nonlocal left
        if args[0] == "1" and left:
            left -= call.__name__ == method.replace("get", "open")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    def look() -> object:
        return backend.stat("log/1") if method == "stat" else backend.get("log/1", 1)

    sick.start(lambda name, nth: missing if name in ("open", "stat") else None)
    if found:
        assert look()
    else:
        with pytest.raises(BackendError if found is None else NotFound):
            look()


@pytest.mark.parametrize("call", PATHS)
def test_what_the_server_calls_stale_is_opened_anew(tmp_path: Path, sick: SickOS, call: str) -> None:
    """Nobody is told of it but by the time it takes."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.put_if_absent("log/1", b"1")
    struck = 0
    for act in (
        lambda: backend.get("log/1", 1),
        lambda: backend.stat("log/1"),
        lambda: backend.read_into("log/1", 0, memoryview(bytearray(1))),
        lambda: list(backend.list("")),
        lambda: backend.replace("hint", b"x"),
        lambda: backend.put_if_absent("data/x/a", b"x"),
        lambda: backend.put_if_absent("data/y/a", b"x"),
        lambda: backend.open_writer("data/z/a").abort(),
        lambda: backend.delete(["data/x/a"]),
        lambda: backend.delete(["data/y/a"]),
    ):
        sick.start(lambda name, nth: error_before(errno.ESTALE) if name == call and nth <= 2 else None)
        act()
        struck += sick.seen[call]
        sick.heal()
    found = [info.key for info in backend.list("")]
    assert [key for key in found if not key.endswith(("/", ".partial"))] == ["hint", "log/1"]
    assert struck or call in ("listdir", "lstat")


def test_a_file_that_was_replaced_while_it_was_read_is_read_again(tmp_path: Path, sick: SickOS) -> None:
    """JuiceFS then answers EBADF."""
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    backend.replace("hint", b"1")
    for read in (lambda: backend.get("hint", 9), lambda: backend.read_into("hint", 0, memoryview(bytearray(1)))):
        sick.start(lambda name, nth: error_before(errno.EBADF) if name == "preadv" and nth == 1 else None)
        read()
        assert sick.seen["preadv"] >= 2
        sick.heal()


def test_a_file_that_could_not_be_made_durable_has_no_name(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    for nth in range(1, 100):
        backend = backend_at(tmp_path)
        writer = backend.open_writer("data/x/a")
        writer.write(0, memoryview(b"a"), 0)
        sick.start(lambda name, n, nth=nth: error_before(errno.EIO) if name == "fsync" and n == nth else None)  # type: ignore[misc]
        try:
            writer.finish()
        except BackendError:
            writer.abort()
            assert list(backend.list("")) == []
        else:
            break
    assert nth > 4


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["fsync", "close"])
def test_what_the_flush_or_the_close_tells_counts(tmp_path: Path, sick: SickOS, name: str, number: int) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)

    def fail(call: Callable[..., object], args: tuple[int], kwargs: dict[str, Any]) -> None:
        unfinished = os.readlink(f"/proc/self/fd/{args[0]}").endswith(".partial")
        call(*args, **kwargs)
        if unfinished:
            raise OSError(number, os.strerror(number))

    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"a"), 0)
    sick.start(lambda called, nth: fail if called == name else None)
    for act in (lambda: backend.put_if_absent("log/1", b"1"), writer.finish):
        with pytest.raises(BackendError) as caught:
            act()
        assert caught.value.errno == number
    sick.heal()
    writer.abort()
    assert [info.key for info in backend.list("")] == []
    backend.put_if_absent("log/1", b"2")


def test_a_file_is_opened_once_for_all_its_parts(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "a").write_bytes(bytes(range(100)))
    opened = 0

    def count(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        nonlocal opened
        opened += args[0] == "a"
        return call(*args, **kwargs)

    def still_open() -> bool:
        links = (
            os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")
        )
        return any(link.removesuffix(" (deleted)") == str(tmp_path / "a") for link in links)

    def read(start: int) -> bytes:
        part = bytearray(10)
        backend.read_into("a", start, memoryview(part))
        return bytes(part)

    def read_beyond_the_end() -> None:
        with pytest.raises(BackendError):
            read(95)

    backend = backend_at(tmp_path)
    sick.start(lambda name, nth: count if name == "open" else None)
    assert b"".join(read(start) for start in range(0, 100, 10)) == bytes(range(100))
    assert opened == 1
    assert not still_open(), "it was read to its end"
    ends: list[Callable[[], object]] = [
        lambda: backend.delete(["b"]),  # perhaps the same file: an NFS client would keep it as .nfs…
        backend.close,
        read_beyond_the_end,
    ]
    for end in ends:
        read(0)
        assert still_open()
        end()
        assert not still_open()
    read(0)
    (tmp_path / "new").write_bytes(bytes(100))
    (tmp_path / "new").rename(tmp_path / "a")
    assert read(10) == bytes(10), "what was put there instead is read"


def test_a_file_grows_from_its_start_to_its_end_in_whatever_order_its_parts_come(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    writer = backend.open_writer("data/x/a")
    places: list[int] = []

    def note(real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places.append(args[2])
        return real(*args, **kwargs)

    sick.start(lambda name, nth: note if name == "pwrite" else None)
    for number in (2, 0, 3, 1):
        writer.write(number * 1000, memoryview(bytes([number]) * 1000), number)
    writer.finish()
    sick.heal()
    assert places == [0, 1000, 2000, 3000]
    assert backend.get("data/x/a", 5000) == b"".join(bytes([number]) * 1000 for number in range(4))


def test_a_file_with_a_gap_is_not_published(tmp_path: Path, sick: SickOS) -> None:
    (tmp_path / "log").mkdir()
    backend = backend_at(tmp_path)
    writer = backend.open_writer("data/x/a")
    writer.write(1000, memoryview(bytes(1000)), 1)
    with pytest.raises(BackendError, match="never written"):
        writer.finish()
    writer.abort()
    assert not [*backend.list("data/")]
