"""A store on S3: its whole life, how many requests it takes, writers that race, uploads that nobody finished."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import races
import torch
from procs import Channel, Nursery, nursery
from s3_rig import PART, Service, keys, location_of
from stores import store_on, write

from ckptstore import Store
from ckptstore.errors import DamagedFile, NoAtomicCreate, StoreNotFound
from ckptstore.protocol import Backend, PartWriter
from ckptstore.wrapper import Wrapper

pytest_plugins = ("s3_fixtures",)


def _state(seed: int, numbers: int = 10) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(numbers, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("which", ["server", "simple_server"])
def test_a_life_of_a_store(request: pytest.FixtureRequest, which: str) -> None:
    server: Service = request.getfixturevalue(which)
    url = server.url(keep_last=2)
    with Store(url, owner="a") as store:
        for step in range(4):
            store.save(_state(step, 2_000_000), "latest", step=step)  # 8 MB: two parts
        assert torch.equal(store.load("latest")["w"], _state(3, 2_000_000)["w"])
    with Store(url, owner="b") as store:
        state = _state(9, 2_000_000)
        assert store.resume(state, "latest") is not None
        assert torch.equal(state["w"], _state(3, 2_000_000)["w"])
        damage, sizes_only = store.checkpoints()[-1].verify_remote()
        assert damage == []
        assert sizes_only == ([] if which == "server" else ["state.pt"])
    with Store(url, owner="b", keep_last=1) as store:
        store.prune()
        store.gc()
        assert [c.step for c in store.checkpoints()] == [3]
    backend = server.backend(location_of(url))
    assert {key.split("/")[1] for key in keys(backend, "data/")} == {store.checkpoints()[0].id}
    assert keys(backend, "probe/") == []


class _Restless(Wrapper):
    """Storage below which memory changes between the moment when it was hashed and the one when it is sent."""

    def __init__(self, inner: Backend, memory: bytearray) -> None:
        super().__init__(inner)
        self.memory = memory

    def open_writer(self, key: str) -> PartWriter:
        writer = self.inner.open_writer(key)
        passed_on = writer.write_pieces  # type: ignore[attr-defined]

        def write(offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
            self.memory[-1] = (self.memory[-1] + 1) % 256  # not back to what it was, with a part in another thread
            passed_on(offset, pieces, number, crc)

        writer.write_pieces = write  # type: ignore[attr-defined]
        return writer


@pytest.mark.parametrize("which", ["server", "simple_server"])
def test_tensors_that_change_while_they_are_saved_are_not_published(request: pytest.FixtureRequest, which: str) -> None:
    """Whether or not the service compares the CRC: if only the MD5 was computed when the part was sent, size and MD5 are right."""
    data = bytearray(2 * PART)
    server: Service = request.getfixturevalue(which)
    backend = _Restless(server.backend(), data)
    with store_on(backend) as store:
        with pytest.raises(DamagedFile, match="changed in memory"), store.transaction() as tx, tx.open("state.pt") as file:
            file.write(data)
        assert store.checkpoints() == []
    assert keys(backend, "data/") == []


@pytest.mark.parametrize("which", ["server", "simple_server"])
def test_requests_of_a_small_save_and_of_a_first_look(request: pytest.FixtureRequest, which: str) -> None:
    server: Service = request.getfixturevalue(which)
    url = server.url(keep_last=2)
    seen: Counter[str] = Counter()

    def watch(store: Store) -> None:
        backend: Any = store._engine.backend
        events = backend.inner._bucket._connected().meta.events
        events.register("before-send.s3", lambda event_name, **_: seen.update([event_name.rpartition(".")[2]]))

    with Store(url, owner="a") as store:
        for step in range(20):
            write(store, step=step)
        store._engine.settle()
        watch(store)
        write(store, step=20)
        store._engine.settle()
        # The file, the manifest, the record, the hint; and the checkpoint that went, at one go.
        assert seen == {"PutObject": 4, "DeleteObjects": 1}
    seen.clear()
    with Store(url, owner="a") as store:
        watch(store)
        store._engine.log.head()
        assert seen == {"GetObject": 2, "ListObjectsV2": 1}


def test_services_that_ignore_the_condition_are_refused(simple_server: Service) -> None:
    """Before anything else is written."""
    url = simple_server.url()

    def ignore(store: Store) -> None:
        backend: Any = store._engine.backend
        events = backend.inner._bucket._connected().meta.events
        events.register("before-parameter-build.s3.PutObject", lambda params, **_: params.pop("IfNoneMatch", None))

    with Store(url) as store:
        ignore(store)
        with pytest.raises(NoAtomicCreate, match="single_writer=1") as caught:
            write(store)
        assert "\n" not in str(caught.value)
    assert keys(simple_server.backend(location_of(url))) == []


def test_a_folder_that_is_not_a_store(server: Service) -> None:
    backend = server.backend()
    backend.replace("photos/1.jpg", b"x")
    location = backend.url.removeprefix("s3://")
    with Store(f"s3://{location}?endpoint_url={server.options['endpoint_url']}") as store:
        for call in (store.load, store.checkpoint):
            with pytest.raises(StoreNotFound) as caught:
                call()
            assert "\n" not in str(caught.value)
    assert keys(backend) == ["photos/1.jpg"]


def test_a_bucket_that_retains_its_objects(simple_server: Service) -> None:
    """Object lock in governance mode: what is deleted stays as an older version, and that is nobody's error."""
    bucket = "retaining"
    client = simple_server.client
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
    client.put_object_lock_configuration(Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule})
    url = simple_server.url(keep_last=1).replace(simple_server.place().split("/")[0], bucket)
    with Store(url) as store:
        saved = [write(store, step=step) for step in range(3)]
        store.gc()
        assert [c.id for c in store.checkpoints()] == saved[-1:]
        assert store.verify() == []
    assert {key.split("/")[1] for key in keys(simple_server.backend(location_of(url)), "data/")} == {saved[-1]}


