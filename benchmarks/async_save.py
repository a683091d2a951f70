"""How long a save in the background blocks the training thread, beside one memcpy of the same bytes and dcp.async_save; its memory."""

from __future__ import annotations

import ctypes
import gc
import mmap
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from paired import SIZE, Target, Way, extra_memory, figure, large, many, nbytes, paired, places, report
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ckptstore import Store

ROUNDS = 5


class Watched:
    """A training that tells how long its steps wait."""

    optimizer: torch.optim.Optimizer
    waited = 0.0
    """Seconds that the last step has waited for a copy."""
    _began = 0.0

    def watch_steps(self) -> None:
        """Tell from now on how long a step waits for the hook of the store, which must be there already."""

        def before(*_: object) -> None:
            self._began = time.perf_counter()

        def after(*_: object) -> None:
            self.waited = time.perf_counter() - self._began

        self.optimizer.register_step_pre_hook(after)
        handle = self.optimizer.register_step_pre_hook(before)
        self.optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)


class Training(Watched):
    """A model in training, whose state is as large as wanted."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: dict[str, Any], forward: Callable[[], torch.Tensor]) -> None:
        self.optimizer = optimizer
        self.state = state
        self._forward = forward
        self.least = 0.0
        """Seconds that forward and backward take at least; gradients are accumulated until then."""

    def iteration(self) -> None:
        """Forward, backward, step."""
        end = time.perf_counter() + self.least
        while True:
            self._forward().backward()
            if time.perf_counter() >= end:
                break
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # a gibibyte of new pages, every time, would take longer than all the rest


def large_training() -> Training:
    """32 parameters, and nothing else."""
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in large().items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-9)
    state = {name: p.data for name, p in parameters.items()}
    return Training(optimizer, state, lambda: torch.stack([p.sum() for p in parameters.values()]).sum())


def many_training() -> Training:
    """1200 tensors of a model and its Adam."""
    model, optimizer = many()
    blocks: list[Any] = list(model.children())
    inputs = [torch.rand(4, block[0].in_channels, 4, 4) for block in blocks]

    def forward() -> torch.Tensor:
        return torch.stack([block(x).square().mean() for block, x in zip(blocks, inputs, strict=True)]).sum()

    return Training(optimizer, {"model": model, "optimizer": optimizer}, forward)


def blocked(kind: str, training: Training, folder: Path) -> list[Any]:
    """Return how long the thread is blocked, whatever is written where afterwards, and the memory that it takes."""
    state, size = training.state, nbytes(list(training.state.values()))
    store = Store(folder / "store", keep_last=1)
    store.save_async({"warm": torch.ones(8)}, rng=True).result()
    grown = extra_memory(lambda: store.save_async(state).result())
    source, target = torch.ones(size, dtype=torch.uint8), mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(target))
    stager = DefaultStager(StagingOptions(False, False, False, False))
    pending: list[Future[Any]] = []

    def begin_dcp(own: DefaultStager | None = None) -> None:
        plain = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        begun: Any = dcp.async_save(plain, checkpoint_id=str(folder / "dcp"), async_stager=own, no_dist=True)
        pending.append(getattr(begun, "upload_completion", begun))

    def end_dcp() -> None:
        pending.pop().result()
        shutil.rmtree(folder / "dcp")
        gc.collect()

    def give_up() -> None:  # nobody is blocked any more, so it need not be written
        pending.pop().cancel()
        store._background.wait()
        store._engine.settle()
        gc.collect()

    def overlapped() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.thread_time()
        pending.append(store.save_async(state, optimizer=training.optimizer))
        called, used = time.perf_counter() - start, time.thread_time() - cpu
        training.iteration()
        return called + training.waited, used

    store.save_async(state, optimizer=training.optimizer).result()
    training.watch_steps()
    ctypes.memmove(address, source.data_ptr(), size)  # new memory takes ten times as long
    start = time.perf_counter()
    ctypes.memmove(address, source.data_ptr(), size)
    training.least = 3 * (time.perf_counter() - start)
    ways = {
        "memcpy": Way(lambda: ctypes.memmove(address, source.data_ptr(), size)),
        "save_async": Way(lambda: pending.append(store.save_async(state)), after=give_up),
        "save_async, overlapped": Way(overlapped, after=give_up),
        "dcp.async_save": Way(begin_dcp, after=end_dcp),
        "dcp.async_save, a stager kept": Way(lambda: begin_dcp(stager), after=end_dcp),
    }
    targets = [
        Target("save_async", "memcpy", 1.2),
        Target("save_async", "dcp.async_save", 0.5),
        Target("save_async", "dcp.async_save, a stager kept", 0.5),
        Target("save_async, overlapped", "memcpy", 0.05),
    ]
    found = paired(f"the training thread is blocked; {kind}", ways, ROUNDS, targets, size=size)
    store.close()
    stager.close()
    return [found, figure(f"extra memory of save_async, by the size of the state; {kind}", round(grown / size, 3), "×", 1.05)]


def slowed(kind: str, training: Training, where: str, folder: Path) -> dict[str, Any]:
    """Return how much longer an iteration takes while a save goes on."""
    with Store(folder / "store", keep_last=1) as store:
        pending: list[Future[Any]] = []

        def save_and_train() -> None:
            pending.append(store.save_async(training.state, optimizer=training.optimizer))
            training.iteration()

        def finish() -> None:
            pending.pop().result()
            store._engine.settle()  # what was pruned is deleted in the background

        ways = {"train": Way(training.iteration), "train while saving": Way(save_and_train, after=finish)}
        return paired(f"an iteration that shares the machine with an overlapped save; {kind}, {where}", ways, 3)


if __name__ == "__main__":
    results: list[Any] = []
    with places(sys.argv[1]) as found:
        for kind, make in (("32 tensors", large_training), ("1200 tensors", many_training)):
            training, name = make(), f"{kind}, {SIZE >> 20} MiB"
            results += blocked(name, training, list(found.values())[-1] / f"blocked-{len(results)}")
            results += [slowed(name, training, where, folder / f"slowed-{len(results)}") for where, folder in found.items()]
            del training
            gc.collect()
    report(*results)
