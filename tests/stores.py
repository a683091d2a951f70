"""Stores over backends that a test has made, and the raw objects below them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from unittest import mock

from ckptstore import Store, registry
from ckptstore.backends import memory
from ckptstore.backends.memory import MemoryBackend
from ckptstore.errors import BackendError
from ckptstore.log import Log
from ckptstore.protocol import Backend
from ckptstore.record import Record
from ckptstore.testing import Fault, FaultyBackend

_T = TypeVar("_T")
_numbers = itertools.count()
_given: dict[str, Backend] = {}


class Given:
    """Opens ``given://n``: the backend that a test put there."""

    options: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def open(cls, location: str, options: Mapping[str, str]) -> Backend:
        assert not options
        return _given.pop(location)


def store_on(backend: Backend, **options: Any) -> Store:
    """Return a store on `backend`."""
    place = str(next(_numbers))
    _given[place] = backend
    with mock.patch.dict(registry._BUILTIN, {"given": f"{__name__}:Given"}):
        return Store(f"given://{place}", **options)


def new_memory() -> MemoryBackend:
    """Return a memory backend that nobody else has opened."""
    return MemoryBackend.open(f"tests-{next(_numbers)}", {})


def unreadable() -> Store:
    """Return a store with a checkpoint in it, as a new job opens it that can list and read nothing of it."""
    inner = new_memory()
    with store_on(inner) as before:
        before.save({"x": 1}, step=1)
    sick = FaultyBackend(inner)
    sick.plan += [Fault(method, 0, before=BackendError("nothing can be read")) for method in ("list", "get", "stat", "read_into")]
    return store_on(sick)


def objects(backend: MemoryBackend) -> dict[str, bytes]:
    """Return the dictionary behind a memory backend."""
    return memory._spaces[backend.url.removeprefix("memory://")].objects


def state_of(backend: Backend) -> Record:
    """Return the newest record, read by somebody who knows nothing yet."""
    return Log(backend).head().record


def write(store: Store, name: str = "latest", files: Mapping[str, bytes] | None = None, **more: Any) -> str:
    """Save plain files as one checkpoint and return its id."""
    with store.transaction(name, **more) as tx:
        for path, data in (files or {"a.bin": b"some bytes"}).items():
            with tx.open(path) as file:
                file.write(data)
    return tx.checkpoint.id


def contents(store: Store, checkpoint_id: str) -> dict[str, bytes]:
    """Return the files of a checkpoint, as somebody reads them who opens them one by one."""
    checkpoint = store.checkpoint(checkpoint_id)
    found = {}
    for path in checkpoint.files:
        with checkpoint.open(path) as file:
            found[path] = file.read()
    return found


def tree(folder: Path) -> dict[str, bytes]:
    """Return all files below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class RawFolder:
    """The raw access of the conformance suite to a backend that keeps its objects in a folder: to be named before `BackendConformance`."""

    place: Path

    @property
    def root(self) -> Path:
        return self.place / "runs" / "42"

    def raw_get(self, key: str) -> bytes | None:
        path = self.root / key
        return path.read_bytes() if path.exists() else None

    def raw_put(self, key: str, data: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def raw_keys(self) -> Sequence[str]:
        return [str(p.relative_to(self.root)) for p in self.root.rglob("*") if not p.is_dir()]


class Killed(BaseException):
    """What a process meets that is killed in the middle of a call."""


class Mortal(FaultyBackend):
    """The storage as seen by a process that can be killed: from then on, none of its calls reaches the storage.

    One thread moves all parts, so that the same calls come in the same order each time.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.capabilities = replace(inner.capabilities, parallel=1)
        self.calls_left: int | None = None
        """Die at the call after so many; None: live."""
        self.last_takes_effect = False
        """Whether the call that it dies in still reaches the storage."""
        self._life = threading.RLock()

    def die(self) -> None:
        """Die at once."""
        self.calls_left = 0
        raise Killed

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        """Make one call, unless the process is dead."""
        if method == "close":  # for whoever cleans up after the dead
            return call()
        with self._life:
            if self.calls_left is not None:
                self.calls_left -= 1
                if self.calls_left < 0:
                    if self.calls_left == -1 and self.last_takes_effect:
                        call()
                    raise Killed
            return super().run(method, call)
