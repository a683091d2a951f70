"""What a job does with a store behind `FaultyProxy`, one operation at a time, and whether what it was told is true."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from faulty_http import (
    Answer,
    Exchange,
    Fault,
    FaultyProxy,
    Late,
    Request,
    answer,
    conflict_after,
    cut,
    cut_request,
    lost,
    unanswered,
)
from stores import contents, state_of, write

from ckptstore import Store
from ckptstore.errors import CkptStoreError, CommitUnknown
from ckptstore.naming import new_id

__all__ = [
    "GCS",
    "OPERATIONS",
    "READING",
    "S3",
    "Kind",
    "Side",
    "World",
    "judge",
    "late",
    "prepare",
    "rehearse",
    "requests_of",
    "strike",
]

_LARGE = bytes((5 << 20) + 1)
"""More than one part on S3, and a resumable upload on GCS."""
_SMALL = b"some bytes"

late = Late()


# --- what happens to a request


@dataclass(frozen=True)
class Kind:
    """A fault, and the requests that it can happen to."""

    fault: Fault
    applies: Callable[[Request], bool] = lambda request: True


def _is_conditional(request: Request) -> bool:
    """Whether it creates what must not be there yet. What only begins an upload creates nothing."""
    if request.method in ("POST", "PUT") and ("upload_id=" in request.path or "ifGenerationMatch=0" in request.path):
        return "name=" not in request.path
    return any(name.lower() == "if-none-match" for name, _ in request.headers)


def _has_body(request: Request) -> bool:
    return any(name.lower() == "content-length" and value not in ("0", "1") for name, value in request.headers)


def _is_listing(request: Request) -> bool:
    return request.method == "GET" and ("list-type=2" in request.path or re.search(r"/o\?", request.path) is not None)


def _is_reading(request: Request) -> bool:
    return request.method == "GET"


def _without_newest(x: Exchange) -> None:
    """The listing lacks the later half of what is there."""
    whole = x.forward()
    if whole.body.startswith(b"{"):
        found = json.loads(whole.body)
        found["items"] = found.get("items", [])[: len(found.get("items", [])) // 2]
        body = json.dumps(found).encode()
    else:
        entries = re.findall(rb"<Contents>.*?</Contents>", whole.body, re.DOTALL)
        body = whole.body
        for entry in entries[len(entries) // 2 :]:
            body = body.replace(entry, b"", 1)
    headers = [(name, value) for name, value in whole.headers if name.lower() != "content-length"]
    x.reply(Answer(whole.status, headers, body))


def _json_error(status: int, sent: int | None = None) -> Fault:
    body = json.dumps({"error": {"code": status, "message": "because"}}).encode()
    return lambda x: x.reply(Answer(sent or status, [("Content-Type", "application/json")], body))


def _deletion_error(x: Exchange) -> None:
    key = re.search(rb"<Key>.*?</Key>", x.request.body)
    body = b"<DeleteResult><Error>%s<Code>InternalError</Code><Message>because</Message></Error></DeleteResult>"
    x.reply(Answer(200, [("Content-Type", "application/xml")], body % (key[0] if key else b"")))


_ANYWHERE = {
    "reset before": Kind(lost),
    "reset after": Kind(unanswered),
    "reset in mid-body": Kind(cut_request, _has_body),
    "412 against one's own": Kind(conflict_after, _is_conditional),
    "late": Kind(late),
    "truncated": Kind(cut, _is_reading),
    "stale list": Kind(_without_newest, _is_listing),
}

S3 = {
    **_ANYWHERE,
    "409": Kind(answer(409, "OperationAborted")),
    "429": Kind(answer(429, "TooManyRequests")),
    "500": Kind(answer(500, "InternalError")),
    "503": Kind(answer(503, "SlowDown")),
    "expired credentials": Kind(answer(400, "ExpiredToken")),
    "error inside 200": Kind(answer(200, "InternalError"), lambda r: r.method == "POST" and "uploadId=" in r.path),
    "error inside 200 to a deletion": Kind(_deletion_error, lambda r: r.method == "POST" and "delete" in r.path),
}

GCS = {
    **_ANYWHERE,
    "409": Kind(_json_error(409)),
    "429": Kind(_json_error(429)),
    "500": Kind(_json_error(500)),
    "503": Kind(_json_error(503)),
    "error inside 200": Kind(_json_error(500, sent=200), lambda r: r.method in ("POST", "PUT")),
}


# --- the store


State = tuple[dict[str, str], frozenset[str]]
"""What the names point to, and the ids of the checkpoints."""


@dataclass
class Side:
    """How one service is reached."""

    proxy: FaultyProxy
    new_url: Callable[[], str]
    """Of a new store, past the proxy."""
    upstream: str
    """The address of the service, which the proxy takes the place of."""


class World:
    """A store, what is known to be in it, and the job that uses it through the proxy."""

    def __init__(self, side: Side) -> None:
        self.proxy = side.proxy
        self.url = side.new_url()
        self.proxied = self.url.replace(side.upstream, side.proxy.url)
        self.numbers = itertools.count(1)
        self.proxy.heal()
        with Store(self.url, owner="job", keep_last="all") as store:
            write(store, "old", step=0)
            self.kept = write(store, "kept", files={"a": _SMALL, "big": _LARGE}, step=0)
            write(store, step=0)
        self.direct = Store(self.url, acquire=False, keep_last="all")
        self.state = self.after = self.look()
        self.keep_last = "all"
        self.owner = "job"
        self._job: Store | None = None

    @property
    def job(self) -> Store:
        """The job's store, in which it has saved before."""
        if self._job is None:
            self._job = Store(self.proxied, owner=self.owner, keep_last=self.keep_last)
            write(self._job, "old", step=0)
            self.state = self.look()
        return self._job

    def open(self) -> Store:
        """Open the store anew through the proxy, to read."""
        return Store(self.proxied, acquire=False)

    def look(self) -> State:
        """Return what somebody finds who reaches the service directly, and knows nothing."""
        record = state_of(self.direct._engine.backend)
        return dict(record.names), frozenset(e.id for e in record.checkpoints)

    def overtake(self) -> None:
        """Let a newer job acquire the store, save, and collect."""
        with Store(self.url, owner=f"newer-{next(self.numbers)}", keep_last="all") as store:
            store.acquire()
            saved = write(store, step=next(self.numbers))
            store.gc()
        names, ids = self.look()
        assert names["latest"] == saved
        self.state = names, ids

    def renew(self) -> None:
        """Have another job from now on."""
        self.settle()
        self._job = None
        self.owner = f"job-{next(self.numbers)}"

    def check_all(self) -> None:
        """Every byte is there, and the next job can work."""
        self.proxy.heal()
        self.renew()
        with Store(self.url, owner="last", keep_last="all") as store:
            store.acquire()
            assert (store.names(), {c.id for c in store.checkpoints()}) == self.state
            assert store.verify() == []
            assert contents(store, "kept") == {"a": _SMALL, "big": _LARGE}
            write(store)
            store.gc()
            assert store.verify() == []

    def settle(self) -> None:
        """Wait for what the job does in the background."""
        if self._job is not None:
            self._job.close()

    def close(self) -> None:
        """Let go of all connections."""
        self.settle()
        self.direct.close()


