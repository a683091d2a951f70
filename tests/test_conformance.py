"""The conformance suite on the backends that need no server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stores import RawFolder

from ckptstore.backends import memory
from ckptstore.backends.local import LocalBackend
from ckptstore.backends.memory import MemoryBackend
from ckptstore.protocol import Backend
from ckptstore.testing import BackendConformance, FaultyBackend


class TestLocal(RawFolder, BackendConformance):
    def make_backend(self, place: Path) -> Backend:
        return LocalBackend.open(str(place / "runs" / "42"), {})


class TestMemory(BackendConformance):
    def make_backend(self, place: Path) -> Backend:
        return MemoryBackend.open(str(place), {})

    @property
    def objects(self) -> dict[str, bytes]:
        return memory._spaces[str(self.place)].objects

    def raw_get(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def raw_put(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    def raw_keys(self) -> Sequence[str]:
        return list(self.objects)


class TestFaultyWithoutFaults(TestMemory):
    def make_backend(self, place: Path) -> Backend:
        return FaultyBackend(super().make_backend(place))
