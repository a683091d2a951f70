"""Lightning on a store: real Trainers, saved, killed at any moment and resumed; Fabric."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from procs import Channel, Nursery
from stores import unreadable

from ckptstore import BackendError, CheckpointNotFound, FallbackWarning, Fenced, NotSerializable, Store, UsageError, WrongKind

EPOCHS, BATCHES = 3, 8


def warm_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's
        import lightning.pytorch  # noqa: F401

        import ckptstore.integrations.lightning  # noqa: F401


def make_model() -> Any:
    """A model whose every step depends on the generators, on the learning rate, and on all steps before."""
    import lightning.pytorch as pl
    import torch

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 1))
            self.seen: list[list[int]] = []

        def _loss(self, batch: Any) -> Any:
            x, y, _ = batch
            return torch.nn.functional.mse_loss(self.net(x + torch.randn_like(x) * 0.1), y)

        def training_step(self, batch: Any, index: int) -> Any:
            self.seen.append(batch[2].tolist())
            loss = self._loss(batch) * random.uniform(0.9, 1.1)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self._loss(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9), "interval": "step"}]

    return Model()


def make_loader(workers: int = 0, batch_size: int = 8) -> Any:
    import torch

    import ckptstore

    numbers = torch.arange(64)
    x = torch.sin(numbers[:, None] * torch.arange(1.0, 5.0))
    data = torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True), numbers)
    sampler = ckptstore.InterruptableDistributedSampler(data, seed=3)
    return torch.utils.data.DataLoader(data, batch_size, sampler=sampler, num_workers=workers)


def make_trainer(url: Any, folder: str, *callbacks: Any, io: Any = None, **options: Any) -> Any:
    import lightning.pytorch as pl

    from ckptstore.integrations.lightning import ExactResume, StoreCheckpointIO

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    where: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    io = io or StoreCheckpointIO(url)
    options = {"max_epochs": EPOCHS, **options}
    return pl.Trainer(**quiet, **where, plugins=[io], callbacks=[*callbacks, ExactResume()], **options)


def saver(folder: str, **options: Any) -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint(dirpath=f"{folder}/checkpoints", **options)


def digest(model: Any, trainer: Any) -> str:
    """Of everything that training left behind."""
    import torch

    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.numpy().tobytes())
    for state in trainer.optimizers[0].state_dict()["state"].values():
        for value in state.values():
            found.update(torch.as_tensor(value).numpy().tobytes())
    found.update(str([c.scheduler.state_dict()["_last_lr"] for c in trainer.lr_scheduler_configs]).encode())
    found.update(torch.rand(8).numpy().tobytes())
    found.update(str(random.random()).encode())
    return found.hexdigest()


def quietly() -> None:
    """What Lightning has to say about small data is no error; what we warn about is."""
    import logging

    from ckptstore import StoreWarning

    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", StoreWarning)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(channel: Channel, url: str, folder: str, saves: dict[str, Any], options: dict[str, Any]) -> None:
    """Train from wherever the store says to the end, saying what is done."""
    quietly()
    import lightning.pytorch as pl
    import torch

    from ckptstore.integrations.lightning import StoreCheckpointIO

    class Teller(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            channel.send("started", trainer.global_step)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            channel.send("step", trainer.global_step, module.seen[-1])

    torch.set_num_threads(1)
    torch.manual_seed(5)
    random.seed(5)
    model, loader = make_model(), make_loader(options.pop("workers", 0))
    validation = make_loader(batch_size=32)
    io = StoreCheckpointIO(url, asynchronous=options.pop("asynchronous", False))
    trainer = make_trainer(url, folder, Teller(), saver(folder, **saves), io=io, **options)
    trainer.fit(model, loader, validation, ckpt_path="latest")
    channel.send("end", digest(model, trainer))


# Where a save at a batch is followed by a validation (see docs/integrations.md), none may fall on that batch: 8 make an epoch.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "every steps, top-k and last": ({"every_n_train_steps": 5, "monitor": "loss", "save_top_k": 2, "save_last": True}, {}),
    "every step": ({"every_n_train_steps": 1}, {"limit_val_batches": 0}),
    "validated in mid-epoch": ({"every_n_train_steps": 7, "save_last": True}, {"val_check_interval": 4}),
    "every epoch": ({"every_n_epochs": 1, "save_top_k": -1}, {}),
    "after validation": ({"monitor": "val_loss", "save_top_k": 2, "save_on_train_epoch_end": False}, {}),
    "in the background": (
        {"every_n_train_steps": 3, "monitor": "loss", "save_top_k": 2, "save_last": True},
        {"asynchronous": True, "limit_val_batches": 0},
    ),
    "accumulated": ({"every_n_train_steps": 1, "save_last": True}, {"accumulate_grad_batches": 2, "limit_val_batches": 0}),
    "with workers": ({"every_n_train_steps": 3}, {"workers": 1, "limit_val_batches": 0}),
}


IN_CI = ["every step", "every steps, top-k and last", "in the background"]


@pytest.mark.parametrize(
    ("kind", "kills"),
    [*((kind, 3) for kind in IN_CI), *(pytest.param(kind, 20, marks=pytest.mark.soak) for kind in KINDS)],
)
def test_killed_at_any_moment(tmp_path: Path, warm: Nursery, kind: str, kills: int) -> None:
    saves, options = KINDS[kind]
    rng = random.Random(kind)
    whole = warm.start(fit, str(tmp_path / "whole"), str(tmp_path), saves, options).rest()
    steps = [message[1:] for message in whole if message[0] == "step"]
    assert [step for step, _ in steps if step] and len(steps) == EPOCHS * BATCHES
    url = str(tmp_path / "store")
    killed = 0
    while killed < kills:  # each life has a chance to go on
        child = warm.start(fit, url, str(tmp_path), saves, options)
        first = child.recv()
        assert first[0] == "started"
        told = 0
        for _ in range(rng.randrange(14)):
            if child.recv()[0] == "end":
                url, told = f"{tmp_path}/store{killed}", 1
                break
        if told:
            continue
        time.sleep(rng.uniform(0, 0.01))
        child.kill()
        killed += 1
    end = warm.start(fit, url, str(tmp_path), saves, options).rest()
    assert end[-1] == whole[-1]
    with Store(url) as store:
        assert store.verify() == []


@pytest.mark.parametrize(
    ("kind", "epochs"),
    [("every epoch", 1), pytest.param("every step", 1, marks=pytest.mark.soak), ("every epoch", EPOCHS), ("every step", EPOCHS)],
)
def test_resumed_at_the_end_of_an_epoch(tmp_path: Path, warm: Nursery, kind: str, epochs: int) -> None:
    """There the loader draws from the generators once more, but not if it was the last one."""
    saves, options = KINDS[kind]
    whole = warm.start(fit, str(tmp_path / "whole"), str(tmp_path), saves, options).rest()
    child = warm.start(fit, str(tmp_path / "store"), str(tmp_path), saves, options)
    for _ in range(epochs * BATCHES + 2):
        child.recv()
    child.kill()
    again = warm.start(fit, str(tmp_path / "store"), str(tmp_path), saves, options).rest()
    if (kind, epochs) == ("every epoch", EPOCHS):  # saved when all was done: nothing is started any more
        assert again == whole[-1:]
    assert again[0] in (["started", epochs * BATCHES], whole[-1])
    assert again[-1] == whole[-1]


def told(warm: Nursery, function: Any, *arguments: Any) -> list[Any]:
    """Run `function` in a child of its own, and return the last thing it said."""
    return warm.start(function, *arguments).rest()[-1]


def keep(channel: Channel, folder: str) -> None:
    """See what ModelCheckpoint's rules leave in a store."""
    quietly()
    url = f"{folder}/store"
    metric = saver(f"{folder}/best", every_n_train_steps=2, monitor="loss", save_top_k=2, save_last=True)
    weights = saver(f"{folder}/weights", every_n_train_steps=8, save_weights_only=True, filename="w-{step}")
    trainer = make_trainer(url, folder, metric, weights)
    model = make_model()
    trainer.fit(model, make_loader())
    store = trainer.strategy.checkpoint_io.store
    names, kept = store.names(), {c.id: c for c in store.checkpoints()}
    best = {Path(p).stem.replace("=", "") for p in metric.best_k_models}
    assert {n.removeprefix("checkpoints.") for n in names} == {*best, "last", "latest", "w-step24", "weights"}
    assert store.checkpoint("latest").step == 24
    assert "checkpoints.last" in names
    free = [c for c in kept.values() if c.id not in names.values()]
    assert [c.name for c in free] in (["latest", "weights"], ["weights", "latest"], ["weights"])  # to fall back to: keep_last=2
    assert {c.by for c in kept.values()} == {"lightning"}
    assert store.checkpoint("latest").metadata["path"].endswith("checkpoints/last.ckpt")

    # By path, by name, and by id: what was saved there, and nothing else.
    io = trainer.strategy.checkpoint_io
    loaded = io.load_checkpoint(metric.best_model_path)
    assert loaded["global_step"] == store.checkpoint("checkpoints." + Path(metric.best_model_path).stem.replace("=", "")).step
    assert io.load_checkpoint("latest")["global_step"] == 24
    assert "optimizer_states" not in io.load_checkpoint("weights")
    first = store.checkpoints()[0]
    assert io.load_checkpoint(first.id)["global_step"] == first.step
    with pytest.raises(CheckpointNotFound, match="nowhere"):
        io.load_checkpoint("nowhere.ckpt")
    trainer.validate(model, make_loader(), ckpt_path=metric.best_model_path, verbose=False)
    assert not list(Path(folder).rglob("*.ckpt"))
    channel.send("kept")


