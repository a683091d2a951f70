"""A verified resume as the first thing that a process does, as jobs do that start again, beside torch, which checks nothing.

The memory is new then, for both. Where the same process resumes again and again (``loading.py``), most of it is what was freed before.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loading import plain, restore
from paired import Target, large, many, nbytes, paired, places, report

import ckptstore

ROUNDS = 5
STATES = ("32 tensors", "1200 tensors")


def objects(kind: str) -> dict[str, Any]:
    """Return live objects of one kind of state."""
    if kind == "32 tensors":
        return dict(large())
    model, optimizer = many()
    return {"model": model, "optimizer": optimizer}


def measure(way: str, kind: str, place: Path) -> None:
    """Resume once, in this process, and print wall and CPU seconds. What is imported when first used is there before: that is no memory."""
    small = {"model": torch.nn.Linear(1, 1)}
    with tempfile.TemporaryDirectory(dir=place) as folder, ckptstore.Store(folder) as store:
        store.save(small)
        store.resume(small)
        torch.save(plain(small), f"{folder}/torch.pt")
        restore(small, Path(f"{folder}/torch.pt"))
    live = objects(kind)
    start, cpu = time.perf_counter(), time.process_time()
    if way == "resume":
        with ckptstore.Store(place / "store") as store:
            store.resume(live)
    else:
        restore(live, place / "torch.pt")
    print(time.perf_counter() - start, time.process_time() - cpu)


def new_process(way: str, kind: str, place: Path) -> Callable[[], tuple[float, float]]:
    """Return what does `measure` in a new process."""

    def run() -> tuple[float, float]:
        command = [sys.executable, __file__, way, kind, str(place)]
        wall, cpu = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return float(wall), float(cpu)

    return run


def compare(kind: str, where: str, place: Path) -> dict[str, Any]:
    """Return the figures of one state in one place."""
    place.mkdir(parents=True)
    live = objects(kind)
    torch.save(plain(live), place / "torch.pt")
    with ckptstore.Store(place / "store") as store:
        store.save(live)
    names = ("resume", "torch.load + load_state_dict")
    targets = [Target(*names, 0.5, clock) for clock in ("wall", "cpu")]
    ways = {name: new_process(name, kind, place) for name in names}
    return paired(f"{kind}, {where}, in a new process", ways, ROUNDS, targets, size=nbytes(plain(live)))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    else:
        with places(sys.argv[1]) as wanted:
            report(*(compare(kind, where, folder / kind) for where, folder in wanted.items() for kind in STATES))
