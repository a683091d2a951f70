"""A durable, checksummed save beside the limit, and beside what others do: of large tensors and of many, on disk and in memory.

The limit is the same bytes, written by as many threads from where they lie into one file, and flushed. BENCH_STATES (large,many) and
BENCH_PLACES (disk,/dev/shm) choose; Orbax takes part if BENCH_ORBAX names a Python that has it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from paired import Target, Way, large, many, nbytes, paired, places, report
from safetensors.torch import save_file

import ckptstore

PIECE = 8 << 20


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield path and value of each tensor."""
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, (dict, list)):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{path}.{key}")


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def ways(state: Any, folder: Path, stack: ExitStack) -> Iterator[tuple[str, Way]]:
    """Yield how each of them saves `state` to a new file in `folder`."""
    tensors = dict(leaves(state))
    views = [memoryview(t.reshape(-1).numpy()).cast("B") for t in tensors.values()]  # type: ignore[arg-type]
    pieces = [view[i : i + PIECE] for view in views for i in range(0, len(view), PIECE)]
    target = folder / "other"

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        os.sync()  # what the one before has left to do is not this one's

    def other(run: Callable[[], object]) -> Way:
        return Way(run, before=clear)

    store = stack.enter_context(ckptstore.Store(folder / "store", keep_last=1))  # to be closed before its folder goes
    yield "ckptstore", Way(lambda: store.save(state), before=lambda: (store._engine.settle(), clear()))

    def limit() -> None:
        fd = os.open(target / "raw", os.O_CREAT | os.O_WRONLY)
        with ThreadPoolExecutor(4) as threads:
            offset, running = 0, []
            for piece in pieces:
                running.append(threads.submit(os.pwrite, fd, piece, offset))
                offset += len(piece)
            assert sum(done.result() for done in running) == offset
        os.fsync(fd)
        os.close(fd)

    yield "parallel pwrite, fsync", other(limit)

    def by_torch() -> None:
        with open(target / "temp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(target / "temp", target / "state.pt")
        flush(target)

    yield "torch.save, fsync, rename, fsync", other(by_torch)

    def by_safetensors() -> None:
        save_file(tensors, target / "state.safetensors")
        flush(target / "state.safetensors")

    yield "safetensors, fsync", other(by_safetensors)

    def by_dcp(count: int) -> None:
        writer = dcp.FileSystemWriter(target / "dcp", thread_count=count, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not distributed
            dcp.save(state, storage_writer=writer, no_dist=True)

    seconds = {}
    for count in (1, 2, 4):
        clear()
        start = time.perf_counter()
        by_dcp(count)
        seconds[count] = time.perf_counter() - start
    best = min(seconds, key=lambda count: seconds[count])
    yield f"dcp.save, {best} thread{'s' * (best > 1)}", other(lambda: by_dcp(best))

    if python := os.environ.get("BENCH_ORBAX"):
        command = [python, str(Path(__file__).with_name("orbax_save.py")), str(target)]
        orbax = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

        def by_orbax() -> tuple[float, float]:
            assert orbax.stdin and orbax.stdout
            print(*(t.numel() for t in tensors.values()), file=orbax.stdin, flush=True)
            wall, cpu = map(float, orbax.stdout.readline().split())
            return wall, cpu

        yield "Orbax", other(by_orbax)


def main(folder: Path) -> None:
    """Report each state in each place."""
    results = []
    with places(folder) as found:
        for kind in os.environ.get("BENCH_STATES", "large,many").split(","):
            state: Any = large()
            if kind == "many":
                model, optimizer = many()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            for place, path in found.items():
                goals = {"parallel pwrite, fsync": 1.15, "torch.save, fsync, rename, fsync": 0.65 if place == "/dev/shm" else 0.8}
                with ExitStack() as stack:
                    todo = dict(ways(state, path / kind, stack))
                    targets = [Target("ckptstore", name, goals.get(name, 1)) for name in todo if name != "ckptstore"]
                    results.append(paired(f"durable save, {kind} tensors, {place}", todo, 7, targets, size=nbytes([state])))
                shutil.rmtree(path / kind)
    report(*results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
