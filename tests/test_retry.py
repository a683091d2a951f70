"""Storage behind a network: repeating, slowing down, few requests, and trying out what a service claims."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from stores import new_memory, store_on, write

from ckptstore import Store, retry
from ckptstore.errors import (
    AlreadyExists,
    Ambiguous,
    BackendError,
    NoAtomicCreate,
    NotFound,
    PermissionDenied,
    Throttled,
    Transient,
)
from ckptstore.log import Log
from ckptstore.protocol import Backend, ObjectInfo
from ckptstore.retry import Persistent
from ckptstore.testing import Fault, FaultyBackend
from ckptstore.wrapper import SingleWriter, Wrapper


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    monkeypatch.setattr(retry, "_LONGEST_WAIT", 0.0)


def far_away(inner: Backend, **more: Any) -> FaultyBackend:
    """Return `inner` with the capabilities of a service."""
    backend = FaultyBackend(inner)
    backend.capabilities = replace(inner.capabilities, remote=True, **more)
    return backend


LOST = Transient("the answer was lost")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["get", "read_into", "stat", "list", "delete", "replace", "open_writer", "writer.write"])
def test_what_may_be_repeated_is(method: str, when: str) -> None:
    backend = far_away(new_memory())
    store = store_on(backend)
    write(store)
    backend.plan += [Fault(method, backend.calls[method] + i, **{when: LOST}) for i in (1, 2)]
    for _ in range(3):
        write(store)
    assert store.verify() == []
    assert store.gc().keys == ()
    assert backend.calls[method] > 2
    assert len(store.checkpoints()) == 2


def test_not_for_longer_than_allowed() -> None:
    backend = far_away(new_memory())
    backend.plan.append(Fault("get", 0, before=LOST))
    for seconds in (0, 0.05):
        with pytest.raises(Transient):
            Persistent(backend, seconds).get("x", 10)
    assert backend.calls["get"] > 2
    once = far_away(new_memory())
    once.plan.append(Fault("stat", 0, before=LOST))
    with pytest.raises(Transient):
        Persistent(once, 0).stat("x")
    assert once.calls["stat"] == 1


def test_errors_that_will_not_pass_are_raised_at_once() -> None:
    backend = far_away(new_memory())
    backend.plan.append(Fault("get", 0, before=BackendError("no such bucket")))
    with pytest.raises(BackendError, match="bucket"):
        Persistent(backend, 100).get("x", 10)
    assert backend.calls["get"] == 1


@pytest.mark.parametrize("broken_at", [0, 1, 2, 3])
def test_a_listing_that_breaks_off_goes_on(broken_at: int) -> None:
    class Breaking(Wrapper):
        left = 1

        def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
            for i, info in enumerate(self.inner.list(prefix, start_after)):
                if i == broken_at and self.left:
                    self.left -= 1
                    raise LOST
                yield info

    inner = new_memory()
    for i in range(4):
        inner.put_if_absent(f"data/{i}", b"x")
    assert [i.key for i in Persistent(Breaking(inner), 10).list("data/")] == [f"data/{i}" for i in range(4)]


def test_a_listing_error_is_no_empty_listing() -> None:
    inner = new_memory()
    inner.put_if_absent("data/1", b"x")
    backend = far_away(inner)
    backend.plan.append(Fault("list", 0, before=LOST))
    with pytest.raises(Transient):
        list(Persistent(backend, 0).list("data/"))


@pytest.mark.parametrize("error", [Transient("nothing listens there"), Throttled("503"), Ambiguous("the answer was lost")])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_outlives_a_few_lost_answers(error: BackendError, when: str) -> None:
    if when == "after" and not isinstance(error, Ambiguous):
        pytest.skip("after it took effect, it is ambiguous")
    inner = new_memory()
    backend = far_away(inner)
    store = store_on(backend)
    write(store)
    n = backend.calls["put_if_absent"]
    backend.plan += [Fault("put_if_absent", n + i, **{when: error}) for i in (1, 2, 3)]
    written = write(store)
    assert [c.id for c in store_on(inner)][-1] == written
    assert len([i for i in inner.list("log/") if i.key != "log/hint"]) == 3


def test_a_commit_that_never_got_there_is_told_so_and_its_data_goes() -> None:
    inner = new_memory()
    backend = far_away(inner)
    store = store_on(backend, retry_seconds=0.05)
    kept = write(store)
    backend.plan.append(Fault("put_if_absent", 0, before=Transient("nothing listens there")))
    with pytest.raises(Transient):
        write(store)
    assert {i.key.split("/")[1] for i in inner.list("data/")} == {kept}


def test_complaints_halve_what_is_under_way_and_calm_brings_it_back() -> None:
    gate = retry._Gate(32)

    def complain(at_once: int, about: int) -> None:
        """Have so many requests under way, and the service complain about the last few."""
        with ExitStack() as under_way:
            for _ in range(at_once - about):
                under_way.enter_context(gate.passed())
            with pytest.raises(Throttled):
                _all_throttled(gate, about)

    for at_once, about, left in ((8, 1, 4), (4, 4, 2), (2, 1, 1), (1, 1, 1)):
        complain(at_once, about)
        assert gate._limit == left
    for _ in range(retry._CALM):
        with gate.passed():
            pass
    assert gate._limit == 2
    for _ in range(40 * retry._CALM):
        with gate.passed():
            pass
    assert gate._limit == 32


def _all_throttled(gate: retry._Gate, count: int) -> None:
    with gate.passed():
        if count > 1:
            _all_throttled(gate, count - 1)
        raise Throttled("slow down")


def test_no_more_than_the_gate_allows_are_under_way() -> None:
    gate = retry._Gate(2)
    seen: list[int] = []
    enter = threading.Barrier(6)

    def work() -> None:
        enter.wait()
        for _ in range(50):
            with gate.passed():
                seen.append(len(gate._under_way))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 300
    assert max(seen) <= 2
    assert not gate._under_way


# -- few requests


def requests(backend: FaultyBackend) -> dict[str, int]:
    """Return what was asked since the last time, and begin anew."""
    no_request = ("list.item", "open_writer", "writer.write", "writer.start_finish", "writer.abort")
    made = {k: v for k, v in backend.calls.items() if v and k not in no_request}
    backend.calls.clear()
    return made


@pytest.mark.parametrize("saves", [1, 2, 9, 40])
def test_a_small_save_takes_five_requests_and_finding_the_newest_three(saves: int) -> None:
    inner = new_memory()
    backend = far_away(inner)
    store = store_on(backend)
    for _ in range(saves):
        write(store)
        store._engine.settle()
    requests(backend)
    write(store)
    store._engine.settle()
    made = requests(backend)
    assert made == {"writer.finish": 2, "put_if_absent": 1, "replace": 1, **({"delete": 1} if saves > 1 else {})}
    reader = far_away(inner)
    assert Log(reader).head().slot == saves + 2
    assert sum(requests(reader).values()) == 3


@pytest.mark.parametrize("hint", [None, b"", b"1", b"3 nonsense", b"9", b"10 " + b"0" * 64, b"999", b"x" * 200])
def test_no_hint_leads_astray(hint: bytes | None) -> None:
    inner = new_memory()
    store = store_on(far_away(inner))
    for _ in range(9):
        write(store)
    inner.delete(["log/hint"])
    if hint is not None:
        inner.replace("log/hint", hint)
    assert Log(far_away(inner)).head() == Log(inner).head()


def test_a_listing_that_lags_is_put_right_by_the_next_commit() -> None:
    inner = new_memory()
    old = store_on(inner)
    write(old)
    stale = [*inner.list("log/")]

    class Lagging(Wrapper):
        def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
            return (i for i in stale if i.key > start_after)

    for _ in range(5):
        write(old)
    newer = store_on(Lagging(far_away(inner)))
    saved = write(newer)
    assert [c.id for c in store_on(inner)][-1] == saved


# -- claims are tried out


class Overwriting(Wrapper):
    """A service that ignores the condition."""

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        self.inner.replace(key, data)


def test_a_service_that_ignores_the_condition_is_refused_before_anything_is_written() -> None:
    inner = new_memory()
    for call in (Store.acquire, write, lambda s: s.resume({"x": 1})):
        with pytest.raises(NoAtomicCreate, match="single_writer=1"):
            call(store_on(Overwriting(far_away(inner, probe=True))))
    assert [*inner.list("")] == []


@pytest.mark.parametrize("lost", [(), (1,), (2,), (1, 2), (1, 2, 3)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_one_that_obeys_it_is_asked_once(lost: tuple[int, ...], when: str) -> None:
    inner = new_memory()
    backend = far_away(inner, probe=True)
    backend.plan += [Fault("put_if_absent", n, **{when: Ambiguous("the answer was lost")}) for n in lost]
    store = store_on(backend)
    if lost == (1, 2, 3) and when == "before":
        with pytest.raises(BackendError, match=r"could not find out.*the answer was lost"):
            write(store)
        backend.plan.clear()
    write(store)
    made = backend.calls["put_if_absent"]
    write(store)
    assert backend.calls["put_if_absent"] == made + 1
    assert not [*inner.list("probe/")]


def test_where_nothing_may_be_written_the_reason_is_told() -> None:
    """A service may answer a conditional write of somebody without the right as if it were busy; an ordinary one it refuses."""
    backend = far_away(new_memory(), probe=True)
    backend.plan += [
        Fault("put_if_absent", 0, before=Ambiguous("conditional request conflict")),
        Fault("replace", 1, before=PermissionDenied(13, "not with these credentials")),
    ]
    with pytest.raises(PermissionDenied, match="not with these credentials"):
        store_on(backend).acquire()


def test_readers_try_nothing_out() -> None:
    inner = new_memory()
    write(store_on(inner))
    backend = far_away(inner, probe=True)
    assert store_on(backend).checkpoint().files
    assert backend.calls["put_if_absent"] == 0


def test_a_single_writer_does_without_the_condition() -> None:
    inner = new_memory()
    written = []

    class Service(Overwriting):
        def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
            self.replace(key, data)

        def replace(self, key: str, data: bytes) -> None:
            written.append(key)
            self.inner.replace(key, data)

    service = Service(inner)
    service.capabilities = replace(inner.capabilities, probe=True, remote=True)
    store = store_on(service, single_writer=1)
    for _ in range(4):
        write(store)
    assert len(store_on(inner).checkpoints()) == 2
    assert written
    assert not [key for key in written if key.startswith("probe/")]
    alone = SingleWriter(service)
    with pytest.raises(AlreadyExists):
        alone.put_if_absent("log/000000000001", b"mine")
    with pytest.raises(NotFound):
        alone.stat("log/000000000099")