def test_what_model_checkpoint_keeps_is_kept(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, keep, str(tmp_path)) == ["kept"]


def count_up(channel: Channel, folder: str, asynchronous: bool) -> None:
    """Save several times in an epoch under a name that has only the epoch: the best are kept all the same, as they are on a disk."""
    quietly()
    import torch

    from ckptstore.integrations.lightning import StoreCheckpointIO

    def best(io: Any) -> tuple[dict[str, float], Any]:
        torch.manual_seed(1)
        random.seed(1)
        saves = saver(
            f"{folder}/{io is None}", filename="{epoch}", every_n_train_steps=2, monitor="loss", save_top_k=3, save_last=True
        )
        if io is None:
            import lightning.pytorch as pl

            io = pl.plugins.io.TorchCheckpointIO()
        trainer = make_trainer("", folder, saves, io=io, max_epochs=2)
        trainer.fit(make_model(), make_loader())
        return {Path(path).stem: float(score) for path, score in saves.best_k_models.items()}, trainer

    io = StoreCheckpointIO(f"{folder}/store", asynchronous=asynchronous)
    (found, trainer), (expected, _) = best(io), best(None)
    assert found == expected
    assert len(found) == 3
    assert set(io.store.names()) == {f"checkpoints.{name.replace('=', '')}" for name in [*found, "last"]} | {"latest"}
    scores = {}
    for name in found:  # each is the one that it says it is
        (state,) = (
            v for k, v in io.load_checkpoint(f"checkpoints/{name}.ckpt")["callbacks"].items() if k.startswith("ModelCheckpoint")
        )
        scores[name] = float(state["current_score"])
    assert scores == found
    trainer.validate(make_model(), make_loader(), ckpt_path="best", verbose=False)
    channel.send("counted")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_names_that_come_again(tmp_path: Path, warm: Nursery, asynchronous: bool) -> None:
    assert told(warm, count_up, str(tmp_path), asynchronous) == ["counted"]


