"""A saving process is killed at random moments: nothing acknowledged is lost, no store is unreadable. `test_every_call` has the others."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import evidence
import pytest
from procs import Channel, Child, Nursery, litter

from ckptstore import Checkpoint, Store

LARGE = 9 << 20
"""Bytes in a tensor of more than one chunk."""


class Counter:
    """The least that can be saved as a sampler."""

    def __init__(self) -> None:
        self.drawn = 0

    def state_dict(self) -> dict[str, int]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.drawn = state["drawn"]


def weights(step: int) -> Any:
    import torch

    return torch.arange(1000.0) * step


def ballast(step: int) -> Any:
    import torch

    return torch.full((LARGE if step % 8 == 0 else 1000,), step % 251, dtype=torch.uint8)


def content(step: int) -> bytes:
    return b"%d" % step * 1000


def train(channel: Channel, url: str, seed: int) -> None:
    """Resume, say where, then save and keep house until killed, saying what is about to be done and what has been."""
    rng = random.Random(seed)
    import torch

    sampler = Counter()
    state: dict[str, Any] = {"weights": torch.zeros(1000), "step": 0}
    store = Store(url, keep_last=2)
    resumed = store.resume(state, sampler=sampler)
    start: int = state["step"]
    assert (resumed.step if resumed else 0) == start
    assert torch.equal(state["weights"], weights(start))
    assert sampler.drawn == start * 10
    store.gc()
    assert not litter(store)
    channel.send("resumed", resumed and resumed.id)
    for step in count(start + 1):
        sampler.drawn = step * 10
        full = {"weights": weights(step), "step": step, "ballast": ballast(step)}
        with announced(channel, "latest", step) as made:
            made += [store.save(full, step=step, sampler=sampler, rng=rng.random() < 0.3, metrics={"loss": 1 / step})]
        match rng.randrange(8):
            case 0 | 1:
                with announced(channel, "best", step) as made:
                    made += [store.tag("best", "latest")]
            case 2 | 3:
                with announced(channel, "export", step) as made:
                    made += [save_parts(store, "export", step, 3)]
            case 4 if "export" in store:
                with announced(channel, "export", step):
                    store.delete("export")
            case 5:
                store.prune()
            case 6:
                store.gc()


@contextmanager
def announced(channel: Channel, name: str, step: int) -> Iterator[list[Checkpoint]]:
    """Say that `name` is about to change, and then to what it was: to what the block puts into the list, to nothing if that is empty."""
    made: list[Checkpoint] = []
    channel.send("begin", name, step)
    yield made
    channel.send("done", name, made[0].id if made else None)


def save_parts(store: Store, name: str, step: int, parts: int = 2) -> Checkpoint:
    # Metrics that make the record large enough to be shrunk once it is old.
    with store.transaction(name, step=step, metrics={f"{i}" * 999: i for i in range(4)}) as tx:
        for i in range(parts):
            with tx.open(f"part/{i}") as file:
                file.write(content(step))
    return tx.checkpoint


class Ledger:
    """What a store must hold by what its writers said: what each name points to, and the one change that may or may not have happened."""

    def __init__(self) -> None:
        self.names: dict[str, str | None] = {}
        self.begun: tuple[str, int] | None = None
        self.done = 0
        self.cut_short = 0
        self.unsaid = 0
        """Of those cut short, how many had taken effect all the same."""

    def hear(self, message: list[Any]) -> None:
        match message:
            case ["begin", name, step]:
                self.begun = (name, step)
            case ["done", name, checkpoint_id]:
                self.names[name] = checkpoint_id
                self.begun = None
                self.done += 1

    def check(self, url: str) -> None:
        """Compare with what a process that knows nothing finds there, every byte of it."""
        store = Store(url)
        found = store.names()
        begun, self.begun = self.begun, None
        self.cut_short += begun is not None
        for name in {*found, *self.names}:
            expected, there = self.names.get(name), found.get(name)
            if there != expected:
                assert begun is not None and begun[0] == name, f"{name} is {there}, not the acknowledged {expected}"
                assert there is None or store.checkpoint(name).step == begun[1]
                self.names[name] = there
                self.unsaid += 1
        assert store.verify() == []
        for checkpoint in store.checkpoints():
            check_content(checkpoint)
        store.close()


def check_content(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint with what was saved at its step."""
    step = checkpoint.step
    assert step is not None
    for file in checkpoint.files:
        if file.startswith("part/"):
            with checkpoint.open(file) as part:
                assert part.read() == content(step)
    if "state.pt" in checkpoint.files:
        import torch

        state = checkpoint.load()
        assert state["step"] == step
        assert torch.equal(state["weights"], weights(step))
        assert torch.equal(state["ballast"], ballast(step))
        assert checkpoint.sampler_state == {"drawn": step * 10}


@pytest.mark.parametrize("kills", [70, pytest.param(5000, marks=pytest.mark.soak)])
def test_killed_at_any_moment(tmp_path: Path, warm: Nursery, kills: int) -> None:
    rng = random.Random(20261123)
    url = str(tmp_path / "store")
    ledger = Ledger()
    usual = 0.02  # seconds from one acknowledgement to the next, learnt on the way
    with evidence.experiment("killed at random moments") as tally:
        for kill in range(kills):
            tally.strike()
            child = warm.start(train, url, kill)
            if rng.random() < 0.2:  # while it starts, resumes and collects
                time.sleep(rng.uniform(0, 0.06))
            else:
                assert child.expect("resumed") == [ledger.names.get("latest")]
                usual = 0.9 * usual + 0.1 * await_acknowledgements(child, ledger, rng.randint(1, 4))
                time.sleep(rng.uniform(0, 1.5 * usual))
            for message in child.kill():
                ledger.hear(message)
            ledger.check(url)
    assert ledger.done > kills
    assert ledger.cut_short > kills // 3
    assert ledger.unsaid > 0


def await_acknowledgements(child: Child, ledger: Ledger, wanted: int) -> float:
    """Listen to `wanted` acknowledgements; return the seconds each took."""
    start, before = time.monotonic(), ledger.done
    while ledger.done - before < wanted:
        ledger.hear(child.recv())
    return (time.monotonic() - start) / wanted
