"""Verified loads, and what reads less, beside torch, which checks nothing: from a warm page cache, on disk and in /dev/shm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from paired import MIB, Target, Way, extra_memory, figure, large, many, nbytes, paired, places, report

import ckptstore

ROUNDS = 7


def plain(objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is saved of live objects."""
    return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in objects.items()}


def restore(objects: Mapping[str, Any], path: Path) -> None:
    """Do what `resume` does, with torch alone."""
    state = torch.load(path)
    for name, target in objects.items():
        if hasattr(target, "load_state_dict"):
            target.load_state_dict(state[name])
        else:
            target.copy_(state[name])


def first(value: Any) -> float:
    """Look at the first tensor in nested dicts."""
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values()))
    return float(value.flatten()[0])


def largest(state: Any) -> str:
    """Return the dotted path of the largest tensor."""
    sizes: dict[str, int] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            sizes[path] = value.nbytes
        for key, item in value.items() if isinstance(value, dict) else ():
            visit(item, f"{path}.{key}" if path else str(key))

    visit(state, "")
    return max(sizes, key=lambda path: sizes[path])


def bytes_read() -> int:
    """Return how many bytes this process has read so far, from caches too."""
    return int(Path("/proc/self/io").read_text().split()[1])


def compare(what: str, objects: Mapping[str, Any], place: Path) -> list[dict[str, Any]]:
    """Return the figures of one state in one place."""
    place.mkdir(parents=True)
    path = place / "torch.pt"
    torch.save(plain(objects), path)
    with ckptstore.Store(place / "store", keep_last=1) as store:
        checkpoint = store.save(objects)
        stored = place / "store" / "data" / checkpoint.id / "state.pt"
        lazy = Way(
            lambda: first(store.load(mmap=True, verify="lazy")),
            after=lambda: store._engine.raise_late(wait=True),  # the check in the background must not slow others down
        )
        ways: dict[str, Any] = {
            "load": store.load,
            "torch.load": lambda: torch.load(path),
            "resume": lambda: store.resume(objects),
            "torch.load + load_state_dict": lambda: restore(objects, path),
            "lazy load, first tensor": lazy,
            "torch.load(mmap=True), first tensor": lambda: first(torch.load(path, mmap=True)),
            "verify": checkpoint.verify,
            "cat": lambda: subprocess.run(["cat", str(stored)], stdout=subprocess.DEVNULL, check=True),
        }
        targets = []
        for clock in ("wall", "cpu"):  # two CPUs that others use as well: what is spread over both shows in the CPU time only
            targets += [
                Target("load", "torch.load", 0.8, clock),
                Target("resume", "torch.load + load_state_dict", 0.5, clock),
                Target("lazy load, first tensor", "torch.load(mmap=True), first tensor", 1.5, clock),
                Target("verify", "cat", 1.3, clock),
            ]
        figures = []
        loaded: list[Any] = []
        extra = (extra_memory(lambda: loaded.append(store.load())) - nbytes(loaded[0])) / MIB
        figures.append(figure(f"{what}: memory of a load beyond the loaded object", round(extra, 1), "MiB", 64))
        name = largest(loaded[0])
        before = bytes_read()
        tensor = checkpoint.load_tensors([name])[name]
        ratio = round((bytes_read() - before) / tensor.nbytes, 3)
        figures.append(
            figure(f"{what}: bytes read for one tensor of {tensor.nbytes / MIB:.0f} MiB, by its bytes", ratio, "×", 1.1)
        )
        loaded.clear()
        figures.append(paired(what, ways, ROUNDS, targets, size=nbytes(plain(objects))))
    return figures


if __name__ == "__main__":
    results = []
    with places(sys.argv[1]) as where:
        for name, folder in where.items():
            results += compare(f"32 tensors, {name}", large(), folder / "large")
            model, optimizer = many()
            results += compare(f"1200 tensors, {name}", {"model": model, "optimizer": optimizer}, folder / "many")
    report(*results)
