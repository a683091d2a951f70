"""`torch.distributed.checkpoint` on a store, in one process: planners, partial loads, ids, odd and hostile content, other kinds."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from stores import new_memory, store_on, unreadable
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

import ckptstore
from ckptstore import InterruptableDistributedSampler, Store, errors
from ckptstore.errors import CkptStoreError, FallbackWarning, UsageError, WeightsOnlyWarning
from ckptstore.ranks import portable
from ckptstore.testing import FaultyBackend

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "run", keep_last="all") as opened:
        yield opened


def save(store: Store, state: dict[str, Any], name: str = "latest", **more: Any) -> str:
    """Save with DCP and return the id."""
    metadata = dcp.save(state, storage_writer=store.dcp_writer(name, **more))
    assert metadata.storage_meta
    return str(metadata.storage_meta.checkpoint_id)


def load(store: Store, state: dict[str, Any], target: str | None = None, **more: Any) -> dict[str, Any]:
    """Load with DCP."""
    dcp.load(state, storage_reader=store.dcp_reader(target, **more))
    return state


def refused(kind: type[Exception], call: Any, *arguments: Any, **more: Any) -> Exception:
    """Return the error behind the exception that DCP raises."""
    with pytest.raises(dcp.CheckpointException) as caught:
        call(*arguments, **more)
    ((cause, _),) = caught.value.failures.values()
    assert type(cause) is kind, cause
    assert isinstance(cause, Exception)
    return cause


def test_all_kinds_of_values(store: Store) -> None:
    """Of a view only what is seen is written."""
    wide = torch.randn(1000, 1000)
    state: dict[str, Any] = {
        "view": wide[::100, 5:7],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "fp8": torch.randn(5).to(torch.float8_e4m3fn),
        "nested": {"list": [1, "two", {"three": torch.ones(3)}], "none": None, "number": 2.5},
    }
    save(store, state, step=4)
    assert store.checkpoint().nbytes < 100_000
    blank: dict[str, Any] = {k: torch.zeros_like(v) for k, v in state.items() if k != "nested"}
    blank["nested"] = {"list": [0, "", {"three": torch.zeros(3)}], "none": 1, "number": 0.0}
    load(store, blank)
    for name, value in state.items():
        if name != "nested":
            assert blank[name].dtype == value.dtype
            assert torch.equal(*(x.view(torch.uint8) if name == "fp8" else x for x in (blank[name], value)))
    assert blank["nested"]["list"][:2] == [1, "two"]
    assert blank["nested"]["list"][2]["three"].equal(torch.ones(3))
    assert (blank["nested"]["none"], blank["nested"]["number"]) == (None, 2.5)


class TestIds:
    def test_a_checkpoint_id_is_a_name_to_save_and_a_name_or_id_to_load(self, store: Store) -> None:
        writer = store.dcp_writer("latest", step=1)
        assert writer.checkpoint_id == "latest"
        dcp.save({"x": torch.ones(2)}, storage_writer=writer, checkpoint_id="best")
        assert list(store.names()) == ["best"]
        assert writer.checkpoint_id == store.checkpoint("best").id
        for wanted in ("best", store.checkpoint("best").id, Path("best")):
            state = {"x": torch.zeros(2)}
            dcp.load(state, storage_reader=store.dcp_reader("no-such"), checkpoint_id=wanted)
            assert state["x"].tolist() == [1, 1]

    def test_a_writer_may_be_used_again(self, store: Store) -> None:
        writer = store.dcp_writer()
        for value in (1.0, 2.0):
            dcp.save({"x": torch.full((2,), value)}, storage_writer=writer)
        assert len(store.checkpoints()) == 2
        assert load(store, {"x": torch.zeros(2)})["x"].tolist() == [2, 2]

    def test_what_can_be_an_id(self, store: Store) -> None:
        writer, reader = store.dcp_writer(), store.dcp_reader()
        for text, may_write, may_read in (("latest", True, True), ("e1-0123456789ab", False, True), ("a/b", False, False)):
            assert writer.validate_checkpoint_id(text) is may_write
            assert reader.validate_checkpoint_id(text) is may_read
        for neither in (None, 5, b"latest"):
            assert not writer.validate_checkpoint_id(neither)  # type: ignore[arg-type]
            assert not reader.validate_checkpoint_id(neither)  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidName):
            dcp.save({}, storage_writer=writer, checkpoint_id="../x")
        with pytest.raises(errors.InvalidName):
            store.dcp_writer("a/b")
        assert store.checkpoints() == []

    def test_by_step(self, store: Store) -> None:
        for step in (1, 2):
            save(store, {"x": torch.full((2,), float(step))}, step=step)
        assert load(store, {"x": torch.zeros(2)}, step=1)["x"].tolist() == [1, 1]
        refused(errors.CheckpointNotFound, load, store, {"x": torch.zeros(2)}, step=3)

    def test_what_is_not_there(self, store: Store) -> None:
        refused(errors.StoreNotFound, load, store, {"x": torch.zeros(2)})
        save(store, {"x": torch.zeros(2)})
        assert "did you mean 'latest'" in str(refused(errors.CheckpointNotFound, load, store, {"x": torch.zeros(2)}, "lates"))


class Reading(FaultyBackend):
    """Notes how many bytes of data are read; files have chunks of 64 KiB."""

    def __init__(self) -> None:
        super().__init__(new_memory())
        self.capabilities = replace(self.capabilities, part_size=1 << 16)
        self.read = 0

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        if not key.endswith(".metadata"):
            self.read += len(buffer)
        super().read_into(key, offset, buffer)


class TestPartialLoads:
    def test_only_the_chunks_that_are_wanted_are_read(self) -> None:
        backend = Reading()
        with store_on(backend) as store:
            values = {f"t{i}": torch.randn(256, 256) for i in range(16)}  # 256 KiB each
            save(store, values)
            found = load(store, {"t7": torch.zeros(256, 256), "t12": torch.zeros(256, 256)})
            assert found["t7"].equal(values["t7"])
            assert found["t12"].equal(values["t12"])
            assert backend.read <= 2 * (6 << 16)

    def test_each_chunk_of_many_small_items_is_read_once(self) -> None:
        backend = Reading()
        with store_on(backend) as store:
            values: dict[str, Any] = {f"t{i}": torch.randn(50) for i in range(300)}
            save(store, values)
            found = load(store, {name: torch.zeros(50) for name in values})
            assert all(found[name].equal(values[name]) for name in values)
            assert backend.read == store.checkpoint().files["__0_0.distcp"]

    def test_what_is_not_wanted_may_be_damaged(self, store: Store) -> None:
        save(store, {"a": torch.zeros(1 << 22), "b": torch.ones(1 << 22)})  # 16 MiB each: in chunks of their own
        file = Path(store.url) / "data" / store.checkpoint().id / "__0_0.distcp"
        with file.open("r+b") as raw:
            raw.seek(1 << 20)
            raw.write(b"\xff")
        assert load(store, {"b": torch.zeros(1 << 22)})["b"].eq(1).all()
        damaged = refused(errors.DamagedFile, load, store, {"a": torch.zeros(1 << 22)})
        assert isinstance(damaged, errors.DamagedFile)
        ((start, stop),) = damaged.ranges
        assert start <= 1 << 20 < stop

    def test_damage_that_was_met_is_written_down_by_the_next_commit(self, store: Store) -> None:
        """So that retention does not count on it, nor others look at it again."""
        ids = [save(store, {"x": torch.ones(2)}, step=step) for step in (1, 2)]
        file = Path(store.url) / "data" / ids[1] / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
        refused(errors.DamagedFile, load, store, {"x": torch.zeros(2)})
        save(store, {"x": torch.ones(2)}, step=3)
        found = store._engine.log.head().record.entry(ids[1])
        assert found is not None
        assert found.verified is False

    def test_random_ranges_are_those_of_the_file(self) -> None:
        backend = Reading()
        with store_on(backend) as store:
            content = random.Random(1).randbytes(1_000_003)
            with store.transaction() as tx, tx.open("f") as file:
                file.write(content)
            checkpoint = store.checkpoint()
            for seed in range(50):
                dice = random.Random(seed)
                cuts = sorted(dice.sample(range(len(content) + 1), 2 * dice.randint(1, 40)))
                wanted = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
                found = [bytes(data) for data in checkpoint.read_ranges("f", wanted)]
                assert found == [content[a : a + n] for a, n in wanted]
            for bad in ([(5, 0)], [(-1, 5)], [(1_000_000, 4)], [(0, 10), (9, 5)]):
                with pytest.raises(errors.DamagedFile):
                    list(checkpoint.read_ranges("f", bad))

    def test_keys_alone(self, store: Store) -> None:
        """What torch's tools use, that know nothing of the state: `_load_state_dict_from_keys`."""
        save(store, {"a": torch.ones(3), "b": {"c": torch.zeros(2), "n": 5}})
        found = _load_state_dict_from_keys({"b"}, storage_reader=store.dcp_reader())
        assert found["b"]["c"].tolist() == [0, 0]
        assert found["b"]["n"] == 5
        assert "a" not in found


