"""The model of the commit protocol beside the real code: each process of the model is a real `Store`, led step by step.

Each store runs in a thread of its own over the memory backend, and waits at every request until it is told what becomes of it.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from unittest import mock

from protocol_model import Config, Id, Message, Move, Part, Process, State
from protocol_search import FAULTS, Model, kind_of
from stores import Killed, new_memory, objects, store_on

from ckptstore import log, transaction
from ckptstore.backends.memory import MemoryBackend, _MemoryWriter
from ckptstore.errors import AlreadyExists, Ambiguous, BackendError, CkptStoreError, CommitUnknown, Fenced, NotFound
from ckptstore.log import LOG, Head, Log, slot_key, slot_of
from ckptstore.naming import DATA, MANIFEST, data_key
from ckptstore.protocol import Backend, ObjectInfo
from ckptstore.record import Record, decode
from ckptstore.retention import Retention
from ckptstore.testing import FaultyBackend

__all__ = ["walk"]

_T = TypeVar("_T")
_PATIENCE = 60.0  # seconds until a thread that does not get to its next request is taken for hung
_FILE = "a.bin"


class _Staged(FaultyBackend):
    """The storage as one process sees it. What is not a step of the model passes: hints, and what belongs to a look."""

    def __init__(self, inner: Backend, ask: Callable[[str, Any], Any]) -> None:
        super().__init__(inner)
        self.capabilities = replace(inner.capabilities, parallel=1)
        self.ask = ask
        self.free = False
        self.sees: int | None = None
        """Newest slot that the look under way sees; None outside of looks."""
        self.in_flight: Callable[[], object] = lambda: None
        """What the request that was last left without an answer does, should it arrive."""

    def visible(self, key: str) -> None:
        if self.sees is not None and (slot_of(key) or 0) > self.sees:
            raise NotFound(f"{key} is not seen yet")

    def stat(self, key: str) -> ObjectInfo:
        self.visible(key)
        return super().stat(key)

    def get(self, key: str, limit: int) -> bytes:
        self.visible(key)
        slot = slot_of(key) if key.startswith(LOG) else None
        if self.sees is None and slot is not None and self.ask("get", slot) == "lost":
            raise BackendError("no answer")
        return super().get(key, limit)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ObjectInfo]:
        answer = self.ask("list", None) if prefix == DATA and not self.free else "served"
        if answer == "lost":
            raise BackendError("no answer")
        return super().list(prefix, start_after) if answer == "served" else iter(())

    def put_if_absent(self, key: str, data: bytes, ready: Callable[[], object] | None = None) -> None:
        if ready:
            ready()
        answer = self.ask("put", slot_of(key))
        if answer == "refused":
            raise BackendError("refused")
        if answer == "unanswered":
            self.in_flight = partial(self._land, key, data)
            raise Ambiguous("no answer")
        super().put_if_absent(key, data)
        if answer == "twice":
            raise AlreadyExists("the second of two packets")

    def _land(self, key: str, data: bytes) -> None:
        with suppress(AlreadyExists):
            self.inner.put_if_absent(key, data)

    def run(self, method: str, call: Callable[[], _T]) -> _T:
        writer = getattr(call, "__self__", None)
        if method == "writer.finish" and isinstance(writer, _MemoryWriter):
            assert writer._buffer is not None
            key, data = writer._key, bytes(writer._buffer)
            if self.ask("write", 2 if key.endswith(MANIFEST) else 1) != "done":
                self.in_flight = partial(self._land, key, data)
                raise BackendError("no answer")
        return super().run(method, call)

    def delete(self, keys: Sequence[str]) -> None:
        if self.ask("delete", tuple(keys)) == "done":
            super().delete(keys)
            return
        self.in_flight = partial(self.inner.delete, list(keys))
        raise BackendError("no answer")


class _Actor:
    """One process of the model, for real."""

    def __init__(self, storage: MemoryBackend, model: Process, config: Config) -> None:
        self.serial, self.saves = model.serial, model.saves
        self.ops: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.asked: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.dead = False
        self.backend = _Staged(storage, self.ask)
        keep: Any = "all" if config.keep_all else 1
        self.store = store_on(
            self.backend, owner=f"owner {model.owner}" if model.owner else None, acquire=model.owner > 0, keep_last=keep
        )
        the_log = self.store._engine.log
        take_over = self.store._writer._take_over
        self.store._writer._take_over = partial(self._freely, take_over)  # type: ignore[method-assign]
        the_log.head = partial(self._look, the_log)  # type: ignore[method-assign]
        self.unknown: CommitUnknown | None = None
        self.now: tuple[str, Any] = ("ended", "")
        """What it waits for: a request, or ("ended", outcome)."""
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    # in its own thread (and in that of its deletions, while its own waits for it)

    def ask(self, request: str, detail: Any) -> Any:
        if self.dead:
            raise Killed
        self.asked.put((request, detail))
        answer = self.answers.get()
        if self.dead:
            raise Killed
        return answer

    def _freely(self, take_over: Callable[[Head], Record | None], head: Head) -> Record | None:
        self.backend.free = True  # it lists the data in an empty store, to find out whether that was always so
        try:
            return take_over(head)
        finally:
            self.backend.free = False

    def _look(self, the_log: Log) -> Head:
        slot = self.ask("look", None)
        if slot == "lost":
            raise BackendError("no answer")
        self.backend.sees = slot
        try:
            return Log.head(the_log)
        finally:
            self.backend.sees = None

    def _live(self) -> None:
        while (op := self.ops.get()) is not None:
            try:
                outcome = self._run(op)
            except Fenced:
                outcome = "fenced"
            except CommitUnknown as exc:
                outcome = "unknown"
                if op == "save":
                    self.unknown = exc
            except CkptStoreError:
                outcome = "failed"
            except Killed:
                return
            except BaseException as exc:
                outcome = f"{type(exc).__name__}: {exc}"
            self.asked.put(("ended", outcome))

    def _run(self, op: str) -> str:
        if op == "save":
            self.saves -= 1
            with self.store.transaction() as tx, tx.open(_FILE) as file:
                file.write(b"some bytes")
            self.store._engine.settle()
        elif op == "prune":
            with mock.patch.object(self.store, "_retention", Retention(keep_last=1)):
                self.store.prune()
        elif op == "gc":
            self.store.gc()
        else:
            assert self.unknown
            return "it was" if self.store.resolve(self.unknown) else "it was not"
        return "done"

    # in the thread of the one who leads

    def begin(self, op: str) -> None:
        self.ops.put(op)
        self.now = self.asked.get(timeout=_PATIENCE)

    def answer(self, answer: Any) -> None:
        self.answers.put(answer)
        self.now = self.asked.get(timeout=_PATIENCE)

    def kill(self) -> None:
        self.dead = True
        self.answers.put(None)
        self.ops.put(None)
        self.thread.join(_PATIENCE)
        assert not self.thread.is_alive()
        self.store.close()


def _id(checkpoint: Id) -> str:
    epoch, serial, number = checkpoint
    return f"e{epoch}-{serial:06x}{number:06x}"


def _key(part: Part) -> str:
    return data_key(_id(part[0]), MANIFEST if part[1] == 2 else _FILE)


def _request(p: Process) -> tuple[str, Any]:
    """Return what the model's process waits for, as the real one says it."""
    request, _, what = p.at.partition(" ")
    if request in ("look", "list"):
        return request, None
    if request == "write":
        return request, int(what)
    if request in ("get", "read", "peek"):
        return "get", p.unknown[0] if request == "get" and p.unknown else p.head + 1
    if request == "put":
        return request, p.head + 1
    parts = p.todo[0] if request == "delete" else ((p.saving, 1), (p.saving, 2))
    return "delete", frozenset(_key(part) for part in parts if part[0])