def stateful(channel: Channel, folder: str) -> None:
    """A loader that keeps its state, of which Lightning restores that from the last batch of an epoch in the next one."""
    quietly()
    import torch
    from torchdata.stateful_dataloader import StatefulDataLoader

    from ckptstore.integrations.torchdata import InLoader

    def fit(url: str, steps: int, inside: Any = InLoader) -> tuple[list[Any], str]:
        torch.manual_seed(5)
        random.seed(5)
        model, plain = make_model(), make_loader()
        loader = StatefulDataLoader(plain.dataset, plain.batch_size, sampler=inside(plain.sampler))
        trainer = make_trainer(url, url, saver(url, every_n_train_steps=1), max_steps=steps)
        trainer.fit(model, loader, ckpt_path="latest")
        return model.seen, digest(model, trainer)

    whole, end = fit(f"{folder}/whole", -1)
    assert whole[:BATCHES] != whole[BATCHES : 2 * BATCHES]
    for steps in (BATCHES, BATCHES + 3):
        begun, _ = fit(f"{folder}/{steps}", steps)
        assert len(begun) == steps
        rest, again = fit(f"{folder}/{steps}", -1)
        assert (begun + rest, again) == (whole, end)
    with pytest.raises(UsageError, match=r"InLoader\(sampler\)"):
        fit(f"{folder}/refused", 1, lambda sampler: sampler)
    channel.send("the same")


def test_a_stateful_loader(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, stateful, str(tmp_path)) == ["the same"]


def start_over(channel: Channel, folder: str) -> None:
    """Start at the beginning where there is something to resume from: because Lightning does not look there, or was not told to."""
    quietly()
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    from ckptstore import StoreWarning
    from ckptstore.integrations.lightning import StoreCheckpointIO

    def fit(path: str | None, io: Any = None, **options: Any) -> Any:
        url = f"{folder}/store"
        trainer = make_trainer(url, folder, saver(folder, every_n_train_steps=4, **options), io=io, max_epochs=1)
        trainer.fit(make_model(), make_loader(), ckpt_path=path)
        return trainer

    fit("last")  # nothing there
    for io in (None, AsyncCheckpointIO(StoreCheckpointIO(f"{folder}/store"))):
        for path in (None, "last"):
            with pytest.raises(StoreWarning, match='starts at step 0; ckpt_path="latest" goes on'):
                fit(path, io)
    trainer = fit("latest")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(make_model(), make_loader())  # goes on with what it has
    assert trainer.global_step == 16
    with pytest.raises(UsageError, match=r'save_last="link".*use save_last=True'):
        fit("latest", save_last="link")

    # They run on GPUs only, but say that much before.
    from types import SimpleNamespace

    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

    from ckptstore.integrations.lightning import ExactResume

    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        strategy.checkpoint_io = StoreCheckpointIO(f"{folder}/store")
        with pytest.raises(UsageError, match=f"{type(strategy).__name__} saves in a way of its own.*dcp_writer"):
            ExactResume().setup(SimpleNamespace(strategy=strategy), None, "fit")
    channel.send("warned")


