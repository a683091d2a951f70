"""`torch.distributed.checkpoint` on a store: power cuts, two hosts, kills at any moment, and torchrun."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dcp_process as work
import evidence
import pytest
import torch
import torch.distributed.checkpoint as dcp
from crash_states import build, crash_states, recording
from juicefs_rig import SharedFolder
from procs import litter
from ranks_rig import Ranks

import ckptstore
from ckptstore import Store

pytest_plugins = ("juicefs_fixtures",)
WARM = ("dcp_process", "ranks_rig")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


def save_as_two_ranks(stores: list[Store], step: int) -> None:
    """Do what `dcp.save` does on two ranks, one after the other."""
    writers = [store.dcp_writer(step=step) for store in stores]
    planners = [dcp.DefaultSavePlanner() for _ in stores]
    plans = []
    for rank, (writer, planner) in enumerate(zip(writers, planners, strict=True)):
        planner.set_up_planner({f"x{rank}": torch.full((3000,), float(step)), f"n{rank}": step}, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
        plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    plans = writers[0].prepare_global_plan(plans)
    parts = zip(writers, planners, plans, strict=True)
    results = [writer.write_data(planner.finish_plan(plan), planner).wait() for writer, planner, plan in parts]
    writers[0].finish(metadata, results)


def step_of(root: Path) -> int | None:
    """Return the step that a resuming job finds, None for an empty store; raises when it is of no one step."""
    state: dict[str, Any] = {"x0": torch.zeros(3000), "x1": torch.zeros(3000), "n0": 0, "n1": 0}
    with Store(root) as store:
        checkpoint = store.dcp_resume(state)
        if checkpoint is None:
            return None
        store.gc()
        assert litter(store) == []
    step = checkpoint.step
    assert (state["n0"], state["n1"]) == (step, step)
    assert all(state[name].eq(step).all() for name in ("x0", "x1"))
    return step


@pytest.mark.parametrize(
    ("stride", "most"), [pytest.param(9, 3, id="sampled"), pytest.param(1, 60, id="full", marks=pytest.mark.soak)]
)
def test_whatever_a_disk_keeps_of_two_ranks_after_a_power_cut(tmp_path: Path, stride: int, most: int) -> None:
    """Nothing acknowledged is missing, and nothing is of two generations, in any state that POSIX allows."""
    folder = tmp_path / "disk"
    folder.mkdir()
    marks: list[tuple[int, int]] = []
    with recording(folder) as history:
        stores = [Store(folder / "run") for _ in range(2)]
        for step in (1, 2, 3):
            begun = len(history.operations)
            save_as_two_ranks(stores, step)
            marks.append((begun, len(history.operations)))
            stores[0]._engine.settle()
        for store in stores:
            store.close()
    rng = random.Random(5)
    seen = set()
    numbers = itertools.count()
    with evidence.experiment("crash states of a distributed save") as tally:
        for at in [*range(0, len(history.operations), stride), len(history.operations)]:
            acknowledged = max((step for step, (_, end) in enumerate(marks, 1) if end <= at), default=None)
            begun_step = max((step for step, (start, _) in enumerate(marks, 1) if start < at), default=None)
            for tree in crash_states(history, at, most, rng):
                key = hash((acknowledged, begun_step, tuple(sorted(tree.items()))))
                if key in seen:
                    continue
                seen.add(key)
                tally.strike()
                disk = tmp_path / str(next(numbers))
                build(tree, disk)
                assert step_of(disk / "run") in (acknowledged, begun_step)
                shutil.rmtree(disk)
    print(f"{len(history.operations)} operations, {len(seen)} states")
    assert len(seen) > 200 // stride


def test_two_hosts(ranks: Ranks, shared: SharedFolder) -> None:
    """Each rank has a mount of its own, with a cache of its own: JuiceFS."""
    urls = [f"shared://{host}/run?create=1" for host in (shared.a, shared.b)]
    for value in (1.0, 2.0):
        ids = ranks.run(work.save_on_mounts, 2, urls, value)
        assert ids[0] == ids[1]
        assert ranks.run(work.load_on_mounts, 2, urls) == [[value]] * 2
    with Store(urls[1], acquire=False) as store:
        assert store.verify() == []


@pytest.mark.parametrize("rounds", [pytest.param(2, id="few"), pytest.param(60, id="many", marks=pytest.mark.soak)])
def test_killed_at_any_moment_and_started_again(ranks: Ranks, tmp_path: Path, rounds: int) -> None:
    """One rank, then the others: what was acknowledged to anybody is there, or something newer, and all of one value."""
    url = str(tmp_path / "run")
    dice = random.Random(rounds)
    acknowledged = 0
    with evidence.experiment("a rank of a distributed save killed at any moment") as tally:
        for _ in range(rounds):
            tally.strike()
            world = dice.choice([2, 4])
            children = ranks.start(work.save_for_ever, world, url)
            assert {child.expect("resumed")[0] >= acknowledged for child in children} == {True}
            for _ in range(dice.randint(0, 2)):
                acknowledged = max(acknowledged, children[0].expect("saved")[0])
            victim = dice.randrange(world)
            if dice.random() < 0.7:
                time.sleep(dice.random() * 0.05)  # at any moment: no event tells it
            said = children[victim].kill()
            for child in children:
                said += child.rest() if child is not children[victim] else []
            acknowledged = max([acknowledged, *(message[1] for message in said if message[0] == "saved")])
        with Store(url) as store:
            store.acquire()
            found = store.checkpoint()
            assert found.step is not None
            assert found.step >= acknowledged
            assert store.verify() == []
            store.gc()
            assert litter(store) == []


@pytest.mark.soak
def test_torchrun_starts_again_after_a_rank_was_killed(tmp_path: Path) -> None:
    """The ranks of one start are one job, found out from torchrun's environment; those of the next are a newer one."""
    script = tmp_path / "train.py"
    script.write_text(work.TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    env = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/preemption.md
    done = subprocess.run([*command, script, tmp_path / "run"], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-5000:]
    with Store(tmp_path / "run") as store:
        kept = [(int(c.id.partition("-")[0][1:]), c.step) for c in store.checkpoints()]
        epochs, steps = zip(*kept, strict=True)
        assert steps[-2:] == (5, 6)
        assert all(step >= 3 for step in steps), "what the last start resumed from is kept, and nothing older"
        assert list(epochs) == sorted(epochs)
        assert epochs[-1] > 1
        assert litter(store) == []
