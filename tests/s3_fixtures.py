"""S3 services as fixtures; a test module takes them in with ``pytest_plugins``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from s3_rig import Service

from ckptstore.backends.s3 import S3Backend

pytest_plugins = ("conftest_private_s3",)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration but what a test makes."""
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def server(seaweedfs: Any, aws: None, monkeypatch: pytest.MonkeyPatch) -> Service:
    """SeaweedFS, which obeys conditions and checksums as Amazon does."""
    return _reached(Service(seaweedfs), monkeypatch)


@pytest.fixture
def simple_server(moto: Any, aws: None, monkeypatch: pytest.MonkeyPatch) -> Service:
    """moto, which knows no CRC-64/NVME, and checks no checksums."""
    return _reached(Service(moto, checksum="when_required"), monkeypatch)


def _reached(service: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    for name, value in service.server.env.items():
        monkeypatch.setenv(name, value)
    return service


@pytest.fixture
def backend(server: Service) -> Iterator[S3Backend]:
    """A new place on SeaweedFS."""
    opened = server.backend()
    yield opened
    opened.close()
