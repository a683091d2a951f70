"""A transaction step by step: what each is for, and what is left when it fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import contents, new_memory, objects, state_of, store_on, write

from ckptstore.backends.memory import MemoryBackend
from ckptstore.errors import BackendError, Fenced, InvalidName, UsageError
from ckptstore.files import Files
from ckptstore.protocol import PartWriter
from ckptstore.testing import Fault, FaultyBackend
from ckptstore.wrapper import Wrapper


def data(backend: MemoryBackend) -> set[str]:
    """Return the keys below ``data/``."""
    return {key for key in objects(backend) if key.startswith("data/")}


def test_it_begins_when_what_was_retired_before_is_gone() -> None:
    backend = new_memory()
    with store_on(backend, keep_last=1) as store:
        write(store)
        real, deleted = store._engine.settle, list[set[str]]()
        write(store)
        store._engine.settle = lambda: (real(), deleted.append(data(backend)))[1]  # type: ignore[func-returns-value, method-assign]
        with store.transaction() as tx:
            assert len(deleted) == 1 and len({key.split("/")[1] for key in deleted[0]}) == 1
        assert deleted[0] < data(backend)
        assert tx.checkpoint.id in {key.split("/")[1] for key in data(backend)}


def test_who_watches_is_asked_before_each_write_and_when_all_but_the_record_is_there() -> None:
    backend = new_memory()
    seen = list[Any]()
    with store_on(backend) as store:
        tx = store.transaction()
        tx.watch(lambda: seen.append("write"), lambda: seen.append((data(backend), state_of(backend).checkpoints.ids())))
        with tx, tx.open("a.bin") as file:
            file.write(b"one")
            file.write(b"two")
    keys = {f"data/{tx.id}/a.bin", f"data/{tx.id}/manifest.json"}
    assert seen == ["write", "write", (keys, set())]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), BackendError("no space left")], ids=["interrupt", "error"])
def test_when_a_file_does_not_become_durable_nothing_is_left(stop: BaseException) -> None:
    backend = new_memory()
    faulty = FaultyBackend(backend, [Fault("writer.finish", 2, before=stop)])
    with store_on(faulty) as store:
        with pytest.raises(type(stop)):
            write(store, files={"a.bin": b"a", "b.bin": b"b"})
        assert data(backend) == set()
        assert faulty.calls["writer.abort"] >= 1
        kept = write(store)
        assert [c.id for c in store] == [kept]


def test_when_the_record_is_refused_nothing_is_left() -> None:
    backend = new_memory()
    faulty = FaultyBackend(backend)
    with store_on(faulty) as store:
        first = write(store)
        faulty.plan.append(Fault("put_if_absent", faulty.calls["put_if_absent"] + 1, before=BackendError("no space left")))
        with pytest.raises(BackendError, match="no space left"):
            write(store)
        assert {key.split("/")[1] for key in data(backend)} == {first}


def test_what_is_half_written_is_dropped_when_the_block_is_left_by_an_exception() -> None:
    faulty = FaultyBackend(new_memory())
    with store_on(faulty) as store:
        with pytest.raises(ZeroDivisionError), store.transaction() as tx:
            tx.open("a.bin").write(b"half of it")
            assert 1 // 0
        assert faulty.calls["writer.abort"] == 1
        assert faulty.calls["writer.finish"] == 0


def test_a_job_that_was_overtaken_is_told_so_whatever_its_files_met() -> None:
    backend = new_memory()
    with store_on(backend) as newer:

        def overtaken() -> None:
            newer.acquire()
            raise BackendError("the folder is gone")

        with store_on(FaultyBackend(backend, [Fault("writer.finish", before=overtaken)])) as old:
            with pytest.raises(Fenced) as caught:
                write(old)
            assert "the folder is gone" in str(caught.value.__cause__)


def test_what_is_committed_is_known_even_if_something_comes_in_between_after_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(record: Any) -> None:
        raise KeyboardInterrupt

    with store_on(new_memory()) as store:
        monkeypatch.setattr(store._engine, "committed", interrupt)
        tx = store.transaction()
        with pytest.raises(KeyboardInterrupt), tx:
            pass
        assert tx.checkpoint.id == tx.id == store.checkpoint().id


# --- files of other processes


def written_elsewhere(files: Files, path: str, content: bytes) -> None:
    with files.open(path) as file:
        file.write(content)
    files.finish()


def test_files_that_other_processes_have_written_belong_to_it() -> None:
    with store_on(new_memory()) as store:
        with store.transaction() as tx:
            files = Files(store._engine, tx.id)
            written_elsewhere(files, "shard.pt", b"of rank 1")
            tx.adopt(files.entries, {"shard.pt": ["builtins.set"]})
        assert contents(store, tx.id) == {"shard.pt": b"of rank 1"}
        assert store.checkpoint().manifest.unsafe == {"shard.pt": ["builtins.set"]}


def test_a_file_that_is_not_taken_in_leaves_no_word_about_its_classes() -> None:
    with store_on(new_memory()) as store:
        with store.transaction() as tx:
            files = Files(store._engine, tx.id)
            written_elsewhere(files, "shard.pt", b"of rank 1")
            tx.adopt(files.entries, {})
            with pytest.raises(InvalidName, match="already"):
                tx.adopt(files.entries, {"shard.pt": ["builtins.set"]})
        assert store.checkpoint().manifest.unsafe == {}


class _Sums(Wrapper):
    """A service that tells, when an object is complete, which checksum it has recorded."""

    def open_writer(self, key: str) -> PartWriter:
        writer = self.inner.open_writer(key)
        finish = writer.finish
        writer.finish = lambda: (finish(), f"SUM:{key.split('/')[-1]}")[1]  # type: ignore[method-assign]
        return writer


def test_the_manifest_has_the_checksums_of_the_service() -> None:
    service = _Sums(new_memory())
    service.capabilities = replace(service.capabilities, remote=True)
    with store_on(service) as store:
        write(store, files={"a.bin": b"a", "b.bin": b"b"})
        assert [f.remote for f in store.checkpoint().manifest.files] == ["SUM:a.bin", "SUM:b.bin"]


# --- files from elsewhere


@pytest.mark.parametrize(
    ("make", "match"), [(os.mkfifo, "not a regular file"), (Path.mkdir, "not a regular file")], ids=["fifo", "folder"]
)
def test_what_is_no_file_is_refused_and_closed(tmp_path: Path, make: Callable[[Path], None], match: str) -> None:
    make(tmp_path / "odd")
    with store_on(new_memory()) as store, store.transaction() as tx:
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(UsageError, match=match):
            tx.add_file("x", tmp_path / "odd")
        assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("source", ["a\0b", Path("a\0b")])
def test_a_path_with_nul_is_refused(source: Any) -> None:
    with store_on(new_memory()) as store, store.transaction() as tx, pytest.raises(UsageError, match="contains NUL"):
        tx.add_file("x", source)


def test_a_tree_is_added_in_the_order_of_its_names(tmp_path: Path) -> None:
    """On any file system: two checkpoints of the same tree are the same."""
    for i in (5, 2, 9, 0, 7, 3, 8, 1, 6, 4):
        (tmp_path / f"folder{i}").mkdir()
        for j in (1, 2, 0):
            (tmp_path / f"folder{i}" / f"{j}").write_bytes(b"")
    with store_on(new_memory()) as store:
        with store.transaction() as tx:
            tx.add_tree(tmp_path)
        assert [f.path for f in store.checkpoint().manifest.files] == [f"folder{i}/{j}" for i in range(10) for j in range(3)]