def test_a_run_that_starts_over_is_warned_of(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, start_over, str(tmp_path)) == ["warned"]


def take_over(channel: Channel, folder: str) -> None:
    """Resume: from then on an older job does nothing any more, and what was resumed from is kept."""
    quietly()
    from ckptstore.integrations.lightning import StoreCheckpointIO

    url = f"{folder}/store?keep_last=1"
    older = StoreCheckpointIO(url)
    make_trainer("", folder, saver(folder, every_n_train_steps=3), io=older, max_steps=3).fit(make_model(), make_loader())

    class Newer(StoreCheckpointIO):
        """Before it reads anything, nothing can be added any more."""

        def load_checkpoint(self, *arguments: Any, **more: Any) -> Any:
            with pytest.raises(Fenced):
                older.save_checkpoint({"global_step": 4}, "late.ckpt")
            channel.send("fenced")
            return super().load_checkpoint(*arguments, **more)

    newer = make_trainer("", folder, saver(folder, every_n_train_steps=1), io=Newer(url), max_steps=7)
    newer.fit(make_model(), make_loader(), ckpt_path="latest")
    kept = Store(url, acquire=False).checkpoints()
    assert [c.step for c in kept] == [3, 7]
    before = Store(url, acquire=False)._engine.log.head().record
    assert before.resumed == kept[0].id

    # To evaluate is to take nothing over.
    make_trainer(url, folder).validate(make_model(), make_loader(), ckpt_path="latest", verbose=False)
    assert Store(url, acquire=False)._engine.log.head().record == before
    channel.send("kept")


def test_a_resumed_run_owns_the_store(tmp_path: Path, warm: Nursery) -> None:
    assert warm.start(take_over, str(tmp_path)).rest() == [["fenced"], ["kept"]]


class Odd:
    """No plain value."""


def accumulate(channel: Channel, folder: str) -> None:
    """Be stopped between the two batches of a step, right after a resume: what is there is still the step before."""
    quietly()
    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            if index == 5:
                raise KeyError("stopped")

    url = f"{folder}/store"
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    saves = {"every_n_train_steps": 1, "save_last": True}
    make_trainer(url, folder, saver(folder, **saves), max_steps=2, **options).fit(make_model(), make_loader())
    before = Store(url, acquire=False).checkpoint().id
    with pytest.raises(KeyError, match="stopped"):
        make_trainer(url, folder, Stop(), saver(folder, **saves), **options).fit(make_model(), make_loader(), ckpt_path="latest")
    assert Store(url, acquire=False).checkpoint().id == before
    channel.send("not saved")


def test_nothing_is_saved_between_the_batches_of_a_step(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, accumulate, str(tmp_path)) == ["not saved"]


def trust(channel: Channel, folder: str) -> None:
    """Load what is no plain value, as its writer is trusted, or not."""
    quietly()
    import lightning.pytorch as pl

    from ckptstore import UnsafeContent, WeightsOnlyWarning

    class Holder(pl.Callback):
        got: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {"odd": Odd()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.got = state["odd"]

    def fit(**more: Any) -> Any:
        holder = Holder()
        trainer = make_trainer(f"{folder}/store", folder, holder, saver(folder), max_epochs=1)
        trainer.fit(make_model(), make_loader(), ckpt_path="latest", **more)
        return holder.got

    with pytest.warns(WeightsOnlyWarning, match="Odd"):
        assert fit() is None
    with pytest.raises(UnsafeContent, match=r"Odd.*weights_only=False"):
        fit()
    assert isinstance(fit(weights_only=False), Odd)

    # Without a Trainer: the file is one of Lightning's.
    store = Store(f"{folder}/store", acquire=False)
    plain = make_model()
    file = f"{folder}/store/data/{store.checkpoint().id}/state.pt"
    loaded = type(plain).load_from_checkpoint(file, weights_only=False)
    assert digest_of(loaded) != digest_of(plain)
    channel.send("trusted")


def test_what_is_no_plain_value(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, trust, str(tmp_path)) == ["trusted"]


def fall_back(channel: Channel, folder: str) -> None:
    quietly()
    warnings.simplefilter("always", FallbackWarning)
    url = f"{folder}/store"
    trainer = make_trainer(url, folder, saver(folder, every_n_train_steps=8), max_epochs=2)
    trainer.fit(make_model(), make_loader())
    store = Store(url, acquire=False)
    newest = store.checkpoint("latest")
    assert newest.step == 16
    path = Path(folder) / "store/data" / newest.id / "state.pt"
    path.write_bytes(path.read_bytes()[:-9] + b"rotten---")
    trainer = make_trainer(url, folder, saver(folder, every_n_train_steps=8))
    with pytest.warns(FallbackWarning, match="falling back"):
        trainer.fit(make_model(), make_loader(), ckpt_path="latest")
    assert trainer.global_step == 24
    channel.send("fell back")


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, fall_back, str(tmp_path)) == ["fell back"]


