"""What the tests of the conformance suite have in common."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from ..protocol import Backend

__all__ = ["Conformance", "in_parallel", "some_bytes"]

_T = TypeVar("_T")


def some_bytes(n: int, seed: int = 0) -> bytes:
    """Return `n` bytes of no pattern."""
    return random.Random(seed).randbytes(n)


def in_parallel(n: int, work: Callable[[int], _T]) -> list[_T]:
    """Run ``work(0) … work(n - 1)`` in threads that start at the same moment; return the results."""
    barrier = threading.Barrier(n)

    def start(i: int) -> _T:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(start, range(n)))


class Conformance:
    """What a subclass provides for the tests, and what it may set."""

    threads = 16
    """How many race for one key."""
    rounds = 5
    """How many times they do; fewer where a race is slow."""
    many = 1100
    """More objects than one page of the service's listing, and than one bulk delete, holds."""
    finish_may_overwrite = False
    """`PartWriter.finish` cannot tell whether its key is taken."""
    secrets: Sequence[str] = ()
    """Credentials that `make_backend` uses, which no message may show."""

    backend: Backend
    place: Path

    def make_backend(self, place: Path) -> Backend:
        """Return a new backend object for a place that is empty when a test starts. `place` is the test's own ``tmp_path``.

        Called again within one test, it MUST open the same place, as another process would.
        """
        raise NotImplementedError

    def raw_get(self, key: str) -> bytes | None:
        """Return the stored bytes of `key`, or None; without the backend under test."""
        raise NotImplementedError

    def raw_put(self, key: str, data: bytes) -> None:
        """Store `data` under `key`; without the backend under test."""
        raise NotImplementedError

    def raw_keys(self) -> Sequence[str]:
        """Return the keys of everything stored, leftovers included; without the backend under test."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _open_place(self, tmp_path: Path) -> Iterator[None]:
        self.place = tmp_path
        self.backend = self.make_backend(tmp_path)
        yield
        self.backend.close()

    def another(self) -> Backend:
        """Return a second backend object for the same place."""
        return self.make_backend(self.place)

    def keys(self, prefix: str = "", start_after: str = "") -> list[str]:
        """Return the listed keys."""
        return [info.key for info in self.backend.list(prefix, start_after)]

    def write(self, key: str, *parts: bytes) -> None:
        """Write one large object, part by part."""
        writer = self.backend.open_writer(key)
        offset = 0
        for number, part in enumerate(parts):
            writer.write(offset, memoryview(part), number)
            offset += len(part)
        writer.finish()
