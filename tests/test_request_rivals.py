"""The others on S3 and Google Cloud Storage, where the same happens to their requests: ``torch.save`` and DCP through s3fs and gcsfs."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import fsspec
import gcs_rig
import pytest
import s3_rig
import torch
import torch.distributed.checkpoint as dcp
from faulty_http import FaultyProxy
from rivals import state_of_step, step_of_state
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from wire_life import GCS, S3, Kind

pytest_plugins = ("gcs_fixtures", "s3_fixtures")

_KINDS = ("reset before", "reset after", "reset in mid-body", "500", "503")


def _torch_save(url: str, options: dict[str, Any], step: int) -> None:
    with fsspec.open(f"{url}/latest.pt", "wb", **options) as file:
        torch.save(state_of_step(step), file)


def _torch_load(url: str, options: dict[str, Any], newest: int) -> int:
    files, place = fsspec.url_to_fs(f"{url}/latest.pt", **options)
    return step_of_state(torch.load(io.BytesIO(files.cat_file(place))))  # whole: not each server here knows of ranges


def _dcp_save(url: str, options: dict[str, Any], step: int) -> None:
    dcp.save(state_of_step(step), storage_writer=FsspecWriter(f"{url}/step-{step}", **options), no_dist=True)


def _dcp_load(url: str, options: dict[str, Any], newest: int) -> int:
    state = state_of_step(0)
    files, place = fsspec.url_to_fs(f"{url}/step-{newest}", **options)
    with tempfile.TemporaryDirectory() as folder:
        for path in files.find(place):
            Path(folder, path.rpartition("/")[2]).write_bytes(files.cat_file(path))
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return step_of_state(state)


SUBJECTS: dict[str, tuple[Callable[..., None], Callable[..., int]]] = {
    "torch.save": (_torch_save, _torch_load),
    "DCP": (_dcp_save, _dcp_load),
}


@dataclass
class Reached:
    """A service, as fsspec gets to it."""

    name: str
    url: str
    upstream: str
    kinds: Mapping[str, Kind]
    options: Callable[[str], dict[str, Any]]
    """For an address."""


def _s3(address: str) -> dict[str, Any]:
    return {"client_kwargs": {"endpoint_url": address}, "skip_instance_cache": True}


def _gcs(address: str) -> dict[str, Any]:
    return {"endpoint_url": address, "token": "anon", "project": "p", "skip_instance_cache": True}


@pytest.fixture(params=["S3", "GCS"])
def reached_by_fsspec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Reached:
    if request.param == "S3":
        s3: s3_rig.Service = request.getfixturevalue("server")
        return Reached("S3", f"s3://{s3.place()}", s3.server.endpoint_url, S3, _s3)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # else it looks for another kind of service, for a minute
    gcs: gcs_rig.Service = request.getfixturevalue("fake_gcs")
    return Reached("GCS", f"gs://{gcs.place()}", gcs.layer.url, GCS, _gcs)


@pytest.mark.soak
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_same_happens_to_others(reached_by_fsspec: Reached, subject: str, kind: str) -> None:
    """Only counted: what was acknowledged last, or was being saved, must be there. A file that is renamed is copied there: not tried."""
    save, load = SUBJECTS[subject]
    service, what = reached_by_fsspec, reached_by_fsspec.kinds[kind]
    points = violations = 0
    with FaultyProxy(service.upstream) as proxy, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct, faulty = service.options(service.upstream), service.options(proxy.url)
        save(service.url, faulty, 1)
        acknowledged = 1
        assert load(service.url, direct, 1) == 1
        for nth in range(1, 100):
            step = nth + 1
            seen = iter(range(1, 1000))
            proxy.inject(what.fault, lambda r, nth=nth, seen=seen: what.applies(r) and next(seen) == nth)
            said = True
            try:
                save(service.url, faulty, step)
            except (Exception, dcp.CheckpointException):
                said = False
            if proxy.pending:
                break
            points += 1
            found = None
            for newest in (step, acknowledged):
                try:
                    found = load(service.url, direct, newest)
                    break
                except (Exception, dcp.CheckpointException):
                    continue
            violations += found != step and (said or found != acknowledged)
            acknowledged = step if said else found or acknowledged
        proxy.heal()
    evidence.record(
        f"{service.name}: {kind} at every request", points=points, fired=points, violations=violations, subject=subject
    )
    assert points > 0