def refuse(channel: Channel, folder: str) -> None:
    """Meet what cannot be: a clear error, and nothing published."""
    quietly()
    import torch

    import ckptstore
    from ckptstore.integrations.lightning import StoreCheckpointIO

    url = f"{folder}/store"
    io = StoreCheckpointIO(url)
    with pytest.raises(NotSerializable, match="lock"):
        io.save_checkpoint({"global_step": 1, "lock": __import__("threading").Lock()}, "a.ckpt")
    with pytest.raises(NotSerializable, match="dict"):
        io.save_checkpoint([1], "a.ckpt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="storage_options"):
        io.save_checkpoint({}, "a.ckpt", storage_options={"x": 1})
    assert io.store.checkpoints() == []
    assert not io.load_checkpoint("latest")
    with pytest.raises(CheckpointNotFound, match="nothing to evaluate"):
        make_trainer(url, folder).validate(make_model(), make_loader(), ckpt_path="latest", verbose=False)

    io.store.save({"mine": 1}, step=1)
    trainer = make_trainer(url, folder)
    with pytest.raises(WrongKind, match=r"written by Store\.save"):
        trainer.fit(make_model(), make_loader(), ckpt_path="latest")

    for by in ("accelerate", "torch.distributed.checkpoint", "transformers"):
        with Store(url, acquire=False).transaction() as tx:
            tx.by = by
            with tx.open("model.safetensors") as file:
                file.write(b"weights")
        with pytest.raises(WrongKind, match=f"written by {by}, not by Lightning"):
            trainer.fit(make_model(), make_loader(), ckpt_path="latest")

    # What cannot be listed is not taken for an empty store.
    sick = StoreCheckpointIO(unreadable())
    for meet in (lambda: sick.load_checkpoint("latest"), lambda: sick.load_checkpoint("a.ckpt")):
        with pytest.raises(BackendError, match="nothing can be read"):
            meet()
    with pytest.raises(BackendError, match="nothing can be read"):
        make_trainer("", folder, io=sick).fit(make_model(), make_loader(), ckpt_path="latest")

    # A job that was taken over is told so, and its Trainer stops.
    old = make_trainer(f"{folder}/other", folder, saver(folder, every_n_train_steps=1))

    import lightning.pytorch as pl

    class Newer(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            Store(f"{folder}/other").acquire()

    old.callbacks.insert(0, Newer())
    with pytest.raises(Fenced):
        old.fit(make_model(), make_loader())

    # In the middle of an epoch, a loader that can only start anew is warned about.
    place = f"{folder}/third"
    plain = torch.utils.data.DataLoader(make_loader().dataset, 8)
    make_trainer(place, folder, saver(folder, every_n_train_steps=3, save_top_k=-1), max_steps=4).fit(make_model(), plain)
    with pytest.raises(ckptstore.StoreWarning, match="can only start anew"):
        make_trainer(place, folder).fit(make_model(), plain, ckpt_path="latest")
    channel.send("refused")


def test_what_cannot_be_is_refused(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, refuse, str(tmp_path)) == ["refused"]


def late(channel: Channel) -> None:
    """Save in the background what succeeds, what cannot be saved, and what fails late."""
    quietly()
    import threading

    import torch
    from stores import new_memory, store_on

    from ckptstore.integrations.lightning import StoreCheckpointIO
    from ckptstore.testing import Fault, FaultyBackend

    backend = FaultyBackend(new_memory())
    io = StoreCheckpointIO(store_on(backend, keep_last=1), asynchronous=True)
    weights, gate = torch.ones(1000), threading.Event()
    backend.plan.append(Fault("put_if_absent", 0, before=lambda: gate.wait(60)))
    io.save_checkpoint({"global_step": 1, "w": weights}, "a.ckpt")
    weights.fill_(2)
    assert io._pending is not None and not io._pending.done()
    threading.Timer(0.1, gate.set).start()
    assert io.load_checkpoint("a.ckpt")["w"].eq(1).all()  # which waits
    io.teardown()
    assert io.store.checkpoint("a").by == "lightning"

    # What cannot be saved is told at once, and leaves nothing behind.
    with pytest.raises(NotSerializable, match="lock"):
        io.save_checkpoint({"global_step": 2, "lock": threading.Lock()}, "b.ckpt")
    io.teardown()

    # An older one goes when the newer one is durable, in the order in which ModelCheckpoint says so.
    gate.clear()
    io.save_checkpoint({"global_step": 3, "w": weights}, "c.ckpt")
    io.remove_checkpoint("a.ckpt")
    assert set(io.store.names()) == {"latest", "a"}
    gate.set()
    io.save_checkpoint({"global_step": 3, "w": weights}, "last.ckpt")
    io.teardown()
    assert set(io.store.names()) == {"latest", "c", "last"}
    assert len({io.store.checkpoint(name).id for name in ("latest", "last")}) == 1

    # What fails late is raised by the next save, or at the end, and what it should have replaced stays.
    ends = (lambda: io.save_checkpoint({"global_step": 5}, "e.ckpt"), io.teardown)
    places = ("put_if_absent", "writer.write")  # the second lets other commits through
    for where, end in itertools.product(places, ends):
        backend.plan[:] = [Fault(where, 0, before=BackendError("the disk is gone"))]
        io.save_checkpoint({"global_step": 4, "w": weights}, "d.ckpt")
        io.remove_checkpoint("c.ckpt")
        with pytest.raises(BackendError, match="the disk is gone"):
            end()
        backend.plan.clear()
        io.teardown()
        assert set(io.store.names()) == {"latest", "c", "last"}
    io.save_checkpoint({"global_step": 6, "w": weights}, "f.ckpt")
    io.teardown()
    assert io.store.checkpoint("latest").step == 6
    channel.send("told")


def test_what_fails_in_the_background(warm: Nursery) -> None:
    assert told(warm, late) == ["told"]


def told_to_stop(channel: Channel, folder: str) -> None:
    """Lightning's own answer to SIGTERM, with the store under it."""
    quietly()
    import signal

    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 5:
                signal.raise_signal(signal.SIGTERM)

    def trainer(*callbacks: Any) -> Any:
        saves = saver(folder, every_n_train_steps=100, save_on_exception=True)
        return make_trainer(f"{folder}/store", folder, *callbacks, saves, max_epochs=1)

    stopped = trainer(Stop())
    with pytest.raises(BaseException, match="") as exc:
        stopped.fit(make_model(), make_loader(), ckpt_path="latest")
    assert type(exc.value).__name__ == "SIGTERMException"
    assert Store(f"{folder}/store", acquire=False).checkpoint().step == 5
    again, model = trainer(), make_model()
    again.fit(model, make_loader(), ckpt_path="latest")
    assert again.global_step == 8
    assert len(model.seen) == 3
    channel.send("stopped")


def test_sigterm(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, told_to_stop, str(tmp_path)) == ["stopped"]


def tuned(channel: Channel, folder: str, asynchronous: bool) -> None:
    """A learning rate and a batch size are looked for before the run is resumed; what that saves is nothing to resume from."""
    quietly()
    from lightning.pytorch.tuner import Tuner

    from ckptstore.integrations.lightning import StoreCheckpointIO

    for steps, begun in ((5, 0), (8, 5)):
        io = StoreCheckpointIO(f"{folder}/store", asynchronous=asynchronous)
        trainer = make_trainer("", folder, saver(folder, every_n_train_steps=5), io=io, max_steps=steps)
        model = make_model()
        model.lr, model.batch_size = 0.01, 4
        model.train_dataloader = model.val_dataloader = lambda model=model: make_loader(batch_size=model.batch_size)
        before = io.store.names(), [c.id for c in io.store.checkpoints()]
        tuner = Tuner(trainer)
        tuner.scale_batch_size(model, steps_per_trial=1, max_trials=1)
        tuner.lr_find(model, num_training=3)
        assert (io.store.names(), [c.id for c in io.store.checkpoints()]) == before
        model.seen.clear()
        trainer.fit(model, ckpt_path="latest")
        assert (trainer.global_step, len(model.seen)) == (steps, steps - begun)
    channel.send("tuned")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_the_tuner_saves_is_nothing_to_resume_from(tmp_path: Path, warm: Nursery, asynchronous: bool) -> None:
    assert told(warm, tuned, str(tmp_path), asynchronous) == ["tuned"]


def once_more(channel: Channel, folder: str) -> None:
    """A run is broken off, and begun anew in the same process with the same loader, as people do in a notebook."""
    quietly()
    import lightning.pytorch as pl

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 11:
                raise RuntimeError("enough")

    whole, loader = make_model(), make_loader()
    make_trainer(f"{folder}/whole", folder, max_epochs=2, enable_checkpointing=False).fit(whole, loader)
    for workers in (0, 1):
        loader = make_loader(workers)
        trainer = make_trainer(f"{folder}/broken", folder, Stop(), max_epochs=2, enable_checkpointing=False)
        with pytest.raises(RuntimeError, match="enough"):
            trainer.fit(make_model(), loader)
        model = make_model()
        make_trainer(f"{folder}/again", folder, max_epochs=2, enable_checkpointing=False).fit(model, loader)
        assert model.seen == whole.seen
    channel.send("begun anew")


def test_a_run_that_is_begun_anew_sees_everything(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, once_more, str(tmp_path)) == ["begun anew"]


def fabric(channel: Channel, url: str, stop_at: int) -> None:
    quietly()
    import lightning.fabric
    import torch

    from ckptstore.integrations.lightning import StoreCheckpointIO

    torch.manual_seed(2)
    io = StoreCheckpointIO(url)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, plugins=[io])
    model = torch.nn.Linear(4, 1)
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if "latest" in io.store:
        fabric.load("latest", state)
    else:
        with pytest.raises(CheckpointNotFound, match="empty"):
            fabric.load("latest", state)
    channel.send("from", state["step"])
    while state["step"] < 9:
        x = torch.sin(torch.arange(4.0) * state["step"])
        loss = (model(x) - x.sum()).square().mean()
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        state["step"] += 1
        if state["step"] % 2 == 0:
            fabric.save(f"{url}/step{state['step']}.ckpt", state)
        if state["step"] == stop_at:
            return
    assert io.store.checkpoint("latest").step == 8
    channel.send("end", digest_of(model))


def digest_of(module: Any) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in module.parameters())).hexdigest()


