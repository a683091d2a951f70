"""Services without a working create-if-absent: writers are refused before anything is written, unless there is only one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from s3_rig import PART, Service, keys, location_of

from ckptstore import Store
from ckptstore.cli import main
from ckptstore.errors import NoAtomicCreate

pytest_plugins = ("s3_fixtures",)


@pytest.fixture(params=["rclone", "snailmail_ignores", "snailmail_rejects"])
def service(request: pytest.FixtureRequest, reached: Callable[[Service], Service]) -> Service:
    """A service that ignores conditions, or answers that it has none."""
    return reached(Service(request.getfixturevalue(request.param), checksum="when_required"))


def stored(service: Service) -> list[str]:
    """Return the keys of all objects in all buckets."""
    buckets = [b["Name"] for b in service.client.list_buckets()["Buckets"]]
    return [item["Key"] for b in buckets for item in service.client.list_objects_v2(Bucket=b).get("Contents", ())]


def test_a_writer_is_refused_and_nothing_is_left(service: Service) -> None:
    before = stored(service)
    url = service.url()
    for change in (lambda s: s.save({"x": 1}, step=1), lambda s: s.acquire(), lambda s: s.resume({})):
        with Store(url) as store, pytest.raises(NoAtomicCreate, match=r"create-if-absent|create only if absent") as caught:
            change(store)
        assert "single_writer=1" in str(caught.value)
    assert stored(service) == before


def test_the_command_line_says_it_in_one_line(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    url = service.url()
    with Store(url, single_writer=True) as store:
        store.save({"x": 1}, step=1)
    before = stored(service)
    assert main(["tag", url, "best", "latest"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "single_writer=1" in line
    assert stored(service) == before
    assert main(["tag", f"{url}&single_writer=1", "best", "latest"]) == 0


def test_readers_need_no_condition(service: Service) -> None:
    with Store(service.url()) as store:
        assert store.names() == {}
        assert "latest" not in store


def test_a_single_writer_is_served(service: Service) -> None:
    numbers = 2_000_000  # 8 MB: two parts
    url = service.url(single_writer=1, keep_last=2)
    for launch in ("a", "b"):
        with Store(url, owner=launch) as store:
            state = {"w": torch.zeros(numbers)}
            found = store.resume(state)
            assert (found is None) == (launch == "a")
            assert found is None or (found.step == 3 and torch.equal(state["w"], torch.full((numbers,), 3.0)))
            for step in range(4):
                store.save({"w": torch.full((numbers,), float(step))}, step=step)
            store.tag("best", "latest")
            assert store.verify() == []
            assert len(store.checkpoints()) == (2 if launch == "a" else 3)  # what was resumed from is kept


def test_an_upload_that_nobody_finished_is_found(service: Service) -> None:
    url = service.url(single_writer=1)
    with Store(url, owner="a") as store:
        store.save({"x": 1}, step=1)
    backend = service.backend(location_of(url))
    writer = backend.open_writer("data/e1-s2-0123456789ab/state.pt")
    writer.write(0, memoryview(bytes(PART)), 0)
    (left,) = [key for key in keys(backend) if key.endswith(".partial")]
    with Store(url, owner="b") as store:
        store.acquire()
        store.gc()
        assert store.load()["x"] == 1
    assert left not in keys(backend)