# --- what is done


@dataclass(frozen=True)
class Operation:
    """Something that a user does. `run` sets `World.after` before it can take effect."""

    run: Callable[[World], None]
    prepare: Callable[[World], object] = lambda world: world.job
    keep_last: str = "all"


def _save(world: World, files: dict[str, bytes]) -> None:
    names, ids = world.state
    with world.job.transaction(step=next(world.numbers)) as tx:
        now = {**names, "latest": tx.id}
        world.after = now, frozenset({*ids, tx.id} if world.keep_last == "all" else now.values())
        for path, data in files.items():
            with tx.open(path) as file:
                file.write(data)


def _acquire(world: World) -> None:
    world.renew()
    with Store(world.proxied, owner=world.owner) as store:
        store.acquire()


def _tag(world: World) -> None:
    names, ids = world.state
    world.after = {**names, "best": names["latest" if names.get("best") != names["latest"] else "kept"]}, ids
    world.job.tag("best", world.after[0]["best"])


def _prune(world: World) -> None:
    names, _ = world.state
    world.after = names, frozenset(names.values())
    world.job.prune()


def _nothing(world: World) -> None:
    """No job is needed."""


def _before_prune(world: World) -> None:
    """Leave a checkpoint that no name points to."""
    world.job.names()
    write(world.direct, "old", step=1)
    write(world.direct, "old", step=2)


