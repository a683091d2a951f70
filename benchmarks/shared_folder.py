"""A shared file system, mounted twice on this machine (JuiceFS): two writers that race for commits, and 1 GiB beside plain files.

The plain files are written in one go from memory, in pieces of 8 MiB, and flushed; and read into memory by one call. torch alone, with a
flush, is there to tell what of the difference is torch's own. What is saved through one mount is loaded through the other, so that nothing
comes from a cache of the client that wrote it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from ckptstore import Store

MIB = 1 << 20
SIZE = int(os.environ.get("BENCH_MIB", "1024")) * MIB
ROUNDS = 3
COMMITS = 60
PIECE = 8 * MIB


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write the tensors one after another, and flush."""
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for tensor in state.values():
        view = memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
        for start in range(0, len(view), PIECE):
            assert os.write(fd, view[start : start + PIECE]) == PIECE
    os.fsync(fd)
    os.close(fd)


def torch_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Save with torch alone, and flush."""
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


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


def spread(values: list[float]) -> str:
    """Return the median and what it lies between."""
    return f"{median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def main(a: Path, b: Path) -> None:
    """Print the figures."""
    figures: dict[str, object] = {"file system": "JuiceFS", "rounds": ROUNDS}
    for count in (1, 2):
        rates = [race([f"shared://{place}/race-{count}-{turn}?create=1" for place in (a, b)[:count]]) for turn in range(3)]
        figures[f"commits per second, {count} writer{'s' * (count > 1)}"] = (
            f"{median(rates):.0f} ({min(rates):.0f} – {max(rates):.0f})"
        )
    state = {f"layer{i}": torch.rand(SIZE // 32 // 4) for i in range(32)}
    store, other = Store(f"shared://{a}/big?create=1&keep_last=1"), Store(f"shared://{b}/big")
    store.save({"warm": torch.ones(1)})
    other.load()
    ways = {
        "plain write": lambda: plain_save(a / "plain", state),
        "torch.save": lambda: torch_save(a / "torch", state),
        "save": lambda: store.save(state, step=0),
        "plain read": lambda: (b / "plain").read_bytes(),
        "torch.load": lambda: torch.load(b / "torch"),
        "load": other.load,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(ROUNDS):
        (a / "plain").unlink(missing_ok=True)
        (a / "torch").unlink(missing_ok=True)
        names = list(ways)
        for half in (names[:3], names[3:]):
            for name in half[turn % 3 :] + half[: turn % 3]:
                seconds[name].append(timed(ways[name]))
                store._engine.settle()  # what was pruned is deleted in the background; that must not slow others down
    for name, values in seconds.items():
        figures[f"{name} (s)"] = spread(values)
    for ours, plain in (("save", "plain write"), ("save", "torch.save"), ("load", "plain read"), ("load", "torch.load")):
        ratios = [x / y for x, y in zip(seconds[ours], seconds[plain], strict=True)]
        figures[f"{ours} / {plain}, pair by pair"] = spread(ratios)
    print(json.dumps(figures))


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
