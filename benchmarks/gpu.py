"""On a GPU: how long the training thread and the device are held up by saves in the background; saves, and loads to the device.

Beside one copy of the same bytes into page-locked memory of the host, at the speed of the bus. Without a GPU nothing is measured.
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from async_save import Watched
from loading import plain, restore
from paired import SIZE, Target, Way, extra_memory, figure, large, many, nbytes, paired, places, report
from save import flush

from ckptstore import Store

ROUNDS = 5


class Training(Watched):
    """A model and its optimizer on the device, and matrices to multiply: forward and backward that last as long as wanted."""

    def __init__(self, kind: str) -> None:
        self.state: dict[str, Any]
        if kind == "32 tensors":
            parameters = {name: torch.nn.Parameter(tensor.cuda()) for name, tensor in large().items()}
            self.optimizer = torch.optim.SGD(parameters.values(), lr=1e-9)
            self.state = {name: p.data for name, p in parameters.items()}
            self._parameters = list(parameters.values())
        else:
            model, _ = many()
            model.cuda()
            self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-9, fused=True)
            self.state = {"model": model, "optimizer": self.optimizer}
            self._parameters = list(model.parameters())
        self._matrix = torch.rand(4096, 4096, device="cuda", dtype=torch.bfloat16)
        self.products = 1
        self.iteration()

    def iteration(self) -> None:
        """Forward, backward, step."""
        for _ in range(self.products):
            self._matrix @ self._matrix
        torch.stack([p.sum() for p in self._parameters]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)

    def last(self, seconds: float) -> None:
        """Have an iteration take the device about so long."""
        self.products = 100
        taken = on_device(self.iteration)
        self.products = max(1, round(self.products * seconds / taken))


def on_device(call: Callable[[], object]) -> float:
    """Return how many seconds the current stream takes for what `call` does, waiting for the host included, by events of CUDA."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def blocked(kind: str, training: Training, folder: Path) -> list[Any]:
    """Return how long the thread and the device are held up."""
    state = training.state
    size = nbytes(list(state.values()))
    source = torch.ones(size, dtype=torch.uint8, device="cuda")
    target = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    store = Store(folder / "store", keep_last=1)
    store.save_async({"warm": torch.ones(8, device="cuda")}).result()
    grown = extra_memory(lambda: store.save_async(state).result())
    pending: list[Future[Any]] = []

    def copy() -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    def overlapped() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.thread_time()
        pending.append(store.save_async(state, optimizer=training.optimizer))
        called, used = time.perf_counter() - start, time.thread_time() - cpu
        training.iteration()
        return called + training.waited, used

    def begin_dcp() -> None:  # with its own stager: one that is kept, with page-locked memory, fails in torch 2.11 (KeyError)
        begun: Any = dcp.async_save(plain(state), checkpoint_id=str(folder / "dcp"), no_dist=True)
        pending.append(getattr(begun, "upload_completion", begun))

    def end_dcp() -> None:
        pending.pop().result()
        shutil.rmtree(folder / "dcp")
        gc.collect()

    def give_up() -> None:  # nobody is blocked any more, so it need not be written
        if pending:
            pending.pop().cancel()
        store._background.wait()
        store._engine.settle()
        gc.collect()

    def iteration_with(**options: Any) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            def both() -> None:
                pending.append(store.save_async(state, **options))
                training.iteration()

            return on_device(both), 0.0

        return run

    store.save_async(state, optimizer=training.optimizer).result()
    training.watch_steps()
    copy()
    start = time.perf_counter()
    copy()
    training.last(3 * (time.perf_counter() - start))
    synchronize = torch.cuda.synchronize
    ways = {
        "a copy to page-locked memory": Way(copy, before=synchronize),
        "save_async": Way(lambda: pending.append(store.save_async(state)), before=synchronize, after=give_up),
        "save_async, overlapped": Way(overlapped, before=synchronize, after=give_up),
        "dcp.async_save": Way(begin_dcp, before=synchronize, after=end_dcp),
    }
    targets = [
        Target("save_async", "a copy to page-locked memory", 1.2),
        Target("save_async", "dcp.async_save", 0.5),
    ]
    found = [paired(f"the training thread is blocked; {kind} on a GPU", ways, ROUNDS, targets, size=size)]
    ways = {
        "train": Way(lambda: (on_device(training.iteration), 0.0)),
        "train, and save_async": Way(iteration_with(), after=give_up),
        "train, and save_async, overlapped": Way(iteration_with(optimizer=training.optimizer), after=give_up),
    }
    found.append(paired(f"the device is busy or held up, by its events; {kind} on a GPU", ways, ROUNDS))
    one = median(found[0]["runs"]["a copy to page-locked memory"]["wall"])
    taken = {name: median(run["wall"]) for name, run in found[1]["runs"].items()}
    for name, at_most in (("save_async", 1.2), ("save_async, overlapped", 0.05)):
        held_up = (taken[f"train, and {name}"] - taken["train"]) / one
        found.append(figure(f"the device is held up by {name}, by one copy; {kind} on a GPU", round(held_up, 3), "×", at_most))
    found.append(
        figure(f"extra memory of save_async, by the size of the state; {kind} on a GPU", round(grown / size, 3), "×", 1.05)
    )
    store.close()
    return found


def files(kind: str, objects: Mapping[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Return how long saves and loads take."""
    folder.mkdir(parents=True)
    path, temp = folder / "torch.pt", folder / "temp"

    def by_torch() -> None:
        with open(temp, "wb") as file:
            torch.save(plain(objects), file)
            file.flush()
            flush(temp)
        temp.replace(path)
        flush(folder)

    def finish() -> None:
        torch.cuda.synchronize()
        store._engine.settle()
        gc.collect()

    def way(run: Callable[[], object]) -> Way:
        return Way(lambda: (run(), torch.cuda.synchronize()), before=finish, after=finish)

    with Store(folder / "store", keep_last=1) as store:
        ways = {
            "save": way(lambda: store.save(objects)),
            "save_async, to its end": way(lambda: store.save_async(objects).result()),
            "torch.save, fsync, rename, fsync": way(by_torch),
            "load": way(store.load),
            "torch.load": way(lambda: torch.load(path)),
            "resume": way(lambda: store.resume(objects)),
            "torch.load + load_state_dict": way(lambda: restore(objects, path)),
        }
        by_torch()
        store.save(objects)
        goal = 0.65 if where == "/dev/shm" else 0.8
        targets = [
            Target("save", "torch.save, fsync, rename, fsync", goal),
            Target("save_async, to its end", "torch.save, fsync, rename, fsync", goal),
            Target("load", "torch.load", 0.8),
            Target("resume", "torch.load + load_state_dict", 0.5),
        ]
        return paired(f"from and to a GPU; {kind}, {where}", ways, 5, targets, size=nbytes(plain(objects)))


if __name__ == "__main__":
    results: list[Any] = []
    if torch.cuda.is_available():
        with places(sys.argv[1]) as found:
            for kind in ("32 tensors", "1200 tensors"):
                training, name = Training(kind), f"{kind}, {SIZE >> 20} MiB"
                results += blocked(name, training, list(found.values())[-1] / f"blocked-{len(results)}")
                for where, folder in found.items():
                    results.append(files(name, training.state, where, folder / f"files-{len(results)}"))
                del training
                gc.collect()
    report(*results)
