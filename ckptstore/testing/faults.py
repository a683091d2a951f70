"""A backend that fails at a chosen call, before or after the call took effect."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar, cast

from ..errors import InvalidURL, UsageError
from ..protocol import Backend, GatheringWriter, ObjectInfo, PartWriter

__all__ = ["Fault", "FaultyBackend"]

_T = TypeVar("_T")
_METHODS = ("put_if_absent", "replace", "open_writer", "get", "read_into", "stat", "list", "delete", "close")
_POINTS = frozenset({*_METHODS, "list.item", "writer.write", "writer.start_finish", "writer.finish", "writer.abort"})


@dataclass(frozen=True)
class Fault:
    """What happens at call number `nth` of `method`.

    `method` is a method of `Backend`, or ``writer.write``, ``.start_finish``, ``.finish``, ``.abort`` (counted over all writers), or
    ``list.item`` (each object that any listing is about to yield). `before` and `after` are each an exception to raise or a function
    to call, before the call reaches the inner backend and after it returned from there::

        Fault("put_if_absent", before=BackendError("…"))                 # fails without effect
        Fault("put_if_absent", before=Ambiguous("…"))                    # no effect, but nobody is told so
        Fault("put_if_absent", 3, after=Ambiguous("…"))                  # the third write lands but reports failure
        Fault("writer.write", 2, before=KeyboardInterrupt())             # Ctrl-C
        Fault("put_if_absent", before=lambda: other_store.save(…))       # another writer, at precisely this moment
    """

    method: str
    nth: int = 1
    """From 1; 0 means every call."""
    before: BaseException | Callable[[], object] | None = None
    after: BaseException | Callable[[], object] | None = None

    def __post_init__(self) -> None:
        if self.method not in _POINTS:
            raise UsageError(f"no fault can be put at {self.method!r}; known: {', '.join(sorted(_POINTS))}")
        if self.nth < 0 or (self.before is None and self.after is None):
            raise UsageError("a fault needs a call number from 0 on, and something to do before or after the call")


class FaultyBackend:
    """Passes every call on to `inner`, and injects `plan` on the way.

    `calls` counts the calls of each method since the start. Faults may be added while it is in use::

        backend = FaultyBackend(inner, [Fault("get", 1, before=BackendError("…"))])
        backend.plan.append(Fault("list", backend.calls["list"] + 1, before=BackendError("…")))
    """

    options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, inner: Backend, plan: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.plan = [*plan]
        self.calls: Counter[str] = Counter()
        self.capabilities = inner.capabilities
        self.url = inner.url
        self._lock = threading.Lock()

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> FaultyBackend:
        """Refuse: there is nothing to wrap in a URL.

        Raises:
            InvalidURL
        """
        raise InvalidURL("a FaultyBackend is made around an open backend: FaultyBackend(inner, plan)")

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        """Count one call of `method`, and make it between the faults planned for it."""
        with self._lock:
            self.calls[method] += 1
            faults = [f for f in self.plan if f.method == method and f.nth in (0, self.calls[method])]
        for fault in faults:
            _strike(fault.before)
        result = call()
        for fault in faults:
            _strike(fault.after)
        return result

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`. `ready` is called before any fault: without it, no answer could be lost."""
        if ready:
            ready()
        self.run("put_if_absent", lambda: self.inner.put_if_absent(key, data))

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        self.run("replace", lambda: self.inner.replace(key, data))

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        return _FaultyWriter(self, self.run("open_writer", lambda: self.inner.open_writer(key)))

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        return self.run("get", lambda: self.inner.get(key, limit))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        self.run("read_into", lambda: self.inner.read_into(key, offset, buffer))

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        return self.run("stat", lambda: self.inner.stat(key))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Faults of ``list`` strike at the first step of the iteration, as an ordinary generator's do."""
        for info in self.run("list", lambda: self.inner.list(prefix, start_after)):
            yield self.run("list.item", lambda info=info: info)  # type: ignore[misc]

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        self.run("delete", lambda: self.inner.delete(keys))

    def close(self) -> None:
        """See `Backend.close`."""
        self.run("close", self.inner.close)


class _FaultyWriter:
    """See `PartWriter`."""

    def __init__(self, backend: FaultyBackend, inner: PartWriter) -> None:
        self._backend = backend
        self._inner = inner

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        self._backend.run("writer.write", lambda: self._inner.write(offset, data, number, crc))

    def write_pieces(self, offset: int, pieces: Sequence[memoryview], number: int, crc: int | None = None) -> None:
        """See `GatheringWriter.write_pieces`."""
        inner = cast(GatheringWriter, self._inner)
        self._backend.run("writer.write", lambda: inner.write_pieces(offset, pieces, number, crc))

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`."""
        self._backend.run("writer.start_finish", self._inner.start_finish)

    def finish(self) -> str | None:
        """See `PartWriter.finish`."""
        return self._backend.run("writer.finish", self._inner.finish)

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        self._backend.run("writer.abort", self._inner.abort)


def _strike(what: BaseException | Callable[[], object] | None) -> None:
    if isinstance(what, BaseException):
        raise what
    if what is not None:
        what()
