"""`atomic_torch_save`: the old file or the new one, nothing in between and nothing beside it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mounted, traced

from ckptstore.atomic import atomic_torch_save
from ckptstore.errors import BackendError, NotFound, StorageFull, UsageError


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("zipped", [True, False])
def test_saves_what_torch_saves(tmp_path: Path, zipped: bool) -> None:
    weight = torch.arange(100_000.0)
    obj = {"weight": weight, "view": weight[10:20], "step": 3}
    atomic_torch_save(obj, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded["weight"], weight)
    assert loaded["view"].untyped_storage().data_ptr() == loaded["weight"].untyped_storage().data_ptr()
    assert loaded["step"] == 3
    assert _files(tmp_path) == ["x.pt"]


def test_relative_path_and_str(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for value in (1, 2):
        atomic_torch_save(value, "x.pt")
        assert torch.load("x.pt") == value


def test_permission_bits_are_kept_or_the_umask_decides(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    before = os.umask(0o027)
    try:
        atomic_torch_save(1, path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o666, 0o444):
            path.chmod(mode)
            atomic_torch_save(2, path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.touch(0o600)
    modes: list[int] = []

    class Spy:
        def __reduce__(self) -> tuple[Any, ...]:
            modes.extend(stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir())
            return (int, ())

    atomic_torch_save(Spy(), path)
    assert modes == [0o600, 0o600]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "x.pt").symlink_to("real/y.pt")
    for value in (1, 2):  # first the link dangles
        atomic_torch_save(value, tmp_path / "x.pt")
        assert (tmp_path / "x.pt").is_symlink()
        assert torch.load(tmp_path / "real" / "y.pt") == value
    assert _files(tmp_path) == ["real", "x.pt"]
    assert _files(tmp_path / "real") == ["y.pt"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    bad: list[Any] = [
        tmp_path / "folder",
        tmp_path / "fifo",
        tmp_path / "loop",
        f"{tmp_path}/new/",
        "",
        "a\0b",
        b"x",
        None,
        io.BytesIO(),
    ]
    for path in bad:
        with pytest.raises(UsageError):
            atomic_torch_save(1, path)
    with pytest.raises(UsageError, match=r"give the path, or use torch\.save"):
        atomic_torch_save(1, io.BytesIO())  # type: ignore[arg-type]
    assert _files(tmp_path) == ["fifo", "folder", "loop"]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="create it first"):
        atomic_torch_save(1, tmp_path / "a" / "b" / "x.pt")
    assert _files(tmp_path) == []


@pytest.mark.parametrize("error", [KeyError("mine"), OSError(28, "mine"), KeyboardInterrupt()])
def test_errors_of_the_object_pass_through_and_the_old_file_stays(tmp_path: Path, error: BaseException) -> None:
    class Bad:
        def __reduce__(self) -> tuple[Any, ...]:
            raise error

    atomic_torch_save("old", tmp_path / "x.pt")
    with pytest.raises(type(error)) as caught:
        atomic_torch_save([torch.zeros(1000), Bad()], tmp_path / "x.pt")
    assert caught.value is error
    assert torch.load(tmp_path / "x.pt") == "old"
    assert _files(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, zipped: bool) -> None:
    """torch itself says "RuntimeError: unexpected pos 704 vs 598"."""
    with mounted(tmp_path / "disk", "tmpfs", "size=1m"):
        atomic_torch_save("old", tmp_path / "disk" / "x.pt")
        with pytest.raises(StorageFull):
            atomic_torch_save(torch.zeros(1 << 20), tmp_path / "disk" / "x.pt", _use_new_zipfile_serialization=zipped)
        assert torch.load(tmp_path / "disk" / "x.pt") == "old"
        assert _files(tmp_path / "disk") == ["x.pt"]


def test_flushes_and_their_failures(tmp_path: Path) -> None:
    """One child, since importing torch is slow: a good save, one whose first flush fails, and one whose second does."""
    code = """
import json
from ckptstore.atomic import atomic_torch_save
said = []
for i in range(3):
    try: atomic_torch_save(i, f"{i}.pt"); said.append(None)
    except OSError as exc: said.append([type(exc).__name__, getattr(exc, "durable", None)])
print(json.dumps(said))
"""
    steps, said = traced(tmp_path, code, "fsync:error=EIO:when=3+2")
    assert steps == [
        *("fsync 0.pt.tmp", "renameat . 0.pt.tmp . 0.pt", "fsync ."),
        *("fsync 1.pt.tmp FAILED", "unlinkat . 1.pt.tmp"),
        *("fsync 2.pt.tmp", "renameat . 2.pt.tmp . 2.pt", "fsync . FAILED"),
    ]
    assert said == [None, ["BackendError", None], ["Ambiguous", False]]
    assert _files(tmp_path) == ["0.pt", "2.pt"]
    assert issubclass(BackendError, OSError)
