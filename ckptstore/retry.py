"""Repeating what may be repeated when a service could not answer, and sending less when it asks for less."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from .errors import Ambiguous, Throttled, Transient
from .protocol import Backend, GatheringWriter, ObjectInfo, PartWriter
from .workers import Bell
from .wrapper import Wrapper

__all__ = ["Persistent"]

_R = TypeVar("_R")

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 10.0
"""Seconds; the waits between are random, up to a bound that doubles, so that many clients do not come back all at once."""
_CALM = 20
"""Calls that must go well before one more is sent at a time again."""


class _Gate:
    """How many requests are under way at a time: half of what was, after a complaint, and one more after a while without any."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._under_way: dict[object, int] = {}  # with how many complaints had been heeded when it began
        self._complaints = 0
        self._calm = 0
        self._lock = threading.Lock()
        self._changed = Bell()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Wait for a place, and hold it for the length of the block."""
        place = object()
        try:
            self._changed.until(lambda: self._take(place))
            yield
            self._went_well()
        except Throttled:
            self._lower(place)
            raise
        finally:
            self._under_way.pop(place, None)  # one step: an interrupt does not keep the place
            self._changed.ring()

    def _take(self, place: object) -> bool:
        with self._lock:
            if len(self._under_way) < self._limit:
                self._under_way[place] = self._complaints
        return place in self._under_way

    def _lower(self, place: object) -> None:
        with self._lock:
            self._calm = 0
            if self._under_way[place] == self._complaints:  # else it was sent before the last complaint: the same one, said again
                self._complaints += 1
                self._limit = max(1, min(self._limit, len(self._under_way)) // 2)

    def _went_well(self) -> None:
        with self._lock:
            self._calm += 1
            if self._calm >= _CALM and self._limit < self._most:
                self._limit, self._calm = self._limit + 1, 0


class Persistent(Wrapper):
    """Repeats each call that raised `Transient`, with growing random waits, for at most `seconds`; then the last error is raised.

    A `put_if_absent` whose answer was lost is not repeated here: only the log can tell what became of it. Thread-safe.
    """

    def __init__(self, inner: Backend, seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds
        self._gate = _Gate(4 * inner.capabilities.parallel)
        self._unanswered = 0

    def again(self, call: Callable[[], _R]) -> _R:
        """Return what `call` returns, once it does."""

        def through() -> _R:
            with self._gate.passed():
                return call()

        return Retrying(
            retry=retry_if_exception_type(Transient),
            wait=wait_random_exponential(_FIRST_WAIT, _LONGEST_WAIT),
            stop=stop_after_delay(self._seconds),
            reraise=True,
        )(through)

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`. Repeated only while it provably did not take effect.

        After one that was not answered it waits, because the log will ask what became of it, and perhaps send it again.
        """
        if ready:
            ready()
        try:
            self.again(lambda: self.inner.put_if_absent(key, data))
        except Ambiguous:
            if self._seconds:
                time.sleep(random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 4**self._unanswered)))
            self._unanswered += 1
            raise
        self._unanswered = 0

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        self.again(lambda: self.inner.replace(key, data))

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        return _PersistentWriter(self, self.again(lambda: self.inner.open_writer(key)))

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        return self.again(lambda: self.inner.get(key, limit))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        self.again(lambda: self.inner.read_into(key, offset, buffer))

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        return self.again(lambda: self.inner.stat(key))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. A listing that breaks off goes on after the last key that came."""
        items = iter(self.inner.list(prefix, start_after))
        last = start_after

        def step() -> ObjectInfo | None:
            nonlocal items
            try:
                return next(items, None)
            except Transient:
                items = iter(self.inner.list(prefix, last))  # a generator that has raised is at its end: it would look complete
                raise

        while (info := self.again(step)) is not None:
            last = info.key
            yield info

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        self.again(lambda: self.inner.delete(keys))


class _PersistentWriter:
    """See `PartWriter`."""

    def __init__(self, backend: Persistent, inner: PartWriter) -> None:
        self._backend = backend
        self._inner = inner

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        self._backend.again(lambda: self._inner.write(offset, data, number, crc))

    def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
        """See `GatheringWriter.write_pieces`."""
        inner = cast(GatheringWriter, self._inner)
        self._backend.again(lambda: inner.write_pieces(offset, pieces, number, crc))

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`."""
        self._backend.again(self._inner.start_finish)

    def finish(self) -> str | None:
        """See `PartWriter.finish`."""
        return self._backend.again(self._inner.finish)

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        self._inner.abort()
