"""Objects in this process: ``memory://name``. Gone when the process ends; for tests and for trying things out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from ckptstore.errors import AlreadyExists, BackendError, InvalidOption, InvalidURL, NotFound
from ckptstore.protocol import Capabilities, ObjectInfo, PartWriter

__all__ = ["MemoryBackend"]


class _Space:
    """What all backends opened on one name share."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, bytes] = {}

    def create(self, key: str, data: bytes) -> None:
        with self.lock:
            if key in self.objects:
                raise AlreadyExists(f"{key} exists already, and was left as it is")
            self.objects[key] = data


_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


class MemoryBackend:
    """A dictionary under a lock, shared within the process by everyone who opens the same name. A forked child has its own copy."""

    options: ClassVar[Mapping[str, str]] = {}
    capabilities = Capabilities(atomic_create=True, durable=False, part_size=8 << 20, parallel=4)

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        with _spaces_lock:
            self._space = _spaces.setdefault(name, _Space())

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> MemoryBackend:
        """Make a backend for the space named `location`.

        Raises:
            InvalidOption: any option.
            InvalidURL: an empty name.
        """
        if options:
            raise InvalidOption(f"a memory store takes no option {min(options)!r}")
        if not location:
            raise InvalidURL("a memory store needs a name, as in memory://tests")
        return cls(location)

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`. Lives as long as the process."""
        if ready:
            ready()
        self._space.create(key, bytes(data))

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        with self._space.lock:
            self._space.objects[key] = bytes(data)

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        return _MemoryWriter(self._space, key)

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        data = self._object(key)
        if len(data) > limit:
            raise BackendError(f"{self.url}: {key} is {len(data)} bytes long, more than the {limit} that belong here")
        return data

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        data = self._object(key)
        end = offset + buffer.nbytes
        if end > len(data):
            raise BackendError(f"{self.url}: {key} ends at byte {len(data)}, expected {end}")
        if buffer.nbytes:
            buffer.cast("B")[:] = memoryview(data)[offset:end]

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        return ObjectInfo(key, len(self._object(key)))

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`. Unfinished writes leave nothing behind here."""
        with self._space.lock:
            found = [ObjectInfo(k, len(v)) for k, v in self._space.objects.items() if k.startswith(prefix) and k > start_after]
        yield from sorted(found, key=lambda info: info.key)

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        with self._space.lock:
            for key in keys:
                self._space.objects.pop(key, None)

    def close(self) -> None:
        """See `Backend.close`. The objects stay: others may have the same name open."""

    def _object(self, key: str) -> bytes:
        with self._space.lock:
            try:
                return self._space.objects[key]
            except KeyError:
                raise NotFound(f"{self.url}: there is no {key}") from None


class _MemoryWriter:
    """See `PartWriter`."""

    def __init__(self, space: _Space, key: str) -> None:
        self._space = space
        self._key = key
        self._lock = threading.Lock()
        self._buffer: bytearray | None = bytearray()

    def write(self, offset: int, data: memoryview, number: int, crc: int | None = None) -> None:
        """See `PartWriter.write`."""
        end = offset + data.nbytes
        with self._lock:
            buffer = self._require_open()
            if end > len(buffer):
                buffer.extend(bytes(end - len(buffer)))
            if data.nbytes:
                buffer[offset:end] = data.cast("B")

    def start_finish(self) -> None:
        """See `PartWriter.start_finish`. Nothing takes time here."""

    def finish(self) -> None:
        """See `PartWriter.finish`."""
        with self._lock:
            buffer = self._require_open()
            self._buffer = None
        self._space.create(self._key, bytes(buffer))

    def abort(self) -> None:
        """See `PartWriter.abort`."""
        with self._lock:
            self._buffer = None

    def _require_open(self) -> bytearray:
        if self._buffer is None:
            raise BackendError(f"{self._key}: this writer is finished or aborted; open a new one")
        return self._buffer