def test_fabric(tmp_path: Path, warm: Nursery) -> None:
    whole = warm.start(fabric, str(tmp_path / "whole"), 0).rest()
    assert warm.start(fabric, str(tmp_path / "store"), 5).rest() == [["from", 0]]
    assert warm.start(fabric, str(tmp_path / "store"), 0).rest() == [["from", 4], whole[-1]]


def fabric_loop(channel: Channel, url: str, wrapped: bool) -> None:
    """Train with a sampler of ours, whose state, and the generator's, Fabric saves with the rest at every step."""
    quietly()
    import lightning.fabric
    import torch

    from ckptstore.integrations.lightning import StoreCheckpointIO

    class Generator:
        def state_dict(self) -> dict[str, Any]:
            return {"torch": torch.get_rng_state()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            torch.set_rng_state(state["torch"])

    torch.set_num_threads(1)
    torch.manual_seed(2)
    io = StoreCheckpointIO(url)
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, plugins=[io])
    dropout = torch.nn.Dropout(0 if wrapped else 0.3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), dropout, torch.nn.ReLU(), torch.nn.Linear(16, 1))
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    loader = make_loader()
    sampler = loader.sampler
    state = {"model": model, "optimizer": optimizer, "sampler": sampler, "generator": Generator(), "step": 0}
    if "latest" in io.store:
        fabric.load("latest", state)
    channel.send("started", state["step"])
    if wrapped:
        loader = fabric.setup_dataloaders(loader, use_distributed_sampler=False)
    for epoch in range(sampler.epoch, EPOCHS):
        with sampler.in_epoch(epoch):
            for x, y, numbers in sampler.track(loader):
                loss = torch.nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                fabric.backward(loss)
                optimizer.step()
                state["step"] += 1
                fabric.save("step.ckpt", state)
                channel.send("step", state["step"], numbers.tolist())
    channel.send("end", digest_of(model))


