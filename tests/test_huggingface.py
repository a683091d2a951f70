"""Hugging Face on a store: real Trainers and Accelerators on small models made at random, interrupted and resumed."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from procs import Channel, Nursery
from stores import store_on, unreadable

from ckptstore import FallbackWarning, Store, WrongKind

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(OFFLINE)
STEPS = 12


def warm_up() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's
        import accelerate  # noqa: F401
        import transformers.models.gpt2.modeling_gpt2
        import transformers.trainer  # noqa: F401

        import ckptstore.integrations.accelerate
        import ckptstore.integrations.transformers  # noqa: F401


def quietly() -> None:
    """What others warn of is no error here; what we warn of is."""
    from ckptstore import StoreWarning

    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", StoreWarning)


def make_trainer(url: str, output: str, *callbacks: Any, **options: Any) -> tuple[Any, Any]:
    import torch
    import transformers

    from ckptstore.integrations.transformers import StoreCallback

    transformers.set_seed(7)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.2)
    model = transformers.GPT2LMHeadModel(config)
    data = [{"input_ids": (ids := torch.arange(i, i + 8) % 32), "labels": ids} for i in range(64)]
    options = {"max_steps": STEPS, "save_steps": 3, "logging_steps": 3, "save_total_limit": 1, **options}
    quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "per_device_train_batch_size": 4}
    args = transformers.TrainingArguments(output, **quiet, **options)
    store = StoreCallback(url)
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[store, *callbacks])
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, transformers.PrinterCallback):
            trainer.remove_callback(callback)
    return trainer, store


def weights(trainer: Any) -> list[float]:
    return [float(p.double().sum()) for p in trainer.model.parameters()]


def join(rank: int, world: int, meet: str) -> None:
    """Become a rank, as a launcher would make one."""
    import torch

    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 0}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in here.items()}})
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)


def train(channel: Channel, url: str, output: str, stop_at: int, rank: int = 0, world: int = 1) -> None:
    """Train from wherever the store says; be killed at a step, if one is given."""
    quietly()
    import transformers

    if world > 1:
        join(rank, world, f"{output}-meet{stop_at}")

    class Teller(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            channel.send("step", state.global_step)
            if state.global_step == stop_at:
                os._exit(9)

    trainer, store = make_trainer(url, output, Teller())
    folder = store.newest(output)
    channel.send("from", folder and Path(folder).name)
    trainer.train(resume_from_checkpoint=folder)
    channel.send("end", weights(trainer))


def test_a_trainer_is_killed_and_resumed(tmp_path: Path, warm: Nursery) -> None:
    whole = warm.start(train, str(tmp_path / "whole"), str(tmp_path / "w"), 0).rest()
    assert whole[0] == ["from", None]
    url, output = str(tmp_path / "store"), tmp_path / "output"
    assert warm.start(train, url, str(output), 2).rest() == [["from", None], ["step", 1], ["step", 2]]
    assert warm.start(train, url, str(output), 5).rest()[0] == ["from", None]
    # Half of a folder that the Trainer was writing when it was killed is no checkpoint.
    (output / "checkpoint-6").mkdir()
    (output / "checkpoint-6/trainer_state.json").write_text("{")
    (output / "checkpoint-3/model.safetensors").write_bytes(b"spoilt here, whole in the store")
    again = warm.start(train, url, str(output), 8).rest()
    assert again[:2] == [["from", "checkpoint-3"], ["step", 4]]
    last = warm.start(train, url, str(output), 0).rest()
    assert last[0] == ["from", "checkpoint-6"]
    assert last[-1] == whole[-1]
    with Store(url, acquire=False) as store:
        newest = store.checkpoint("latest")
        assert (newest.step, newest.by) == (12, "transformers")
        assert newest.metrics["loss"] > 0
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"} <= set(newest.files)
        assert store.verify() == []
        with pytest.raises(WrongKind, match="transformers"):
            store.load()


def test_two_ranks_of_a_trainer(tmp_path: Path, warm: Nursery) -> None:
    """What each of them has saved is in the one checkpoint, and each goes on from it."""

    def run(place: str, stop_at: int) -> list[list[Any]]:
        url, output = str(tmp_path / place), str(tmp_path / f"{place}-output")
        return [child.rest() for child in [warm.start(train, url, output, stop_at, rank, 2) for rank in range(2)]]

    whole = run("whole", 0)
    assert [said[0] for said in run("store", 7)] == [["from", None]] * 2
    end = run("store", 0)
    assert [said[0] for said in end] == [["from", "checkpoint-6"]] * 2
    assert [said[-1] for said in end] == [said[-1] for said in whole]
    assert end[0][-1] == end[1][-1]
    with Store(tmp_path / "store", acquire=False) as store:
        assert store.checkpoint().step == STEPS
        assert {"model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(store.checkpoint().files)
        assert store.verify() == []


def told_to_stop(channel: Channel, url: str, output: str) -> None:
    """Be sent SIGTERM at step 4, of which the Trainer saves what it has; go on from that."""
    quietly()
    import transformers

    class Stop(transformers.TrainerCallback):
        manager: Any = None

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 4:
                signal.raise_signal(signal.SIGTERM)
                while not self.manager.is_checkpoint_requested:  # a timer's thread says so
                    time.sleep(0.001)

    half = Path(output, "checkpoint-5")
    half.mkdir(parents=True)
    for file in ("model.safetensors", "trainer_state.json"):
        (half / file).write_bytes(b"half of it")
    stop = Stop()
    trainer, store = make_trainer(url, output, stop, save_steps=100, save_total_limit=None, enable_jit_checkpoint=True)
    jit = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
    stop.manager = jit.jit_manager
    stop.manager.kill_wait = 0
    assert store.newest(output) is None
    trainer.train()
    assert trainer.state.global_step == 5
    assert [c.step for c in store.store.checkpoints()] == [4]
    again, store = make_trainer(url, output, save_steps=100)
    folder = store.newest(output)
    assert folder is not None
    again.train(resume_from_checkpoint=folder)
    channel.send("end", folder, again.state.global_step)


def test_what_is_saved_at_sigterm_is_published(tmp_path: Path, warm: Nursery) -> None:
    """And what a killed run left of the step at which training stops is not."""
    output = str(tmp_path / "out")
    assert warm.start(told_to_stop, str(tmp_path / "s"), output).rest() == [["end", f"{output}/checkpoint-4", STEPS]]


def test_a_damaged_folder_is_passed_over(tmp_path: Path, warm: Nursery) -> None:
    warm.start(train, str(tmp_path / "store"), str(tmp_path / "a"), 7).rest()
    with Store(tmp_path / "store", acquire=False) as store:
        newest = store.checkpoint("latest")
    path = tmp_path / "store/data" / newest.id / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    child = warm.start(fall_back, str(tmp_path / "store"), str(tmp_path / "b"))
    assert child.expect("fell back") == ["checkpoint-3"]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["checkpoint-3"]


def fall_back(channel: Channel, url: str, output: str) -> None:
    from ckptstore.integrations.transformers import StoreCallback

    Path(output).mkdir()
    with pytest.warns(FallbackWarning, match=r"optimizer\.pt"):
        folder = StoreCallback(url).newest(output)
    channel.send("fell back", folder and Path(folder).name)


# --- accelerate


def accelerate(channel: Channel, url: str, stop_at: int, rank: int, world: int, prepared: bool) -> None:
    """Train by hand from wherever the store says; with a loader that sets epochs which it counts from 0 in each run, if `prepared`."""
    quietly()
    import torch
    from accelerate import Accelerator

    import ckptstore
    from ckptstore.integrations.accelerate import load_state, save_state

    if world > 1:
        join(rank, world, f"{url}-meet{stop_at}")
    torch.manual_seed(3)
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0 if prepared else 0.2), torch.nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.sin(torch.arange(64.0)[:, None] * torch.arange(1.0, 5.0))
    sampler = ckptstore.InterruptableDistributedSampler(data, seed=1)
    model, optimizer = accelerator.prepare(model, optimizer)
    store = ckptstore.Store(url)
    checkpoint = load_state(accelerator, store, sampler=sampler)
    step = 0 if checkpoint is None else checkpoint.step or 0
    channel.send("from", step)
    loader = torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler)
    if prepared:
        loader = accelerator.prepare(loader)
    for epoch in range(sampler.epoch, 3):
        with sampler.in_epoch(epoch):
            for batch in sampler.track(loader):
                loss = torch.nn.functional.mse_loss(model(batch), batch.sum(1, keepdim=True))
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                step += 1
                if step % 2 == 0:
                    save_state(accelerator, store, step=step, sampler=sampler)
                if step == stop_at:
                    return
    channel.send("end", [float(p.double().sum()) for p in model.parameters()])


@pytest.mark.parametrize(("world", "prepared"), [(1, False), (1, True), (2, False)])
def test_accelerate_goes_on_where_it_was(tmp_path: Path, warm: Nursery, world: int, prepared: bool) -> None:
    def run(url: str, stop_at: int) -> list[list[Any]]:
        ranks = [warm.start(accelerate, str(tmp_path / url), stop_at, rank, world, prepared) for rank in range(world)]
        told = [rank.rest() for rank in ranks]
        return told[0]

    whole = run("whole", 0)
    assert run("store", 3) == [["from", 0]]
    assert run("store", 7) == [["from", 2]]
    assert run("store", 11) == [["from", 6]]
    end = run("store", 0)
    assert end[0] == ["from", 10]
    assert end[-1] == whole[-1]
    with Store(tmp_path / "store", acquire=False) as store:
        assert store.checkpoint().by == "accelerate"
        assert {"model.safetensors", "optimizer.bin"} <= set(store.checkpoint().files)
        assert store.verify() == []


def in_the_background(channel: Channel, url: str) -> None:
    """Save beside a step of accelerate's optimizer."""
    quietly()
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    before = model.weight.detach().clone()
    with Store(url) as store:
        pending = store.save_async({"model": model, "optimizer": optimizer}, optimizer=optimizer)
        assert len(optimizer.optimizer._optimizer_step_pre_hooks) == 1, "the steps are its"
        accelerator.backward(model(torch.ones(1, 2)).sum())
        optimizer.step()
        assert not torch.equal(model.weight, before)
        assert torch.equal(pending.result(60).load()["model"]["weight"], before)
    channel.send("saved")


