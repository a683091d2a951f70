"""Requests per save, per load and per look for the newest on S3 (a real server, SeaweedFS), and the memory that a large save takes."""

import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import ckptstore

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from services import seaweedfs_server

MIB = 1 << 20


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


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


def told(seen: Counter[str]) -> str:
    """Return what was counted, and begin anew."""
    text = f"{sum(seen.values())} ({', '.join(f'{n} {name}' for name, n in seen.items())})"
    seen.clear()
    return text


with seaweedfs_server(Path(sys.argv[1])) as server:
    os.environ.update(server.env)
    url = f"s3://{server.new_bucket()}/run?endpoint_url={server.endpoint_url}"
    figures: dict[str, object] = {}
    with ckptstore.Store(url) as store:
        for step in range(3):
            store.save({"weight": torch.zeros(1024)}, step=step)
        store._engine.settle()
        seen = counted(store)
        store.save({"weight": torch.zeros(1024)}, step=3)
        store._engine.settle()
        figures["save of a small state (with the pruning of an old one)"] = told(seen)
        store.load()
        figures["load by the job itself"] = told(seen)
    with ckptstore.Store(url) as store:
        seen = counted(store)
        store.names()
        figures["finding the newest, in a new process"] = told(seen)
        store.load()
        figures["and loading it"] = told(seen)
    with ckptstore.Store(url) as store:
        state = {f"layer{i}": torch.rand(32 * MIB // 4) for i in range(32)}
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to now: proc_pid_clear_refs(5)
        store.save(state, step=4)
        figures["extra memory of a save of 1 GiB (MiB); concurrency × part_size is 64"] = round((memory("VmHWM") - before) / MIB)
print(json.dumps(figures))