# --- several processes


@pytest.fixture(scope="module")
def processes() -> Iterator[Nursery]:
    yield from nursery(__name__)


def _write_and_die(channel: Channel, env: dict[str, str], url: str) -> None:
    os.environ.update(env)
    store = Store(url, owner="a")
    write(store, step=1)
    with store.transaction(step=2) as tx, tx.open("state.pt") as file:
        file.write(bytes(11 << 20))
        os.kill(os.getpid(), signal.SIGKILL)


def test_interrupted_uploads_are_found_by_gc(server: Service, processes: Nursery) -> None:
    url = server.url()
    assert processes.start(_write_and_die, server.server.env, url).rest() == []
    backend = server.backend(location_of(url))
    assert [key for key in keys(backend) if key.endswith(".partial")]
    with Store(url, owner="b") as store:
        store.acquire()  # which collects
        assert [c.step for c in store.checkpoints()] == [1]
    assert not [key for key in keys(backend) if key.endswith(".partial")]


@pytest.mark.parametrize("which", ["server", "simple_server"])
def test_four_processes_create_and_one_wins_each_time(request: pytest.FixtureRequest, racers: Nursery, which: str) -> None:
    server: Service = request.getfixturevalue(which)
    races.check_creations(racers, server.url(), server.server.env)


@pytest.mark.parametrize("owners", races.OWNERS)
@pytest.mark.parametrize("which", ["server", "simple_server"])
def test_four_processes_save_under_one_name_and_none_loses(
    request: pytest.FixtureRequest, racers: Nursery, which: str, owners: str
) -> None:
    server: Service = request.getfixturevalue(which)
    races.check_saves(racers, server.url(keep_last="all"), races.OWNERS[owners], server.server.env)


def test_eight_stores_save_at_once_and_none_loses(simple_server: Service) -> None:
    url = simple_server.url(keep_last="all")
    Store(url, owner="one").acquire()

    def save(i: int) -> str:
        with Store(url, acquire=False) as store:
            return write(store, f"rank-{i}", step=i)

    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(save, range(8)))
    with Store(url, owner="one") as store:
        assert sorted(c.id for c in store.checkpoints()) == sorted(saved)
        assert [store.checkpoint(f"rank-{i}").id for i in range(8)] == saved
        assert store.verify() == []
