"""The samplers: torch's order, and every sample exactly once however often and on however many ranks a run is stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ckptstore import (
    AdvancedTooFarError,
    HasNotResetProgressError,
    InterruptableDistributedGroupedBatchSampler,
    InterruptableDistributedSampler,
    InterruptableSampler,
    SamplerMismatch,
)
from ckptstore.errors import UsageError


class Numbers(torch.utils.data.Dataset[int]):
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def ranks(length: int, world: int, **options: Any) -> list[InterruptableDistributedSampler]:
    return [InterruptableDistributedSampler(Numbers(length), world, rank, **options) for rank in range(world)]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_the_order_is_torchs(world: int, drop_last: bool, shuffle: bool) -> None:
    for length in (0, 1, 2, 3, 7, 8, 100):
        orders = []
        for epoch in range(3):
            for rank in range(world):
                options: Any = {"shuffle": shuffle, "seed": 7, "drop_last": drop_last}
                torchs = DistributedSampler(Numbers(length), world, rank, **options)
                ours = InterruptableDistributedSampler(Numbers(length), world, rank, **options)
                torchs.set_epoch(epoch)
                ours.set_epoch(epoch)
                # Without samples torch's asks for a remainder of nothing.
                expected = [] if length == 0 else list(torchs)
                assert list(ours) == expected
                assert list(ours) == expected, "iterating consumes nothing"
                assert len(ours) == len(expected)
                orders.append((epoch, list(ours)))
        if shuffle and length == 100:
            assert len({tuple(order) for _, order in orders}) == 3 * world, "each epoch has an order of its own"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_sample_once_over_changing_worlds(data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 200))
    shuffle, drop_last = data.draw(st.booleans()), data.draw(st.booleans())
    seen: list[int] = []
    state: Any = None
    stops = data.draw(st.integers(1, 3))
    for stop in range(stops + 1):
        world = data.draw(st.integers(1, 16))
        samplers = ranks(length, world, shuffle=shuffle, drop_last=drop_last, seed=3)
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(json.loads(json.dumps(state)))
            else:
                sampler.set_epoch(4)
        rows = list(zip(*samplers, strict=True))  # what the ranks draw at the same time
        already = len(seen)
        if stop < stops:
            rows = rows[: data.draw(st.integers(0, len(rows)))]
        for row in rows:
            for sampler in samplers:
                sampler.advance(1)
            seen += row
        states = [sampler.state_dict() for sampler in samplers]
        assert all(s == states[0] for s in states), "all ranks agree"
        state = states[0]
        seen = seen[: already + min(len(seen) - already, length - already)]  # what comes after is padding
        assert state["consumed"] == len(seen)
    assert max(Counter(seen).values(), default=1) == 1
    missing = length - len(seen)
    assert missing == 0 if not drop_last else missing < 16


@pytest.mark.parametrize("before", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_padding_is_the_only_repetition(before: int, after: int) -> None:
    length = 50
    old = ranks(length, before, seed=1)
    head = [index for row in zip(*(list(s)[:5] for s in old), strict=True) for index in row]
    for sampler in old:
        sampler.advance(5)
    new = ranks(length, after, seed=1)
    for sampler in new:
        sampler.load_state_dict(old[-1].state_dict())
    tail = [index for row in zip(*new, strict=True) for index in row]
    padding = -(length - len(head)) % after
    assert sorted(head + tail[: len(tail) - padding]) == list(range(length))
    assert len(head) + len(tail) == length + padding


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("length", [3, 50])
def test_resumed_at_the_same_world_is_as_if_nothing_happened(length: int, drop_last: bool) -> None:
    for world in (1, 3, 4, 8):
        for taken in range(18):
            for rank, sampler in enumerate(ranks(length, world, seed=5, drop_last=drop_last)):
                whole = list(sampler)
                step = min(taken, len(whole))
                sampler.advance(step)
                resumed = InterruptableDistributedSampler(Numbers(length), world, rank, seed=5, drop_last=drop_last)
                resumed.load_state_dict(sampler.state_dict())
                assert list(resumed) == whole[step:]
                assert resumed.progress == step


def test_epochs() -> None:
    sampler = InterruptableDistributedSampler(Numbers(10))
    for epoch in range(2):
        with sampler.in_epoch(epoch):
            assert sampler.epoch == epoch
            sampler.advance(10)
        assert (sampler.epoch, sampler.progress) == (epoch + 1, 0), "the epoch is over: a save here must not repeat it"
    with pytest.raises(KeyboardInterrupt), sampler.in_epoch(2):
        sampler.advance(4)
        raise KeyboardInterrupt
    assert sampler.state_dict()["consumed"] == 4
    with pytest.raises(HasNotResetProgressError, match="epoch 2 is under way"):
        sampler.set_epoch(3)
    with pytest.raises(HasNotResetProgressError), sampler.in_epoch(3):
        raise AssertionError("not reached")
    sampler.set_epoch(2)
    with sampler.in_epoch(2):
        assert len(list(sampler)) == 6
    sampler.advance(1)
    resumed = InterruptableDistributedSampler(Numbers(10))
    resumed.load_state_dict(sampler.state_dict())
    with pytest.raises(HasNotResetProgressError), resumed.in_epoch(4):
        raise AssertionError("not reached")
    for _ in range(2):
        resumed.set_epoch(3)  # the one under way, as often as one likes
    assert (resumed.epoch, resumed.consumed) == (3, 1)
    resumed.advance(5)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.state_dict() == sampler.state_dict(), "going back counts anew"
    sampler.reset_progress()
    sampler.set_epoch(9)
    for bad in (-1, 1.5, True, "1"):
        with pytest.raises(UsageError):
            sampler.set_epoch(bad)  # type: ignore[arg-type]


def test_too_far() -> None:
    sampler = InterruptableDistributedSampler(Numbers(10), 4, 1)
    sampler.advance(3)
    with pytest.raises(AdvancedTooFarError):
        sampler.advance(1)
    assert sampler.progress == 3
    for bad in (-1, 0.5, True):
        with pytest.raises(UsageError):
            sampler.advance(bad)  # type: ignore[arg-type]
    with pytest.raises(AdvancedTooFarError):
        sampler.load_state_dict({"progress": 4, "epoch": 0})
    with pytest.raises(AdvancedTooFarError):
        sampler.load_state_dict({**sampler.state_dict(), "consumed": 11})
    assert sampler.progress == 3


def test_the_short_state_of_cycling_utils_loads() -> None:
    whole = list(InterruptableDistributedSampler(Numbers(20), 2, 1))
    sampler = InterruptableDistributedSampler(Numbers(20), 2, 1)
    sampler.load_state_dict({"progress": 4, "epoch": 0})
    assert (sampler.progress, sampler.epoch, list(sampler)) == (4, 0, whole[4:])
    single = InterruptableSampler(Numbers(20))
    single.load_state_dict({"progress": 20, "epoch": 3})
    assert (single.progress, single.epoch, list(single)) == (20, 3, [])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (InterruptableDistributedSampler(Numbers(21)), "length"),
        (InterruptableDistributedSampler(Numbers(20), seed=1), "seed"),
        (InterruptableDistributedSampler(Numbers(20), shuffle=False), "shuffle"),
        (InterruptableDistributedSampler(Numbers(20), drop_last=True), "padding"),
        (InterruptableDistributedGroupedBatchSampler(Numbers(20), [0] * 20, 1), "kind"),
    ],
)
def test_another_sequence_is_refused(other: InterruptableDistributedSampler, named: str) -> None:
    sampler = InterruptableDistributedSampler(Numbers(20))
    sampler.advance(2)
    before = sampler.state_dict()
    with pytest.raises(SamplerMismatch, match=named):
        sampler.load_state_dict(other.state_dict())
    assert sampler.state_dict() == before


@pytest.mark.parametrize(
    "state",
    [
        None,
        [],
        {},
        {"epoch": 1},
        {"progress": 1},
        {"progress": True, "epoch": 0},
        {"progress": -1, "epoch": 0},
        {"consumed": 0, "epoch": 0},
    ],
)
def test_what_is_no_state_is_refused(state: Any) -> None:
    sampler = InterruptableDistributedSampler(Numbers(20))
    with pytest.raises(SamplerMismatch):
        sampler.load_state_dict(state)
    for key, value in (("length", 20.0), ("seed", False), ("shuffle", 1), ("format", 0), ("consumed", True), ("epoch", 1.0)):
        with pytest.raises(SamplerMismatch, match=key):
            sampler.load_state_dict({**sampler.state_dict(), key: value})
    newer = {**sampler.state_dict(), "format": 2}
    with pytest.raises(SamplerMismatch, match="newer"):
        sampler.load_state_dict(newer)


def loaders(sampler: Any, **options: Any) -> Iterator[DataLoader[int]]:
    yield DataLoader(Numbers(103), batch_size=8, sampler=sampler, **options)
    yield DataLoader(Numbers(103), batch_sampler=BatchSampler(sampler, 8, False), **options)
    yield DataLoader(Numbers(103), batch_size=8, sampler=sampler, drop_last=True, **options)


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}], ids=["alone", "workers"]
)
@pytest.mark.parametrize("kind", range(3), ids=["sampler", "batch_sampler", "drop_last"])
def test_loaders_stopped_in_mid_epoch(kind: int, options: dict[str, Any]) -> None:
    """Prefetching workers run ahead, and the state does not."""

    def run(stop: int | None, state: Any = None) -> tuple[list[list[int]], Any]:
        sampler = InterruptableDistributedSampler(Numbers(103), seed=2)
        if state is not None:
            sampler.load_state_dict(state)
        loader = list(loaders(sampler, **options))[kind]
        batches: list[list[int]] = []
        for epoch in range(sampler.epoch, 2):
            with sampler.in_epoch(epoch):
                for batch in sampler.track(loader):
                    batches.append(batch.tolist())
                    if len(batches) == stop:
                        return batches, json.loads(json.dumps(sampler.state_dict()))
        return batches, sampler.state_dict()

    whole, _ = run(None)
    assert len(whole) == 2 * (12 if kind == 2 else 13)
    for stop in (3, 12, 13, 17):
        head, state = run(stop)
        tail, _ = run(None, state)
        assert head + tail == whole


def test_a_loader_that_cannot_be_counted_is_refused() -> None:
    sampler = InterruptableDistributedSampler(Numbers(10))

    class Odd(BatchSampler):
        pass

    for loader in (DataLoader(Numbers(10)), DataLoader(Numbers(10), batch_sampler=Odd(sampler, 2, False)), [1, 2]):
        with pytest.raises(UsageError, match="does not draw from this sampler"):
            next(iter(sampler.track(loader)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="in_order"):
        next(iter(sampler.track(DataLoader(Numbers(10), sampler=sampler, num_workers=2, in_order=False))))
    assert sampler.consumed == 0
    assert [int(x) for x in sampler.track(DataLoader(Numbers(10), batch_size=None, sampler=sampler))] == list(
        InterruptableDistributedSampler(Numbers(10))
    )


def test_what_the_collate_function_returns_does_not_matter() -> None:
    sampler = InterruptableDistributedSampler(Numbers(10), 1, 0)
    counts = []
    for _ in sampler.track(DataLoader(Numbers(10), batch_size=4, sampler=sampler, collate_fn=lambda samples: "x" * 99)):
        counts.append(sampler.progress)
    assert counts == [4, 8, 10], "the batch in hand is counted"


def test_a_loop_that_nothing_is_left_for_is_an_error_not_an_epoch_without_training() -> None:
    sampler = InterruptableSampler(Numbers(10))
    loader = DataLoader(Numbers(10), batch_size=4, sampler=sampler, drop_last=True)
    assert len(list(sampler.track(loader))) == 2
    with pytest.raises(HasNotResetProgressError, match="in_epoch"):
        list(sampler.track(loader))
    resumed = InterruptableSampler(Numbers(10))
    resumed.load_state_dict(sampler.state_dict())
    loader = DataLoader(Numbers(10), batch_size=4, sampler=resumed, drop_last=True)
    assert list(resumed.track(loader)) == []
    with resumed.in_epoch(0):  # what a resume after the last batch of an epoch does
        assert list(resumed.track(loader)) == []
    with pytest.raises(KeyboardInterrupt), resumed.in_epoch(1):
        list(resumed.track(loader))
        raise KeyboardInterrupt
    with resumed.in_epoch(1):  # and what a retry in the same process does
        assert list(resumed.track(loader)) == []


def test_counting_twice_is_told() -> None:
    sampler = InterruptableSampler(Numbers(100))
    with pytest.raises(UsageError, match="leave out the advance"):
        for _ in sampler.track(DataLoader(Numbers(100), batch_size=4, sampler=sampler)):
            sampler.advance(4)


def test_an_error_in_the_loop_keeps_the_progress_with_the_batch_in_hand() -> None:
    sampler = InterruptableSampler(Numbers(100))
    loader = DataLoader(Numbers(100), batch_size=4, sampler=sampler)
    with pytest.raises(ZeroDivisionError), sampler.in_epoch(0):
        for number, _ in enumerate(sampler.track(loader), 1):
            assert number < 3 or 1 / 0
    assert (sampler.epoch, sampler.consumed) == (0, 12)


class Failing(Numbers):
    """Cannot read sample 6."""

    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise OSError("unreadable")
        return index


def test_a_batch_that_could_not_be_read_is_not_counted() -> None:
    sampler = InterruptableSampler(Failing(10), shuffle=False)
    with pytest.raises(OSError, match="unreadable"):
        list(sampler.track(DataLoader(Failing(10), batch_size=2, sampler=sampler)))
    assert sampler.consumed == 6


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_grouped_batches(data: st.DataObject) -> None:
    groups = data.draw(st.lists(st.integers(0, 4), max_size=60))
    batch_size = data.draw(st.integers(1, 7))
    drop_last = data.draw(st.booleans())
    seen: list[list[int]] = []
    state: Any = None
    total = 0
    for stop in range(3):
        world = data.draw(st.integers(1, 6))
        samplers = [
            InterruptableDistributedGroupedBatchSampler(
                Numbers(len(groups)), groups, batch_size, world, rank, drop_last=drop_last
            )
            for rank in range(world)
        ]
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        total = samplers[0].state_dict()["length"]
        rows = list(zip(*samplers, strict=True))
        if stop < 2:
            rows = rows[: data.draw(st.integers(0, len(rows)))]
        for row in rows:
            seen += row
            for sampler in samplers:
                sampler.advance()
        state = samplers[0].state_dict()
        seen = seen[:total]
        assert state["consumed"] == len(seen)
    for batch in seen:
        assert len(batch) == batch_size
        assert len({groups[index] for index in batch}) == 1
    sizes = Counter(groups)
    counts = Counter(index for batch in seen for index in batch)
    if drop_last:
        assert max(counts.values(), default=1) == 1
    else:
        assert set(counts) == set(range(len(groups))), "every sample is in a batch"
        assert sum(counts.values()) == sum(-(-n // batch_size) * batch_size for n in sizes.values())


def test_grouped_state_is_refused_for_other_groups() -> None:
    sampler = InterruptableDistributedGroupedBatchSampler(Numbers(4), [0, 0, 1, 1], 2)
    other = InterruptableDistributedGroupedBatchSampler(Numbers(4), [0, 1, 1, 0], 2)
    with pytest.raises(SamplerMismatch, match="groups"):
        sampler.load_state_dict(other.state_dict())
    for size, options, named in ((3, {}, "batch_size"), (2, {"drop_last": True}, "padding"), (2, {"seed": 1}, "seed")):
        changed = InterruptableDistributedGroupedBatchSampler(Numbers(4), [0, 0, 1, 1], size, **options)  # type: ignore[arg-type]
        with pytest.raises(SamplerMismatch, match=named):
            sampler.load_state_dict({**changed.state_dict(), "length": 2})
    with pytest.raises(UsageError, match="3 entries for 4 samples"):
        InterruptableDistributedGroupedBatchSampler(Numbers(4), [0, 0, 1], 2)
    with pytest.raises(UsageError, match="batch_size"):
        InterruptableDistributedGroupedBatchSampler(Numbers(4), [0, 0, 1, 1], 0)
    loader = DataLoader(Numbers(4), batch_sampler=sampler)
    assert len(loader) == 2
    assert sorted(i for batch in sampler.track(loader) for i in batch.tolist()) == [0, 1, 2, 3]
    assert sampler.state_dict()["consumed"] == 2


@pytest.mark.parametrize("options", [{}, {"num_workers": 2, "persistent_workers": True}], ids=["alone", "workers"])
def test_grouped_batches_stopped_in_mid_epoch(options: dict[str, Any]) -> None:
    def run(stop: int | None, state: Any = None) -> tuple[list[list[int]], Any]:
        sampler = InterruptableDistributedGroupedBatchSampler(Numbers(50), [i % 3 for i in range(50)], 4, seed=6)
        if state is not None:
            sampler.load_state_dict(state)
        loader = DataLoader(Numbers(50), batch_sampler=sampler, **options)
        batches: list[list[int]] = []
        for epoch in range(sampler.epoch, 2):
            with sampler.in_epoch(epoch):
                for batch in sampler.track(loader):
                    batches.append(batch.tolist())
                    if len(batches) == stop:
                        return batches, json.loads(json.dumps(sampler.state_dict()))
        return batches, None

    whole, _ = run(None)
    assert len(whole) == 2 * 14, "groups of 17, 17 and 16"
    assert sorted(whole[:14]) != sorted(whole[14:]), "each epoch has batches of its own"
    for stop in (4, 14, 20):
        head, state = run(stop)
        assert (state["consumed"], state["unit"]) == (stop - 14 * state["epoch"], "batches")
        assert head + run(None, state)[0] == whole


def test_without_a_process_group_it_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (
        InterruptableDistributedSampler,
        lambda data, *world: InterruptableDistributedGroupedBatchSampler(data, [0] * 8, 2, *world),
    ):
        sampler = kind(Numbers(8))
        assert isinstance(sampler, DistributedSampler), "so that trainers leave it in place"
        assert (sampler.num_replicas, sampler.rank) == (1, 0)
        with pytest.raises(UsageError, match="give rank too"):
            kind(Numbers(8), 4)
        for world in ((0, 0), (4, 4), (4, -1), (True, 0), (1.5, 0)):
            with pytest.raises(UsageError, match=r"rank|num_replicas"):
                kind(Numbers(8), *world)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.warns(RuntimeWarning, match="init_process_group") as warned:
            kind(Numbers(8))
        assert warned[0].filename == __file__, "it points at the line that made the sampler"
        kind(Numbers(8), 2, 1)
        monkeypatch.setenv("WORLD_SIZE", "1")


def test_arguments() -> None:
    made: Any = [
        InterruptableSampler(Numbers(8), seed=np.int64(3), shuffle=np.bool_(True)),  # type: ignore[arg-type]
        InterruptableDistributedSampler(Numbers(8), np.int64(2), np.int64(1), seed=np.int64(3)),  # type: ignore[arg-type]
        InterruptableDistributedGroupedBatchSampler(Numbers(8), torch.arange(8) % 2, np.int64(2), seed=np.int64(3)),  # type: ignore[arg-type]
    ]
    for sampler in made:
        sampler.advance(torch.tensor(1))
        assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()
        with pytest.raises(UsageError):
            sampler.advance(torch.tensor(1.0))
        with pytest.raises(UsageError, match="seed"):
            type(sampler)(Numbers(0), *([[], 2] if sampler is made[2] else []), seed=1.5)
    for group in (0.5, "a", None):
        with pytest.raises(UsageError, match="group id"):
            InterruptableDistributedGroupedBatchSampler(Numbers(1), [group], 1)  # type: ignore[list-item]


def test_a_real_process_group_shares_out_the_epoch(tmp_path: Path) -> None:
    """Two processes consume 3 rounds; the rest is drawn by one, and nothing is drawn twice or left out."""
    code = """
        import json, sys
        import torch.distributed as dist
        from ckptstore import InterruptableDistributedSampler
        rank, folder = int(sys.argv[1]), sys.argv[2]
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        sampler = InterruptableDistributedSampler(range(25), seed=9)
        drawn = [index for index, _ in zip(sampler, range(3))]
        sampler.advance(len(drawn))
        with open(f"{folder}/{rank}.json", "w") as file:
            json.dump({"drawn": drawn, "state": sampler.state_dict()}, file)
        dist.barrier()
        dist.destroy_process_group()
    """
    children = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(rank), str(tmp_path)]) for rank in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0]["state"] == results[1]["state"]
    alone = InterruptableDistributedSampler(range(25), seed=9)
    alone.load_state_dict(results[0]["state"])
    assert sorted(results[0]["drawn"] + results[1]["drawn"] + list(alone)) == list(range(25))


def test_the_order_does_not_depend_on_the_default_device() -> None:
    """After ``torch.set_default_device("cuda")``, torch's own sampler fails."""
    sampler = InterruptableSampler(range(20), seed=1)
    expected = list(sampler)
    with torch.device("meta"):
        assert list(sampler) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_go_on_as_if_nothing_had_happened(workers: int) -> None:
    """Starting a loader in mid-epoch must not use up a random number that the run which was not stopped did not use there."""

    def run(stop: int | None, start: Any = None) -> tuple[list[float], Any]:
        sampler = InterruptableDistributedSampler(Numbers(40), seed=2)
        loader = DataLoader(Numbers(40), batch_size=8, sampler=sampler, num_workers=workers)
        torch.manual_seed(0)
        if start is not None:
            sampler.load_state_dict(start[0])
            torch.set_rng_state(start[1])
        drawn: list[float] = []
        for epoch in range(sampler.epoch, 2):
            with sampler.in_epoch(epoch):
                for _ in sampler.track(loader):
                    drawn.append(float(torch.rand(())))
                    if len(drawn) == stop:
                        return drawn, (sampler.state_dict(), torch.get_rng_state())
        return drawn, None

    whole, _ = run(None)
    for stop in (1, 4, 5, 7):
        head, start = run(stop)
        assert head + run(None, start)[0] == whole
