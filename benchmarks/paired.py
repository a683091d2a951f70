"""What all benchmarks share: the states, alternating runs, what is made of them, and the machine.

A benchmark is a script that is given a folder to write in, and ends with `report`. Seconds mean nothing on another machine, or at another
time: what counts is the ratio of two ways to do the same, measured in turns, pair by pair.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = [
    "MIB", "SIZE", "Target", "Way", "blocks", "extra_memory", "figure", "large", "machine", "many", "nbytes", "paired", "places", "report",
    "spread", "summary",
]  # fmt: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the servers that tests use as well

MIB = 1 << 20
SIZE = int(os.environ.get("BENCH_MIB", "1024")) * MIB
"""Bytes of a state."""

# --- states


def large(size: int = SIZE) -> dict[str, torch.Tensor]:
    """Return 32 tensors of `size` bytes together."""
    import torch

    return {f"layer{i}": torch.rand(size // 32 // 4) for i in range(32)}


def blocks(size: int = SIZE) -> torch.nn.Module:
    """Return a model like a ResNet, whose state is `size` bytes with that of an Adam: see `many`."""
    from torch import nn

    scale = (size / (1 << 30)) ** 0.5
    widths = [64, 128, 256, 512, 1216, 1296, 1216, 1408, 1448, 1448]
    found = []
    for i in range(80):
        width = max(1, round(widths[i % len(widths)] * scale))
        found.append(nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)))
    return nn.Sequential(*found)


def many(size: int = SIZE) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a model like a ResNet, and an Adam that has made a step: 1200 tensors of 4 B to 8 MiB, `size` bytes together (for 1 GiB).

    80 blocks of a convolution and its normalisation, six tensors each in the model and nine in the optimizer (`step`, and two moments).
    """
    import torch

    model = blocks(size)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def nbytes(state: Any) -> int:
    """Return the bytes of all tensors in nested dicts and lists, or in what has a ``state_dict()``."""
    if hasattr(state, "state_dict"):
        state = state.state_dict()
    if isinstance(state, Mapping):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        return sum(map(nbytes, state))
    return int(getattr(state, "nbytes", 0))


# --- alternating runs


@dataclass(frozen=True)
class Way:
    """One way to do it. Only `run` is timed; what `before` and `after` do is not."""

    run: Callable[[], object]
    """If it returns a pair of floats, they are taken for its wall and CPU seconds: it has measured in a process of its own."""
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Target:
    """What is promised: `way` takes at most `at_most` times as long as `beside`, pair by pair, in the median."""

    way: str
    beside: str
    at_most: float
    clock: str = "wall"  # or "cpu"


def paired(
    title: str,
    ways: Mapping[str, Callable[[], object] | Way],
    rounds: int,
    targets: Sequence[Target] = (),
    *,
    size: int = 0,
    warm: int = 1,
) -> dict[str, Any]:
    """Run all `ways` in turns, each round beginning with another, and return what came out, for `report`.

    Every other round goes backwards, lest one way always get the memory that another has just freed, and yet another always new memory.

    Args:
        size: bytes that each run moves, so that rates can be told; 0 if that means nothing.
        warm: rounds before those that count.
    """
    todo = {name: way if isinstance(way, Way) else Way(way) for name, way in ways.items()}
    names = list(todo)
    runs: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in names}
    for turn in range(-warm, rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order[:: 1 if turn % 2 else -1]:
            wall, cpu = _timed(todo[name])
            if turn >= 0:
                runs[name]["wall"].append(wall)
                runs[name]["cpu"].append(cpu)
    return {"title": title, "bytes": size, "runs": runs, "targets": [_judged(t, runs) for t in targets]}


def _timed(way: Way) -> tuple[float, float]:
    way.before()
    start, cpu = time.perf_counter(), _cpu_seconds()
    result = way.run()
    taken = time.perf_counter() - start, _cpu_seconds() - cpu
    way.after()
    if isinstance(result, tuple) and len(result) == 2 and all(isinstance(r, float) for r in result):
        return result
    return taken


def _cpu_seconds() -> float:
    """Return those of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _judged(target: Target, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(runs[target.way][target.clock], runs[target.beside][target.clock], strict=True)]
    return {**asdict(target), "ratio": median(ratios), "spread": spread(ratios)}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles; of fewer than eight values, the least and the greatest."""
    if len(values) < 8:
        return min(values), max(values)
    low, _, high = quantiles(values, n=4)
    return low, high


def figure(title: str, value: float, unit: str, at_most: float | None = None, note: str = "") -> dict[str, Any]:
    """Return one number, for `report`."""
    return {"title": title, "value": value, "unit": unit, "at_most": at_most, "note": note}


def extra_memory(call: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process grew at most during a call, by the kernel's own high-water mark.

    What was freed before, but kept by malloc, is given back first: the call would use it again, and seem to take less than it does.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to now: proc_pid_clear_refs(5)
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# --- where


@contextmanager
def places(folder: Path | str) -> Iterator[dict[str, Path]]:
    """Lend a folder on disk and one in /dev/shm, by name; BENCH_PLACES=disk leaves out the other, and the reverse."""
    shm = Path(tempfile.mkdtemp(prefix="bench-", dir="/dev/shm"))
    wanted = os.environ.get("BENCH_PLACES", "disk,/dev/shm").split(",")
    try:
        yield {name: path for name, path in {"disk": Path(folder), "/dev/shm": shm}.items() if name in wanted}
    finally:
        shutil.rmtree(shm, ignore_errors=True)


def machine(folder: Path | str) -> dict[str, object]:
    """Describe what was measured on."""
    import torch

    from ckptstore.mounts import file_system

    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpus": f"{len(os.sched_getaffinity(0))} × {model[1] if model else platform.machine()}",
        "memory (GiB)": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "kernel": platform.release(),
        "file system": file_system(str(folder)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


# --- results


def report(*results: Mapping[str, Any]) -> None:
    """Hand the results to ``run.py``, or to whoever has started the script."""
    print(json.dumps(results))


def summary(result: Mapping[str, Any]) -> str:
    """Return a result as text."""
    if "value" in result:
        goal = "" if result["at_most"] is None else f"  (target: <= {result['at_most']:g}{_missed(result['value'], result)})"
        return f"  {result['title']}: {result['value']:g} {result['unit']}{goal}{'; ' * bool(result['note'])}{result['note']}"
    lines = [f"  {result['title']}"]
    for name, run in result["runs"].items():
        (low, high), wall = spread(run["wall"]), median(run["wall"])
        rate = f"  {result['bytes'] / MIB / wall:8.0f} MiB/s" if result["bytes"] else ""
        lines.append(f"    {name:<44}{wall:9.4f} s ({low:.4f} – {high:.4f}){rate}   CPU {median(run['cpu']):.3f} s")
    for goal in result["targets"]:
        low, high = goal["spread"]
        clock = " CPU" * (goal["clock"] == "cpu")
        told = f"{goal['ratio']:.2f} ({low:.2f} – {high:.2f}), target <= {goal['at_most']:g}{_missed(goal['ratio'], goal)}"
        lines.append(f"    {goal['way']} / {goal['beside']}{clock}: {told}")
    return "\n".join(lines)


def _missed(value: float, goal: Mapping[str, Any]) -> str:
    return "" if value <= goal["at_most"] else ": MISSED"
