"""Parts come in any order; some storage takes a file only from its beginning to its end."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .errors import BackendError
from .workers import Bell

__all__ = ["InOrder"]


class InOrder:
    """Hands parts on in the order of their offsets, one at a time. Thread-safe.

    A part that comes while earlier ones are on their way waits, in its own thread and memory. One that comes before its predecessor is
    copied, and handed on with it: waiting could be for ever, if one thread writes all parts.
    """

    def __init__(self, send: Callable[[memoryview], None]) -> None:
        self._send = send
        self._sending: object = None
        self._lock = threading.Lock()
        self._changed = Bell()
        self._early: dict[int, bytes] = {}
        self.position = 0
        """How many bytes were handed on."""

    def write(self, offset: int, data: memoryview) -> None:
        """Hand on `data`, and all that was waiting for it. When `send` raised, the same call may be made again, if `send` can be."""
        data = data.cast("B") if data.nbytes else memoryview(b"")
        turn = object()

        def begin() -> bool:
            with self._lock:
                if self._sending is None:
                    if offset > self.position:
                        self._early[offset] = bytes(data)
                    else:
                        self._sending = turn
                    return True
            return False

        try:
            self._changed.until(begin)
            if self._sending is turn:
                self._hand_on(offset, data)
        finally:
            if self._sending is turn:
                self._sending = None
            self._changed.ring()

    def _hand_on(self, offset: int, data: memoryview) -> None:
        if data and offset == self.position:
            self._send(data)
            self.position += len(data)
        while (early := self._early.get(self.position)) is not None:
            self._send(memoryview(early))
            del self._early[self.position]
            self.position += len(early)

    def close(self) -> None:
        """Make sure that nothing is missing.

        Raises:
            BackendError: there is a gap.
        """
        self.write(self.position, memoryview(b""))  # what may be left of a call that failed and was not made again
        if self._early:
            raise BackendError(f"bytes {self.position} to {min(self._early) - 1} were never written")
