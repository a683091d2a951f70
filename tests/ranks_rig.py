"""Ranks: real processes in one gloo process group, forked from a warm parent."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from procs import Channel, Child, Nursery

_numbers = itertools.count()
LIMIT = timedelta(seconds=30)
"""After which a collective gives up: nothing may hang."""


class Ranks:
    """Runs functions of a test module on all ranks of a new group."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self._nursery = nursery
        self._folder = folder
        self.env: dict[str, str] = {}
        """What the ranks have in their environment beyond what the parent has."""

    def start(self, function: Callable[..., object], world: int, *arguments: Any) -> list[Child]:
        """Start ``function(channel, rank, *arguments)`` on `world` processes, by rank. Of one process there is no group."""
        meet = str(self._folder / f"meet-{next(_numbers)}")
        where = (function.__module__, function.__qualname__)
        return [self._nursery.start(run_rank, self.env, meet, rank, world, *where, *arguments) for rank in range(world)]

    def run(self, function: Callable[..., object], world: int, *arguments: Any) -> list[Any]:
        """Return what each rank has to say at last, by rank: what `function` returned, or an error as [its type, its text]."""
        return [child.expect("end")[0] for child in self.start(function, world, *arguments)]


def run_rank(
    channel: Channel, env: dict[str, str], meet: str, rank: int, world: int, module: str, name: str, *arguments: Any
) -> None:
    """In a child: join the group and run."""
    torch.set_num_threads(1)
    os.environ.update(env)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=LIMIT)
        dist.barrier()  # who has nothing to do with the others ends at once, and they may be connecting still
    import importlib

    function = getattr(importlib.import_module(module), name)
    try:
        result = function(channel, rank, *arguments)
    except BaseException as exc:
        causes = {str(r): [type(e).__name__, str(e)] for r, (e, _) in getattr(exc, "failures", {}).items()}
        channel.send("end", [type(exc).__name__, causes or str(exc)])
        return
    channel.send("end", result)
