"""What torch's own tests of `torch.distributed.checkpoint` ask of a storage, asked of ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dcp_process as work
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks_rig import Ranks
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from ckptstore import Store, errors
from ckptstore.errors import WeightsOnlyWarning

WARM = ("dcp_process", "ranks_rig")
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "run") as opened:
        yield opened


class Holder:
    """A `Stateful` of one value."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.loaded = False

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.loaded = state["value"], True


class Noticing(dict[str, Any]):
    """Notes what is put into it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.put: list[str] = []

    def __setitem__(self, key: str, value: Any) -> None:
        self.put.append(key)
        super().__setitem__(key, value)


def save(store: Store, state: dict[str, Any], **more: Any) -> None:
    dcp.save(state, storage_writer=store.dcp_writer(), **more)


def load(store: Store, state: dict[str, Any], **more: Any) -> None:
    dcp.load(state, storage_reader=store.dcp_reader(), **more)


def test_stateful_objects_are_loaded_in_place_and_values_replaced(store: Store) -> None:
    held = Holder(b"some bytes")
    state = Noticing({"held": held, "plain": {"x": torch.ones(3), "list": [1, 2]}})
    save(store, state)
    held.value = b""
    state["plain"] = {"x": (x := torch.zeros(3)), "list": [0, 0]}
    state.put.clear()
    load(store, state)
    assert state["held"] is held
    assert (held.loaded, held.value) == (True, b"some bytes")
    assert state.put == ["plain"]
    assert state["plain"]["list"] == [1, 2]
    assert state["plain"]["x"] is x
    assert x.tolist() == [1, 1, 1]


def test_nothing_at_all(store: Store) -> None:
    save(store, {})
    state: dict[str, Any] = {}
    load(store, state)
    assert state == {}


def test_a_file_in_memory(store: Store) -> None:
    """As some keep their losses in. It is no plain value, so only who asks for it gets it."""
    raw = io.BytesIO()
    torch.save([0.5, 0.25], raw)
    with pytest.warns(WeightsOnlyWarning, match="BytesIO"):
        save(store, {"held": Holder(raw)})
    held = Holder(io.BytesIO())
    with pytest.raises(dcp.CheckpointException, match="BytesIO"):
        load(store, {"held": held})
    dcp.load({"held": held}, storage_reader=store.dcp_reader(weights_only=False))
    held.value.seek(0)
    assert torch.load(held.value) == [0.5, 0.25]


def test_some_keys_are_missing_and_allowed_to_be(store: Store) -> None:
    save(store, {"x": torch.ones(3)})
    state = {"x": torch.zeros(3), "new": torch.full((2,), 7.0)}
    load(store, state, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert state["x"].tolist() == [1, 1, 1]
    assert state["new"].tolist() == [7, 7]


def test_a_part_of_a_nested_state_by_its_key(store: Store) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save(store, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    found = _load_state_dict_from_keys("optimizer.state", storage_reader=store.dcp_reader())
    assert set(found) == {"optimizer"}
    assert set(found["optimizer"]) == {"state"}
    for index, slots in optimizer.state_dict()["state"].items():
        for name, value in slots.items():
            assert found["optimizer"]["state"][str(index)][name].equal(value)


def test_another_dtype(store: Store) -> None:
    save(store, {"x": torch.tensor([1.5, 2.5])})
    state = {"x": torch.zeros(2, dtype=torch.bfloat16)}
    load(store, state)
    assert state["x"].dtype == torch.bfloat16
    assert state["x"].tolist() == [1.5, 2.5]


def test_another_shape(store: Store) -> None:
    save(store, {"x": torch.ones(3)})
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        load(store, {"x": torch.zeros(4)})


def test_what_is_known_of_the_storage(store: Store) -> None:
    writer = store.dcp_writer()
    made = dcp.save({"x": torch.ones(3)}, storage_writer=writer)
    reader = store.dcp_reader()
    meta = reader.read_metadata().storage_meta
    assert meta is not None
    assert meta == made.storage_meta
    assert meta.checkpoint_id == meta.save_id == writer.checkpoint_id == reader.checkpoint_id == store.checkpoint().id


def test_the_tools_that_convert(store: Store, tmp_path: Path) -> None:
    """To one file, and from one."""
    model = torch.nn.Linear(3, 2)
    save(store, {"model": model})
    dcp_to_torch_save(Path(store.url) / "data" / store.checkpoint().id, tmp_path / "model.pt")
    one = torch.load(tmp_path / "model.pt")
    assert all(one["model"][name].equal(value) for name, value in model.state_dict().items())

    torch_save_to_dcp(tmp_path / "model.pt", tmp_path / "converted")
    with store.transaction() as tx:
        tx.add_tree(tmp_path / "converted")
    again = torch.nn.Linear(3, 2)
    load(store, {"model": again})
    assert again.weight.equal(model.weight)


def test_metadata_as_older_torchs_wrote_it(store: Store, tmp_path: Path) -> None:
    """With a class of theirs for what is known of a tensor."""
    from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

    with patch("torch.distributed.checkpoint.metadata.TensorProperties", TensorProperties):
        dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "old")
    with store.transaction() as tx:
        tx.add_tree(tmp_path / "old")
    state = {"x": torch.zeros(3)}
    load(store, state)
    assert state["x"].tolist() == [1, 1, 1]
    known = store.dcp_reader().read_metadata().state_dict_metadata["x"]
    assert type(known.properties) is TensorProperties


def test_stagers(store: Store) -> None:
    """What `dcp.async_save` copies with: its own, one that is kept, one that copies in the background."""
    background = StagingOptions(use_pinned_memory=False, use_shared_memory=False, use_non_blocking_copy=False)
    for value, options in enumerate([None, background, background], 1):
        stager = DefaultStager(options) if options else None
        state = {"x": torch.full((1000,), float(value))}
        response = dcp.async_save(state, storage_writer=store.dcp_writer(step=value), async_stager=stager)
        if isinstance(response, dcp.state_dict_saver.AsyncSaveResponse):
            response.staging_completion.result()
            response = response.upload_completion
        else:
            assert stager is None
        state["x"].zero_()
        response.result()
        if stager:
            stager.close()
        blank = {"x": torch.zeros(1000)}
        load(store, blank)
        assert blank["x"].eq(value).all()


def test_a_save_in_the_background_that_fails_says_so(store: Store) -> None:
    with Store(store.url) as newer:
        store.acquire()
        newer.acquire()
    response = dcp.async_save({"x": torch.ones(3)}, storage_writer=store.dcp_writer())
    with pytest.raises(dcp.CheckpointException, match="Fenced") as caught:
        (response if not hasattr(response, "upload_completion") else response.upload_completion).result()
    assert type(caught.value.failures[0][0]) is errors.Fenced
    assert store.checkpoints() == []


# -- several ranks


def test_whatever_fails_on_whichever_rank_all_raise(ranks: Ranks, tmp_path: Path) -> None:
    """At each step of a save, nothing is published; at each of a load, nothing is left waiting; then both succeed."""
    for found in ranks.run(work.fail_at_each_step, 2, str(tmp_path / "run")):
        assert found == {"save": [], "load": [], "steps": [1], "value": [1.0]}


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_state_that_one_rank_cannot_take_leaves_nobody_waiting(ranks: Ranks, tmp_path: Path, bad_rank: int) -> None:
    found = ranks.run(work.resume_with_a_state_that_fails, 2, str(tmp_path / "run"), bad_rank)
    assert found[bad_rank] == ["ValueError: no state", 1, True]
    told, *rest = found[1 - bad_rank]
    assert told.startswith(f"RankFailed: rank {bad_rank} failed")
    assert rest == [1, True]


@pytest.mark.parametrize("coordinator", [0, 1])
def test_another_coordinator(ranks: Ranks, tmp_path: Path, coordinator: int) -> None:
    assert ranks.run(work.coordinate, 2, str(tmp_path / "run"), coordinator) == [[4.0]] * 2
    with Store(tmp_path / "run") as store:
        assert store.verify() == []
        assert len(store.checkpoints()) == 1


def test_keys_in_another_order_on_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(work.order_differently, 2, str(tmp_path / "run")) == [["A", "B"]] * 2


def test_sharded_tensors(ranks: Ranks, tmp_path: Path) -> None:
    """The kind before `DTensor`: from each way of cutting to each other."""
    assert ranks.run(work.reshard_old_kind, 2, str(tmp_path / "run")) == [[]] * 2


@pytest.mark.soak
def test_every_placement_on_a_grid(ranks: Ranks, tmp_path: Path) -> None:
    """Copies, parts, and parts that are copied, from each to each other."""
    assert ranks.run(work.reshard_grid, 4, str(tmp_path / "run")) == [[]] * 4
