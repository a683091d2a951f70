"""What a store does in the background, and how it is closed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, TypeVar

from .background import PendingSave
from .envelope import JSON
from .errors import CkptStoreError, StoreWarning
from .owned import Owned
from .transaction import Draft

__all__ = ["Asynchronous"]

_S = TypeVar("_S", bound="Asynchronous")


class Asynchronous(Owned):
    """The methods of `Store` that know of saves in the background. Whatever changes the store waits for them, with `_background.wait`."""

    def save_async(
        self,
        obj: Any,
        name: str = "latest",
        *,
        step: int | None = None,
        sampler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        metadata: JSON = None,
        rng: bool = False,
        when_busy: Literal["wait", "skip", "replace"] = "wait",
        optimizer: Any = None,
        checked: bool = False,
    ) -> PendingSave:
        """Do what `save` does, in the background: this returns as soon as later changes of `obj` do not matter any more.

        Saves in the background go on one at a time, in the order of the calls, and whatever else changes the store waits for them.

        Args:
            when_busy: what to do while an earlier one goes on. "wait" for its end; "skip": save nothing, and return a `PendingSave` that is
                cancelled; "replace": begin as soon as the earlier one has ended, and cancel another one that waits for that. Only
                "replace" takes memory for a second copy of the state.
            optimizer: one or a list. Their parameters and state are copied in the background, too: only their ``step()`` may change them
                until the copy is complete, and it waits for that.
            checked: with `optimizer`, find out by checksums whether something else changed one of those tensors before it was copied.

        The other arguments are as for `save`. All are taken as they are at the call.

        Raises:
            NotSerializable, UsageError, or whatever a ``state_dict()`` raised: nothing was begun.
            Exception: what an earlier save in the background failed with, if nobody has asked about it; nothing was begun.
        """
        self._background.raise_failure()
        draft = Draft.check(name, step, metrics, metadata, sampler)
        return self._background.save(
            self._begin_now, obj, draft, when_busy=when_busy, rng=rng, optimizer=optimizer, checked=checked
        )

    def close(self) -> None:
        """Wait for saves in the background, and release threads, memory and connections. Idempotent.

        Raises:
            Exception: what a save in the background failed with, if nobody has asked about it.
        """
        self._background.close()
        self._engine.close()
        self._background.raise_failure()

    def __enter__(self: _S) -> _S:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        self._background.close()
        try:
            self._background.raise_failure()
        except Exception as exc:
            self._warn_of(exc)
        finally:
            try:
                self._engine.close()
            except CkptStoreError as exc:  # what a check in the background has found
                self._warn_of(exc)

    def _warn_of(self, exc: Exception) -> None:
        url = self._engine.backend.url
        warnings.warn(f"{url}: something in the background has failed as well: {exc!r}", StoreWarning, stacklevel=3)
