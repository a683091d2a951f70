"""An old job that is not dead yet and a newer one, as two real processes; owners, cooperating writers, ranks of one launch."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import evidence
import pytest
from procs import Channel, Nursery, litter

from ckptstore import Checkpoint, Store
from ckptstore.backends.local import LocalBackend, _LocalWriter
from ckptstore.errors import BackendError, CkptStoreError, Fenced, UsageError
from ckptstore.owner import default_owner
from ckptstore.posix import NewFile


def put(store: Store, name: str = "latest", step: int | None = None, **more: Any) -> Checkpoint:
    """Save without torch."""
    with store.transaction(name, step=step, **more) as tx, tx.open("file") as file:
        file.write(b"content")
    return tx.checkpoint


def outcome(call: Callable[[], object]) -> str:
    """Return the name of the error that `call` raises, "done" if it raises none."""
    try:
        call()
    except CkptStoreError as exc:
        return type(exc).__name__
    return "done"


def epoch(checkpoint: Checkpoint) -> int:
    return int(checkpoint.id[1:].split("-")[0])


# -- the old job is stopped, and continued when a newer one has taken over


def stop_here() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_at(point: str) -> None:
    """Have this process stop itself, once, when it gets to `point` of a save."""
    stops = [stop_here]

    def once(condition: bool) -> None:
        if condition and stops:
            stops.pop()()

    def wrap(owner: Any, method: str, before: Callable[..., bool], after: Callable[..., bool]) -> None:
        inner = getattr(owner, method)

        def outer(self: Any, *args: Any) -> Any:
            once(before(self, *args))
            result = inner(self, *args)
            once(after(self, *args))
            return result

        setattr(owner, method, outer)

    def never(*_: Any) -> bool:
        return False

    def always(*_: Any) -> bool:
        return True

    def record(self: Any, *_: Any) -> bool:
        return "/log/" in self.path

    def manifest(self: Any, *_: Any) -> bool:
        return bool(self.path.endswith("manifest.json"))

    match point:
        case "before the first file":
            wrap(LocalBackend, "open_writer", always, never)
        case "in the middle of a file":
            wrap(_LocalWriter, "write", never, always)
        case "before a file is durable":
            wrap(_LocalWriter, "finish", always, never)
        case "before the manifest":
            wrap(NewFile, "publish", manifest, never)
        case "before the record":
            wrap(LocalBackend, "put_if_absent", always, never)
        case "before the link":
            wrap(NewFile, "publish", record, never)
        case "after the link":
            wrap(NewFile, "publish", never, record)


POINTS = [
    "before the first file",
    "in the middle of a file",
    "before a file is durable",
    "before the manifest",
    "before the record",
    "before the link",
    "after the link",
]


def old_job(channel: Channel, url: str, point: str) -> None:
    """Save, save again with a stop in the middle, and when continued try everything."""
    import torch

    store = Store(url, keep_last=1)
    first = store.save({"step": torch.tensor(1)}, step=1)
    channel.send("saved", first.id)
    stop_at(point)
    result = outcome(lambda: store.save({"step": torch.tensor(2)}, step=2))
    again = {
        "save": outcome(lambda: store.save({"step": torch.tensor(3)}, step=3)),
        "transaction": outcome(lambda: put(store)),
        "tag": outcome(lambda: store.tag("best", first)),
        "prune": outcome(store.prune),
        "delete": outcome(lambda: store.delete("latest")),
        "acquire": outcome(store.acquire),
        "resume": outcome(lambda: store.resume({"step": torch.tensor(0)})),
    }
    channel.send("result", result, again, store.load()["step"].item())


@pytest.mark.parametrize("saves", [0, 1, 12])  # 12: the slot that the old job is about to take is a tombstone by then
@pytest.mark.parametrize("point", POINTS)
def test_a_stopped_job_changes_nothing_when_continued(tmp_path: Path, warm: Nursery, point: str, saves: int) -> None:
    import torch

    old = warm.start(old_job, str(tmp_path / "store"), point)
    [first] = old.expect("saved")
    old.wait_stopped()

    new = Store(tmp_path / "store")
    state = {"step": torch.tensor(0)}
    resumed = new.resume(state)
    assert resumed is not None
    committed = point == "after the link"
    assert state["step"].item() == resumed.step == (2 if committed else 1)
    assert (resumed.id == first) is not committed
    for step in range(saves):
        new.save({"step": torch.tensor(10 + step)}, step=10 + step, metrics={"m" * 999 + str(i): i for i in range(5)})
    before = new.names()

    old.proceed()
    result, again, seen = old.expect("result")
    assert result == ("done" if committed else "Fenced")
    assert set(again.values()) == {"Fenced"}, again
    assert seen == new.checkpoint().step

    assert new.names() == Store(tmp_path / "store").names() == before
    new.gc()
    assert new.verify() == []
    assert litter(new) == []
    assert epoch(new.save({"step": torch.tensor(99)}, step=99)) == 2


def saving_job(channel: Channel, url: str) -> None:
    """Save until fenced."""
    store = Store(url)
    for step in range(10**6):
        try:
            checkpoint = put(store, step=step)
        except Fenced:
            channel.send("fenced")
            break
        channel.send("saved", checkpoint.id)
    store.close()


@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.soak)])
def test_stopped_at_any_moment(tmp_path: Path, warm: Nursery, rounds: int) -> None:
    rng = random.Random(2)
    url = str(tmp_path / "store")
    with evidence.experiment("an old job stops at random moments") as tally:
        for _ in range(rounds):
            tally.strike()
            old = warm.start(saving_job, url)
            for _ in range(rng.randint(1, 3)):
                [acknowledged] = old.expect("saved")
            time.sleep(rng.uniform(0, 0.015))
            old.stop()
            new = Store(url)
            new.acquire()
            taken_over = new.checkpoint().id
            if rng.random() < 0.5:
                put(new)
            names = new.names()
            old.proceed()
            messages = old.rest()
            assert messages[-1] == ["fenced"]
            acknowledged = [acknowledged, *(message[1] for message in messages[:-1])][-1]
            # It may have been stopped between its commit and saying so, or between the commit and hearing of it: never the other way round.
            assert taken_over == acknowledged
            assert new.names() == Store(url).names() == names
            put(new)
            new.gc()
            assert new.verify() == []
            assert litter(new) == []
            new.close()


# -- ranks of one launch share an epoch


def test_owner_of_a_torchrun_launch() -> None:
    rank = {"TORCHELASTIC_RUN_ID": "run-7", "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    owner = default_owner({**rank, "RANK": "0"})
    assert owner == default_owner({**rank, "RANK": "15"})
    job = {**rank, "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}
    assert default_owner(job) == default_owner({**job, "SLURM_PROCID": "3"})
    assert default_owner(job) != default_owner({**job, "SLURM_RESTART_COUNT": "1"})  # requeued: torchrun counts from 0 again
    assert owner != default_owner({**rank, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert owner != default_owner({**rank, "TORCHELASTIC_RUN_ID": "run-8"})


def test_owner_of_a_torchrun_launch_without_a_run_id() -> None:
    rank = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
    one_node = {**rank, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}
    assert default_owner({**one_node, "RANK": "0"}) == default_owner({**one_node, "RANK": "7"})
    assert str(os.getppid()) in default_owner(one_node).split(":")
    assert default_owner(one_node) != default_owner({**one_node, "TORCHELASTIC_RESTART_COUNT": "1"})
    several = {**rank, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    with pytest.raises(UsageError, match="rdzv-id"):
        default_owner(several)
    slurm = {**several, "SLURM_JOB_ID": "5"}
    assert default_owner(slurm) == default_owner({**slurm, "SLURM_PROCID": "1"}) != default_owner({**slurm, "SLURM_JOB_ID": "6"})


def test_owner_of_a_slurm_job() -> None:
    task = {"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"}
    owner = default_owner({**task, "SLURM_PROCID": "0"})
    assert owner == default_owner({**task, "SLURM_PROCID": "3", "SLURM_NODEID": "1"})
    others = [{"SLURM_JOB_ID": "6"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}]
    assert len({owner, *(default_owner({**task, **other}) for other in others)}) == 4


def test_owner_of_a_lone_process() -> None:
    owner = default_owner({})
    assert owner.startswith(f"{socket.gethostname()}:{os.getpid()}:")
    assert owner != default_owner({})


def rank(channel: Channel, url: str, environ: dict[str, str], name: str, count: int) -> None:
    """One rank of a launch: commit `count` times."""
    os.environ.update(environ)
    store = Store(url, keep_last="all")
    channel.recv()
    outcomes = [outcome(partial(put, store, name, step)) for step in range(count)]
    channel.send("outcomes", sorted(set(outcomes)))
    channel.recv()
    channel.send("late", outcome(lambda: put(store, name)), outcome(store.acquire))


def test_ranks_of_one_launch_commit_side_by_side_until_the_next_launch(tmp_path: Path, warm: Nursery) -> None:
    url = str(tmp_path / "store")
    launch = {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_RESTART_COUNT": "0"}
    ranks = [warm.start(rank, url, launch, f"rank{i}", 100) for i in range(2)]
    late = warm.start(rank, url, launch, "late", 1)
    for child in ranks:
        child.send("go")
    for child in ranks:
        assert child.expect("outcomes") == [["done"]]
    store = Store(url, keep_last="all")
    for name in ("rank0", "rank1"):
        assert [c.step for c in store.checkpoints() if c.name == name] == list(range(100))
    assert {epoch(c) for c in store.checkpoints()} == {1}

    restarted = warm.start(rank, url, {**launch, "TORCHELASTIC_RESTART_COUNT": "1"}, "restarted", 1)
    restarted.send("go")
    assert restarted.expect("outcomes") == [["done"]]
    assert epoch(store.checkpoint("restarted")) == 2
    late.send("go")  # it has not touched the store before, and must not take it from the newer launch
    assert late.expect("outcomes") == [["Fenced"]]
    for child in (*ranks, late):
        child.send("go")
        assert child.expect("late") == ["Fenced", "Fenced"]
    restarted.send("go")
    assert restarted.expect("late") == ["done", "done"]


def resuming_job(channel: Channel, url: str, owner: str | None) -> None:
    """Resume and, when all have, save."""
    store = Store(url, owner=owner)
    channel.send("ready")
    channel.recv()
    channel.send("resumed", outcome(lambda: store.resume({"step": 0})))
    channel.recv()
    channel.send("saved", outcome(lambda: store.save({"step": 2}, step=2)))


@pytest.mark.parametrize("owner", [None, "launch"])
def test_resuming_side_by_side(tmp_path: Path, warm: Nursery, owner: str | None) -> None:
    """Of several jobs exactly one goes on; of one job, all processes do."""
    url = str(tmp_path / "store")
    Store(url).save({"step": 1}, step=1)
    for turn in range(8):
        jobs = [warm.start(resuming_job, url, owner and f"{owner} {turn}") for _ in range(3)]
        for job in jobs:
            job.expect("ready")
        for job in jobs:
            job.send("go")
        resumed = [job.expect("resumed")[0] for job in jobs]
        assert set(resumed) <= {"done", "Fenced"}
        for job in jobs:
            job.send("go")
        saved = [job.expect("saved")[0] for job in jobs]
        assert sorted(saved) == (["done"] * 3 if owner else ["Fenced", "Fenced", "done"])
        assert resumed[saved.index("done")] == "done"
        assert Store(url).verify() == []


def test_two_jobs_on_one_folder(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    kept = put(first)
    put(second)
    for call in (first.acquire, lambda: put(first), lambda: first.tag("best", kept), first.prune, lambda: first.delete(kept)):
        with pytest.raises(Fenced, match="stop this job"):
            call()
    assert first.checkpoint(kept.id) == kept  # it may still read
    put(second)


# -- a store that travels to another process of the same job


def in_worker(store: Store, pipe: Any) -> None:
    pipe.send((put(store, "worker").id, store.tag("seen", "worker").id))
    pipe.recv()
    pipe.send(outcome(lambda: put(store)))


@pytest.mark.parametrize("newer", [False, True], ids=["alone", "beside a newer job"])
@pytest.mark.parametrize("what", ["all", "content", "log"])
def test_a_job_whose_store_was_deleted_under_it_commits_nothing(tmp_path: Path, what: str, newer: bool) -> None:
    root = tmp_path / "store"
    with Store(root) as old:
        put(old, step=1)
        put(old, step=2)
        for path in {"all": [root], "content": [*root.iterdir()], "log": [root / "log"]}[what]:
            shutil.rmtree(path)
        if newer:
            with Store(root) as new:
                put(new, step=7)
        with pytest.raises(BackendError, match=r"pen the store anew"):
            put(old, step=3)
    with Store(root) as anew:
        assert [c.step for c in anew] == [7] * newer
        put(anew, step=8)


@pytest.mark.parametrize("acquired", [False, True])
def test_a_pickled_store_is_the_same_job(tmp_path: Path, acquired: bool) -> None:
    store = Store(tmp_path, keep_last=3)
    if acquired:
        put(store)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    worker = spawn.Process(target=in_worker, args=(store, theirs))
    worker.start()
    made, tagged = ours.recv()
    assert made == tagged == store.names()["seen"]
    assert epoch(put(store)) == epoch(store.checkpoint(made)) == 1
    Store(tmp_path).acquire()
    ours.send("go")
    assert ours.recv() == "Fenced"
    worker.join()
    with pytest.raises(Fenced):
        put(store)


def test_a_pickled_store_does_not_come_back_from_the_dead(tmp_path: Path) -> None:
    """It was pickled before the newer job acquired, and unpickled after."""
    store = Store(tmp_path)
    put(store)
    travelling = pickle.dumps(store)
    put(Store(tmp_path))
    with pytest.raises(Fenced):
        put(pickle.loads(travelling))


# -- cooperating writers


def test_a_cooperating_writer_fences_nobody(tmp_path: Path) -> None:
    trainer, evaluation = Store(tmp_path), Store(tmp_path, acquire=False)
    latest = put(trainer, step=1)
    scored = put(evaluation, "scores", step=1)
    evaluation.tag("best", latest)
    assert epoch(put(trainer, step=2)) == epoch(scored) == 1
    assert set(trainer.names()) == {"latest", "scores", "best"}
    evaluation.prune()
    evaluation.delete("scores")
    assert epoch(put(trainer, step=3)) == 1
    with pytest.raises(UsageError):
        evaluation.acquire()
    put(Store(tmp_path), step=4)
    evaluation.tag("after", "latest")
    assert epoch(put(evaluation, "scores", step=4)) == 2


def test_a_cooperating_save_across_a_change_of_owner_may_be_repeated(tmp_path: Path) -> None:
    put(Store(tmp_path))
    evaluation = Store(tmp_path, acquire=False)
    with pytest.raises(Fenced, match="save again"), evaluation.transaction("scores") as tx:
        with tx.open("file") as file:
            file.write(b"written before")
        trainer = Store(tmp_path)
        trainer.acquire()  # collects what it does not know
    assert "scores" not in trainer
    put(evaluation, "scores")
    assert epoch(trainer.checkpoint("scores")) == 2
    put(trainer)
    trainer.gc()
    assert litter(trainer) == []


def test_a_cooperating_writer_may_come_first(tmp_path: Path) -> None:
    first = put(Store(tmp_path, acquire=False), "early")
    trainer = Store(tmp_path)
    put(trainer)
    assert trainer.checkpoint("early") == first
    trainer.gc()
    assert trainer.verify() == []
