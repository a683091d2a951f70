"""What a POSIX file system may keep of some operations after a crash: more than any real one does, so that none is forgotten.

The model is the weak one. A file's bytes are safe once an fsync of that file, begun after they were written, has returned; a folder's
entries once an fsync of that folder has. Of all else, any subset may be on the disk, in any order: a new name without its file's bytes,
an unlink without the link before it, the later of two files. A rename is kept or lost as a whole. Bytes that are not safe are there, or
missing, or zeroes, or torn. (ext4, xfs and btrfs keep far more order than this; fsync(2) and POSIX promise none of it.)
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["Entries", "History", "Sync", "Tree", "Truncate", "Write", "build", "crash_states", "recording"]

Tree = Mapping[str, bytes | None]
"""What is on a disk: relative path -> bytes of a file, None for a folder."""


@dataclass(frozen=True)
class Entries:
    """Names in folders change, together: (folder, name, what it names from now on or None)."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Write:
    """Bytes are written to a file."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Truncate:
    """A file gets another length."""

    file: int
    size: int


@dataclass(frozen=True)
class Sync:
    """An fsync has returned."""

    what: int
    covers: int
    """How many operations were over when it began."""


@dataclass
class History:
    """Operations below one folder, in the order in which they were over. Files and folders are numbered; the folder itself is 0."""

    operations: list[Entries | Write | Truncate | Sync] = field(default_factory=list)
    folders: set[int] = field(default_factory=lambda: {0})
    _last: int = 0

    def new(self, is_folder: bool) -> int:
        """Return a number for a new file or folder."""
        self._last += 1
        if is_folder:
            self.folders.add(self._last)
        return self._last


@contextmanager
def recording(root: Path) -> Iterator[History]:
    """Record what this process does below `root` through Python's `os`, in all its threads."""
    history = History()
    numbers = {_id(os.stat(root)): 0}  # (device, inode) -> number
    lock = threading.RLock()
    real = {
        name: getattr(os, name) for name in ("open", "pwrite", "fsync", "link", "unlink", "rename", "replace", "mkdir", "rmdir")
    }

    def folder_of(path: Any, dir_fd: int | None) -> tuple[int | None, str]:
        above, name = os.path.split(os.fspath(path))
        if dir_fd is not None:
            assert not above
            return numbers.get(_id(os.fstat(dir_fd))), name
        return numbers.get(_id(os.stat(above or "."))), name

    def note(*changes: tuple[int | None, str, int | None]) -> None:
        known = tuple((folder, name, what) for folder, name, what in changes if folder is not None)
        if known:
            assert len(known) == len(changes), "in or out of the recorded folder"
            history.operations.append(Entries(known))

    def do_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        with lock:
            fd: int = real["open"](path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                assert flags & os.O_EXCL, "who made the file cannot be told"
                folder, name = folder_of(path, dir_fd)
                if folder is not None:
                    numbers[_id(os.fstat(fd))] = number = history.new(False)
                    note((folder, name, number))
            return fd

    def do_pwrite(fd: int, data: Any, offset: int) -> int:
        with lock:
            done: int = real["pwrite"](fd, data, offset)
            number = numbers.get(_id(os.fstat(fd)))
            if number is not None:
                history.operations.append(Write(number, offset, bytes(data)[:done]))
            return done

    def do_fsync(fd: int) -> None:
        with lock:
            covers, number = len(history.operations), numbers.get(_id(os.fstat(fd)))
        real["fsync"](fd)
        if number is not None:
            with lock:
                history.operations.append(Sync(number, covers))

    def do_link(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **more: Any) -> None:
        with lock:
            real["link"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **more)
            number = numbers.get(_id(os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False)))
            note((*folder_of(target, dst_dir_fd), number))

    def do_rename(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        with lock:
            number = numbers.get(_id(os.stat(source, dir_fd=src_dir_fd, follow_symlinks=False)))
            real["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            note((*folder_of(source, src_dir_fd), None), (*folder_of(target, dst_dir_fd), number))

    def do_replace(source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        do_rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)

    def do_mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with lock:
            real["mkdir"](path, mode, dir_fd=dir_fd)
            folder, name = folder_of(path, dir_fd)
            if folder is not None:
                numbers[_id(os.stat(path, dir_fd=dir_fd))] = number = history.new(True)
                note((folder, name, number))

    def do_remove(kind: str) -> Callable[..., None]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            with lock:
                real[kind](path, dir_fd=dir_fd)
                note((*folder_of(path, dir_fd), None))

        return remove

    with mock.patch.multiple(
        os,
        open=do_open,
        pwrite=do_pwrite,
        fsync=do_fsync,
        link=do_link,
        rename=do_rename,
        replace=do_replace,
        mkdir=do_mkdir,
        unlink=do_remove("unlink"),
        rmdir=do_remove("rmdir"),
    ):
        yield history


def _id(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def crash_states(history: History, at: int, most: int, rng: random.Random) -> Iterator[Tree]:
    """Yield what may be on the disk after a crash when the first `at` operations were over, each tree once.

    If there are more than `most`, the nearest to "all is there" and to "nothing is", and a sample of the others.
    """
    done = history.operations[:at]
    safe: dict[int, int] = {}  # file or folder -> how many operations are safe, if they are about it
    for op in done:
        if isinstance(op, Sync):
            safe[op.what] = max(safe.get(op.what, 0), op.covers)
    entries = [(i, op) for i, op in enumerate(done) if isinstance(op, Entries)]
    pending = [i for i, op in entries if any(i >= safe.get(folder, 0) for folder, _, _ in op.changes)]
    writes: dict[int, list[tuple[bool, Write | Truncate]]] = {}
    for i, op in enumerate(done):
        if isinstance(op, Write | Truncate):
            writes.setdefault(op.file, []).append((i < safe.get(op.file, 0), op))
    contents = {file: _contents(of) for file, of in writes.items()}
    seen = set()
    for lost in _subsets(pending, most, rng):
        named = _named(history, [op for i, op in entries if i not in lost])
        files = [path for path, number in named.items() if number not in history.folders]
        choices = [contents.get(named[path], [b""]) for path in files]
        # Two names of one file show the same bytes; that they do not here is only more than a file system would do.
        for chosen in _products(choices, most, rng):
            tree: dict[str, bytes | None] = {path: None for path, number in named.items() if number in history.folders}
            tree.update(zip(files, chosen, strict=True))
            key = tuple(sorted(tree.items()))
            if key not in seen:
                seen.add(key)
                yield tree
                if len(seen) >= most:
                    return


def _named(history: History, operations: Sequence[Entries]) -> dict[str, int]:
    """Return what can be reached after `operations`, by path."""
    folders: dict[int, dict[str, int]] = {0: {}}
    for op in operations:
        for folder, name, what in op.changes:
            names = folders.setdefault(folder, {})
            if what is None:
                names.pop(name, None)
            else:
                names[name] = what
    found: dict[str, int] = {}
    stack = [("", 0)]
    while stack:
        above, number = stack.pop()
        for name, what in folders.get(number, {}).items():
            found[above + name] = what
            if what in history.folders:
                stack.append((f"{above}{name}/", what))
    return found


def _contents(steps: Sequence[tuple[bool, Write | Truncate]]) -> list[bytes]:
    """Return what a file may hold, the whole first and the least last."""

    def after(kept: Iterable[Write | Truncate]) -> bytes:
        data = bytearray()
        for step in kept:
            if isinstance(step, Truncate):
                data[step.size :] = bytes(max(0, step.size - len(data)))
            else:
                end = step.offset + len(step.data)
                data.extend(bytes(max(0, end - len(data))))
                data[step.offset : end] = step.data
        return bytes(data)

    least = after(step for is_safe, step in steps if is_safe)
    whole = after(step for _, step in steps)
    if all(is_safe for is_safe, _ in steps):
        return [whole]
    zeroes = least[: len(whole)] + bytes(max(0, len(whole) - len(least)))
    half = len(whole) // 2
    torn = [whole[:half], whole[:half] + zeroes[half:], zeroes[:half] + whole[half:], zeroes]
    without = [after(s for j, (_, s) in enumerate(steps) if i != j) for i, (is_safe, _) in enumerate(steps) if not is_safe]
    return list(dict.fromkeys([whole, *torn, *without[:20], least]))


def _subsets(items: Sequence[int], most: int, rng: random.Random) -> Iterator[frozenset[int]]:
    """Yield all subsets, smallest first; if there are more than `most`, the small and the large ones and then others, without end."""
    if 2 ** len(items) <= most:
        for size in range(len(items) + 1):
            yield from map(frozenset, combinations(items, size))
        return
    for size in (0, 1, 2):
        for some in combinations(items, size):
            yield frozenset(some)
            yield frozenset(items) - frozenset(some)
    for _ in range(10 * most):
        yield frozenset(i for i in items if rng.random() < 0.5)


def _products(choices: Sequence[Sequence[bytes]], most: int, rng: random.Random) -> Iterator[tuple[bytes, ...]]:
    """Yield ways to choose one of each: all, or if those are many, the first of each, those that differ in one place, and some others."""
    total = 1
    for of in choices:
        total *= len(of)
    if total <= max(8, most // 50):
        yield from product(*choices)
        return
    first = tuple(of[0] for of in choices)
    yield first
    for i, of in enumerate(choices):
        for other in of[1:]:
            yield (*first[:i], other, *first[i + 1 :])
    for _ in range(most // 50):
        yield tuple(rng.choice(of) for of in choices)


def build(tree: Tree, place: Path) -> None:
    """Make `tree` in the new folder `place`."""
    place.mkdir()
    for path, data in sorted(tree.items()):
        if data is None:
            (place / path).mkdir(parents=True, exist_ok=True)
    for path, data in tree.items():
        if data is not None:
            (place / path).write_bytes(data)
