"""The others on S3, where the same happens to their requests: ``torch.save`` and DCP through s3fs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import evidence
import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
from faulty_http import FaultyProxy
from rivals import state_of_step, step_of_state
from s3_rig import Service
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from wire_life import S3

pytest_plugins = ("s3_fixtures",)

_KINDS = ("reset before", "reset after", "reset in mid-body", "500", "503")


def _torch_save(url: str, options: dict[str, Any], step: int) -> None:
    with fsspec.open(f"{url}/latest.pt", "wb", **options) as file:
        torch.save(state_of_step(step), file)


def _torch_load(url: str, options: dict[str, Any], newest: int) -> int:
    with fsspec.open(f"{url}/latest.pt", "rb", **options) as file:
        return step_of_state(torch.load(file))


def _dcp_save(url: str, options: dict[str, Any], step: int) -> None:
    dcp.save(state_of_step(step), storage_writer=FsspecWriter(f"{url}/step-{step}", **options), no_dist=True)


def _dcp_load(url: str, options: dict[str, Any], newest: int) -> int:
    state = state_of_step(0)
    dcp.load(state, storage_reader=FsspecReader(f"{url}/step-{newest}", **options), no_dist=True)
    return step_of_state(state)


SUBJECTS: dict[str, tuple[Callable[..., None], Callable[..., int]]] = {
    "torch.save": (_torch_save, _torch_load),
    "DCP": (_dcp_save, _dcp_load),
}


@pytest.mark.soak
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_same_happens_to_others(server: Service, subject: str, kind: str) -> None:
    """Only counted: what was acknowledged last, or was being saved, must be there."""
    save, load = SUBJECTS[subject]
    url = f"s3://{server.place()}"
    points = violations = 0
    with FaultyProxy(server.server.endpoint_url) as proxy, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = {"client_kwargs": {"endpoint_url": server.server.endpoint_url}, "skip_instance_cache": True}
        faulty = {**direct, "client_kwargs": {"endpoint_url": proxy.url}}
        save(url, faulty, 1)
        acknowledged = 1
        for nth in range(1, 100):
            step = nth + 1
            seen = iter(range(1, 1000))
            proxy.inject(S3[kind].fault, lambda r, nth=nth, seen=seen: S3[kind].applies(r) and next(seen) == nth)
            said = True
            try:
                save(url, faulty, step)
            except (Exception, dcp.CheckpointException):
                said = False
            if proxy.pending:
                break
            points += 1
            found = None
            for newest in (step, acknowledged):
                try:
                    found = load(url, direct, newest)
                    break
                except (Exception, dcp.CheckpointException):
                    continue
            violations += found != step and (said or found != acknowledged)
            acknowledged = step if said else found or acknowledged
        proxy.heal()
    evidence.record(f"S3: {kind} at every request", points=points, fired=points, violations=violations, subject=subject)
    assert points > 0
