"""What the shared backend tries again, and what not; how long it waits before it does, and in all. Nobody waits here: it is noted."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sick_os import SickOS, Trouble, error_before

from ckptstore.backends import shared as shared_module
from ckptstore.backends._shared_names import PAUSES
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import Ambiguous, BackendError, NotFound, PermissionDenied, StorageFull

PATHS = ("link", "listdir", "lstat", "mkdir", "open", "replace", "rmdir", "scandir", "stat", "unlink")
DATA = ("close", "fsync", "preadv", "pwrite")


@pytest.fixture(autouse=True)
def sick() -> Iterator[SickOS]:
    with SickOS().installed() as it:
        yield it


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it was to pause, each time."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def backend(tmp_path: Path) -> SharedBackend:
    (tmp_path / "log").mkdir()
    backend = SharedBackend.open(str(tmp_path), {})
    backend.put_if_absent("log/1", b"1")
    return backend


def only(name: str, trouble: Trouble, concerned: Callable[[str], bool]) -> Callable[[str, int], Trouble | None]:
    """Make trouble for what concerns some paths, as they are given."""

    def perhaps(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        return trouble(call, args, kwargs) if concerned(str(args[0])) else call(*args, **kwargs)

    return lambda called, nth: perhaps if called == name else None


def test_pauses_grow_and_end() -> None:
    assert list(PAUSES) == sorted(PAUSES)
    assert PAUSES[0] == 0
    assert 2 < sum(PAUSES) < 5, "JuiceFS keeps the old inode for a second; a call that fails is to say so before long"


def test_what_became_of_a_link_is_looked_up_at_longer_and_longer_intervals(
    backend: SharedBackend, sick: SickOS, slept: list[float]
) -> None:
    sick.start(lambda name, nth: error_before(errno.EIO) if name == "link" else None)
    with pytest.raises(Ambiguous, match="look again later"):
        backend.put_if_absent("log/2", b"2")
    assert slept == list(PAUSES)
    assert sick.seen["link"] == 1, "it may have been made"


REFUSALS = [
    (errno.ENOSPC, StorageFull),
    (errno.EDQUOT, StorageFull),
    (errno.EACCES, PermissionDenied),
    (errno.EROFS, PermissionDenied),
]


@pytest.mark.parametrize(("number", "kind"), REFUSALS)
def test_what_was_refused_is_not_tried_again(
    tmp_path: Path, backend: SharedBackend, sick: SickOS, slept: list[float], number: int, kind: type[BackendError]
) -> None:
    """And it is known that it did not happen."""
    backend.replace("hint", b"old")
    for call, act in (
        ("link", lambda: backend.put_if_absent("log/2", b"2")),
        ("replace", lambda: backend.replace("hint", b"new")),
    ):
        sick.start(lambda name, nth, call=call: error_before(number) if name == call else None)  # type: ignore[misc]
        with pytest.raises(kind) as caught:
            act()
        assert caught.value.errno == number
        assert sick.seen[call] == 1
    for act in (lambda: backend.put_if_absent("log/2", b"2"), lambda: backend.open_writer("data/x/a")):
        sick.start(only("open", error_before(number), lambda path: path.endswith(".partial")))
        with pytest.raises(kind):
            act()
    sick.heal()
    assert slept == []
    assert backend.get("hint", 3) == b"old"
    assert os.listdir(tmp_path / "log") == ["1"]


def test_a_store_that_is_not_there_is_not_waited_for(tmp_path: Path, slept: list[float]) -> None:
    backend = SharedBackend.open(str(tmp_path), {})
    for act in (lambda: backend.put_if_absent("log/1", b"1"), lambda: backend.open_writer("data/x/a")):
        with pytest.raises(BackendError, match="there is no store in this folder"):
            act()
    assert slept == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EEXIST])
def test_a_file_that_cannot_be_made_is_tried_again_after_pauses(
    backend: SharedBackend, sick: SickOS, slept: list[float], number: int
) -> None:
    sick.start(only("open", error_before(number), lambda path: path.endswith(".partial")))
    with pytest.raises(BackendError) as caught:
        backend.open_writer("data/x/a")
    assert caught.value.errno == number
    assert slept == list(PAUSES)


def test_what_is_listed_and_cannot_be_opened_is_looked_for_after_pauses(
    backend: SharedBackend, sick: SickOS, slept: list[float]
) -> None:
    sick.start(only("open", error_before(errno.ENOENT), "1".__eq__))
    with pytest.raises(BackendError, match="it is listed, but"):
        backend.get("log/1", 1)
    assert slept == list(PAUSES)
    slept.clear()
    with pytest.raises(NotFound):
        backend.stat("log/2")
    assert slept == list(PAUSES[:1]), "most likely it is not there"


def test_a_root_that_is_there_and_cannot_be_opened_is_not_missing(
    tmp_path: Path, backend: SharedBackend, sick: SickOS, slept: list[float]
) -> None:
    left = 0

    def missing(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        nonlocal left
        if args[0] == str(tmp_path) and left:
            left -= 1
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: missing if name == "open" else None)
    for act in (lambda: backend.get("log/1", 1), lambda: backend.put_if_absent("log/2", b"2")):
        left = 3
        slept.clear()
        act()
        assert slept == list(PAUSES[:3])
    left = 10**6
    with pytest.raises(BackendError, match="it is there, but cannot be opened") as caught:
        backend.get("log/1", 1)
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("call", [*PATHS, *DATA])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EBADF, errno.ENOENT, errno.EIO])
def test_nothing_is_waited_for_longer_than_all_pauses_together(
    backend: SharedBackend, sick: SickOS, slept: list[float], call: str, number: int
) -> None:
    backend.put_if_absent("data/x/a", b"a")
    for act in (
        lambda: backend.get("log/1", 1),
        lambda: backend.stat("log/1"),
        lambda: backend.read_into("log/1", 0, memoryview(bytearray(1))),
        lambda: list(backend.list("log/")),
        lambda: backend.replace("hint", b"x"),
        lambda: backend.put_if_absent("log/2", b"x"),
        lambda: backend.open_writer("data/z/a").abort(),
        lambda: backend.delete(["data/x/a"]),
    ):
        sick.start(lambda name, nth: error_before(number) if name == call else None)
        slept.clear()
        with suppress(BackendError):
            act()
        assert sum(slept) <= sum(PAUSES)


def test_not_all_that_was_ever_seen_is_remembered(backend: SharedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "_SEEN", 5)
    for n in range(2, 20):
        backend.put_if_absent(f"log/{n}", b"x")
        assert len(backend._seen) <= 5
    assert "log/19" in backend._seen