def test_a_save_in_the_background_beside_accelerates_optimizer(tmp_path: Path, warm: Nursery) -> None:
    assert warm.start(in_the_background, str(tmp_path / "store")).rest() == [["saved"]]


def refuse(channel: Channel, url: str) -> None:
    """Meet what cannot be."""
    quietly()
    import pickle

    import torch
    import torch.distributed.checkpoint as dcp
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from ckptstore import BackendError, CheckpointNotFound, Fenced, UsageError
    from ckptstore.backends.local import LocalBackend
    from ckptstore.integrations.accelerate import load_state, save_state
    from ckptstore.integrations.transformers import StoreCallback
    from ckptstore.testing import Fault, FaultyBackend

    model = Accelerator(cpu=True).prepare(torch.nn.Linear(2, 2))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    store = Store(url)
    store.save({"x": 1}, step=1)
    before = store.names()
    with pytest.raises(WrongKind, match=r"written by Store\.save .*, not by accelerate"):
        load_state(accelerator, store)
    with pytest.raises(WrongKind, match=r"written by Store\.save .*, not by transformers"):
        StoreCallback(store).newest(f"{url}-out")
    save_state(accelerator, store)
    with pytest.raises(WrongKind, match="written by accelerate, not by transformers"):
        StoreCallback(store).newest(f"{url}-out")
    with pytest.raises(WrongKind, match="written by accelerate"):
        store.load()
    assert store.names() != before
    dcp.save({"x": torch.ones(1)}, storage_writer=store.dcp_writer())
    with pytest.raises(WrongKind, match=r"written by torch\.distributed\.checkpoint, not by accelerate"):
        load_state(accelerator, store)
    with store.transaction() as tx:
        tx.by = "lightning"
        tx.save({})
    with pytest.raises(WrongKind, match="written by lightning, not by accelerate"):
        load_state(accelerator, store)
    with pytest.raises(WrongKind, match="written by lightning, not by transformers"):
        StoreCallback(store).newest(f"{url}-out")
    # What only has weights cannot be resumed from, and so is not the latest.
    trainer, weights_only = make_trainer(f"{url}-weights", f"{url}-weights-out", max_steps=3, save_only_model=True)
    trainer.train()
    assert list(weights_only.store.names()) == ["weights"]
    with pytest.raises(CheckpointNotFound, match="latest"):
        weights_only.newest(f"{url}-out")
    trainer.args.output_dir = f"{url}-elsewhere"  # as in a search of hyperparameters, which has a folder for each trial
    with pytest.raises(UsageError, match="a store for each trial"):
        weights_only.on_save(trainer.args, trainer.state, trainer.control)

    sick = unreadable()  # not taken for an empty store
    for resume in (lambda: load_state(accelerator, sick), lambda: StoreCallback(sick).newest(f"{url}-out")):
        with pytest.raises(BackendError, match="nothing can be read"):
            resume()
    before = store.names()

    class Spoilt:
        def state_dict(self) -> Any:
            raise RuntimeError("no state today")

        def load_state_dict(self, state: Any) -> None: ...

    accelerator.register_for_checkpointing(Spoilt())
    with pytest.raises(RuntimeError, match="no state today"):
        save_state(accelerator, store)
    assert store.names() == before
    # Who resumes has taken over, and what was resumed from is kept.
    for which, resume in enumerate(
        (lambda owner: load_state(Accelerator(cpu=True), owner), lambda owner: StoreCallback(owner).newest(f"{url}-out"))
    ):
        place = f"{url}-{which}"
        older = Store(place, keep_last=1)
        with older.transaction(step=1) as tx:
            tx.by = ("accelerate", "transformers")[which]
            with tx.open("random_states_0.pkl") as file:
                pickle.dump({"step": 0}, file)

        def try_to_save(older: Store = older) -> None:
            with pytest.raises(Fenced):
                older.save({}, step=2)

        backend = FaultyBackend(LocalBackend.open(place, {}), [Fault("read_into", before=try_to_save)])  # before anything is read
        newer = store_on(backend, keep_last=1)
        resume(newer)
        assert backend.calls["read_into"]
        for step in (3, 4):
            newer.save({}, step=step)
        assert [c.step for c in newer.checkpoints()] == [1, 4]
        assert newer._engine.log.head().record.resumed == tx.checkpoint.id
        found = newer._engine.log.head().record.entry(tx.checkpoint.id)
        assert found is not None
        assert found.verified  # every byte of it was read

    named = Accelerator(cpu=True, project_config=ProjectConfiguration(automatic_checkpoint_naming=True))
    with pytest.raises(UsageError, match="automatic_checkpoint_naming"):
        save_state(named, store)

    # Ranks that do not know of each other yet.
    os.environ.update(WORLD_SIZE="2")
    with pytest.raises(UsageError, match="TrainingArguments first"):
        StoreCallback(f"{url}-2").newest(f"{url}-out")

    # Ranks of which only some are on this host.
    join(0, 1, f"{url}-meet")
    os.environ.update(LOCAL_WORLD_SIZE="1", WORLD_SIZE="2")
    accelerator = Accelerator(cpu=True)
    for call in (save_state, load_state):
        with pytest.raises(UsageError, match="give folder="):
            call(accelerator, store)
    save_state(accelerator, store, step=9, folder=os.path.dirname(url))
    found = load_state(accelerator, store, folder=os.path.dirname(url))
    assert found is not None
    assert found.step == 9
    channel.send("refused")