@pytest.mark.parametrize(
    ("wrapped", "kills"), [(False, 3), (True, 3), *(pytest.param(how, 20, marks=pytest.mark.soak) for how in (False, True))]
)
def test_fabric_killed_at_any_moment(tmp_path: Path, warm: Nursery, wrapped: bool, kills: int) -> None:
    """In its own loader, which sets epochs that it counts from 0 in each run, or in the one that it was given."""
    rng = random.Random(wrapped)
    whole = warm.start(fabric_loop, str(tmp_path / "whole"), wrapped).rest()
    batches = {message[1]: message[2] for message in whole if message[0] == "step"}
    assert list(batches) == [*range(1, EPOCHS * BATCHES + 1)]
    places = iter(range(1000))
    url = str(tmp_path / f"store{next(places)}")
    killed = 0
    while killed < kills:
        child = warm.start(fabric_loop, url, wrapped)
        assert child.recv()[0] == "started"
        for _ in range(rng.randrange(14)):
            message = child.recv()
            if message[0] == "end":
                url = str(tmp_path / f"store{next(places)}")
                break
            assert message[2] == batches[message[1]]
        else:
            time.sleep(rng.uniform(0, 0.01))
            child.kill()
            killed += 1
    end = warm.start(fabric_loop, url, wrapped).rest()
    assert end[-1] == whole[-1]
    assert all(message[2] == batches[message[1]] for message in end if message[0] == "step")
    with Store(url) as store:
        assert store.verify() == []


def fabric_more(channel: Channel, folder: str) -> None:
    """What else Fabric does with checkpoints: parts of a state, raw objects, no state at all."""
    quietly()
    import lightning.fabric
    import torch

    from ckptstore.integrations.lightning import StoreCheckpointIO

    io = StoreCheckpointIO(f"{folder}/store")
    fabric = lightning.fabric.Fabric(accelerator="cpu", devices=1, plugins=[io])
    model, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    fabric.save("all.ckpt", {"model": model, "step": 7, "note": "words"})
    assert io.store.checkpoint("all").step == 7
    state: dict[str, Any] = {"model": other, "step": 0}
    assert fabric.load("all.ckpt", state) == {"note": "words"}
    assert digest_of(other) == digest_of(model)
    assert state["step"] == 7
    assert fabric.load("all.ckpt")["note"] == "words"
    fabric.save("raw.ckpt", model.state_dict())
    third = torch.nn.Linear(2, 1)
    fabric.load_raw("raw.ckpt", third)
    assert digest_of(third) == digest_of(model)
    fabric.save("part.ckpt", {"model": model, "step": 8}, filter={"model": lambda name, value: name == "bias"})
    assert list(io.load_checkpoint("part.ckpt")["model"]) == ["bias"]
    channel.send("done")


