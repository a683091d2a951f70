"""S3 services as fixtures; a test module takes them in with ``pytest_plugins``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from s3_rig import Service

from ckptstore.backends.s3 import S3Backend

if TYPE_CHECKING:
    from services import Server

pytest_plugins = ("services",)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration but what a test makes."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def reached(aws: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Service], Service]:
    """Let the SDK find the credentials of a service."""

    def reach(service: Service) -> Service:
        for name, value in service.server.env.items():
            monkeypatch.setenv(name, value)
        return service

    return reach


@pytest.fixture
def server(seaweedfs: Server, reached: Callable[[Service], Service]) -> Service:
    """SeaweedFS, which obeys conditions and checksums as Amazon does."""
    return reached(Service(seaweedfs))


@pytest.fixture
def simple_server(moto: Server, reached: Callable[[Service], Service]) -> Service:
    """moto, which knows no CRC-64/NVME, and checks no checksums."""
    return reached(Service(moto, checksum="when_required"))


@pytest.fixture(scope="session")
def ceph_rgw() -> Iterator[Server]:
    """See `ceph_rgw_server`."""
    from ceph import ceph_rgw_server

    with ceph_rgw_server() as running:
        yield running


@pytest.fixture
def old_s3(ceph_rgw: Server, reached: Callable[[Service], Service]) -> Service:
    """Ceph, which knows no CRC-64/NVME, and conditions only on a PUT. For the soak."""
    return reached(Service(ceph_rgw, checksum="when_required"))


@pytest.fixture
def backend(server: Service) -> Iterator[S3Backend]:
    """A new place on SeaweedFS."""
    opened = server.backend()
    yield opened
    opened.close()