class Renaming(dcp.DefaultSavePlanner):
    """A planner that changes what is written, and leaves data of its own."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found * 2 if isinstance(found, torch.Tensor) else found

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data={**metadata.planner_data, "mine": Mine(3)})


@dataclass
class Mine:
    number: int


class TestPlanners:
    def test_planner_data_comes_back(self, store: Store) -> None:
        """A class of one's own in it is refused until it is allowed, as by torch.load."""
        dcp.save({"x": torch.ones(2)}, storage_writer=store.dcp_writer(), planner=Renaming())
        cause = refused(errors.UnsafeContent, load, store, {"x": torch.zeros(2)})
        assert "add_safe_globals" in str(cause)
        with torch.serialization.safe_globals([Mine]):
            assert load(store, {"x": torch.zeros(2)})["x"].tolist() == [2, 2]
            assert store.dcp_reader().read_metadata().planner_data["mine"] == Mine(3)

    def test_cached_plans_are_refused(self, store: Store) -> None:
        """They would send the ranks to the place of the save before."""
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = "of this test"
        dcp.save({"x": torch.ones(2)}, storage_writer=store.dcp_writer(), planner=planner)
        assert "enable_plan_caching" in str(
            refused(UsageError, dcp.save, {"x": torch.ones(2)}, storage_writer=store.dcp_writer(), planner=planner)
        )
        assert len(store.checkpoints()) == 1

    @pytest.mark.parametrize("where", ["local", "memory", "shared"])  # a name that is taken is met at three different moments
    def test_a_rank_that_writes_to_the_place_of_an_earlier_save(self, tmp_path: Path, where: str) -> None:
        """What is there stays, and nothing is published."""
        url = {"local": str(tmp_path), "memory": "memory://stale", "shared": f"shared://{tmp_path}?create=1"}[where]
        (tmp_path / "log").mkdir()  # or a disk of this machine would be refused
        store = Store(url)

        class Stale(dcp.DefaultSavePlanner):
            place: Any = None

            def finish_plan(self, new_plan: Any) -> Any:
                plan = super().finish_plan(new_plan)
                self.place = self.place or plan.storage_data
                return replace(plan, storage_data=self.place)

        class Lost(dcp.DefaultSavePlanner):
            def finish_plan(self, new_plan: Any) -> Any:
                return replace(super().finish_plan(new_plan), storage_data=None)

        planner = Stale()
        dcp.save({"x": torch.ones(2)}, storage_writer=store.dcp_writer(step=1), planner=planner)
        cause = refused(UsageError, dcp.save, {"x": torch.zeros(2)}, storage_writer=store.dcp_writer(), planner=planner)
        assert "Stale gave this rank the place of an earlier save" in str(cause)

        # One that also loses what says so. The file that is there stays; elsewhere, what was written is not taken in.
        planner.place = replace(planner.place, token=None)
        refused(errors.AlreadyExists, dcp.save, {"x": torch.zeros(2)}, storage_writer=store.dcp_writer(), planner=planner)
        planner.place = replace(planner.place, file="__7_0.distcp")
        cause = refused(CkptStoreError, dcp.save, {"x": torch.zeros(2)}, storage_writer=store.dcp_writer(), planner=planner)
        assert "a rank used an earlier plan" in str(cause)
        cause = refused(UsageError, dcp.save, {"x": torch.zeros(2)}, storage_writer=store.dcp_writer(), planner=Lost())
        assert "lost the plan's storage_data" in str(cause)
        assert [c.step for c in store.checkpoints()] == [1]
        assert load(store, {"x": torch.zeros(2)})["x"].tolist() == [1, 1]
        assert store.verify() == []

    def test_saving_without_coordination_is_refused(self, store: Store) -> None:
        with pytest.raises(UsageError, match="use_collectives"):
            dcp.save({"x": torch.ones(2)}, storage_writer=store.dcp_writer(), use_collectives=False)
        assert store.checkpoints() == []

    def test_a_planner_that_fails_publishes_nothing(self, store: Store) -> None:
        class Failing(dcp.DefaultSavePlanner):
            def resolve_data(self, write_item: Any) -> Any:
                raise OSError("no such tensor")

        refused(OSError, dcp.save, {"x": torch.ones(2)}, storage_writer=store.dcp_writer(), planner=Failing())
        assert store.checkpoints() == []
        save(store, {"x": torch.ones(2)})
        assert len(list((Path(store.url) / "data").iterdir())) == 1

    def test_no_dist_and_the_old_call(self, store: Store) -> None:
        dcp.save({"x": torch.ones(2)}, storage_writer=store.dcp_writer(), no_dist=True)
        state = {"x": torch.zeros(2)}
        dcp.load(state, storage_reader=store.dcp_reader(), no_dist=True)
        assert state["x"].tolist() == [1, 1]
        with pytest.warns(FutureWarning):
            dcp.save_state_dict({"x": torch.full((2,), 3.0)}, store.dcp_writer(), no_dist=True)
        with pytest.warns(FutureWarning):
            dcp.load_state_dict(state, store.dcp_reader(), no_dist=True)
        assert state["x"].tolist() == [3, 3]

    def test_a_state_that_does_not_fit(self, store: Store) -> None:
        save(store, {"x": torch.ones(2)})
        with pytest.raises(dcp.CheckpointException, match="Missing key"):
            load(store, {"y": torch.ones(2)})
        load(store, {"x": torch.zeros(2)})


