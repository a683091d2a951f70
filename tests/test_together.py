"""Threads, forks, tools beside the job, and storage that hiccups: what one does must not harm what another one does."""

from __future__ import annotations

import _thread
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from procs import in_fork
from stores import new_memory, objects, state_of, store_on, write

from ckptstore import Store
from ckptstore.errors import (
    Ambiguous,
    BackendError,
    CommitUnknown,
    DamagedManifest,
    DamagedRecord,
    FallbackWarning,
    Fenced,
    InvalidName,
    NoAtomicCreate,
    Transient,
    Unreadable,
)
from ckptstore.log import slot_key
from ckptstore.testing import Fault, FaultyBackend
from ckptstore.workers import Job, Workers
from ckptstore.wrapper import Wrapper


def test_a_tool_beside_the_job_prunes_only_under_its_own_name() -> None:
    backend = new_memory()
    job = store_on(backend, keep_last="all")
    kept = [write(job, "latest", step=i) for i in range(6)]
    tool = store_on(backend, acquire=False)
    evaluated = [write(tool, "eval", step=i) for i in range(4)]
    assert [c.id for c in job] == [*kept, *evaluated[-2:]]
    assert set(tool.prune()) == {*kept[:-2]}  # asked for, so its rules are for all


def test_one_whole_file_makes_no_whole_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.transaction() as tx:
        tx.save({"x": 1})
        tx.save({"y": 2}, "optimizer.pt")
    path = tmp_path / "data" / tx.id / "optimizer.pt"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert [d.path for d in store.verify()] == ["optimizer.pt"]
    assert store.load() == {"x": 1}
    write(store, "other")
    assert [e.verified for e in state_of(store._engine.backend).checkpoints if e.id == tx.id] == [False]
    path.write_bytes(data)
    fresh = Store(tmp_path)
    assert fresh.load() == {"x": 1}
    write(fresh, "other")
    assert [e.verified for e in state_of(fresh._engine.backend).checkpoints if e.id == tx.id] == [False]
    assert fresh.verify() == []
    write(fresh, "other")
    assert [e.verified for e in state_of(fresh._engine.backend).checkpoints if e.id == tx.id] == [True]


def test_verifying_reads_the_manifest_again(tmp_path: Path) -> None:
    saved = Store(tmp_path).save({"x": 1})
    assert saved.files
    (tmp_path / "data" / saved.id / "manifest.json").write_bytes(b"rubbish")
    assert [d.path for d in saved.verify()] == [""]
    assert [d.path for d in saved.verify_remote()[0]] == [""]
    with pytest.raises(DamagedManifest):
        Store(tmp_path).load(saved.id)


def test_closing_while_others_commit() -> None:
    """Ends; the time-out of the whole run would say if it did not."""
    backend = FaultyBackend(new_memory())
    store = store_on(backend, keep_last=1)
    write(store)
    stop = threading.Event()

    def close() -> None:
        while not stop.is_set():
            store._engine.workers.close()

    closing = threading.Thread(target=close)
    closing.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write(store), range(100)))
    stop.set()
    closing.join()
    assert store.verify() == []


def test_a_fork_does_not_wait_for_its_parents_deletions(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=1)
    store.save({"x": 1})
    release = threading.Event()
    real = store._engine.delete_data
    store._engine.delete_data = lambda i: (release.wait(), real(i))[1]  # type: ignore[method-assign, assignment]
    store.save({"x": 2})

    def in_child() -> bool:
        store._engine.delete_data = real  # type: ignore[method-assign]
        store.verify()
        return bool(store.save({"x": 3}).id)

    assert in_fork(in_child) == 0
    release.set()
    store.close()
    assert Store(tmp_path).load() == {"x": 3}


