"""S3 on Ceph's RGW, which is older than most of what we ask for: it knows no CRC-64/NVME, and ignores the condition where it is not on
a PUT. With ``checksum=when_required``, and found out without."""

from __future__ import annotations

import datetime
import warnings

import botocore.auth
import botocore.compat
import botocore.crt.auth
import pytest
import races
import torch
from procs import Nursery
from s3_rig import PART, Service, keys, location_of, on_wire, passes, some_bytes, write
from test_s3 import Conformance

from ckptstore import Store
from ckptstore.cli import main
from ckptstore.errors import StoreWarning, Unreadable

pytest_plugins = ("s3_fixtures",)
pytestmark = pytest.mark.soak


class TestCeph(Conformance):
    @pytest.fixture
    def _server(self, old_s3: Service) -> Service:
        return old_s3


def test_four_processes_create_and_one_wins_each_time(old_s3: Service, racers: Nursery) -> None:
    races.check_creations(racers, old_s3.url(), old_s3.server.env, 20)


@pytest.mark.parametrize("owners", races.OWNERS)
def test_four_processes_save_under_one_name_and_none_loses(old_s3: Service, racers: Nursery, owners: str) -> None:
    races.check_saves(racers, old_s3.url(keep_last="all"), races.OWNERS[owners], old_s3.server.env)


@pytest.mark.parametrize("told", [True, False], ids=["when_required", "found out"])
def test_a_life_of_a_store(old_s3: Service, told: bool) -> None:
    if not told:
        del old_s3.options["checksum"]
    url = old_s3.url(keep_last=2)
    states = [torch.randn(2_000_000, generator=torch.Generator().manual_seed(i)) for i in range(4)]  # 8 MB: two parts
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Store(url, owner="a") as store:
            for step, weights in enumerate(states):
                store.save({"w": weights}, step=step)
    assert [str(w.message).count("checksum=when_required") for w in caught if w.category is StoreWarning] == [] if told else [1]
    state = {"w": torch.zeros(2_000_000)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)
        with Store(url, owner="b", keep_last=1) as store:
            assert store.resume(state) is not None
            assert torch.equal(state["w"], states[3])
            assert store.verify() == []
            damage, sizes_only = store.checkpoints()[-1].verify_remote()
            assert (damage, sizes_only) == ([], ["state.pt"])
            store.prune()
            store.gc()
            left = store.checkpoints()
    assert [c.step for c in left] == [3]
    assert {key.split("/")[1] for key in keys(old_s3.backend(location_of(url)), "data/")} == {left[0].id}


def test_bytes_changed_on_the_way_are_refused_by_the_service(old_s3: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptstore.backends import _s3_bucket

    backend = old_s3.backend()
    monkeypatch.setattr(_s3_bucket, "_md5", lambda data: "AAAAAAAAAAAAAAAAAAAAAA==")
    writer = backend.open_writer("data/x")
    with pytest.raises(Exception, match="changed on their way"):
        writer.write(0, memoryview(bytes(PART)), 0)
    writer.abort()


def test_reads_are_of_one_version(old_s3: Service) -> None:
    location = old_s3.place()
    backend, another = old_s3.backend(location), old_s3.backend(location)
    data = some_bytes(2 * PART)
    write(backend, "data/x", data)
    buffer = memoryview(bytearray(10))
    with on_wire(backend, passes) as seen:
        for _ in range(3):
            backend.read_into("data/x", PART - 5, buffer)
    assert bytes(buffer) == data[PART - 5 : PART + 5]
    assert seen == {"GetObject": 3}, "it can compare"
    write(another, "data/x", some_bytes(2 * PART, 1))
    with pytest.raises(Unreadable, match="overwritten"):
        backend.read_into("data/x", 0, buffer)


def test_a_clock_that_is_wrong(old_s3: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The service's own answer to a request of two days ago."""
    url = old_s3.url(retry_seconds=0)
    now = botocore.compat.get_current_datetime
    for signer in (botocore.auth, botocore.crt.auth):  # with awscrt at hand, the SDK takes the latter
        monkeypatch.setattr(signer, "get_current_datetime", lambda *a, **k: now(*a, **k) - datetime.timedelta(days=2))
    assert main(["ls", url]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "this machine's clock is wrong" in line