def test_what_else_fabric_does(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, fabric_more, str(tmp_path)) == ["done"]


def ranks(channel: Channel, url: str, folder: str, rank: int, epochs: int) -> None:
    """A Trainer of two processes."""
    quietly()
    import os

    import lightning.pytorch as pl
    import torch
    from lightning.fabric.plugins.environments import LightningEnvironment

    from ckptstore.integrations.lightning import ExactResume, StoreCheckpointIO

    class Environment(LightningEnvironment):
        creates_processes_externally = True  # type: ignore[assignment]

    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "NODE_RANK": 0}
    os.environ.update({k: str(v) for k, v in meet.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet{epochs}", rank=rank, world_size=2)
    torch.manual_seed(5 + rank)
    random.seed(rank)
    model = make_model()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_steps=epochs, default_root_dir=folder, plugins=[StoreCheckpointIO(url), Environment()],
        callbacks=[saver(folder, every_n_train_steps=1), ExactResume()],
    )  # fmt: skip
    trainer.fit(model, make_loader(), ckpt_path="latest")
    channel.send("end", trainer.global_step, digest_of(model), model.seen, float(torch.rand(1)))


def test_two_ranks_of_a_trainer(tmp_path: Path, warm: Nursery) -> None:
    def run(url: str, steps: int) -> list[list[Any]]:
        (tmp_path / url).mkdir(exist_ok=True)
        both = [warm.start(ranks, str(tmp_path / url / "store"), str(tmp_path / url), rank, steps) for rank in range(2)]
        return [child.rest()[-1] for child in both]

    whole = run("whole", 6)
    assert run("store", 3)[0][1] == 3
    end = run("store", 6)
    for mine, theirs in zip(end, whole, strict=True):
        assert mine[1:3] == theirs[1:3]
        assert mine[3] == theirs[3][3:]
        assert mine[4] == theirs[4]  # each rank has its own generators back
    assert end[0][4] != end[1][4]
    # One rank goes on with what the two have left of the epoch. The generators of two are no use to it.
    seen = [n for child in end for batch in child[3][-2:] for n in batch]
    kind, rest = told(warm, alone, str(tmp_path / "store/store"), str(tmp_path))
    assert kind == "warned"
    assert sorted(seen + rest) == [*range(64)]


def alone(channel: Channel, url: str, folder: str) -> None:
    """Go on with what two ranks have saved."""
    quietly()
    warnings.simplefilter("always")
    trainer, model = make_trainer(url, folder, max_epochs=2), make_model()
    with pytest.warns(UserWarning, match="generators of 2 ranks were saved, and there are 1: not restored"):
        trainer.fit(model, make_loader(), ckpt_path="latest")
    channel.send("warned", [n for batch in model.seen for n in batch])


@pytest.mark.soak
def test_pytorch_lightning(tmp_path: Path) -> None:
    """The other package by which Lightning is known, in a process that has not imported this one."""
    import os
    import subprocess
    import sys

    import ckptstore

    code = f"""
import warnings
warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from ckptstore.integrations.lightning import ExactResume, StoreCheckpointIO
for steps in (3, 5):
    saver = ModelCheckpoint(dirpath={str(tmp_path)!r}, every_n_train_steps=1)
    trainer = pl.Trainer(accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, plugins=[StoreCheckpointIO({str(tmp_path / "store")!r})], callbacks=[saver, ExactResume()])
    trainer.fit(BoringModel(), ckpt_path="latest")
    print(trainer.global_step, StoreCheckpointIO({str(tmp_path / "store")!r}).store.checkpoint().step)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 3\n5 5\n"


def test_paths_and_their_names() -> None:
    from ckptstore.integrations._pins import pin_for

    assert pin_for("/a/b/checkpoints/epoch=0-step=10.ckpt") == "checkpoints.epoch0-step10"
    assert pin_for("last.ckpt") == "last"
    odd = [pin_for(f"x/{name}.ckpt") for name in ("a b", "a/b", "ä", "ö", "n" * 200, "n" * 201, "..")]
    assert len(set(odd)) == len(odd)
    assert all(len(name) <= 128 for name in odd)


def readme(channel: Channel, folder: str) -> None:
    """The README's example, twice."""
    quietly()
    import os
    import re

    os.chdir(folder)
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python lightning\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    example = example.replace("=100", "=10").replace(
        "Trainer(", "Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, "
    )
    for _ in range(2):
        namespace = {"model": make_model(), "loader": make_loader()}
        exec(compile(example, "README.md", "exec"), namespace)
        assert namespace["trainer"].global_step == 24
    assert len(namespace["model"].seen) == 4
    channel.send("done")


def test_the_readme(tmp_path: Path, warm: Nursery) -> None:
    assert told(warm, readme, str(tmp_path)) == ["done"]
