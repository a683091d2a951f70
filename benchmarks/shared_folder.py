"""A shared file system, mounted twice on this machine (JuiceFS): two writers that race for commits, and 1 GiB beside plain files.

The plain files are written in one go from memory, in pieces of 8 MiB, and flushed; and read into memory by one call. torch alone, with a
flush, is there to tell what of the difference is torch's own. Each way keeps the file before until the new one is written, as a store
does: on a virtual machine, memory that was freed long ago costs more than what was freed just now. What is saved through one mount is
loaded through the other, so that nothing comes from a cache of the client that wrote it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from paired import MIB, SIZE, Target, Way, figure, large, paired, report

from ckptstore import Store

COMMITS = 60
PIECE = 8 * MIB


def plain_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the tensors one after another, and flush."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for tensor in state.values():
        view = memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            assert os.write(fd, piece) == len(piece)
    os.fsync(fd)
    os.close(fd)


def torch_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Save with torch alone, and flush."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def _files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def race(urls: list[str]) -> float:
    """Return how many commits per second the writers make together."""
    command = [sys.executable, __file__, "commit"]
    writers = [subprocess.Popen([*command, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for url in urls]
    for writer in writers:
        assert writer.stdout
        writer.stdout.readline()
    start = time.perf_counter()
    for writer in writers:
        writer.communicate(b"go\n")
    seconds = time.perf_counter() - start
    assert not any(writer.returncode for writer in writers)
    return len(urls) * COMMITS / seconds


def commit(url: str) -> None:
    """Save small things, as one of several writers."""
    with Store(url, acquire=False) as store:
        store.save({"step": 0}, f"name-{os.getpid()}")
        print("ready", flush=True)
        sys.stdin.readline()
        for step in range(COMMITS):
            store.save({"step": step}, f"name-{os.getpid()}", step=step)


def main(a: Path, b: Path) -> None:
    """Report the figures."""
    results: list[dict[str, Any]] = []
    for count in (1, 2):
        rates = [race([f"shared://{place}/race-{count}-{turn}?create=1" for place in (a, b)[:count]]) for turn in range(3)]
        note = f"between {min(rates):.0f} and {max(rates):.0f}"
        results.append(figure(f"commits, {count} writer{'s' * (count > 1)}", round(median(rates)), "per second", note=note))
    state = large()
    store, other = Store(f"shared://{a}/big?create=1&keep_last=1"), Store(f"shared://{b}/big")
    store.save({"warm": torch.ones(1)})
    other.load()

    names: dict[str, str] = {}

    def fresh(kind: str) -> str:
        """Name a new file of this kind: a client may not see for a second that a name means another file."""
        names[kind] = f"{kind}-{time.monotonic_ns()}"
        return names[kind]

    def plain() -> None:
        plain_save(a / fresh("plain"), state)

    def by_torch() -> None:
        torch_save(a / fresh("torch"), state)

    def ours() -> None:
        store.save(state, step=0)

    def settle() -> None:
        """Remove what is old, and wait until JuiceFS, which does so in the background, has removed the data: none must slow others down."""
        store._engine.settle()
        for kind, name in names.items():
            for old in a.glob(f"{kind}-*"):
                if old.name != name:
                    old.unlink()
        count, before = _files(objects), -1
        while count != before:
            time.sleep(0.1)
            count, before = _files(objects), count

    objects = a.parent / "objects"
    saves = {"save": Way(ours, after=settle), "plain write": Way(plain, after=settle), "torch.save": Way(by_torch, after=settle)}
    goals = [Target("save", "plain write", 1.15), Target("save", "torch.save", 1)]
    results.append(paired("save on JuiceFS", saves, 3, goals, size=SIZE))
    loads = {  # each of what was just written, so that the reader's client has not seen it
        "load": Way(other.load, before=lambda: (ours(), settle())),
        "plain read": Way(lambda: (b / names["plain"]).read_bytes(), before=lambda: (plain(), settle())),
        "torch.load": Way(lambda: torch.load(b / names["torch"]), before=lambda: (by_torch(), settle())),
    }
    goals = [Target("load", "plain read", 1.15), Target("load", "torch.load", 1)]
    results.append(paired("load on JuiceFS, through the other mount", loads, 3, goals, size=SIZE, warm=0))
    report(*results)


if __name__ == "__main__":
    if sys.argv[1] == "commit":
        commit(sys.argv[2])
    else:
        folder = Path(sys.argv[1]).absolute()
        rig = [sys.executable, str(Path(__file__).parents[1] / "tests" / "juicefs_rig.py"), str(folder)]
        with subprocess.Popen(rig, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
            assert running.stdin
            assert running.stdout
            assert running.stdout.readline() == "ready\n"
            try:
                main(folder / "a", folder / "b")
            finally:
                running.stdin.close()
