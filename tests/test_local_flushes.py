"""Who is flushed when, seen from outside: system call traces, injected errors and signals, and a real power cut."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from conftest import mounted, require, traced

from ckptstore.backends.local import LocalBackend
from ckptstore.errors import NotFound

HEAD = """
import atexit, json, os, sys, ckptstore.backends.local as local
backend = local.LocalBackend.open("store", {})
atexit.register(lambda: print(json.dumps([result, [info.key for info in backend.list("")]])))
def write(key):
    writer = backend.open_writer(key)
    writer.write(0, memoryview(b"x" * 5000), 0)
    return writer
def act(call):
    try: call()
    except BaseException as exc: return [type(exc).__name__, getattr(exc, "durable", None)]
"""
PUT = HEAD + "result = act(lambda: backend.put_if_absent('log/1', b'x'))\n"
FINISH = HEAD + "writer = write('data/x/state.pt'); result = act(writer.finish); writer.abort()\n"


def flushes(steps: list[str]) -> int:
    return sum(step.startswith("fsync") for step in steps)


# -- the order of things


def test_put_flushes_file_then_name_and_every_folder_on_the_way(tmp_path: Path) -> None:
    steps, (result, _) = traced(tmp_path, PUT)
    assert result is None
    above = [tmp_path, *tmp_path.parents]
    above = above[: 1 + next(i for i, p in enumerate(above) if p.is_mount())]
    assert steps == [
        "mkdir store",
        "mkdirat store log",
        "fsync store/log/1.tmp",
        *(f"fsync {os.path.relpath(p, tmp_path)}" for p in above),
        "fsync store",
        "linkat store/log 1.tmp store/log 1",
        "unlinkat store/log 1.tmp",
        "fsync store/log",
    ]


def test_a_second_put_flushes_nothing_twice(tmp_path: Path) -> None:
    steps, _ = traced(tmp_path, PUT + "os.mkdir('mark'); backend.put_if_absent('log/2', b'x')\n")
    assert steps[steps.index("mkdir mark") + 1 :] == [
        "fsync store/log/2.tmp",
        "linkat store/log 2.tmp store/log 2",
        "unlinkat store/log 2.tmp",
        "fsync store/log",
    ]


def test_folders_left_by_a_killed_process_are_flushed(tmp_path: Path) -> None:
    """Whoever made them may have died before the flush."""
    (tmp_path / "store" / "log").mkdir(parents=True)
    steps, _ = traced(tmp_path, PUT)
    link = steps.index("linkat store/log 1.tmp store/log 1")
    assert {"fsync .", "fsync store"} <= {*steps[:link]}


def test_one_flush_of_a_folder_does_for_all_its_new_names_but_not_for_others(tmp_path: Path) -> None:
    code = "writers = [write(key) for key in ('data/x/a', 'data/x/b', 'data/y/c')]\nfor w in writers: w.start_finish()\n"
    steps, _ = traced(tmp_path, HEAD + code + "os.mkdir('mark')\nfor w in writers: w.finish()\nresult = None\n")
    folders = [s for s in steps[steps.index("mkdir mark") + 1 :] if s.startswith("fsync store/data/") and s.count("/") == 2]
    assert folders == ["fsync store/data/x", "fsync store/data/y"]


def test_finish_flushes_file_folder_and_the_folders_above(tmp_path: Path) -> None:
    steps, _ = traced(tmp_path, FINISH + "os.mkdir('mark'); write('data/y/state.pt').finish()\n")
    assert steps[steps.index("mkdir mark") + 1 :] == [
        "mkdirat store/data y",
        "linkat store/data/y state.pt.tmp store/data/y state.pt",
        "unlinkat store/data/y state.pt.tmp",
        "fsync store/data/y/state.pt.tmp",
        "fsync store/data/y",
        "fsync store/data",
    ]


def test_whoever_finishes_first_flushes_the_folder_another_writer_made(tmp_path: Path) -> None:
    code = FINISH + "a = write('data/y/a'); b = write('data/y/b'); os.mkdir('mark1'); b.finish(); os.mkdir('mark2'); a.finish()\n"
    steps, _ = traced(tmp_path, code)
    first, second = steps.index("mkdir mark1"), steps.index("mkdir mark2")
    assert steps[first + 3 : second] == ["fsync store/data/y/b.tmp", "fsync store/data/y", "fsync store/data"]
    assert steps[second + 3 :] == ["fsync store/data/y/a.tmp", "fsync store/data/y"]


# -- a flush, or anything else, that fails


def test_every_failed_flush_of_a_put_is_told(tmp_path: Path) -> None:
    """Before the link: nothing happened. After it: it can be seen, but not relied on."""
    (tmp_path / "plain").mkdir()
    count = flushes(traced(tmp_path / "plain", PUT)[0])
    assert count >= 4
    for n in range(1, count + 1):
        place = tmp_path / str(n)
        place.mkdir()
        steps, outcome = traced(place, PUT, f"fsync:error=EIO:when={n}")
        assert outcome == ([["Ambiguous", False], ["log/1"]] if n == count else [["BackendError", None], []])
        assert flushes(steps) == n  # none is tried again


def test_every_failed_flush_of_a_finish_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    count = flushes(traced(tmp_path / "plain", FINISH)[0])
    assert count >= 5
    for n in range(1, count + 1):
        place = tmp_path / str(n)
        place.mkdir()
        steps, outcome = traced(place, FINISH, f"fsync:error=EIO:when={n}")
        assert outcome == [["BackendError", None], []]
        assert flushes(steps) == n


def test_a_name_that_cannot_be_taken_away_again_is_told(tmp_path: Path) -> None:
    """The disk went read-only under us, as ext4 does after an error."""
    _, outcome = traced(tmp_path, FINISH, "fsync:error=EIO:when=1", "unlinkat:error=EROFS")
    result, listed = outcome  # type: ignore[misc]
    assert result == ["Ambiguous", False]
    assert "data/x/state.pt" in listed


@pytest.mark.parametrize("code", [PUT, FINISH])
def test_an_error_at_close_counts(tmp_path: Path, code: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    traced(place, code)
    closes = [line for line in (tmp_path / "place.strace").read_text().splitlines() if " close(" in line]
    nth = next(i for i, line in enumerate(closes, 1) if ".partial" in line)
    shutil.rmtree(place / "store")
    _, outcome = traced(place, code, f"close:error=EIO:when={nth}")
    hit = [line for line in (tmp_path / "place.strace").read_text().splitlines() if "INJECTED" in line]
    assert len(hit) == 1
    assert ".partial" in hit[0]
    assert outcome == [["BackendError", None], []]


@pytest.mark.parametrize("code", [PUT, FINISH])
def test_without_hard_links_a_rename_that_never_replaces_does(tmp_path: Path, code: str) -> None:
    steps, (result, listed) = traced(tmp_path, code, "linkat:error=EPERM")
    assert result is None
    assert len(listed) == 1
    assert any(step.startswith("renameat2") and not step.endswith("FAILED") for step in steps)
    result = traced(tmp_path, code, "linkat:error=EPERM")[1][0]
    assert result[0] == "AlreadyExists"


@pytest.mark.parametrize("code", [PUT, FINISH])
def test_without_either_there_is_no_atomic_create(tmp_path: Path, code: str) -> None:
    assert traced(tmp_path, code, "linkat:error=EOPNOTSUPP", "renameat2:error=EINVAL")[1] == [["NoAtomicCreate", None], []]


@pytest.mark.parametrize(
    ("error", "kind"),
    [("ENOSPC", "StorageFull"), ("EROFS", "PermissionDenied"), ("EIO", "Ambiguous"), ("ETIMEDOUT", "Ambiguous")],
)
def test_errors_of_link(tmp_path: Path, error: str, kind: str) -> None:
    """Some come before anything happened, the others leave it open."""
    result, listed = traced(tmp_path, PUT, f"linkat:error={error}")[1]
    assert result[0] == kind
    assert listed == []


def test_a_temporary_name_that_stays_does_not_fail_a_put(tmp_path: Path) -> None:
    result, listed = traced(tmp_path, PUT, "unlinkat:error=EIO")[1]
    assert result is None
    assert [key.endswith(".partial") for key in listed] == [False, True]


def test_ctrl_c_at_any_step_leaves_no_half_and_no_litter(tmp_path: Path) -> None:
    for code, calls in (
        (PUT, ("fsync:1", "linkat:1", "unlinkat:1", "fsync:99")),
        (FINISH, ("linkat:1", "fsync:1", "fsync:2", "fsync:3")),
    ):
        for call in calls:
            name, nth = call.split(":")
            place = tmp_path / f"{len(code)}{name}{nth}"
            place.mkdir()
            if nth == "99":
                nth = str(flushes(traced(place, code)[0]))
                shutil.rmtree(place / "store")
            result, listed = traced(place, code, f"{name}:signal=INT:when={nth}")[1]
            assert result[0] == "KeyboardInterrupt"
            assert listed in ([[], ["log/1"]] if code is PUT else [[]])


# -- the real thing

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN = XFS_IOC_GOINGDOWN = _IOR('X', 125, __u32)
_NOTHING_FLUSHED = 2


@pytest.mark.parametrize("keep_metadata", [False, True])
def test_what_was_acknowledged_survives_a_power_cut(tmp_path: Path, keep_metadata: bool) -> None:
    """On ext4 without the heuristics (auto_da_alloc) that hide a missing flush."""
    require(shutil.which("mkfs.ext4"), "needs mkfs.ext4")
    image, disk = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    with mounted(disk, "ext4", "loop,noauto_da_alloc", str(image)):
        backend = LocalBackend.open(str(disk / "runs" / "42"), {})
        writer = backend.open_writer("data/x/deep/state.pt")
        writer.write(0, memoryview(b"s" * 100_000), 0)
        writer.finish()
        backend.put_if_absent("log/1", b"r" * 5000)
        backend.replace("hint", b"h")
        unfinished = backend.open_writer("data/y/state.pt")
        unfinished.write(0, memoryview(b"u" * 5000), 0)
        fd = os.open(disk, os.O_RDONLY)
        fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", 1 if keep_metadata else _NOTHING_FLUSHED))
        os.close(fd)
        unfinished.abort()
    with mounted(disk, "ext4", "loop", str(image)):
        backend = LocalBackend.open(str(disk / "runs" / "42"), {})  # anew: it may be another loop device, and so another folder
        assert backend.get("data/x/deep/state.pt", 1 << 20) == b"s" * 100_000
        assert backend.get("log/1", 1 << 20) == b"r" * 5000
        with pytest.raises(NotFound):
            backend.stat("data/y/state.pt")