class _Walk:
    def __init__(self, config: Config) -> None:
        self.config = config._replace(exact=True)
        self.model = Model(self.config)
        self.state = self.model.start
        self.storage = new_memory()
        self.actors = [_Actor(self.storage, p, config) for p in config.processes]
        self.flight: dict[Message, Callable[[], object]] = {}
        self.path: list[Move] = []

    def new_id(self, epoch: int, step: int | None) -> str:
        actor = next(a for a in self.actors if a.thread is threading.current_thread())
        return _id((epoch, actor.serial, actor.saves))

    def step(self, move: Move, new: State) -> None:
        """Do for real what the model does in `move`, and compare."""
        self.path.append(move)
        if move.what == "arrives":
            self.flight.pop(move.detail)()
        elif move.what == "restarts":
            self.actors[move.who].kill()
            self.actors[move.who] = _Actor(self.storage, new.processes[move.who], self.config)
        else:
            actor = self.actors[move.who]
            if move.begun:
                actor.begin(move.begun)
            if move.what:
                actor.answer(move.answer)
            for message in new.flight - self.state.flight:
                self.flight[message] = actor.backend.in_flight
            self._compare_process(actor, new.processes[move.who], move)
        self.state = new
        self._compare_storage()

    def _compare_process(self, actor: _Actor, p: Process, move: Move) -> None:
        what, detail = actor.now
        if not p.op:
            assert (what, detail) == ("ended", move.outcome), f"the code: {what} {detail}; the model: {move.outcome}"
            return
        request = _request(p)
        if what == "delete":  # one who lists first does not delete what is gone
            assert request[0] == "delete"
            assert frozenset(detail) == request[1] or (not detail and p.change)
        else:
            assert (what, detail) == request, f"the code: {what} {detail}; the model: {request}"

    def _compare_storage(self) -> None:
        found = objects(self.storage)
        slots = sorted(key for key in found if key.startswith(LOG))
        assert slots == [slot_key(n) for n in range(1, len(self.state.log) + 1)]
        for key, wanted in zip(slots, self.state.log, strict=True):
            assert wanted
            record = decode(found[key], slot_of(key) or 0)
            assert isinstance(record, Record)
            assert record.epoch == wanted.epoch
            assert record.owner == (f"owner {wanted.owner}" if wanted.owner else "")
            assert [e.id for e in record.checkpoints] == [_id(i) for i in wanted.kept]
            assert sorted(record.retired) == sorted(_id(i) for i in wanted.retired)
            assert record.names == ({"latest": _id(wanted.kept[-1])} if wanted.kept else {})
        assert {key for key in found if key.startswith(DATA)} == {_key(part) for part in self.state.data}

    def close(self) -> None:
        for actor in self.actors:
            actor.kill()


def walk(config: Config, rng: random.Random, seen: Counter[tuple[str, str]]) -> int:
    """Take one random path of the model, preferring kinds of steps seldom `seen`, to where it ends; return its length."""
    led = _Walk(config)
    with mock.patch.object(transaction, "new_id", led.new_id), mock.patch.object(log, "_ATTEMPTS", config.attempts):
        try:
            while moves := sorted(led.model.moves(led.state), key=lambda found: repr(found[0])):
                kinds = [kind_of(move, led.state) for move, _ in moves]
                # What goes well leads on, and what came seldom is worth more.
                weights = [(1 if kind[1] in FAULTS else 5) / (1 + seen[kind] ** 0.3) for kind in kinds]
                chosen = rng.choices(range(len(moves)), weights)[0]
                seen[kinds[chosen]] += 1
                led.step(*moves[chosen])
        except AssertionError as exc:
            told = "\n".join(map(str, led.path))
            raise AssertionError(f"the code left the model at the end of this path:\n{told}\n{exc}") from exc
        finally:
            led.close()
    return len(led.path)
