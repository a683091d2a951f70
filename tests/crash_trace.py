"""The history of a whole process, as `strace` saw it: for what writes below Python's `os`, as torch does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from conftest import require
from crash_states import Entries, History, Sync, Truncate, Write

__all__ = ["MARK", "python", "traced"]

MARK = "mark-"
"""A process says where it is by removing a file of such a name, which is not there, from the recorded folder."""
_ON_DESCRIPTORS = ("write", "writev", "pwrite64", "ftruncate", "lseek", "fsync", "fdatasync", "close")
_ON_PATHS = ("openat", "creat", "link", "linkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "unlink", "unlinkat")


def traced(root: Path, command: Sequence[str]) -> tuple[History, dict[str, int]]:
    """Run `command`; return what it did below `root`, which is empty, and how many operations were over at each of its marks.

    One thread at a time may write. Raises AssertionError for calls that it cannot follow.
    """
    require(shutil.which("strace"), "needs strace")
    log = root.with_suffix(".strace")
    strace = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-xx",
        "-s",
        "100000000",
        "-o",
        str(log),
        "-e",
        f"trace={','.join(_ON_DESCRIPTORS + _ON_PATHS)}",
    ]
    done = subprocess.run([*strace, *command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    reader = _Reader(root)
    for call, arguments, result in _calls(log):
        reader.take(call, arguments, result)
    return reader.history, reader.marks


def _calls(log: Path) -> Iterator[tuple[str, str, int]]:
    """Yield name, arguments and result of the calls that did not fail, and of marks."""
    begun: dict[str, str] = {}
    with log.open() as lines:
        for line in lines:
            pid, _, text = line.rstrip("\n").partition(" ")
            text = text.lstrip()
            if text.endswith(" <unfinished ...>"):
                begun[pid] = text.removesuffix(" <unfinished ...>")
                continue
            if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
                text = begun.pop(pid) + text[resumed.end() :]
            found = re.fullmatch(r"(\w+)\((.*)\) += (-?\d+).*", text)
            if found and (int(found[3]) >= 0 or found[1].startswith("unlink")):
                yield found[1], found[2], int(found[3])


def _text(quoted: str) -> bytes:
    """Decode what ``-xx`` has put in hexadecimal."""
    return bytes.fromhex(quoted.replace("\\x", ""))


class _Reader:
    """Follows the calls of one process, with what it has open and what the folder holds."""

    def __init__(self, root: Path) -> None:
        self.history = History()
        self.marks: dict[str, int] = {}
        self._root = os.fsencode(root)
        self._tree: dict[bytes, int] = {b"": 0}  # path below the root -> number
        self._open: dict[int, tuple[int, int]] = {}  # descriptor -> number, position
        self._sizes: dict[int, int] = {}

    def take(self, call: str, arguments: str, result: int) -> None:
        paths = [self._below(_text(p)) for p in re.findall(r'"([^"]*)"', arguments)] if call not in _ON_DESCRIPTORS else []
        first = arguments.split(",", 1)[0]
        fd = int(first) if first.isdigit() else -1
        if call.startswith("unlink") and paths[0] and os.path.basename(paths[0]).startswith(MARK.encode()):
            self.marks[paths[0].decode().partition(MARK)[2]] = len(self.history.operations)
        elif result < 0 or (call in _ON_DESCRIPTORS and fd not in self._open):
            pass
        elif call in _ON_DESCRIPTORS:
            self._on_descriptor(call, fd, arguments, result)
        elif any(path is not None for path in paths):
            assert fd < 0 or call == "openat", f"relative to a folder: {call}({arguments})"
            self._on_paths(call, [p for p in paths if p is not None], arguments, result)
        elif call in ("openat", "creat"):
            self._open.pop(result, None)

    def _below(self, path: bytes) -> bytes | None:
        path = os.path.normpath(path)
        if path == self._root:
            return b""
        return path[len(self._root) + 1 :] if path.startswith(self._root + b"/") else None

    def _on_paths(self, call: str, paths: list[bytes], arguments: str, result: int) -> None:
        path = paths[0]
        match call.rstrip("2").removesuffix("at"):
            case "open" | "creat":
                number = self._tree.get(path)
                if number is None:
                    number = self._name(path, False)
                elif "O_TRUNC" in arguments and self._sizes.get(number):
                    self._resize(number, 0)
                self._open[result] = number, 0
            case "mkdir":
                self._name(path, True)
            case "unlink":
                self.history.operations.append(Entries(((*self._entry(path), None),)))
                del self._tree[path]
            case "rename":
                number = self._tree.pop(path)
                self._tree[paths[1]] = number
                self.history.operations.append(Entries(((*self._entry(path), None), (*self._entry(paths[1]), number))))
            case _:
                raise AssertionError(f"{call}({arguments})")

    def _on_descriptor(self, call: str, fd: int, arguments: str, result: int) -> None:
        number, position = self._open[fd]
        match call:
            case "close":
                del self._open[fd]
            case "fsync" | "fdatasync":
                self.history.operations.append(Sync(number, len(self.history.operations)))
            case "lseek":
                self._open[fd] = number, result
            case "ftruncate":
                self._resize(number, int(arguments.rpartition(",")[2]))
            case _:
                data = b"".join(_text(q) for q in re.findall(r'"([^"]*)"', arguments))[:result]
                if call == "pwrite64":
                    position = int(arguments.rpartition(",")[2])
                else:
                    self._open[fd] = number, position + len(data)
                self._sizes[number] = max(self._sizes.get(number, 0), position + len(data))
                self.history.operations.append(Write(number, position, data))

    def _resize(self, number: int, size: int) -> None:
        self._sizes[number] = size
        self.history.operations.append(Truncate(number, size))

    def _entry(self, path: bytes) -> tuple[int, str]:
        above, name = os.path.split(path)
        return self._tree[above], os.fsdecode(name)

    def _name(self, path: bytes, is_folder: bool) -> int:
        folder, name = self._entry(path)
        self._tree[path] = number = self.history.new(is_folder)
        self.history.operations.append(Entries(((folder, name, number),)))
        return number


def python(code: str) -> list[str]:
    """Return the command that runs `code` with the modules that we have."""
    return [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"]
