"""A process with saves in the background is killed at random moments: nothing acknowledged is lost, and what is there is whole."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Any

import evidence
import pytest
from procs import Channel, Nursery, litter

from ckptstore import Checkpoint, Store

LARGE = 9 << 20
"""Bytes in a tensor of more than one chunk."""


def warm_up() -> None:
    """Have all imported, and no thread left, so that a fork is a whole process."""
    import torch

    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    with Store("memory://warm-async") as store:
        store.save_async({"p": parameter.data, "o": optimizer}, optimizer=optimizer, rng=True, checked=True).result()
        store.load()
    while len(os.listdir("/proc/self/task")) > 1:  # the thread that saved is about to end
        time.sleep(0.001)


def train(channel: Channel, url: str, seed: int) -> None:
    """Resume, then train and save in the background until killed. Every number of the state is the step that it belongs to."""
    import torch

    rng = random.Random(seed)
    parameter, large = torch.nn.Parameter(torch.zeros(1000)), torch.nn.Parameter(torch.zeros(LARGE, dtype=torch.uint8), False)
    optimizer = torch.optim.SGD([parameter, large], lr=1.0)
    buffer = torch.zeros(10)
    state: dict[str, Any] = {"parameter": parameter.data, "buffer": buffer, "step": 0}
    store = Store(url, keep_last=2)
    resumed = store.resume(state)
    large.data.fill_(state["step"] % 251)
    check({**state, "large": large.data}, state["step"])
    assert (resumed.step if resumed else 0) == state["step"]
    store.gc()
    assert not litter(store)
    channel.send("resumed", state["step"])

    def acknowledge(done: Future[Checkpoint]) -> None:
        if not done.cancelled():
            channel.send("durable", done.result().step)

    for step in count(int(state["step"]) + 1):
        parameter.grad = torch.full((1000,), -1.0)
        optimizer.step()
        large.data.fill_(step % 251)  # after the step, which has waited for what was being copied
        buffer.fill_(step)
        state["step"] = step
        big = {"large": large.data} if step % 4 == 0 else {"large": large.data[:1].clone()}
        pending = store.save_async(
            {**state, **big},
            step=step,
            when_busy=rng.choice(["wait", "skip", "replace"]),
            optimizer=rng.choice([None, optimizer]),
        )
        pending.add_done_callback(acknowledge)
        match rng.randrange(6):
            case 0:
                pending.cancel()
            case 1:
                channel.send("durable", store.save({**state, **big}, step=step).step)


def check(state: dict[str, Any], step: int) -> None:
    """See that all parts of a state are of the same step."""
    assert state["step"] == step
    assert (state["parameter"] == step).all() and (state["buffer"] == step).all() and (state["large"] == step % 251).all()


@pytest.mark.parametrize("kills", [25, pytest.param(2000, marks=pytest.mark.soak)])
def test_killed_with_saves_in_flight(tmp_path: Path, warm: Nursery, kills: int) -> None:
    rng = random.Random(20261125)
    url = str(tmp_path / "store")
    newest = heard = 0
    with evidence.experiment("kill -9 with saves in the background") as tally:
        for kill in range(kills):
            tally.strike()
            child = warm.start(train, url, kill)
            messages = [child.recv()]
            assert messages[0][0] == "resumed" and messages[0][1] >= newest
            for _ in range(rng.randrange(1, 4)):
                messages.append(child.recv())
            time.sleep(rng.uniform(0, 0.05))
            messages += child.kill()
            durable = [m[1] for m in messages if m[0] == "durable"]
            heard += len(durable)
            newest = max([newest, *durable])
            with Store(url) as store:
                assert store.checkpoint().step is not None and store.checkpoint().step >= newest, "an acknowledged save is lost"
                for checkpoint in store:
                    assert checkpoint.step is not None
                    check(checkpoint.load(), checkpoint.step)
                assert store.verify() == []
                newest = store.checkpoint().step
    assert heard > kills
