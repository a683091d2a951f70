"""The backend for Google Cloud Storage on an emulator: the conformance suite, and what goes wrong on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from gcs_rig import Service

from ckptstore.protocol import Backend
from ckptstore.testing import BackendConformance

pytest_plugins = ("gcs_fixtures",)


class TestConformance(BackendConformance):
    rounds = 2
    many = 30  # see test_pages
    service: Service

    @pytest.fixture
    def _open_place(self, fake_gcs: Service, tmp_path: Path) -> Iterator[None]:
        self.service, self.location = fake_gcs, fake_gcs.place()
        self.root = self.location.partition("/")[2] + "/"
        self.place = tmp_path
        self.backend = self.make_backend(tmp_path)
        yield
        self.backend.close()

    @pytest.fixture(autouse=True)
    def _opened(self, _open_place: None) -> None:
        """The suite's own fixture opens the backend before it could ask for a server."""

    def make_backend(self, place: Path) -> Backend:
        return self.service.backend(self.location)

    def raw_get(self, key: str) -> bytes | None:
        return self.service.raw_get(self.root + key)

    def raw_put(self, key: str, data: bytes) -> None:
        self.service.raw_put(self.root + key, data)

    def raw_keys(self) -> Sequence[str]:
        return self.service.raw_keys(self.root)