class TestUnsafe:
    def test_an_object_that_is_no_plain_value(self, store: Store) -> None:
        with pytest.warns(WeightsOnlyWarning, match="Mine"):
            save(store, {"x": Mine(4), "y": 1})
        assert store.checkpoint().manifest.unsafe == {"__0_0.distcp": [f"{__name__}.Mine"]}
        cause = refused(errors.UnsafeContent, load, store, {"x": Mine(0), "y": 0})
        assert "weights_only=False" in str(cause)
        refused(errors.UnsafeContent, load, store, {"x": Mine(0), "y": 0}, weights_only=None)
        assert load(store, {"y": 0})["y"] == 1
        assert load(store, {"x": Mine(0), "y": 0}, weights_only=False) == {"x": Mine(4), "y": 1}

    @pytest.mark.parametrize(
        "content",
        [
            b"cposix\nsystem\n(S'touch %s'\ntR.",
            b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
            pickle.dumps({"not": "metadata"}, 2),
            pickle.dumps(Metadata({}), 2),
            pickle.dumps(Metadata({}, storage_data={MetadataIndex("x"): "nowhere"}), 2),
            pickle.dumps(Metadata({}, storage_data={MetadataIndex("x"): _StorageInfo("f", "0", 4)}), 2),  # type: ignore[arg-type]
            pickle.dumps(Metadata({}, storage_data={MetadataIndex("x"): _StorageInfo("f", 0, 4, ["zip"])}), 2),
            b"no pickle at all",
        ],
    )
    def test_hostile_metadata(self, store: Store, tmp_path: Path, content: bytes) -> None:
        """Refused with a type, by all that somebody could have put there; nothing of it is run."""
        trace = tmp_path / "it ran"
        with store.transaction() as tx, tx.open(".metadata") as file:
            file.write(content.replace(b"%s", os.fsencode(trace)))
        refused(errors.UnsafeContent, load, store, {"x": torch.zeros(2)})
        assert not trace.exists()

    def test_hostile_places(self, store: Store) -> None:
        """Of a file that is not there, or parts beyond its end, or that overlap, or are no tensors."""
        one, two = io.BytesIO(), io.BytesIO()
        torch.save(torch.ones(2), one)
        torch.save([1, 2], two)
        data = one.getvalue() + two.getvalue()
        ends = (len(one.getvalue()), len(data))
        good = dcp.save({"x": torch.ones(2), "y": torch.ones(2)}, storage_writer=store.dcp_writer())
        places = [
            (errors.NotFound, _StorageInfo("../../f", 0, ends[0])),
            (errors.DamagedFile, _StorageInfo("f", ends[0], ends[1])),
            (errors.DamagedFile, _StorageInfo("f", 1, ends[0])),
            (errors.UnsafeContent, _StorageInfo("f", ends[0], ends[1] - ends[0])),
        ]
        for kind, place in places:
            x, y = MetadataIndex("x", [0]), MetadataIndex("y", [0])
            forged = replace(good, storage_data={x: _StorageInfo("f", 0, ends[0]), y: place})
            with store.transaction("bad") as tx:
                for path, content in ((".metadata", pickle.dumps(forged, 2)), ("f", data)):
                    with tx.open(path) as file:
                        file.write(content)
            refused(kind, load, store, {"x": torch.zeros(2), "y": torch.zeros(2)}, store.checkpoint("bad").id)

    def test_metadata_that_knows_a_value_of_which_there_is_none(self, store: Store) -> None:
        forged = Metadata({"x": BytesStorageMetadata()}, planner_data={"x": ("x",)}, storage_data={})
        with store.transaction() as tx, tx.open(".metadata") as file:
            file.write(pickle.dumps(forged, 2))
        refused(errors.StateMismatch, load, store, {"x": 1})


