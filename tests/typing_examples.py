"""Public usage as users write it. Never run: mypy and pyright check that every call is allowed and every result typed."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import ckptstore


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, data: TensorDataset) -> None:
    sampler = ckptstore.InterruptableDistributedSampler(data, num_replicas=2, rank=0)
    with ckptstore.Store("runs/42?keep_last=3") as store:
        ckpt = store.resume({"model": model, "optimizer": optimizer}, "latest", sampler=sampler)
        assert_type(ckpt, ckptstore.Checkpoint | None)
        step = 0 if ckpt is None or ckpt.step is None else ckpt.step
        loader = DataLoader(data, batch_size=32, sampler=sampler)
        for epoch in range(sampler.epoch, 3):
            with sampler.in_epoch(epoch):
                for _ in loader:
                    sampler.advance(32)
                    step += 1
            saved = store.save(
                {"model": model, "optimizer": optimizer.state_dict()},
                "latest",
                step=step,
                sampler=sampler,
                metrics={"loss": 0.31},
                metadata={"note": "warm-up"},
                rng=True,
            )
            assert_type(saved, ckptstore.Checkpoint)
            store.tag("best", saved)


def until_told_to_stop(store: ckptstore.Store) -> None:
    with ckptstore.preemption(grace=120) as guard:
        assert_type(guard, ckptstore.Preemption)
        while not guard.requested():
            pass
        assert_type(guard.seconds_left, float)


def in_the_background(store: ckptstore.Store, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    pending = store.save_async({"model": model, "optimizer": optimizer}, step=7, rng=True, when_busy="skip", optimizer=optimizer)
    assert_type(pending, ckptstore.PendingSave)
    pending.add_done_callback(lambda done: print(done.exception()))
    if not pending.done():
        assert_type(pending.cancel(), bool)
    assert_type(pending.result(timeout=3), ckptstore.Checkpoint)
    store.save_async({}, optimizer=[optimizer], checked=True, when_busy="replace")
    store.save_async({}, when_busy="never")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def several_files(tokenizer: Path) -> None:
    store = ckptstore.Store(Path("runs/42"), keep_last=3, acquire=False)
    with store.transaction("latest", step=1000) as tx:
        assert_type(tx, ckptstore.Transaction)
        tx.save({"weight": torch.zeros(3)}, "model.pt")
        tx.add_file("tokenizer.json", tokenizer)
        tx.add_tree(tokenizer.parent)
        with tx.open("notes.txt", "wb") as f:
            f.write(b"first try")


def look_around(store: ckptstore.Store, folder: Path) -> None:
    if "latest" in store:
        state: Any = store.load("latest", map_location="cpu")
        print(state, store.load(step=1000))
    for ckpt in store.checkpoints():
        assert_type(ckpt, ckptstore.Checkpoint)
        assert_type(ckpt.id, str)
        assert_type(ckpt.step, int | None)
        assert_type(ckpt.created, datetime)
        assert_type(ckpt.nbytes, int)
        assert_type(ckpt.files, dict[str, int])
        assert_type(ckpt.metrics, dict[str, float])
        if ckpt.verify():
            store.delete(ckpt)
    store.checkpoint("latest").download(folder)
    with store.checkpoint(step=1000).open("model.pt") as f:
        assert_type(f.read(), bytes)
    assert_type(store.names(), dict[str, str])
    store.delete("best")
    store.prune()
    store.gc()
    store.verify()
    store.acquire()


def save_one_file(path: Path) -> None:
    ckptstore.atomic_torch_save({"weight": torch.zeros(3)}, path)


def train_on_many_ranks(store: ckptstore.Store, state: dict[str, Any]) -> None:
    assert_type(store.dcp_resume(state), ckptstore.Checkpoint | None)
    save_distributed(state, storage_writer=store.dcp_writer("latest", step=1))
    load_distributed(state, storage_reader=store.dcp_reader("latest"))
    assert_type(store.save(state, process_group=torch.distributed.group.WORLD), ckptstore.Checkpoint)
    assert_type(store.resume(state, process_group=torch.distributed.group.WORLD), ckptstore.Checkpoint | None)


def handle_errors(store: ckptstore.Store) -> None:
    try:
        store.save({}, "latest")
    except ckptstore.Fenced as error:
        raise SystemExit(str(error)) from error
    except ckptstore.CommitUnknown as error:
        assert_type(error.op_id, str)
    except ckptstore.DamagedFile as error:
        assert_type(error.ranges, tuple[tuple[int, int], ...])


def typos_are_found() -> None:
    ckptstore.Stoer("runs/42")  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
