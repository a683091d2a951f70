"""Real damage to real files: found, said, and worked around where something whole is left."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evidence
import pytest
import torch
from stores import state_of, store_on, tree, write

from ckptstore import Checkpoint, Store
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    BackendError,
    CheckpointNotFound,
    Damaged,
    DamagedFile,
    DamagedManifest,
    DamagedRecord,
    FallbackWarning,
    Fenced,
    StoreNotFound,
    Unreadable,
)
from ckptstore.log import slot_key
from ckptstore.record import decode
from ckptstore.testing import Fault, FaultyBackend

RNG = random.Random(7)


def save(store: Store, step: int, name: str = "latest", **more: Any) -> Checkpoint:
    return store.save({"step": torch.tensor(step)}, name, step=step, **more)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two checkpoints, of steps 1 and 2, in records 2 and 3."""
    with Store(tmp_path / "store") as store:
        save(store, 1)
        save(store, 2)
    return tmp_path / "store"


def ids(root: Path) -> list[str]:
    return [c.id for c in Store(root)]


def loaded(root: Path, target: str | None = None) -> int:
    """Return the step in what a process that knows nothing loads."""
    state = Store(root).load(target)
    return int(state["step"])


def falls_back(root: Path, match: str = "falling back to") -> int:
    """Load by name, which must warn, and return the step of what came."""
    with pytest.warns(FallbackWarning, match=match):
        return loaded(root)


@contextmanager
def changed(path: Path, data: bytes) -> Iterator[None]:
    """Have other bytes in a file for the length of the block."""
    before = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(before)