class TestOtherKinds:
    def test_what_dcp_wrote_is_no_state_of_ours(self, store: Store) -> None:
        save(store, {"x": torch.ones(2)})
        for call in (store.load, lambda: store.resume({"x": torch.zeros(2)}), lambda: store.load(store.checkpoint())):
            with pytest.raises(errors.WrongKind, match=r"written by torch\.distributed\.checkpoint.*dcp_reader"):
                call()

    def test_what_save_wrote_is_no_state_of_dcps(self, store: Store) -> None:
        save(store, {"x": torch.ones(2)})
        store.save({"x": torch.ones(2)})
        for call in (load, lambda store, state: store.dcp_resume(state)):
            with pytest.raises((dcp.CheckpointException, errors.WrongKind), match=r"Store\.save or a transaction"):
                call(store, {"x": torch.zeros(2)})

    @pytest.mark.parametrize("by", ["accelerate", "lightning", "transformers"])
    def test_what_other_libraries_wrote(self, store: Store, by: str) -> None:
        """Nobody takes it for a state of theirs, and each says whose it is, and what loads it."""
        with store.transaction() as tx:
            tx.by = by
            if by == "lightning":
                tx.save({"state_dict": {}, "global_step": 3})
            else:
                with tx.open("model.safetensors") as file:
                    file.write(b"weights")
        state = {"x": torch.zeros(2)}
        calls: list[Any] = [lambda: load(store, state), lambda: store.dcp_resume(state), lambda: store.resume(state)]
        if by == "lightning":
            assert store.load()["global_step"] == 3  # a file of torch.save's
        else:
            calls.append(store.load)
        for call in calls:
            with pytest.raises((dcp.CheckpointException, errors.WrongKind), match=rf"by {by}; ckptstore\.integrations\.{by}\."):
                call()
        assert state["x"].tolist() == [0, 0]

    def test_a_folder_that_plain_torch_wrote(self, store: Store, tmp_path: Path) -> None:
        dcp.save({"x": torch.ones(2), "n": 5}, checkpoint_id=tmp_path / "plain")
        with store.transaction("imported") as tx:
            tx.add_tree(tmp_path / "plain")
        assert load(store, {"x": torch.zeros(2), "n": 0}, "imported")["n"] == 5

    def test_a_torch_that_is_laid_out_otherwise(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [
            name for name in sys.modules if name.startswith(("ckptstore.integrations.dcp", "ckptstore.integrations._dcp_"))
        ]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(importlib.import_module("torch.distributed.checkpoint.filesystem"), "_StorageInfo")
        for call in (store.dcp_writer, store.dcp_reader, lambda: store.dcp_resume({})):
            with pytest.raises(errors.WrongVersion, match=f"torch {torch.__version__}".replace("+", r"\+")):
                call()


class TestResume:
    def test_with_sampler_and_fallback(self, store: Store) -> None:
        assert store.dcp_resume({"x": torch.zeros(2)}) is None
        sampler = InterruptableDistributedSampler(range(10), seed=1, num_replicas=1, rank=0)
        with sampler.in_epoch(0):
            sampler.advance(4)
            saved = sampler.state_dict()
            ids = [save(store, {"x": torch.full((2,), v)}, step=int(v), sampler=sampler) for v in (1.0, 2.0)]
        file = Path(store.url) / "data" / ids[1] / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
        state = {"x": torch.zeros(2)}
        other = InterruptableDistributedSampler(range(10), seed=1, num_replicas=1, rank=0)
        with pytest.warns(FallbackWarning, match=ids[0]):
            found = store.dcp_resume(state, sampler=other)
        assert found is not None
        assert (found.id, state["x"].tolist()) == (ids[0], [1, 1])
        assert other.state_dict() == saved

    def test_what_cannot_be_listed_is_no_empty_store(self) -> None:
        """Nobody may take it for "no checkpoint, start at step 0"."""
        state = {"x": torch.zeros(2)}
        store = unreadable()
        calls: list[Any] = [store.load, store.checkpoint, store.checkpoints, store.names]
        calls += [lambda: store.resume(state), lambda: store.dcp_resume(state), lambda: "latest" in store]
        for call in calls:
            with pytest.raises(errors.BackendError, match="nothing can be read"):
                call()
        refused(errors.BackendError, load, store, state)

    def test_it_fences(self, store: Store) -> None:
        with Store(store.url) as older, Store(store.url) as newer:
            save(older, {"x": torch.ones(2)})
            assert newer.dcp_resume({"x": torch.zeros(2)})
            refused(errors.Fenced, save, older, {"x": torch.ones(2)})


def test_the_example_in_the_readme(tmp_path: Path) -> None:
    """As it stands, and once more."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python dcp\n")[2].partition("```")[0]
    train = "model(torch.ones(2, 4)).sum().backward(); optimizer.step()"
    seen = []
    for step in (1, 2):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        with Store(tmp_path) as store:
            names = {"model": model, "optimizer": optimizer, "store": store, "step": step, "torch": torch}
            exec(example.replace("...", train if step == 1 else ""), names)
            assert [c.step for c in store.checkpoints()] == [*range(1, step + 1)]
        seen.append([model.weight, optimizer.state[model.weight]["exp_avg"]])
    for first, second in zip(*seen, strict=True):
        assert first.equal(second)


def test_the_example_in_the_docs(tmp_path: Path) -> None:
    """As it stands, and once more."""
    page = (Path(__file__).parent.parent / "docs/distributed.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    seen = []
    for step in (1, 2):
        model = torch.nn.Linear(4, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        sampler = InterruptableDistributedSampler(range(8))
        with Store(tmp_path, keep_last=4) as store:
            names: dict[str, Any] = {"model": model, "optimizer": optimizer, "store": store, "step": step, "sampler": sampler}
            exec(example, names)
            names["future"].result()
            assert len(store.checkpoints()) == 2 * step
        seen.append(model.weight)
    assert seen[0].equal(seen[1])


def test_with_a_key(tmp_path: Path) -> None:
    """What other ranks wrote is as authentic as what this one did."""
    with Store(tmp_path, hmac_key=b"sixteen bytes or more") as store:
        save(store, {"x": torch.ones(2), "n": 3})
        assert load(store, {"x": torch.zeros(2), "n": 0})["n"] == 3
        assert all(f.digests for f in store.checkpoint().manifest.files)


def test_a_writer_travels_before_it_begins(store: Store) -> None:
    """As it does to the process of `dcp.async_save`."""
    writer = pickle.loads(pickle.dumps(store.dcp_writer("there", step=3)))
    dcp.save({"x": torch.ones(2)}, storage_writer=writer)
    assert store.checkpoint("there").step == 3


def test_every_error_can_be_told_to_other_ranks() -> None:
    """Pickled and unpickled, it is of the same type and says the same."""
    for name in errors.__all__:
        kind = getattr(ckptstore, name)
        if not issubclass(kind, CkptStoreError):
            continue
        error = kind("what to do")
        told = portable(error)
        assert told is error
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, "what to do")
