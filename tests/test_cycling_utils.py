"""The code of docs/cycling_utils.md runs, and does what the page says."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from procs import Channel, Nursery

import ckptstore
from ckptstore import Store

PAGE = (Path(__file__).parent.parent / "docs/cycling_utils.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def warm_up() -> None:
    import torch.distributed  # noqa: F401


def test_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        exec(compile(block, "cycling_utils.md", "exec"), namespace)
    assert (tmp_path / "model.pt").exists()
    with Store("runs/cycling", acquire=False) as store:
        assert store.names() == {"AtomicDirectory": store.checkpoint(step=10).id, "milestone-4": store.checkpoint(step=4).id}


def run_block(channel: Channel, folder: str, rank: int) -> None:
    import torch.distributed as dist

    os.chdir(folder)
    os.environ.update({"TORCHELASTIC_RUN_ID": "page", "TORCHELASTIC_RESTART_COUNT": "0"})  # as torchrun does
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    exec(compile(blocks("python ranks")[0], "cycling_utils.md", "exec"), {})
    channel.send("done")


def test_several_ranks(tmp_path: Path, warm: Nursery) -> None:
    children = [warm.start(run_block, str(tmp_path), rank) for rank in range(2)]
    assert [child.rest() for child in children] == [[["done"]], [["done"]]]
    with Store(tmp_path / "runs/ranks", acquire=False) as store:
        names = {name: store.checkpoint(name) for name in store.names()}
        assert set(names) == {"latest", "any-2", "rank0", "rank1", "with-metrics"}
        assert names["any-2"].step == 2
        assert names["rank1"].load() == {"of": 1}
        assert names["with-metrics"].metrics == {"images_seen": 32.0, "loss": 1.0}
        assert names["with-metrics"].load()["metrics"]["epochs"] == [{"images_seen": 32.0, "loss": 1.0}]


THEIRS = """AtomicDirectory DistributedShardedDataset EpochHandler InterruptableDistributedGroupedBatchSampler
InterruptableDistributedSampler InterruptableSampler MetricsTracker TimestampedTimer atomic_torch_save torch_distributed_readiness"""
"""What one could import from cycling_utils, in any version of it. Below: what AtomicDirectory takes and has."""
PARTS = """async force_save is_master keep_last mono name offline prepare_checkpoint_directory sync_all sync_any symlink_latest"""


def test_every_name_of_theirs_is_on_the_page() -> None:
    left = " ".join(line.split("|")[1] for line in PAGE.partition("## One process")[0].splitlines() if line.startswith("|"))
    assert {*THEIRS.split(), *PARTS.split()} - set(re.findall(r"\w+", left)) == set()


def test_every_name_of_ours_exists() -> None:
    table = PAGE.partition("## One process")[0]
    for name in [*re.findall(r"ckptstore\.([A-Za-z_]+)[(\"]", table), "HasNotResetProgressError", "AdvancedTooFarError"]:
        assert hasattr(ckptstore, name), name
    for name in re.findall(r"`((?:Interruptable)\w+)`", table):
        assert hasattr(ckptstore, name), name