def test_what_cannot_be_is_refused(tmp_path: Path, warm: Nursery) -> None:
    assert warm.start(refuse, str(tmp_path / "store")).rest() == [["refused"]]


def readme(channel: Channel, folder: str) -> None:
    """The README's examples."""
    quietly()
    import re

    import torch
    import transformers
    from accelerate import Accelerator

    import ckptstore

    os.chdir(folder)
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"^```python (transformers|accelerate)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    trainer, _ = make_trainer("other", "out", max_steps=4, save_steps=2)
    for steps in (4, 6):
        trainer.args.max_steps = steps
        names = {"transformers": transformers, "model": trainer.model, "args": trainer.args, "dataset": trainer.train_dataset}
        exec(compile(examples["transformers"], "README.md", "exec"), names)
        assert names["trainer"].state.global_step == steps
    assert Store("runs/transformers").checkpoint().step == 6

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    sampler = ckptstore.InterruptableSampler([1, 2], seed=1)
    names = {"accelerator": accelerator, "store": Store("runs/accelerate"), "sampler": sampler, "step": 5}
    exec(compile(examples["accelerate"], "README.md", "exec"), names)
    assert names["checkpoint"] is None
    exec(compile(examples["accelerate"], "README.md", "exec"), names)
    assert names["checkpoint"].step == 5
    channel.send("done")


def test_the_readme(tmp_path: Path, warm: Nursery) -> None:
    assert warm.start(readme, str(tmp_path)).rest()[-1] == ["done"]
