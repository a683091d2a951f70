"""Google Cloud Storage as a fixture; a test module takes it in with ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from gcs_rig import Service

pytest_plugins = ("services",)


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """fake-gcs-server behind our layer."""
    from services import fake_gcs_server

    with fake_gcs_server(tmp_path_factory.mktemp("gcs")) as server:
        service = Service(server.endpoint_url)
        with closing(service.layer):
            yield service


@pytest.fixture
def fake_gcs(gcs_server: Service, monkeypatch: pytest.MonkeyPatch) -> Service:
    """The service, and nothing in the environment that leads elsewhere."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    return gcs_server