def flipped(data: bytes, bit: int) -> bytes:
    """Return `data` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def some_bits(data: bytes) -> list[int]:
    """Return one bit of every byte."""
    return [8 * i + RNG.randrange(8) for i in range(len(data))]


def all_bits(data: bytes) -> list[int]:
    return list(range(8 * len(data)))


# -- every bit and every length of every file


@pytest.mark.parametrize("bits", [some_bits, pytest.param(all_bits, marks=pytest.mark.soak)])
@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_every_flipped_bit_of_a_checkpoint(root: Path, file: str, bits: Callable[[bytes], list[int]]) -> None:
    newest = ids(root)[-1]
    path = root / "data" / newest / file
    data = path.read_bytes()
    with evidence.experiment("rot: a flipped bit") as tally:
        for i, bit in enumerate(bits(data)):
            tally.strike()
            with changed(path, flipped(data, bit)):
                assert falls_back(root) == 1
                if i % 8 == 0:
                    with pytest.raises(Damaged):
                        loaded(root, newest)
                    found = Store(root).verify()
                    assert [(d.id, d.path) for d in found] == [(newest, "" if file == "manifest.json" else file)]
        assert loaded(root) == 2


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_every_shorter_and_some_longer_lengths_of_a_checkpoint(root: Path, file: str) -> None:
    newest = ids(root)[-1]
    path = root / "data" / newest / file
    data = path.read_bytes()
    with evidence.experiment("rot: a file of another length") as tally:
        for i, other in enumerate((data + b"\0", data + b"\n", data * 2, *(data[:n] for n in range(len(data))))):
            tally.strike()
            with changed(path, other):
                with pytest.raises(Damaged):
                    loaded(root, newest)
                if i % 8 == 0:
                    assert falls_back(root) == 1
                    assert [d.id for d in Store(root).verify()] == [newest]
        assert loaded(root) == 2


def damaged_versions(data: bytes) -> Iterator[bytes]:
    """Yield `data` with every bit flipped in turn, in every shorter length, and in a few longer ones."""
    yield from (flipped(data, bit) for bit in all_bits(data))
    yield from (data[:n] for n in range(len(data)))
    yield from (data + b"\0", data + b"\n", data * 2)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_every_damage_to_the_newest_record(root: Path, every: int) -> None:
    """All of it is found. Of each store with such a record (one in `every`) the record before serves, loudly, and nobody but the next
    owner may build on it."""
    path = root / slot_key(3)
    with evidence.experiment("rot: a damaged record") as tally:
        for i, data in enumerate(damaged_versions(path.read_bytes())):
            tally.strike()
            with pytest.raises(DamagedRecord):
                decode(data, 3)
            if i % every:
                continue
            with changed(path, data):
                with pytest.warns(FallbackWarning, match="commit record 3 is damaged.*using commit record 2"):
                    assert Store(root).checkpoint().step == 1
                if i % (20 * every) == 0:
                    with pytest.warns(FallbackWarning):
                        assert loaded(root) == 1
                    assert "commit record 3" in Store(root).verify()[0].reason
                    for call in (Store.gc, Store.prune, lambda s: s.tag("x", "latest"), lambda s: write(s)):
                        with pytest.raises(DamagedRecord), warnings.catch_warnings():
                            warnings.simplefilter("ignore", FallbackWarning)
                            call(Store(root, acquire=False))
        assert loaded(root) == 2


@pytest.mark.parametrize("n", [1, 2])
def test_every_damage_to_an_older_record(root: Path, n: int) -> None:
    """Nothing needs it while a newer one is whole, but it is found."""
    path = root / slot_key(n)
    for i, data in enumerate(damaged_versions(path.read_bytes())):
        with pytest.raises(DamagedRecord):
            decode(data, n)
        if i % 10 == 0:
            with changed(path, data):
                assert Store(root).checkpoint().step == 2
                [found] = Store(root).verify()
                assert f"commit record {n} " in found.reason
    path.unlink()
    assert loaded(root) == 2
    assert Store(root).verify()[0].id == ""


# -- falling back


def test_falls_back_only_to_what_was_saved_under_that_name(tmp_path: Path) -> None:
    store = Store(tmp_path, keep_last=4)
    save(store, 1)
    save(store, 2)
    save(store, 3, "other")
    newest = save(store, 4)
    store.tag("best", newest)
    for checkpoint in (newest, store.checkpoint(step=2)):
        (tmp_path / "data" / checkpoint.id / "state.pt").write_bytes(b"")
    with pytest.warns(FallbackWarning) as told:
        assert loaded(tmp_path) == 1
    assert [str(w.message).split("falling back to ")[1].split()[0] for w in told] == [
        store.checkpoint(step=step).id for step in (2, 1)
    ]
    for target in (newest.id, "best"):
        with pytest.raises(DamagedFile):
            loaded(tmp_path, target)
    with pytest.raises(DamagedFile):
        Store(tmp_path).load(step=4)
    assert loaded(tmp_path, "other") == 3


def test_resumes_from_the_newest_whole_one_and_keeps_it(root: Path) -> None:
    newest = ids(root)[-1]
    (root / "data" / newest / "manifest.json").unlink()
    state = {"step": torch.tensor(0)}
    job = Store(root, keep_last=1)
    with pytest.warns(FallbackWarning):
        resumed = job.resume(state)
    assert resumed is not None
    assert state["step"].item() == resumed.step == 1
    save(job, 3)
    save(job, 4)
    assert {c.step for c in job} == {1, 4}


def test_nothing_whole_left(root: Path) -> None:
    for path in (root / "data").glob("*/state.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(FallbackWarning), pytest.raises(DamagedFile):
        loaded(root)
    before = tree(root / "data")
    with pytest.warns(FallbackWarning), pytest.raises(DamagedFile):
        Store(root).resume({"step": 0})
    assert tree(root / "data") == before


# -- the newest record is damaged: what becomes of what it named


def spoil(path: Path) -> None:
    path.write_bytes(flipped(path.read_bytes(), 8 * 100))


def test_data_of_a_damaged_record_is_spared_and_can_be_brought_back(root: Path) -> None:
    old, lost = ids(root)
    spoil(root / slot_key(3))
    store = Store(root, keep_last=1)
    state = {"step": torch.tensor(0)}
    with pytest.warns(FallbackWarning):
        resumed = store.resume(state)
    assert resumed is not None
    assert resumed.id == old
    garbage = store.gc()
    assert garbage.spared == (lost,)
    for step in range(3, 20):
        save(store, step)
    assert store.gc().spared == (lost,)
    assert lost not in store
    rescued = store.tag("rescued", lost)
    assert (rescued.id, rescued.step) == (lost, 2)
    assert loaded(root, "rescued") == 2
    assert store.gc().spared == ()
    save(store, 20)
    assert loaded(root) == 20
    assert loaded(root, lost) == 2
    assert store.verify() == []


def test_only_data_that_a_damaged_record_may_have_named_is_spared(root: Path) -> None:
    _, lost = ids(root)
    stranger = root / "data" / "a stranger's" / "file"
    stranger.parent.mkdir()
    stranger.write_bytes(b"x")
    spoil(root / slot_key(3))
    with pytest.warns(FallbackWarning, match=rf"record 3 is damaged.* It may have named {lost}, kept"):
        Store(root).acquire()
    assert state_of(LocalBackend(str(root))).spared == (lost,)
    assert stranger.exists()


def test_a_first_acquisition_spares_nothing_of_those_that_never_acquire(tmp_path: Path) -> None:
    """What they leave behind in epoch 0 was of no record."""
    left, acquired = (tmp_path / "data" / checkpoint_id / "x" for checkpoint_id in ("e0-0123456789ab", "e1-0123456789ab"))
    for file in (left, acquired):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    Store(tmp_path).acquire()
    assert state_of(LocalBackend(str(tmp_path))).spared == (acquired.parent.name,)


def test_data_of_a_damaged_record_is_spared_also_where_nobody_had_acquired(tmp_path: Path) -> None:
    with Store(tmp_path, acquire=False) as tool:
        save(tool, 1)
        lost = save(tool, 2).id
    spoil(tmp_path / slot_key(2))
    store = Store(tmp_path)
    with pytest.warns(FallbackWarning, match=f"named {lost}, kept"):
        store.acquire()
    store.gc()
    assert store.tag("rescued", lost).step == 2


def test_beside_a_damaged_record_nothing_is_begun(root: Path) -> None:
    """A writer that does not acquire could not commit, so it need not write its data first."""
    spoil(root / slot_key(3))
    before = tree(root)
    with pytest.raises(DamagedRecord, match="Nothing was changed"), Store(root, acquire=False).transaction() as tx:
        pytest.fail(f"{tx.id} was begun")
    assert tree(root) == before


def test_spared_data_that_is_damaged_too_is_not_brought_back(root: Path) -> None:
    lost = ids(root)[-1]
    spoil(root / slot_key(3))
    store = Store(root)
    with pytest.warns(FallbackWarning, match=lost):
        store.acquire()
    spoil(root / "data" / lost / "state.pt")
    with pytest.raises(Damaged, match=r"state\.pt"):
        store.tag("rescued", lost)
    assert "rescued" not in store
    (root / "data" / lost / "manifest.json").unlink()
    with pytest.raises(DamagedManifest):
        store.tag("rescued", lost)
    store.delete(lost)
    store.gc()
    assert not (root / "data" / lost).exists()


def test_whoever_wrote_the_damaged_record_is_fenced(root: Path) -> None:
    """It was an acquisition, and its writer knows no other than that it owns the store."""
    newest = Store(root)
    save(newest, 3)
    for n in (4, 5):  # its acquisition and its save
        spoil(root / slot_key(n))
    job = Store(root)
    with pytest.warns(FallbackWarning, match="record 5 is damaged.*going on from commit record 3"):
        job.acquire()
    assert save(job, 9).id.startswith("e4-")  # 1 was whole, and 2 and 3 may have been used in what is damaged
    for call in (lambda: save(newest, 10), lambda: newest.tag("x", "latest"), newest.prune):
        with pytest.raises(Fenced):
            call()
    assert loaded(root) == 9


def test_a_damaged_record_is_passed_over_by_another_process_of_the_same_owner(tmp_path: Path) -> None:
    """It need not acquire what it owns, but could not save behind that record."""
    with Store(tmp_path, owner="launch") as first:
        save(first, 1)
        save(first, 2)
    spoil(tmp_path / slot_key(3))
    with Store(tmp_path, owner="launch") as again:
        with pytest.warns(FallbackWarning, match="record 3 is damaged.*going on from commit record 2"):
            again.acquire()
        save(again, 3)
    assert loaded(tmp_path) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_every_record_of_a_young_store_is_damaged(tmp_path: Path, count: int) -> None:
    store = Store(tmp_path)
    for step in range(1, count):
        save(store, step)
    store.acquire()
    saved = ids(tmp_path)
    for n in range(1, count + 1):
        spoil(tmp_path / slot_key(n))
    data = tree(tmp_path / "data")
    with pytest.warns(FallbackWarning), pytest.raises(CheckpointNotFound):
        loaded(tmp_path)
    with pytest.raises(DamagedRecord):
        Store(tmp_path, acquire=False).gc()
    with pytest.warns(FallbackWarning, match="|".join(saved)):
        Store(tmp_path).acquire()
    for _ in range(2):  # it stays so until somebody decides
        job = Store(tmp_path)
        if saved:
            with pytest.raises(DamagedRecord, match=saved[-1]):
                job.resume({"step": 0})
        else:
            assert job.resume({"step": 0}) is None
    job.gc()
    assert tree(tmp_path / "data") == data
    for found in saved:
        job.tag(f"rescued-{found}", found)
    save(job, 100)
    assert {c.step for c in job} == {*range(1, count), 100}


def test_no_record_that_is_kept_whole_can_be_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for step in range(20):
        save(store, step)
    for path in (tmp_path / "log").glob("0*"):
        spoil(path)
    before = tree(tmp_path)
    calls: list[Callable[[Store], object]] = [
        lambda s: s.load(),
        lambda s: s.resume({"step": 0}),
        lambda s: s.acquire(),
        lambda s: save(s, 99),
        lambda s: s.gc(),
        lambda s: s.verify(),
    ]
    for call in calls:
        with pytest.raises(DamagedRecord, match="none of the newest"):
            call(Store(tmp_path))
    assert tree(tmp_path) == before


def test_a_record_the_disk_cannot_read_is_a_damaged_one(root: Path) -> None:
    dying = Unreadable(5, "the disk is dying")
    backend = FaultyBackend(LocalBackend.open(str(root), {}), [Fault("get", n, before=dying) for n in (2, 3)])
    with pytest.warns(FallbackWarning, match="the disk is dying"):
        assert store_on(backend, acquire=False).checkpoint().step == 1


def test_a_record_passed_over_because_the_disk_could_not_read_it_may_come_back(root: Path) -> None:
    dying = Unreadable(5, "the disk is dying")
    backend = FaultyBackend(LocalBackend.open(str(root), {}), [Fault("get", n, before=dying) for n in (2, 3)])
    job = store_on(backend)
    with pytest.warns(FallbackWarning, match="the disk is dying; going on"):
        job.acquire()
    assert [c.step for c in Store(root)] == [1]  # as the newest record has it, without a warning
    save(job, 3)
    assert loaded(root) == 3


# -- files that are missing, or another's


@pytest.mark.parametrize("file", ["state.pt", "manifest.json"])
def test_two_checkpoints_swap_files(root: Path, file: str) -> None:
    old, new = (root / "data" / i / file for i in ids(root))
    os.rename(old, root / "aside")
    os.rename(new, old)
    os.rename(root / "aside", new)
    assert [d.id for d in Store(root).verify()] == ids(root)
    for target in ids(root):
        with pytest.raises(Damaged):
            loaded(root, target)
    with pytest.warns(FallbackWarning), pytest.raises(Damaged):
        loaded(root)


def test_a_checkpoint_is_gone(root: Path) -> None:
    newest = ids(root)[-1]
    shutil.rmtree(root / "data" / newest)
    assert falls_back(root, "the manifest of .* is missing") == 1
    with pytest.raises(DamagedManifest):
        loaded(root, newest)
    assert save(Store(root), 3).step == 3


def test_all_data_is_gone(root: Path) -> None:
    shutil.rmtree(root / "data")
    with pytest.warns(FallbackWarning), pytest.raises(DamagedManifest):
        loaded(root)
    with pytest.warns(FallbackWarning), pytest.raises(DamagedManifest):
        Store(root).resume({"step": 0})
    assert len(Store(root).verify()) == 2


def test_the_whole_log_is_gone(root: Path) -> None:
    """Nothing is taken for a fresh start, nothing for garbage."""
    saved = ids(root)
    shutil.rmtree(root / "log")
    before = tree(root)
    with pytest.raises(StoreNotFound):
        loaded(root)
    for _ in range(3):  # each a job of its own
        job = Store(root)
        with pytest.raises(DamagedRecord, match=saved[1]):
            job.resume({"step": 0})
        job.gc()
    assert {path: data for path, data in tree(root).items() if path in before} == {
        k: v for k, v in before.items() if "log" not in k
    }
    job.tag("latest", saved[1])
    assert loaded(root) == 2


@pytest.mark.parametrize("file", ["state.pt", "a.bin"])
def test_one_of_several_files_is_damaged(tmp_path: Path, file: str) -> None:
    store = Store(tmp_path)
    for step in (1, 2):
        with store.transaction(step=step) as tx:
            tx.save({"step": torch.tensor(step)})
            with tx.open("a.bin") as out:
                out.write(bytes(range(256)))
    newest = store.checkpoint()
    spoil(tmp_path / "data" / newest.id / file)
    [found] = Store(tmp_path).verify()
    assert (found.id, found.path) == (newest.id, file)
    [(start, stop)] = found.ranges
    assert start <= 100 < stop
    with pytest.raises(DamagedFile) as caught, newest.open(file) as source:
        source.read()
    assert (caught.value.path, caught.value.ranges) == (file, found.ranges)
    with pytest.raises(DamagedFile):
        newest.download(tmp_path / "out")
    assert not (tmp_path / "out" / file).exists()
    if file == "a.bin":
        assert loaded(tmp_path) == 2  # what was asked for is whole


# -- records that are missing, in the wrong place, or another store's


def test_records_in_each_others_place(root: Path) -> None:
    os.replace(root / slot_key(3), root / "aside")
    os.replace(root / slot_key(2), root / slot_key(3))
    os.replace(root / "aside", root / slot_key(2))
    with pytest.warns(FallbackWarning, match="another slot"), pytest.raises(CheckpointNotFound):
        loaded(root)
    with pytest.raises(DamagedRecord):
        Store(root, acquire=False).gc()
    job = Store(root)
    with pytest.warns(FallbackWarning):
        job.acquire()
    assert {c[:2] for c in job.gc().spared} == {"e1"}
    assert len(list((root / "data").iterdir())) == 2


@pytest.mark.parametrize("n", [2, 3])
def test_a_record_of_another_store(root: Path, tmp_path: Path, n: int) -> None:
    with Store(tmp_path / "other") as other:
        for step in (11, 12, 13):
            save(other, step)
    shutil.copy(tmp_path / "other" / slot_key(n), root / slot_key(n))
    if n == 2:  # an old one: nothing is built on it
        assert loaded(root) == 2
        return
    with pytest.warns(FallbackWarning, match="another store"):
        assert loaded(root) == 1
    with pytest.raises(DamagedRecord):
        Store(root, acquire=False).gc()
    job = Store(root)
    with pytest.warns(FallbackWarning):
        save(job, 4)
    job.gc()
    assert len(list((root / "data").iterdir())) == 3
    assert {c.step for c in Store(root)} == {1, 4}


@pytest.mark.parametrize("newest", [4, 5, 16, 30])
def test_any_one_record_is_removed(tmp_path: Path, newest: int) -> None:
    with Store(tmp_path / "full") as store:
        for step in range(2, newest + 1):  # record `step` commits this step
            write(store, step=step)
    for n in range(1, newest):
        shutil.copytree(tmp_path / "full", tmp_path / "holed")
        (tmp_path / "holed" / slot_key(n)).unlink()
        assert Store(tmp_path / "holed").checkpoint().step == newest
        with Store(tmp_path / "holed") as job:
            write(job, step=100)
            assert job.checkpoint().step == Store(tmp_path / "holed").checkpoint().step == 100
        shutil.rmtree(tmp_path / "holed")


@pytest.mark.parametrize(
    "hint",
    [
        None,
        b"",
        b"garbage",
        b"\xff\xfe",
        b"-3",
        b"0",
        b"1",
        b"2",
        b"40",
        b"9" * 19,
        b"9" * 100,
        b"1e1",
        b"0x3",
        "٣".encode(),
        b" 3\n",
    ],
)
def test_whatever_the_hint_says(root: Path, hint: bytes | None) -> None:
    path = root / "log" / "hint"
    if hint is not None:
        path.write_bytes(hint)
    assert loaded(root) == 2
    assert save(Store(root), 3).step == 3
    assert loaded(root) == 3


@pytest.mark.parametrize("kind", ["folder", "link", "fifo"])
def test_something_else_in_the_hints_place(root: Path, kind: str) -> None:
    plant(root / "log" / "hint", kind, root.parent)
    store = Store(root)
    for step in range(3, 35):
        write(store, step=step)
    assert Store(root).checkpoint().step == 34


# -- links and other things planted in the store


def plant(path: Path, kind: str, outside: Path) -> None:
    """Put something in the place of a file or folder, which is moved outside."""
    if path.exists():
        os.rename(path, outside / "moved")
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(outside / "moved")
        case "passwd":
            path.symlink_to("/etc/passwd")
        case "dangling":
            path.symlink_to(outside / "nowhere")
        case "loop":
            path.symlink_to(path)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link", "passwd", "dangling", "loop"])
@pytest.mark.parametrize("where", ["data/{}/state.pt", "data/{}/manifest.json", "data/{}"])
def test_something_else_in_the_place_of_data(root: Path, where: str, kind: str) -> None:
    """What stood there is never reached through it, and the next owner's collection goes no further than the store."""
    newest = ids(root)[-1]
    outside = root.parent / "outside"
    outside.mkdir()
    plant(root / where.format(newest), kind, outside)
    moved = tree(outside)
    assert falls_back(root) == 1
    with pytest.raises(Damaged):
        loaded(root, newest)
    [found] = Store(root).verify()
    assert found.id == newest
    job = Store(root, keep_last=1)
    with pytest.warns(FallbackWarning):
        assert job.resume({"step": 0}) is not None
    save(job, 3)
    job.delete(newest) if newest in job else None
    job.gc()
    assert loaded(root) == 3
    assert tree(outside) == moved
    assert os.path.exists("/etc/passwd")