def _before_gc(world: World) -> None:
    """Leave what a job of an earlier epoch has written and never committed."""
    world.job.names()
    world.direct._engine.backend.replace(f"data/{new_id(0, None)}/x", b"left")


def _gc(world: World) -> None:
    assert world.job.gc() is not None


def _load(world: World) -> None:
    with world.open() as store:
        assert contents(store, "kept") == {"a": _SMALL, "big": _LARGE}


def _open(world: World) -> None:
    with world.open() as store:
        assert (store.names(), {c.id for c in store.checkpoints()}) == world.state


def _verify(world: World) -> None:
    with world.open() as store:
        checkpoint = store.checkpoint(world.kept)
        assert checkpoint.verify() == []
        assert checkpoint.verify_remote() == ([], [])


OPERATIONS = {
    "save": Operation(lambda w: _save(w, {"a": _SMALL})),
    "save large": Operation(lambda w: _save(w, {"big": _LARGE, "a": _SMALL})),
    "overwrite": Operation(lambda w: _save(w, {"a": _SMALL}), keep_last="1"),
    "acquire": Operation(_acquire, _nothing),
    "tag": Operation(_tag),
    "prune": Operation(_prune, _before_prune, keep_last="1"),
    "gc": Operation(_gc, _before_gc),
    "load": Operation(_load, _nothing),
    "open": Operation(_open, _nothing),
    "verify": Operation(_verify, _nothing),
}
READING = ("load", "open", "verify")


@dataclass
class Tried:
    """How an operation went."""

    fired: bool
    violations: list[str] = field(default_factory=list)


def requests_of(world: World, operation: Operation) -> list[Request]:
    """Return the requests of an operation that nothing happens to, and that is not the first of its kind."""
    rehearse(world, operation, 1)
    prepare(world, operation)
    before = len(world.proxy.requests)
    operation.run(world)
    world.settle()
    assert world.look() == world.after
    world.state = world.after
    return world.proxy.requests[before:]


def prepare(world: World, operation: Operation) -> None:
    """Bring about what the operation needs, and take what is there then for granted."""
    if world.keep_last != operation.keep_last:
        world.renew()
        world.keep_last = operation.keep_last
    operation.prepare(world)
    world.state = world.after = world.look()


def rehearse(world: World, operation: Operation, times: int) -> None:
    """Have the job do it a few times, and nothing happen."""
    for _ in range(times):
        prepare(world, operation)
        operation.run(world)
        world.settle()
        assert world.look() == world.after
        world.state = world.after


def strike(world: World, operation: Operation, nth: int, kind: Kind, *, newer: bool = False, earlier: int = 0) -> Tried:
    """Do it while `kind` happens to the `nth` of the requests that it can happen to, and judge what was told.

    `newer`: a newer job saves before what is late arrives. `earlier`: how often the job has done it before.
    """
    rehearse(world, operation, earlier)
    prepare(world, operation)
    seen = itertools.count(1)
    world.proxy.inject(kind.fault, lambda request: kind.applies(request) and next(seen) == nth)
    error: BaseException | None = None
    try:
        operation.run(world)
    except Exception as exc:  # judged below
        error = exc
    world.settle()
    tried = Tried(not world.proxy.pending)
    world.proxy.heal()
    tried.violations += judge(world, error)
    if newer:
        world.overtake()
    late.arrive()
    if world.look() != world.state:
        tried.violations.append("what arrived late has changed the store")
        world.state = world.look()
    if newer or error is not None:
        world.renew()
    return tried


def judge(world: World, error: BaseException | None) -> Iterator[str]:
    """Compare what was told with what is there, and take that for granted from now on."""
    before, after = world.state, world.after
    found = world.state = world.look()
    if error is None:
        if found != after:
            yield f"acknowledged {after}, found {found}"
        return
    yield f"{type(error).__name__}: {error}"  # all of them can be got over
    if isinstance(error, CommitUnknown):
        if found not in (before, after):
            yield f"{found} is neither {before} nor {after}"
    elif isinstance(error, CkptStoreError) and found != before:
        yield f"said to have failed, but {before} became {found}"
