"""A process that does everything with a store, and what happens to it at one of its system calls, by ``strace --inject``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from conftest import require
from procs import Channel, Child, litter
from test_kill import content, save_parts

from ckptstore import Checkpoint, Store
from ckptstore.errors import CkptStoreError, CommitUnknown, FallbackWarning

__all__ = ["AGAIN", "CALLS", "Call", "Possible", "Strace", "attached", "calls_of", "grow", "keep_house", "save_twice"]

CALLS = (
    *("openat", "close", "read", "pread64", "preadv", "write", "writev", "pwrite64", "lseek", "ftruncate", "fallocate"),
    *("fsync", "fdatasync", "sync_file_range", "link", "linkat", "rename", "renameat", "renameat2", "unlink", "unlinkat"),
    *("rmdir", "mkdir", "mkdirat", "stat", "lstat", "newfstatat", "statx", "fstat", "getdents64", "access", "faccessat"),
    *("faccessat2", "readlink", "readlinkat", "fcntl"),
)
"""What may be done to a file or a folder, as far as strace knows it on this machine."""
AGAIN = 10
"""How often a process is run until one of its threads makes a call: which one does is up to chance."""


@dataclass(frozen=True)
class Call:
    """One system call of a process: the `nth` that one of its threads makes of its kind."""

    name: str
    nth: int


def keep_house(channel: Channel, url: str, owning: bool = False) -> None:
    """Do one of everything, once told to, saying what is about to be done and what came of it; `owning`: acquire the store before that."""
    store = Store(url, keep_last=1)
    if owning:
        store.acquire()
    channel.send("ready")
    channel.recv()
    changes: list[tuple[str, int, Callable[[], object]]] = [
        ("", 0, store.acquire),
        ("latest", 20, lambda: save_parts(store, "latest", 20)),
        ("best", 20, lambda: store.tag("best", "latest")),
        ("latest", 21, lambda: save_parts(store, "latest", 21)),
        ("old", 3, lambda: "old" in store and store.delete("old")),
        ("", 0, store.prune),
        ("", 0, store.gc),
    ]
    for name, step, change in changes:
        channel.send("begin", name, step)
        try:
            made = change()
        except CommitUnknown:
            channel.send("unknown", name)
        except (
            CkptStoreError,
            FallbackWarning,
        ) as exc:  # the warning is an error here: that something was passed over, and loudly
            channel.send("refused", name, type(exc).__name__)
        except BaseException as exc:
            channel.send("untyped", name, "".join(traceback.format_exception(exc)))
        else:
            channel.send("done", name, made.id if isinstance(made, Checkpoint) else None)
    store.close()
    channel.send("end")


def save_twice(channel: Channel, name: str, folder: str) -> None:
    """With one of the others: save a step, make sure that it is on the disk, and save another when told to."""
    import rivals

    rival = rivals.RIVALS[name]
    rival.save(Path(folder), 1)
    os.sync()
    channel.send("ready")
    channel.recv()
    try:
        rival.save(Path(folder), 2)
    except rivals.REFUSALS:
        channel.send("refused")
    else:
        channel.send("done")
    channel.send("end")


def grow(place: Path) -> None:
    """Make a store whose next commits leave a hint, shrink old records and let checkpoints go."""
    with Store(place, keep_last=1) as store:
        save_parts(store, "old", 3)
        for step in range(4, 16):
            save_parts(store, "latest", step)


@dataclass
class Possible:
    """What may be in a store by what a process said that worked on it."""

    names: dict[str, set[str | int | None]]
    """For each name, the id of its checkpoint, or the step of one that may be there, or None."""
    violations: list[str] = field(default_factory=list)
    ended: bool = False
    _begun: tuple[str, int | None] | None = None

    @classmethod
    def of(cls, names: dict[str, str]) -> Possible:
        return cls({name: {there} for name, there in names.items()})

    def hear(self, message: list[Any]) -> None:
        match message:
            case ["begin", name, step]:
                self._begun = (name, None if name == "old" else step)
                return
            case ["done", name, there] if name:
                self.names[name] = {there}
            case ["unknown", name]:
                self.unknown()
            case ["untyped", name, error]:
                self.violations.append(f"{name}: {error}")
                self.unknown()
            case ["end"]:
                self.ended = True
        self._begun = None

    def unknown(self) -> None:
        """Nobody will know any more what came of what was begun."""
        if self._begun and self._begun[0]:
            name, step = self._begun
            self.names.setdefault(name, {None}).add(step)

    def check(self, url: str) -> None:
        """Compare with what a process that knows nothing finds there; then go on from there."""
        self.unknown()
        with Store(url, keep_last=1, owner="next") as store:
            found = store.names()
            for name in {*found, *self.names}:
                there = found.get(name)
                may = self.names.get(name, {None})
                if there not in may and (there is None or store.checkpoint(name).step not in may):
                    self.violations.append(f"{name} is {there}, not {may}")
            self.violations += map(str, store.verify())
            for checkpoint in store.checkpoints():
                for file in checkpoint.files:
                    with checkpoint.open(file) as part:
                        if part.read() != content(checkpoint.step or 0):
                            self.violations.append(f"{checkpoint.id}/{file} is wrong")
            new = save_parts(store, "next", 30)
            store.gc()
            self.violations += litter(store)
            if store.checkpoint("next").id != new.id:
                self.violations.append("the next save is not there")


class Strace:
    """What strace says of a process."""

    def __init__(self, output: IO[str]) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(output,))  # else it would wait for us with its process
        self._reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self._lines.put(line)
        self._lines.put(None)

    def close(self) -> None:
        self._reader.join()

    def lines(self) -> Iterator[str]:
        """Yield them until the process has ended."""
        while (line := self._lines.get()) is not None:
            yield line

    def stopped(self) -> bool:
        """Wait until the process stops, or ends: return which."""
        return any("stopped by SIGSTOP" in line for line in self.lines())

    def injected(self) -> int:
        """Wait for the end; return how often something was injected."""
        return sum("(INJECTED" in line for line in self.lines())


@contextmanager
def attached(child: Child, calls: str, inject: str = "") -> Iterator[Strace]:
    """Watch some system calls of a process, by their names, for the length of the block; what is injected counts from now on."""
    require(shutil.which("strace"), "needs strace")
    options = ["-f", "-y", "-s", "200", "-e", f"trace={calls}", *(["-e", f"inject={inject}"] if inject else [])]
    with subprocess.Popen(["strace", *options, "-p", str(child.pid)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "attached" in line, line
        strace = Strace(process.stderr)
        try:
            yield strace
            process.wait()  # for the child
        except BaseException:
            child.close()  # lest it stay, stopped
            raise
        finally:
            process.terminate()
            strace.close()


def calls_of(child: Child, place: Path) -> list[Call]:
    """Run a process to its end and return those of its system calls that touch what is at or below `place`, or above it."""
    known = subprocess.run(["strace", "-e", f"trace={','.join(f'?{c}' for c in CALLS)}", "true"], capture_output=True, text=True)
    assert known.returncode == 0, known.stderr
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[Call, None] = {}
    touches = re.compile(rf'[<"]{re.escape(str(place))}[/">]')
    with attached(child, ",".join(f"?{c}" for c in CALLS)) as strace:
        child.send("go")
        messages = child.rest()
        for line in strace.lines():
            if match := re.match(r"\[pid +(\d+)\] (\w+)\(|()(\w+)\(", line):
                thread, name = (match[1], match[2]) if match[2] else ("", match[4])
                counts[thread, name] += 1
                if touches.search(line):
                    found[Call(name, counts[thread, name])] = None
    assert messages[-1] == ["end"], messages
    return list(found)
