"""A backend around another one: what every wrapper has in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar

from .errors import AlreadyExists, Ambiguous, InvalidURL, NotFound, Transient
from .protocol import Backend, ObjectInfo, PartWriter

__all__ = ["SingleWriter", "Wrapper"]


class Wrapper:
    """Passes every call on to `inner`."""

    options: ClassVar[Mapping[str, str]] = {}

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.capabilities = inner.capabilities
        self.url = inner.url

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> Backend:
        """Refuse: there is nothing to wrap in a URL.

        Raises:
            InvalidURL
        """
        raise InvalidURL(f"a {cls.__name__} is made around an open backend")

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`."""
        self.inner.put_if_absent(key, data, ready)

    def replace(self, key: str, data: bytes) -> None:
        """See `Backend.replace`."""
        self.inner.replace(key, data)

    def open_writer(self, key: str) -> PartWriter:
        """See `Backend.open_writer`."""
        return self.inner.open_writer(key)

    def get(self, key: str, limit: int) -> bytes:
        """See `Backend.get`."""
        return self.inner.get(key, limit)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Backend.read_into`."""
        self.inner.read_into(key, offset, buffer)

    def stat(self, key: str) -> ObjectInfo:
        """See `Backend.stat`."""
        return self.inner.stat(key)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        """See `Backend.list`."""
        return self.inner.list(prefix, start_after)

    def delete(self, keys: Sequence[str]) -> None:
        """See `Backend.delete`."""
        self.inner.delete(keys)

    def close(self) -> None:
        """See `Backend.close`."""
        self.inner.close()


class SingleWriter(Wrapper):
    """Storage that cannot tell two writers apart, for users who make sure that there is only one (``single_writer=1``)."""

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        """See `Backend.put_if_absent`, but for the one winner: it looks, and then writes."""
        if ready:
            ready()
        try:
            self.inner.stat(key)
        except NotFound:
            try:
                self.inner.replace(key, data)
            except Transient as exc:  # harmless to repeat, so it does not say whether it took effect
                raise Ambiguous(*exc.args) from exc
            return
        raise AlreadyExists(f"{key} exists already, and was left as it is")
