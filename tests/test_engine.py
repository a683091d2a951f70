"""What a store's parts keep to themselves from one change to the next, and give back when it is closed."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import pytest
from procs import in_fork
from stores import new_memory, objects, state_of, store_on, write

from ckptstore.errors import BackendError, DamagedFile, FallbackWarning
from ckptstore.log import slot_key
from ckptstore.testing import Fault, FaultyBackend


def folders(backend: object) -> set[str]:
    """Return the ids below ``data/``."""
    return {key.split("/")[1] for key in objects(backend) if key.startswith("data/")}  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["always", "error"])
def test_a_damaged_record_is_told_of_once(how: str) -> None:
    backend = new_memory()
    with store_on(backend) as before:
        write(before)
        write(before)
    objects(backend)[slot_key(3)] = b"rubbish"
    store = store_on(backend, acquire=False)
    told = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(how, FallbackWarning)  # type: ignore[arg-type]
        for _ in range(3):
            try:
                assert len(store.checkpoints()) == 1
            except FallbackWarning:
                told += 1
    assert told + len(caught) == 1


def test_what_was_written_here_is_deleted_without_a_listing_also_when_it_takes_two_attempts() -> None:
    backend = new_memory()
    faulty = FaultyBackend(backend)
    with store_on(faulty, keep_last=1) as store:
        write(store)
        listings = faulty.calls["list"]
        faulty.plan.append(Fault("delete", faulty.calls["delete"] + 1, before=BackendError("not now")))
        for _ in range(2):
            new = write(store)
            store._engine.settle()
    assert folders(backend) == {new}
    assert faulty.calls["list"] == listings


def test_a_handler_of_a_signal_that_saves_does_not_wait_for_whom_it_has_interrupted() -> None:
    """The thread that deletes must not want the lock that the handler, which waits for it, has kept from being given back."""
    store = store_on(new_memory(), keep_last=1)
    write(store)
    made: list[str] = []

    def handler() -> None:
        with store._engine._lock:  # where it came
            made.extend(write(store) for _ in range(3))

    thread = threading.Thread(target=handler, daemon=True)
    thread.start()
    thread.join(60)
    assert len(made) == 3, "it waits for ever"
    assert [checkpoint.id for checkpoint in store] == made[-1:]
    store.close()


def test_what_came_late_is_deleted_with_the_next_attempt() -> None:
    """A packet that was on its way when its checkpoint was deleted."""
    backend = new_memory()
    with store_on(backend) as store:
        made = write(store)
        store.delete(made)
        backend.put_if_absent(f"data/{made}/late.bin", b"late")
        store._engine.delete_data(made)
    assert folders(backend) == set()


def test_what_is_off_the_record_is_forgotten() -> None:
    backend = new_memory()
    with store_on(backend, keep_last=1) as store:
        for _ in range(5):
            write(store)
            store._engine.settle()
            assert store._engine.deleted == set(state_of(backend).retired)
        assert len(store._engine.deleted) == 1


def test_what_is_found_again_is_not_written_down_again() -> None:
    backend = new_memory()
    with store_on(backend) as store:
        write(store)
        assert store.verify() == []
        write(store)
        assert store.verify("latest") == []
        write(store)
        state = state_of(backend)
        assert [e.verified for e in state.checkpoints] == [True, None]
        assert store.verify(state.checkpoints[0].id) == []
        assert store._engine.write_down(state).checkpoints is state.checkpoints


def test_gc_deletes_what_it_can_and_then_tells_of_the_first_that_it_could_not() -> None:
    backend = new_memory()
    with store_on(backend) as store:
        store.acquire()
        for checkpoint_id in ("e0-00000000000a", "e0-00000000000b", "e0-00000000000c"):
            backend.put_if_absent(f"data/{checkpoint_id}/a.bin", b"left over")
        refusals = [Fault("delete", n, before=BackendError(f"refusal {n}")) for n in (1, 2)]
        with store_on(FaultyBackend(backend, refusals), acquire=False) as tool:
            with pytest.raises(BackendError, match="refusal 1"):
                tool.gc()
            assert len(folders(backend)) == 2
            assert len(tool.gc().ids) == 2
    assert folders(backend) == set()


def test_what_a_save_of_many_processes_has_left_is_deleted_by_the_next() -> None:
    backend = new_memory()
    faulty = FaultyBackend(backend, [Fault("delete", 1, before=BackendError("not now"))])
    with store_on(faulty) as store:
        engine = store._engine
        ids = {"e1-00000000000a", "e1-00000000000b"}
        for checkpoint_id in ids:
            engine.unfinished.add(checkpoint_id)
            backend.put_if_absent(f"data/{checkpoint_id}/a.bin", b"left over")
            engine.abandon(checkpoint_id)
        assert not engine.unfinished
        engine.delete_abandoned()
        assert len(folders(backend)) == 1  # a later job takes that one


def test_a_fork_waits_for_what_it_has_begun_and_for_nothing_of_its_parent() -> None:
    backend = new_memory()
    store = store_on(backend, keep_last=1)
    release = threading.Event()
    engine = store._engine
    real = engine.delete_data
    engine.delete_data = lambda i: (release.wait(), real(i))[1]  # type: ignore[method-assign, assignment]
    for _ in range(2):
        write(store)
    engine.check_later(lambda: release.wait() and None)

    def damaged() -> None:
        raise DamagedFile("found late")

    def in_child() -> bool:
        engine.raise_late(wait=True)
        release.set()
        engine.committed(state_of(backend))  # what the parent has begun to delete
        engine.settle()
        assert len(folders(backend)) == 1
        engine.check_later(damaged)
        with pytest.raises(DamagedFile, match="found late"):
            store.close()
        return True

    assert in_fork(in_child) == 0
    assert len(folders(backend)) == 2
    release.set()
    store.close()
    assert len(folders(backend)) == 1


@pytest.mark.parametrize(
    ("key", "digest", "made"),
    [(None, "", ""), (None, "blake3", "blake3"), (b"k" * 32, "", "sha256"), (b"k" * 32, "blake3", "blake3")],
)
def test_chunks_get_the_digest_that_was_asked_for_or_that_a_key_needs(key: bytes | None, digest: str, made: str) -> None:
    with store_on(new_memory(), hmac_key=key, digest=digest) as store:
        write(store)
        assert store.checkpoint().manifest.files[0].digest == made


def test_only_for_local_files_without_sha256_one_thread_writes() -> None:
    for remote in (False, True):
        for key in (None, b"k" * 32):
            backend = new_memory()
            backend.capabilities = replace(backend.capabilities, remote=remote, parallel=5)
            with store_on(backend, hmac_key=key) as store:
                assert store._engine.writer.count == (5 if remote or key else 1)
                write(store)
                assert store.verify() == []


def test_closing_gives_back_threads_and_connections() -> None:
    faulty = FaultyBackend(new_memory())
    before = set(threading.enumerate())
    store = store_on(faulty)
    engine = store._engine
    assert engine.writer is not engine.workers
    seen = set[threading.Thread]()
    for crew in (engine.workers, engine.writer, engine._late):
        crew.submit(lambda: seen.add(threading.current_thread())).wait()
    assert len(seen) == 3
    assert faulty.calls["close"] == 0
    store.close()
    assert set(threading.enumerate()) <= before
    assert faulty.calls["close"] == 1


def test_closing_waits_for_checks_and_raises_what_they_find_and_gives_back_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = FaultyBackend(new_memory(), [Fault("close", before=BackendError("it was gone already"))])
    store = store_on(faulty)
    hold = threading.Event()

    def check() -> None:
        hold.wait()
        raise DamagedFile("found late")

    store._engine.check_later(check)
    store._engine.raise_late()  # nothing yet
    for waits in (*store._engine._jobs.checks, store._engine._late):
        name = "close" if waits is store._engine._late else "wait"
        real = getattr(waits, name)
        monkeypatch.setattr(waits, name, lambda real=real: (hold.set(), real())[1])
    with pytest.raises(DamagedFile, match="found late"):
        store.close()
    assert faulty.calls["close"] == 1
    store.close()


def test_what_a_check_has_found_is_raised_once_without_waiting_for_others() -> None:
    hold, over = threading.Event(), threading.Event()

    def check() -> None:
        raise DamagedFile("found late")

    with store_on(new_memory()) as store:
        store._engine.check_later(check)
        store._engine.check_later(lambda: over.set() or (hold.wait() and None))
        over.wait()  # there is one thread for them
        try:
            with pytest.raises(DamagedFile, match="found late"):
                store.load()
            store._engine.raise_late()
        finally:
            hold.set()
