"""A verified resume as the first thing that a process does, beside torch, which checks nothing.

Jobs that start again resume once, in a process that has loaded nothing before: all memory that a state is read into is new, and has to be
provided by the system. Where one process resumes again and again (``loading.py``), an allocator has what the round before has freed, and
gives it out again: to torch, from the second round on, and to nobody who resumes.

So each run has a process of its own: forked by one that has imported everything, and has neither threads nor a state. It goes both ways
with a few bytes, so that nothing that it shares with its parent has to be copied later; makes the objects, resumes, tells its seconds,
and ends. The files are in the page cache.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from loading import plain, restore
from paired import SIZE, Target, blocks, large, many, nbytes, paired, places, report

import ckptstore
from ckptstore.checksum import crc64nvme

ROUNDS = 6
STATES = ("32 tensors", "1200 tensors")

_R = TypeVar("_R")


def trained(kind: str) -> dict[str, Any]:
    """Return objects of one kind of state as they are when they are saved."""
    if kind == "32 tensors":
        return dict(large())
    model, optimizer = many()
    return {"model": model, "optimizer": optimizer}


def new(kind: str) -> dict[str, Any]:
    """Return the same objects as a job has them before it resumes: their memory is there, and their optimizer has made no step.

    They hold zeros: random numbers would take longer than all else.
    """
    if kind == "32 tensors":
        found: dict[str, Any] = {name: torch.empty(SIZE // 32 // 4).fill_(0) for name in (f"layer{i}" for i in range(32))}
        return found
    with torch.device("meta"):
        model = blocks()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters())}


def resume(objects: dict[str, Any], place: Path) -> None:
    with ckptstore.Store(place / "store") as store:
        store.resume(objects)


def load_with_torch(objects: dict[str, Any], place: Path) -> None:
    restore(objects, place / "torch.pt")


def save(objects: dict[str, Any], place: Path) -> int:
    """Save in both ways, and return the bytes of all tensors."""
    torch.save(plain(objects), place / "torch.pt")
    with open(place / "torch.pt", "rb") as file:
        os.fsync(file.fileno())  # or the disk would be busy with it later
    with ckptstore.Store(place / "store") as store:
        store.save(objects)
    return nbytes(plain(objects))


WAYS = {"resume": resume, "torch.load + load_state_dict": load_with_torch}


def in_child(call: Callable[[], _R]) -> _R:
    """Return what `call` does in a forked process."""
    assert threading.active_count() == 1  # no other thread would be there after the fork
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_tell, args=(call, theirs))
    child.start()
    theirs.close()
    found: _R = ours.recv()
    child.join()
    return found


def _tell(call: Callable[[], object], to: Connection) -> None:
    to.send(call())


def timed(way: str, kind: str, place: Path) -> tuple[float, float]:
    """Resume once; return wall and CPU seconds."""
    prepare()
    objects = new(kind)
    start, cpu = time.perf_counter(), time.process_time()
    WAYS[way](objects, place)
    return time.perf_counter() - start, time.process_time() - cpu


def contents(way: str, kind: str, place: Path) -> list[Any]:
    """Resume once; return what the objects hold then, each tensor as its shape and a checksum."""
    objects = new(kind)
    WAYS[way](objects, place)
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.append((tuple(value.shape), str(value.dtype), crc64nvme(value.numpy().tobytes())))
        elif isinstance(value, dict):
            for key, item in value.items():
                found.append(key)
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)
        else:
            found.append(value)

    visit(plain(objects))
    return found


def compare(kind: str, where: str, place: Path) -> dict[str, Any]:
    """Return the figures of one state in one place."""
    place.mkdir(parents=True)
    size = in_child(lambda: save(trained(kind), place))
    ours, theirs = (in_child(partial(contents, way, kind, place)) for way in WAYS)
    assert ours == theirs, "the two did not come to the same"
    ways = {way: partial(in_child, partial(timed, way, kind, place)) for way in WAYS}
    way, beside = WAYS
    targets = [Target(way, beside, 0.5)]
    return paired(f"{kind}, {where}, in a new process", ways, ROUNDS, targets, size=size, warm=0)


def prepare() -> None:
    """Do all once with a few bytes: much of what torch and the store are made of is imported when it is first used."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1)).sum().backward()
    optimizer.step()
    objects = {"model": model, "optimizer": optimizer, "tensor": torch.zeros(1)}
    with tempfile.TemporaryDirectory() as folder:
        save(objects, Path(folder))
        for way in WAYS.values():
            way(objects, Path(folder))


if __name__ == "__main__":
    prepare()
    gc.freeze()  # a child that looks at everything for garbage would copy all of its parent
    with places(sys.argv[1]) as wanted:
        report(*(compare(kind, where, folder / kind) for where, folder in wanted.items() for kind in STATES))
