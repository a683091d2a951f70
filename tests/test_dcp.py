"""`torch.distributed.checkpoint` on a store, by real processes. What one mesh saved, another loads; whoever fails, none hangs."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import dcp_process as work
import pytest
import torch
import torch.distributed.checkpoint as dcp
from procs import litter
from ranks_rig import Ranks
from s3_rig import Service

from ckptstore import InterruptableSampler, Store

pytest_plugins = ("s3_fixtures",)
WARM = ("dcp_process", "ranks_rig")


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def flip(store: Store, path: str, at: int = -1000) -> None:
    """Damage one bit of a file of the newest checkpoint."""
    file = Path(store.url) / "data" / store.checkpoint().id / path
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


class TestMeshes:
    @pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 4), (4, 2), (2, 1), (1, 2)])
    def test_saved_at_one_mesh_and_loaded_at_another(self, ranks: Ranks, url: str, saved_by: int, loaded_by: int) -> None:
        """An FSDP2 network with AdamW, and DTensors in rows, columns, a grid and as copies: bit for bit the same."""
        saved = ranks.run(work.save_all, saved_by, url, 5)
        loaded = ranks.run(work.load_all, loaded_by, url, "latest")
        assert [isinstance(x[0], str) for x in loaded] == [True] * loaded_by, loaded
        assert loaded[0] == [saved[0], 5, 0]
        with Store(url) as store:
            checkpoint = store.checkpoint()
            assert (checkpoint.step, checkpoint.metrics, checkpoint.by) == (5, {"loss": 0.5}, "torch.distributed.checkpoint")
            assert set(checkpoint.files) == {".metadata", *(f"__{rank}_0.distcp" for rank in range(saved_by))}
            assert store.verify() == []
        assert litter(Store(url)) == []

    def test_on_s3(self, ranks: Ranks, server: Service) -> None:
        where = server.url()
        ranks.env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        saved = ranks.run(work.save_all, 2, where, 5)
        assert ranks.run(work.load_all, 2, where, "resume")[0] == [saved[0], 5, 0]
        with Store(where) as store:
            assert store.verify() == []
            assert store.checkpoint().verify_remote() == ([], [])

    def test_plain_torch_reads_it(self, ranks: Ranks, url: str) -> None:
        ranks.run(work.save_value, 2, url, 7.0)
        state = {name: torch.zeros(64, 1024) for name in "abc"}
        folder = Path(url) / "data" / Store(url).checkpoint().id
        with pytest.warns(UserWarning, match=r"torch\.distributed is disabled"):
            dcp.load(state, checkpoint_id=folder)
        assert all(value.eq(7.0).all() for value in state.values())


class TestFailures:
    @pytest.mark.parametrize("victim", [0, 1, 3])
    def test_a_rank_is_killed_in_the_middle_of_a_save(self, ranks: Ranks, url: str, victim: int) -> None:
        """The others raise; nothing of the save is ever seen; the job that comes after cleans up and goes on."""
        ranks.run(work.save_value, 4, url, 1.0)
        children = ranks.start(work.save_slowly, 4, url, 2.0)
        for child in children:
            assert child.recv() == ["writing"]
        children[victim].kill()
        others = [child for i, child in enumerate(children) if i != victim]
        for child in others:
            child.send("go on")
        for child in others:
            (kind, _) = child.expect("end")[0]
            assert kind in ("RuntimeError", "DistBackendError", "DistNetworkError", "CheckpointException")
        with Store(url, acquire=False) as store:
            assert [c.step for c in store.checkpoints()] == [1]
            assert litter(store)
        assert ranks.run(work.load_values, 2, url) == [[1.0]] * 2
        ranks.run(work.save_value, 4, url, 3.0)
        assert ranks.run(work.load_values, 4, url) == [[3.0]] * 4
        assert litter(Store(url)) == []

    def test_two_saves_to_one_name_never_mix(self, ranks: Ranks, url: str) -> None:
        """While the second is under way, and after it, everybody sees one generation or the other."""
        ranks.run(work.save_value, 2, url, 1.0)
        children = ranks.start(work.save_slowly, 2, url, 2.0)
        for child in children:
            assert child.recv() == ["writing"]
        assert ranks.run(work.load_values, 2, url) == [[1.0]] * 2
        for child in children:
            child.send("go on")
        ids = [child.expect("end")[0] for child in children]
        assert ids == [Store(url).checkpoint().id] * 2
        assert ranks.run(work.load_values, 2, url) == [[2.0]] * 2

    @pytest.mark.parametrize("bad_rank", [0, 1])
    def test_a_rank_whose_disk_is_full(self, ranks: Ranks, url: str, bad_rank: int) -> None:
        """Every rank is told by whom and why. The next save of the same job also clears up what this one left."""
        for told, before in ranks.run(work.save_on_a_full_disk, 2, url, bad_rank):
            assert told == {str(bad_rank): "StorageFull"}
            assert before == []
        assert ranks.run(work.load_values, 2, url) == [[3.0]] * 2
        assert litter(Store(url)) == []

    def test_an_error_that_cannot_be_pickled_reaches_all_ranks(self, ranks: Ranks, url: str) -> None:
        for kind, causes in ranks.run(work.save_oddly, 4, url):
            assert kind == "CheckpointException"
            assert causes == {"3": ["CkptStoreError", "dcp_process.Odd: odd: 3"]}
        assert Store(url).checkpoints() == []

    def test_ranks_that_name_different_stores_all_raise(self, ranks: Ranks, tmp_path: Path) -> None:
        """As they do who give a path of a local disk on several hosts."""
        urls = [str(tmp_path / "one"), str(tmp_path / "two")]
        for kind, causes in ranks.run(work.save_on_mounts, 2, urls, 1.0):
            assert (kind, causes["0"][0]) == ("CheckpointException", "UsageError")
            assert "__1_0.distcp" in causes["0"][1]
            assert "all must name the same store" in causes["0"][1]
        assert [Store(url).checkpoints() for url in urls] == [[], []]

    def test_ranks_of_which_one_has_no_key_all_raise(self, ranks: Ranks, url: str) -> None:
        for kind, causes in ranks.run(work.save_with_a_key_on_one, 2, url):
            assert (kind, causes["0"][0]) == ("CheckpointException", "KeyMismatch")

    def test_an_older_job_is_fenced_on_all_ranks(self, ranks: Ranks, url: str) -> None:
        children = ranks.start(work.save_when_told, 2, url)
        for child in children:
            assert child.recv() == ["saved"]
        with Store(url) as newer:
            newer.acquire()
        for child in children:
            child.send("save")
        for child in children:
            kind, causes = child.expect("end")[0]
            assert (kind, causes["0"][0]) == ("CheckpointException", "Fenced")
        assert [c.step for c in Store(url).checkpoints()] == [1]

    def test_damage_in_one_ranks_part_is_raised_on_all(self, ranks: Ranks, url: str) -> None:
        first, second = (ranks.run(work.save_value, 2, url, value)[0] for value in (1.0, 2.0))
        with Store(url, acquire=False) as store:
            flip(store, "__1_0.distcp")
        for kind, causes in ranks.run(work.load_values, 2, url):
            assert kind == "CheckpointException"
            assert {cause for cause, _ in causes.values()} == {"DamagedFile"}
        assert ranks.run(work.resume_values, 2, url) == [[[1.0], first, 1]] * 2
        assert second != first

    def test_damaged_metadata_is_passed_over_by_name_but_not_by_id(self, ranks: Ranks, url: str) -> None:
        ids = [ranks.run(work.save_value, 2, url, value)[0] for value in (1.0, 2.0)]
        with Store(url, acquire=False) as store:
            flip(store, ".metadata", 100)
        with Store(url) as store:
            store.acquire()
        # In a nursery, warnings are errors: the one that says so is what comes out.
        assert {kind for kind, _ in ranks.run(work.load_values, 2, url)} == {"CheckpointException"}
        for kind, causes in ranks.run(work.load_values, 2, url, ids[1]):
            assert (kind, causes["0"][0]) == ("CheckpointException", "DamagedFile")
        assert ranks.run(work.resume_values, 2, url) == [[[1.0], ids[0], 1]] * 2

    def test_ranks_that_find_different_checkpoints_all_raise(self, ranks: Ranks, url: str) -> None:
        ids = [ranks.run(work.save_value, 2, url, value)[0] for value in (1.0, 2.0)]
        for kind, causes in ranks.run(work.load_apart, 2, url, ids):
            assert (kind, causes["0"][0]) == ("CheckpointException", "RankFailed")

    def test_resume_says_that_a_store_is_empty_on_all_ranks(self, ranks: Ranks, url: str) -> None:
        assert ranks.run(work.resume_values, 2, url) == [None, None]


@pytest.mark.parametrize("kind", ["thread", pytest.param("process", marks=pytest.mark.soak)])
def test_async_save(ranks: Ranks, url: str, kind: str) -> None:
    """What is changed after the call is not in it; the future gives what `dcp.save` returns."""
    ids = ranks.run(work.save_in_background, 2, url, kind)
    assert ids == [Store(url).checkpoint().id] * 2
    assert ranks.run(work.load_values, 2, url) == [[4.0]] * 2


class TestHabits:
    """`Store.save` and `Store.resume` in a job of several ranks."""

    def test_save_on_the_first_rank_waits_for_nobody(self, ranks: Ranks, url: str) -> None:
        ids = ranks.run(work.save_how, 2, url, "first")
        assert [c.id for c in Store(url).checkpoints()] == ids[:1]

    def test_save_on_each_rank_under_a_name_of_its_own(self, ranks: Ranks, url: str) -> None:
        ids = ranks.run(work.save_how, 4, url, "each")
        with Store(url) as store:
            assert store.names() == {f"rank-{rank}": ids[rank] for rank in range(4)}
            assert [store.load(f"rank-{rank}")["rank"].item() for rank in range(4)] == [0, 1, 2, 3]

    def test_save_on_all_ranks_makes_as_many_checkpoints(self, ranks: Ranks, url: str) -> None:
        ids = ranks.run(work.save_how, 2, url, "same")
        with Store(url) as store:
            assert {c.id for c in store.checkpoints()} == set(ids)
            assert store.checkpoint().id == store.checkpoints()[-1].id

    def test_save_on_all_ranks_together_makes_one(self, ranks: Ranks, url: str) -> None:
        ids = ranks.run(work.save_how, 4, url, "together")
        with Store(url) as store:
            assert ids == [c.id for c in store.checkpoints()] * 4
            assert store.load()["rank"].item() == 0

    @pytest.mark.parametrize(
        ("how", "told"),
        [
            ("unpicklable", ["NotSerializable"] * 2),
            ("sharded", ["NotSerializable"] * 2),
            ("one rank", ["RankFailed", "Odd"]),
        ],
    )
    def test_what_cannot_be_saved_together(self, ranks: Ranks, url: str, how: str, told: list[str]) -> None:
        """All ranks raise, nothing is published, and the group is as good as before."""
        assert ranks.run(work.save_together_badly, 2, url, how) == [[kind, {}] for kind in told]
        assert Store(url).load() == {"x": 1}

    @pytest.mark.parametrize("kind", ["DTensor", "ShardedTensor"])
    def test_a_part_of_a_sharded_state_is_not_saved_as_if_it_were_all(
        self, ranks: Ranks, url: str, tmp_path: Path, kind: str
    ) -> None:
        file = tmp_path / "file.pt"
        file.write_text("as it was")
        told, _ = ranks.run(work.save_parts, 2, url, str(file), kind)
        assert set(told) == {"save", "save_async", "atomic_torch_save"}
        for message in told.values():
            assert f"obj['deep'][0]['x'] is a {kind} of which each rank has a part" in message
        assert set(Store(url).names()) == {"same", "same-async", "rank-0"}

    @pytest.mark.parametrize("bad_rank", [0, 1])
    def test_all_ranks_resume_from_what_all_find_whole(self, ranks: Ranks, url: str, bad_rank: int) -> None:
        """And they are one job from then on, although nothing told them of each other but the group: each may save."""
        with Store(url) as store:
            for step in (1, 2):
                store.save({"x": torch.full((3,), float(step))}, step=step)
        assert ranks.run(work.resume_together, 2, url, "", -1) == [[2, [2.0] * 3, 0]] * 2
        assert ranks.run(work.resume_together, 2, url, "damage", bad_rank) == [[1, [1.0] * 3, 1]] * 2
        with Store(url) as store:
            assert {"rank-0", "rank-1"} < set(store.names())

    def test_what_does_not_fit_on_one_rank_changes_nothing_on_any(self, ranks: Ranks, url: str) -> None:
        sampler = InterruptableSampler(range(9))
        sampler.advance(4)
        with Store(url) as store:
            store.save({"x": torch.ones(3), "n": 1}, sampler=sampler)
        assert ranks.run(work.resume_what_does_not_fit, 2, url) == [
            ["RankFailed", [0.0] * 3, 0, 0],
            ["StateMismatch", [0.0] * 4, 0, 0],
        ]

    def test_an_empty_store_is_none_on_all_ranks(self, ranks: Ranks, url: str) -> None:
        assert ranks.run(work.resume_together, 2, url, "", -1) == [None, None]

    def test_a_listing_error_is_raised_on_all_ranks_and_never_none(self, ranks: Ranks, url: str) -> None:
        with Store(url) as store:
            store.save({"x": torch.ones(3)}, step=1)
        assert {kind for kind, _ in ranks.run(work.resume_together, 2, url, "listing", 0)} == {"BackendError"}
        assert [c.step for c in Store(url).checkpoints()] == [1]

    def test_an_error_that_is_no_damage_is_raised_on_all_ranks(self, ranks: Ranks, url: str) -> None:
        with Store(url) as store:
            store.save({"x": torch.ones(3)}, step=1)
        assert [kind for kind, _ in ranks.run(work.resume_together, 2, url, "error", 1)] == ["RankFailed", "BackendError"]
        assert [kind for kind, _ in ranks.run(work.resume_in_vain, 2, url)] == ["StateMismatch", "RankFailed"]

    def test_a_group_that_this_rank_does_not_belong_to(self, ranks: Ranks, url: str) -> None:
        assert ranks.run(work.no_group, 2, url)[1][0] == "UsageError"


def test_a_rank_that_dies(ranks: Ranks, url: str) -> None:
    """Its signal is no business of the store's, but the others are not left waiting."""
    children = ranks.start(work.save_slowly, 2, url, 1.0)
    for child in children:
        assert child.recv() == ["writing"]
    children[1].signal(signal.SIGTERM)
    children[1].rest()
    children[0].send("go on")
    assert children[0].expect("end")[0][0] == "RuntimeError"
