"""torchdata's StatefulDataLoader on a store, with its own samplers and with ours in it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptstore import (
    InterruptableDistributedGroupedBatchSampler,
    InterruptableDistributedSampler,
    InterruptableSampler,
    SamplerMismatch,
    StateMismatch,
    Store,
    UsageError,
)
from ckptstore.integrations.torchdata import InLoader, LoaderState

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # which torchdata 0.11 calls in torch 2.13

LENGTH = 50
DATA = TensorDataset(torch.arange(LENGTH))


def numbers(batches: Any) -> list[int]:
    return [int(n) for (batch,) in batches for n in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_its_own_state_is_a_samplers(tmp_path: Path, workers: int) -> None:
    """Shuffled, its state holds the state of a generator."""

    def make(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return StatefulDataLoader(DATA, batch_size=4, shuffle=True, generator=generator, num_workers=workers)

    loader = make(1)
    batches = iter(loader)
    first = [next(batches) for _ in range(5)]
    with Store(tmp_path) as store:
        store.save({}, step=5, sampler=LoaderState(loader))
        rest = numbers(batches)
        again = make(2)
        assert store.resume({}, sampler=LoaderState(again)) is not None
    assert numbers(again) == rest
    assert sorted(numbers(first) + rest) == list(range(LENGTH))


@pytest.mark.parametrize(("workers", "stop"), [(0, 0), (0, 1), (0, 5), (0, 12), (0, 13), (1, 5), (2, 13)])
def test_our_sampler_inside(tmp_path: Path, workers: int, stop: int) -> None:
    def make() -> tuple[InterruptableDistributedSampler, Any]:
        sampler = InterruptableDistributedSampler(DATA, seed=3)
        return sampler, StatefulDataLoader(DATA, batch_size=4, sampler=InLoader(sampler), num_workers=workers)

    def epochs(sampler: Any, loader: Any, first: int) -> list[list[int]]:
        found = []
        for epoch in range(first, 3):
            sampler.set_epoch(epoch)
            found.append(numbers(loader))
        return found

    whole = epochs(*make(), 0)
    assert whole[0] != whole[1]
    sampler, loader = make()
    sampler.set_epoch(0)
    assert numbers(loader) == whole[0]
    sampler.set_epoch(1)
    batches = iter(loader)
    seen = numbers(next(batches) for _ in range(stop))
    with Store(tmp_path) as store:
        store.save({}, step=stop, sampler=LoaderState(loader))
        sampler, loader = make()
        assert store.resume({}, sampler=LoaderState(loader)) is not None
    assert len(loader) == 13
    rest = numbers(loader)
    assert sampler.epoch == 1
    assert seen + rest == whole[1]
    assert epochs(sampler, loader, 2) == [whole[2]]


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True, "snapshot_every_n_steps": 99}])
def test_the_loop_of_the_docs_goes_on_in_the_right_epoch(options: dict[str, Any]) -> None:
    """Wherever it was saved and stopped: before an epoch, in it, with its last batch, and after its end."""

    def run(url: str, stop: int | None) -> list[list[int]]:
        sampler = InterruptableDistributedSampler(DATA, seed=3)
        loader: Any = StatefulDataLoader(DATA, batch_size=20, sampler=InLoader(sampler), **options)
        seen: list[list[int]] = []
        with Store(url) as store:
            progress = {"saves": 0}
            store.resume(progress, sampler=LoaderState(loader))

            def save() -> bool:
                progress["saves"] += 1
                store.save(progress, sampler=LoaderState(loader))
                return progress["saves"] == stop

            if save():  # again what it was resumed from
                return seen
            for epoch in range(sampler.epoch, 3):
                sampler.set_epoch(epoch)
                for batch in loader:
                    seen.append(numbers([batch]))
                    if save():
                        return seen
                if save():
                    return seen
        return seen

    whole = run(f"memory://{uuid4()}", None)
    assert len(whole) == 9
    for stop in (1, 3, 4, 5, 8, 9, 13) if not options else (5, 8):
        url = f"memory://{uuid4()}"
        assert run(url, stop) + run(url, stop + 1) + run(url, None) == whole, stop


def test_tuples_in_the_state_of_a_dataset_stay_tuples(tmp_path: Path) -> None:
    """As `random.setstate` wants them."""

    class Drawn(torch.utils.data.IterableDataset[float]):
        def __init__(self) -> None:
            self.generator = random.Random(1)

        def __iter__(self) -> Iterator[float]:
            while True:
                yield self.generator.random()

        def state_dict(self) -> dict[str, Any]:
            return {"generator": self.generator.getstate()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.generator.setstate(state_dict["generator"])

    loader, again = (StatefulDataLoader(Drawn(), batch_size=2) for _ in range(2))
    batches = iter(loader)
    next(batches)
    with Store(tmp_path) as store:
        store.save({}, sampler=LoaderState(loader))
        store.resume({}, sampler=LoaderState(again))
    assert torch.equal(next(iter(again)), next(batches))


def test_on_another_number_of_ranks() -> None:
    """The state is global, so any rank's will do."""

    def make(rank: int, world: int) -> Any:
        return StatefulDataLoader(
            DATA, batch_size=4, sampler=InLoader(InterruptableDistributedSampler(DATA, world, rank, seed=3))
        )

    two = [make(rank, 2) for rank in range(2)]
    before = [[next(batches) for _ in range(3)] for batches in map(iter, two)]
    state = LoaderState(two[1]).state_dict()
    assert state == LoaderState(two[0]).state_dict()
    for world in (1, 3):
        after = [make(rank, world) for rank in range(world)]
        for loader in after:
            LoaderState(loader).load_state_dict(state)
        rest = [numbers(loader) for loader in after]
        seen = [n for batches in before for n in numbers(batches)] + [n for part in rest for n in part]
        assert set(seen) == set(range(LENGTH))
        assert len(seen) < LENGTH + world


