"""The shared backend's files on their way to a name: closed before they get it, and never in another one's place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from sick_os import SickOS, error_before

from ckptstore.backends import _shared_names
from ckptstore.backends.shared import SharedBackend
from ckptstore.errors import AlreadyExists, BackendError
from ckptstore.posix import NewFile


@pytest.fixture(autouse=True)
def sick(monkeypatch: pytest.MonkeyPatch) -> Iterator[SickOS]:
    monkeypatch.setattr(_shared_names, "PAUSES", (0.0,) * len(_shared_names.PAUSES))
    with SickOS().installed() as it:
        yield it


@pytest.fixture
def backend(tmp_path: Path) -> SharedBackend:
    (tmp_path / "log").mkdir()
    return SharedBackend.open(str(tmp_path), {})


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_the_close_of_a_replacement_tells_counts(tmp_path: Path, backend: SharedBackend, sick: SickOS, number: int) -> None:
    """An NFS client that has no room for what was written says so then; what was there stays."""

    def fail(call: Callable[..., object], args: tuple[int], kwargs: dict[str, Any]) -> None:
        new = os.readlink(f"/proc/self/fd/{args[0]}").startswith(f"{tmp_path}/hint")
        call(*args, **kwargs)
        if new:
            raise OSError(number, os.strerror(number))

    backend.replace("hint", b"old")
    sick.start(lambda name, nth: fail if name == "close" else None)
    with pytest.raises(BackendError) as caught:
        backend.replace("hint", b"new")
    assert caught.value.errno == number
    sick.heal()
    assert backend.get("hint", 3) == b"old"
    assert sorted(os.listdir(tmp_path)) == ["hint", "log"]


@pytest.mark.parametrize("anew", [True, False], ids=["looked up anew", "as it was opened"])
def test_without_hard_links_a_data_file_does_not_replace_another(backend: SharedBackend, sick: SickOS, anew: bool) -> None:
    backend.put_if_absent("data/x/a", b"first")
    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"second"), 0)

    def fail(call: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        if args[0] == "." and not anew:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    sick.start(lambda name, nth: {"link": error_before(errno.EPERM), "open": fail}.get(name))
    with pytest.raises(AlreadyExists):
        writer.finish()
    writer.abort()
    assert backend.get("data/x/a", 9) == b"first"
    assert [info.key for info in backend.list("")] == ["data/x/a"]


def test_what_failed_or_is_over_cannot_be_finished(backend: SharedBackend, sick: SickOS) -> None:
    writer = backend.open_writer("data/x/a")
    sick.start(lambda name, nth: error_before(errno.EIO) if name == "pwrite" else None)
    with pytest.raises(BackendError, match="could not write"):
        writer.write(0, memoryview(b"a"), 0)
    sick.heal()
    with pytest.raises(BackendError, match="this writer is failed"):
        writer.finish()
    writer.abort()
    with pytest.raises(BackendError, match="this writer is aborted"):
        writer.finish()
    assert list(backend.list("")) == []
    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"a"), 0)
    writer.finish()
    with pytest.raises(BackendError, match="this writer is done"):
        writer.finish()
    assert backend.get("data/x/a", 1) == b"a"


def test_a_file_with_a_gap_is_not_even_flushed(backend: SharedBackend, sick: SickOS) -> None:
    writer = backend.open_writer("data/x/a")
    writer.write(1000, memoryview(bytes(1000)), 1)
    sick.start(lambda name, nth: None)
    with pytest.raises(BackendError, match="never written"):
        writer.finish()
    assert not sick.seen["fsync"]
    writer.abort()
    assert list(backend.list("")) == []


def test_an_interrupt_at_the_end_leaves_nothing_open(tmp_path: Path, backend: SharedBackend) -> None:
    before = len(os.listdir("/proc/self/fd"))
    writer = backend.open_writer("data/x/a")
    writer.write(0, memoryview(b"a"), 0)
    with mock.patch.object(NewFile, "close", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        writer.finish()
    writer.abort()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(tmp_path / "data" / "x") == ["a"]