@pytest.mark.parametrize("kind", ["fifo", "link", "passwd", "dangling"])
@pytest.mark.parametrize("where", ["log", "data", slot_key(3)])
def test_something_else_in_the_place_of_what_carries_the_store(root: Path, where: str, kind: str) -> None:
    outside = root.parent / "outside"
    outside.mkdir()
    plant(root / where, kind, outside)
    before = tree(root.parent)
    calls: list[Callable[[Store], object]] = [
        lambda s: s.load(),
        lambda s: s.resume({"step": 0}),
        lambda s: save(s, 3),
        lambda s: s.gc(),
    ]
    for call in calls:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            with pytest.raises((BackendError, Damaged)):
                call(Store(root))
    after = tree(root.parent)
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[1] for path in after.keys() - before.keys()} <= {"log"}


def test_litter_of_strangers_is_left_alone_and_told(root: Path) -> None:
    (root / "notes.txt").write_text("mine")
    (root / "data" / "stranger").mkdir()
    (root / "data" / "stranger" / "file").write_text("mine")
    (root / "log" / "README").write_text("mine")
    job = Store(root)
    save(job, 3)
    assert job.gc().foreign == ("stranger",)
    assert loaded(root) == 3
    assert {k for k, v in tree(root).items() if v == b"mine"} == {"notes.txt", "data/stranger/file", "log/README"}