def test_between_two_snapshots_ranks_and_batches_must_stay(tmp_path: Path) -> None:
    """There torchdata draws some batches again to get where it was."""

    def make(world: int, batch_size: int, snapshots: int = 4) -> Any:
        sampler = InterruptableDistributedSampler(DATA, world, 0, seed=3)
        return StatefulDataLoader(
            DATA, batch_size=batch_size, sampler=InLoader(sampler), num_workers=1, snapshot_every_n_steps=snapshots
        )

    loader = make(2, 4)
    batches = iter(loader)
    seen = [next(batches) for _ in range(3)]
    state = LoaderState(loader).state_dict()
    for world, batch_size in ((1, 4), (2, 5)):
        with pytest.raises(StateMismatch, match="2 ranks and a batch size of 4, and can only go on so"):
            LoaderState(make(world, batch_size)).load_state_dict(state)
    again = make(2, 4)
    LoaderState(again).load_state_dict(state)
    assert numbers(seen) + numbers(again) == numbers(make(2, 4))

    for _ in batches:
        pass
    state = LoaderState(loader).state_dict()  # at the end nothing is drawn again
    assert state["loader"]["_steps_since_snapshot"]
    more = make(25, 5)
    LoaderState(more).load_state_dict(state)
    assert len(numbers(more)) == 2


def test_nothing_for_this_rank() -> None:
    sampler = InterruptableDistributedSampler(TensorDataset(torch.arange(1)), 2, 0, drop_last=True)
    loader: Any = StatefulDataLoader(TensorDataset(torch.arange(1)), sampler=InLoader(sampler))
    assert list(loader) == []
    state = LoaderState(loader).state_dict()
    assert json.loads(json.dumps(state)) == state
    LoaderState(loader).load_state_dict(state)
    assert sampler.epoch == 1


def test_a_batch_sampler_of_ours() -> None:
    groups = [i % 3 for i in range(LENGTH)]

    def make() -> Any:
        return StatefulDataLoader(
            DATA, batch_sampler=InLoader(InterruptableDistributedGroupedBatchSampler(DATA, groups, 4, seed=1))
        )

    whole = numbers(make())
    loader = make()
    batches = iter(loader)
    seen = numbers(next(batches) for _ in range(6))
    again = make()
    LoaderState(again).load_state_dict(LoaderState(loader).state_dict())
    assert seen + numbers(again) == whole


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="StatefulDataLoader"):
        LoaderState(torch.utils.data.DataLoader(DATA))
    for options in ({"sampler": InterruptableSampler(DATA)}, {"batch_sampler": InterruptableSampler(DATA)}):
        with pytest.raises(UsageError, match=r"InLoader\(sampler\)"):  # it would begin each epoch anew
            LoaderState(StatefulDataLoader(DATA, **options))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="samplers"):
        InLoader(torch.utils.data.SequentialSampler(DATA))  # type: ignore[arg-type]
    sampler = InterruptableSampler(DATA, seed=1)
    loader = StatefulDataLoader(DATA, batch_size=4, sampler=InLoader(sampler))
    with Store(tmp_path) as store:
        store.save({}, "a", sampler=sampler)
        with pytest.raises(StateMismatch, match="a sampler of ckptstore"):
            store.resume({}, "a", sampler=LoaderState(loader))
        store.save({}, "b", sampler=LoaderState(loader))
        with pytest.raises(SamplerMismatch):
            store.resume({}, "b", sampler=sampler)
        other = StatefulDataLoader(DATA, batch_size=4, sampler=InLoader(InterruptableSampler(DATA, seed=2)))
        with pytest.raises(SamplerMismatch, match="seed"):
            store.resume({}, "b", sampler=LoaderState(other))
        workers = StatefulDataLoader(DATA, batch_size=4, num_workers=1)
        store.resume({}, "b", sampler=LoaderState(workers))
        with pytest.raises(Exception, match=r"workers|key|snapshot"):
            next(iter(workers))


def test_the_readme(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python torchdata\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with Store(tmp_path) as store:
        names: dict[str, Any] = {
            "store": store,
            "StatefulDataLoader": StatefulDataLoader,
            "dataset": DATA,
            "step": 1,
            "progress": {},
        }
        for _ in range(2):
            names["sampler"] = InterruptableDistributedSampler(DATA, seed=3)
            exec(compile(example, "README.md", "exec"), names)
            seen = numbers(names["loader"])
            store.save({}, step=2, sampler=LoaderState(names["loader"]))
    assert sorted(seen) == list(range(LENGTH))
