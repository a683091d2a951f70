"""Every request of a save on S3 goes wrong in every way: what was said about the outcome is true, and stays so."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
from botocore import exceptions as sdk
from s3_rig import PART, TIMEOUT, Handler, Service, loses, on_wire, says
from stores import contents, write

from ckptstore import Store, retry
from ckptstore.errors import CkptStoreError, CommitUnknown

pytest_plugins = ("s3_fixtures",)

_FAILED = says(500, "InternalError")


_SMALL = b"small"


class _Late:
    """Keeps requests back, which arrive when nobody waits for them any more."""

    def __init__(self) -> None:
        self._kept: list[Callable[[], object]] = []

    def keep(self, send: Any, request: Any) -> Any:
        self._kept.append(lambda: send(request))
        raise TIMEOUT

    def arrive(self) -> None:
        while self._kept:
            self._kept.pop()()


_late = _Late()


def _failed_after_all(send: Any, request: Any) -> Any:
    send(request)
    return _FAILED(send, request)


def _sent_twice(send: Any, request: Any) -> Any:
    send(request)
    if hasattr(request.body, "seek"):
        request.body.seek(0)
    return send(request)


_KINDS: dict[str, Handler] = {
    "lost request": loses(TIMEOUT, after=False),
    "lost answer": loses(sdk.ConnectionClosedError(endpoint_url="http://s3"), after=True),
    "failed, but took effect": _failed_after_all,
    "throttled": says(503, "SlowDown"),
    "sent twice": _sent_twice,
    "late": _late.keep,
}


class _Nth:
    """Does `handler` to request number `nth` of a save, or to all from there on."""

    def __init__(self, handler: Handler, nth: int, to_all: bool) -> None:
        self._handler, self._nth, self._to_all = handler, nth, to_all
        self._seen = 0
        self._lock = threading.Lock()

    @property
    def struck(self) -> bool:
        return self._seen >= self._nth

    def __call__(self, send: Any, request: Any) -> Any:
        with self._lock:
            self._seen += 1
            here = self._seen >= self._nth if self._to_all else self._seen == self._nth
        return self._handler(send, request) if here else None


@pytest.mark.parametrize("data", [_SMALL, bytes(PART + 1)], ids=["one request", "parts"])
@pytest.mark.parametrize("kind", _KINDS)
def test_any_request_goes_wrong_once_and_the_save_succeeds(
    server: Service, monkeypatch: pytest.MonkeyPatch, kind: str, data: bytes
) -> None:
    monkeypatch.setattr(retry, "_FIRST_WAIT", 0.0)
    url = server.url(keep_last="all")
    saved = []
    with Store(url, owner="job") as store:
        saved.append(write(store, files={"a": data}))
        backend: Any = store._engine.backend
        for nth in itertools.count(1):
            fault = _Nth(_KINDS[kind], nth, to_all=False)
            with on_wire(backend.inner, fault):
                saved.append(write(store, files={"a": data}, step=nth))
            if not fault.struck:
                break
            _late.arrive()
    assert nth == (5 if data == _SMALL else 9)  # each request had its turn
    _check(url, saved, data)


@pytest.mark.parametrize("kind", _KINDS)
def test_all_goes_wrong_from_some_request_on_and_what_is_said_is_true(server: Service, kind: str) -> None:
    url = server.url(keep_last="all", retry_seconds=0)
    saved, told = [], []
    with Store(url, owner="job") as store:
        saved.append(write(store, files={"a": _SMALL}))
        backend: Any = store._engine.backend
        for nth in itertools.count(1):
            fault = _Nth(_KINDS[kind], nth, to_all=True)
            error: CkptStoreError | None = None
            with on_wire(backend.inner, fault):
                tx = store.transaction(step=nth)
                try:
                    with tx, tx.open("a") as file:
                        file.write(_SMALL)
                except CkptStoreError as exc:
                    error = exc
            _late.arrive()
            if error is None or (isinstance(error, CommitUnknown) and store.resolve(error)):
                saved.append(tx.id)
            told.append(type(error))
            if not fault.struck:
                break
    assert CommitUnknown in told or kind == "sent twice"
    _check(url, saved, _SMALL)


def _check(url: str, saved: list[str], data: bytes) -> None:
    with Store(url, owner="later") as store:
        store.acquire()
        assert [c.id for c in store.checkpoints()] == saved
        assert store.verify() == []
        assert contents(store, saved[-1]) == {"a": data}
        backend = store._engine.backend
        assert {info.key.split("/")[1] for info in backend.list("data/") if not info.key.endswith(".partial")} == {*saved}
