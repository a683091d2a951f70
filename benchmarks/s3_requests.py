"""Requests per save, per load and per look for the newest on S3 (a real server, SeaweedFS), and the memory that a large save takes."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from paired import MIB, extra_memory, figure, large, report
from services import seaweedfs_server

import ckptstore


def counted(store: ckptstore.Store) -> Counter[str]:
    """Return a counter of the requests that `store` sends from now on."""
    seen: Counter[str] = Counter()
    backend = store._engine.backend
    while hasattr(backend, "inner"):
        backend = backend.inner

    def count(event_name: str, **_: Any) -> None:
        seen[event_name.rpartition(".")[2]] += 1

    backend._bucket._connected().meta.events.register_first("before-send.s3", count)  # type: ignore[attr-defined]
    return seen


def told(title: str, seen: Counter[str], at_most: int | None = None) -> dict[str, Any]:
    """Return what was counted, and begin anew."""
    found = figure(title, sum(seen.values()), "requests", at_most, ", ".join(f"{n} {name}" for name, n in seen.items()))
    seen.clear()
    return found


with seaweedfs_server(Path(sys.argv[1])) as server:
    os.environ.update(server.env)
    url = f"s3://{server.new_bucket()}/run?endpoint_url={server.endpoint_url}"
    with ckptstore.Store(url) as store:
        for step in range(3):
            store.save({"weight": torch.zeros(1024)}, step=step)
        store._engine.settle()
        seen = counted(store)
        store.save({"weight": torch.zeros(1024)}, step=3)
        store._engine.settle()
        figures = [told("save of a small state (with the pruning of an old one)", seen, 6)]
        store.load()
        figures.append(told("load by the job itself", seen))
    with ckptstore.Store(url) as store:
        seen = counted(store)
        store.names()
        figures.append(told("finding the newest, in a new process", seen, 3))
        store.load()
        figures.append(told("and loading it", seen))
    with ckptstore.Store(url) as store:
        state = large()
        saved = extra_memory(lambda: store.save(state, step=4))
        figures.append(figure("save: extra memory", round(saved / MIB), "MiB", 128, "concurrency × part_size is 64"))
report(*figures)