@pytest.mark.parametrize(
    ("owner", "function"), [(threading.Thread, "start"), (_thread, "start_new_thread")], ids=["first", "any"]
)
def test_no_thread_can_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: Any, function: str) -> None:
    def start(*args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(owner, function, start)
    store = Store(tmp_path, keep_last=1)
    for i in range(3):
        write(store, files={f"{n}.bin": bytes([i]) * 100_000 for n in range(5)})
    assert store.verify() == []
    assert len(list((tmp_path / "data").iterdir())) == 1
    with pytest.raises(ZeroDivisionError):
        Workers(1).submit(lambda: 1 // 0).result()


def test_everything_begun_has_ended_when_a_map_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(2)
    release, ended = threading.Event(), []

    def work(i: int) -> None:
        release.wait()
        ended.append(i)

    results = workers.map(work, range(2))
    real, calls = Job.result, 0

    def interrupted(self: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            release.set()
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Job, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(results)
    assert 0 in ended
    workers.close()


def test_losing_the_race_and_ones_leftovers_to_a_collection_is_no_failure() -> None:
    inner = new_memory()
    backend = FaultyBackend(inner)
    store, other = store_on(backend), store_on(inner, acquire=False)
    first = write(store)

    def another_commits() -> None:
        write(other, "eval")
        raise BackendError("ENOENT: the temporary file is gone")

    backend.plan.append(Fault("put_if_absent", backend.calls["put_if_absent"] + 1, before=another_commits))
    second = write(store)
    assert [c.id for c in store if c.name == "latest"] == [first, second]


def test_acquiring_needs_a_create_if_absent() -> None:
    backend = new_memory()
    backend.capabilities = replace(backend.capabilities, atomic_create=False)
    with pytest.raises(NoAtomicCreate, match="single_writer=1"):
        store_on(backend).acquire()
    assert not list(backend.list(""))


def test_beside_an_owner_nothing_is_written_without_a_create_if_absent() -> None:
    backend = new_memory()
    write(store_on(backend))
    before = dict(objects(backend))
    backend.capabilities = replace(backend.capabilities, atomic_create=False)
    with pytest.raises(NoAtomicCreate, match="single_writer=1"), store_on(backend, acquire=False).transaction() as tx:
        pytest.fail(f"{tx.id} was begun")
    with pytest.raises(NoAtomicCreate, match="single_writer=1"):
        store_on(backend, acquire=False).tag("best", "latest")
    assert objects(backend) == before


def test_a_fenced_job_is_told_so_whatever_its_commit_met() -> None:
    inner = new_memory()
    faulty = FaultyBackend(inner)
    old = store_on(faulty)
    write(old)

    def overtaken() -> None:
        store_on(inner).acquire()
        faulty.plan.append(Fault("get", faulty.calls["get"] + 1, before=BackendError("nor can it be read who took the slot")))
        raise BackendError("no space left")

    faulty.plan.append(Fault("put_if_absent", faulty.calls["put_if_absent"] + 1, before=overtaken))
    with pytest.raises(Fenced) as caught:
        old.tag("best", "latest")
    assert "no space left" in str(caught.value.__cause__)


def test_a_probe_without_an_answer_is_made_again() -> None:
    faulty = FaultyBackend(new_memory(), [Fault("put_if_absent", 1, before=BackendError("not now"))])
    faulty.capabilities = replace(faulty.capabilities, probe=True)
    store = store_on(faulty)
    with pytest.raises(BackendError, match="not now"):
        store.acquire()
    store.acquire()
    assert faulty.calls["put_if_absent"] == 1 + 2 + 1  # then the probe, whose second write is refused, and the record


def test_what_was_never_confirmed_to_be_durable_stays_so() -> None:
    faulty = FaultyBackend(new_memory())
    store = store_on(faulty)
    write(store)
    faulty.plan.append(
        Fault("put_if_absent", faulty.calls["put_if_absent"] + 1, after=Ambiguous("the flush failed", durable=False))
    )
    with pytest.raises(CommitUnknown) as error:
        store.tag("best", "latest")
    with pytest.raises(CommitUnknown, match="save once more") as again:
        store.resolve(error.value.op_id)
    assert (error.value.durable, again.value.durable) == (False, False)
    assert "best" in store


def test_what_was_never_confirmed_and_is_not_there_is_no_longer_unknown() -> None:
    """The power went before it was on the disk, and another commit has its slot."""
    store = store_on(new_memory())
    write(store)
    assert store.resolve("2-abcdef-unconfirmed") is False


def test_an_epoch_belongs_to_one_owner() -> None:
    """As when what others know of a damaged record differs: both would have counted to the same epoch."""
    backend = new_memory()
    write(store_on(backend, owner="a"))
    with store_on(backend, owner="b") as store:
        store._writer.join("b", state_of(backend).epoch)
        with pytest.raises(Fenced, match="a has acquired the store"):
            store.tag("best", "latest")


def test_no_outcome_is_made_up_for_a_record_that_is_gone() -> None:
    backend = new_memory()
    store = store_on(backend, keep_last="all")
    for _ in range(3):
        write(store)
    del objects(backend)[slot_key(2)]
    with pytest.raises(DamagedRecord, match="commit record 2 is not there"):
        store.resolve("2-abcdef")


def test_a_fenced_job_is_told_so_without_asking_again() -> None:
    """For good: whatever happens to the storage, or to the newer job's records, after that."""
    faulty = FaultyBackend(new_memory())
    job = store_on(faulty)
    write(job)
    with store_on(faulty) as newer:
        newer.acquire()
    with pytest.raises(Fenced):
        write(job)
    asked = faulty.calls.copy()
    for _ in range(2):
        with pytest.raises(Fenced, match="stop this job"):
            job.acquire()
        with pytest.raises(Fenced, match="stop this job"), job.transaction() as tx:
            pytest.fail(f"{tx.id} was begun")
    assert faulty.calls == asked


def test_one_hiccup_of_the_disk_does_not_stop_a_job() -> None:
    inner = new_memory()
    write(store_on(inner))
    loose = Unreadable("a cable was loose")
    backend = FaultyBackend(inner, [Fault("get", n, before=loose) for n in (2, 3)])  # it is tried twice
    tool = store_on(backend, acquire=False)
    with pytest.warns(FallbackWarning, match="loose"):
        assert tool.names() == {}
    assert list(tool.names()) == ["latest"]
    write(tool)


@pytest.mark.parametrize("lands", [False, True])
def test_a_single_writers_lost_answer_stays_unknown(lands: bool) -> None:
    inner = new_memory()

    class Claims(Wrapper):
        """A service without a condition, of which every answer about records is lost after the third."""

        writes = 0

        def replace(self, key: str, data: bytes) -> None:
            if "0000" not in key:
                return self.inner.replace(key, data)
            self.writes += 1
            if lands or self.writes <= 2:
                self.inner.replace(key, data)
            if self.writes > 2:
                raise Transient("the answer was lost")

        def get(self, key: str, limit: int) -> bytes:
            if self.writes > 2 and "0000" in key:
                raise Transient("no answer")
            return self.inner.get(key, limit)

        def stat(self, key: str) -> Any:
            if self.writes > 2 and "0000" in key:
                raise Transient("no answer")
            return self.inner.stat(key)

    service = Claims(inner)
    service.capabilities = replace(inner.capabilities, atomic_create=False, remote=True)
    store = store_on(service, single_writer=1, retry_seconds=0)
    write(store)
    with pytest.raises(CommitUnknown):
        write(store)
    ids = {i.key.split("/")[1] for i in inner.list("data/")}
    assert len(ids) == 2
    assert {c.id for c in store_on(inner)} <= ids


def test_a_pickled_store_is_the_same_one_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("runs/42?keep_last=7")
    store.save({"x": 1})
    pickled = pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(pickled)
    assert again.load() == {"x": 1}
    assert again._retention.keep_last == 7


def test_steps_that_are_no_numbers() -> None:
    import torch

    store = store_on(new_memory())
    for step in (torch.tensor(1.5), torch.tensor([1, 2]), "7", 7.0, True, -1, 10**18):
        with pytest.raises(InvalidName, match="whole number"):
            store.save({}, step=step)  # type: ignore[arg-type]
    assert store.save({}, step=torch.tensor(7)).step == 7  # type: ignore[arg-type]
