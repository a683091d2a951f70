"""How much the threads of a save or a load hold up other Python code: a thread that only counts, while they run.

It needs the GIL for every step, so what it loses is what they hold, and its share of the CPUs. To tell these apart the same is done by
another process meanwhile, which takes as much of the CPUs, and has a GIL of its own.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from paired import figure, large, many, places, report

import ckptstore

ROUNDS = 5


class Counter(threading.Thread):
    """Counts, as fast as Python does, until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count = 0
        self.over = False

    def run(self) -> None:
        while not self.over:
            self.count += 1

    def rate(self, meanwhile: Callable[[], object]) -> float:
        """Return steps per second during a call."""
        before, start = self.count, time.perf_counter()
        meanwhile()
        return (self.count - before) / (time.perf_counter() - start)


def seconds(call: Callable[[], object]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def state(kind: str) -> dict[str, Any]:
    """Return what is saved: 32 tensors, or a model and its optimizer."""
    if kind == "32 tensors":
        return large()
    model, optimizer = many()
    return {"model": model, "optimizer": optimizer}


def work(kind: str, root: Path) -> dict[str, Callable[[], object]]:
    """Return what is measured, ready to be called."""
    objects = state(kind)
    store = ckptstore.Store(root, keep_last=1)
    store.save(objects)
    return {"save": lambda: store.save(objects), "load": store.load, "resume": lambda: store.resume(objects)}


def serve(kind: str, root: Path, orders: Connection) -> None:
    """Do in a process of its own what is asked for."""
    todo = work(kind, root)
    orders.send("ready")
    while name := orders.recv():
        todo[name]()
        orders.send("done")


def compare(kind: str, folder: Path) -> list[dict[str, Any]]:
    """Return the figures of one state."""
    folder.mkdir(parents=True)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(kind, folder / "there", theirs), daemon=True)
    process.start()
    here = work(kind, folder / "here")
    ours.recv()

    def there(name: str) -> None:
        ours.send(name)
        ours.recv()

    alone = {name: median(seconds(call) for _ in range(ROUNDS)) for name, call in here.items()}
    counter = Counter()
    counter.start()
    figures = []
    for name, call in here.items():
        kept, beside, taken = [], [], []
        for _ in range(ROUNDS):
            idle = counter.rate(lambda: time.sleep(0.2))
            kept.append(counter.rate(lambda call=call, taken=taken: taken.append(seconds(call))) / idle)  # type: ignore[misc]
            beside.append(counter.rate(lambda name=name: there(name)) / idle)  # type: ignore[misc]
        note = f"{median(beside):.0%} while another process does it: the rest is the CPUs'"
        figures.append(
            figure(f"{kind}: a counting thread keeps during a {name}", round(100 * median(kept)), "% of its speed", note=note)
        )
        slower = round(median(taken) / alone[name], 2)
        figures.append(figure(f"{kind}: a {name} beside it takes, by its time alone", slower, "×"))
    counter.over = True
    ours.send("")
    process.join()
    return figures


if __name__ == "__main__":
    results = []
    with places(sys.argv[1]) as where:
        for place, folder in where.items():
            for kind in ("32 tensors", "1200 tensors"):
                found = compare(kind, folder / kind)
                results += [{**one, "title": f"{place}, {one['title']}"} for one in found]
    report(*results)
