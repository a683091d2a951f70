"""The commit protocol as a model: every state that a few processes can reach, over storage that loses, delays and repeats requests.

What is a step. A process is blocked while it waits for an answer, so that request, effect and answer make one step: when exactly a
process issues a request or takes note of an answer, nobody else can see. What a process does between two requests is part of the
step before. Every effectful request has two outcomes: it is answered, or it is not, and then is *in flight*: it may take effect at
any later moment, which covers a lost answer (at once), a packet that comes late (after the client gave up), and a lost one (never).
A put that is sent twice is told "exists" about itself. A second copy of any other request changes nothing, so it needs no step: ids
are never used again and slots never become free (where a mutant frees them, put copies stay in flight).

A crash is a process that makes no further step: as what must hold is checked in every state, every process has crashed everywhere.
`restart` then puts a new process, with an owner of its own, in its place, while the requests of the old one stay in flight.

A look for the newest record (hint, stats, listing, get) is one step: slots are only added, so all that its requests can see together
is some state of the log between what the process knew and the newest. It may end with any of these: caches and listings are stale.
An old slot shrunk to a tombstone still answers what it is asked, "whose operation?", so shrinking is no step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["BUGS", "Config", "Id", "Model", "Move", "Process", "Record", "State"]

Id = tuple[int, int, int]
"""A checkpoint: the epoch it was written in, the process, and which of its saves."""
Part = tuple[Id, int]
"""A data file: 1 is a file of the checkpoint, 2 its manifest."""
Message = tuple[str, Any, Any]
"""A request in flight: ("put", slot, record), ("write", part, 0) or ("delete", parts, 0)."""

BUGS = (
    "no fence",
    "unconditional latest",
    "epoch-blind gc",
    "log slots deleted",
    "commit before data is durable",
    "data of an ambiguous commit collected",
    "own epoch collected",
    "exists taken for lost",
    "no answer taken for done",
    "refusal settles an earlier attempt",
    "pruned before the commit",
    "acquired without a commit",
    "resolved while the slot is free",
)
"""What can be wrong with the protocol; the first six are the ones its design warns of."""


class Record(NamedTuple):
    epoch: int
    owner: int
    op: int
    kept: tuple[Id, ...]
    retired: tuple[Id, ...]


EMPTY = Record(0, 0, 0, (), ())


class Process(NamedTuple):
    """A job (or, cooperating, a tool): where it is and what it knows."""

    serial: int
    owner: int
    """From 1; 0 for a tool, which acquires nothing."""
    saves: int
    """How many it may still begin."""
    others: tuple[str, ...]
    """Other operations it may still begin."""
    op: str = ""
    """Operation under way; empty between two."""
    at: str = ""
    """The request it makes next."""
    change: str = ""
    """What the commit under way changes: acquire, save, prune or take (a slot, and nothing else)."""
    count: int = 0
    """Commits begun from slot `head`: makes operation ids, which need to be unique only among those who want the same slot."""
    epoch: int = 0
    head: int = 0
    """The newest slot it knows; the next one is what it tries to create."""
    fenced: bool = False
    collected: bool = False
    saving: Id | None = None
    whole: bool = False
    """Whether the data of `saving` is durable."""
    tries: int = 0
    ambiguous: bool = False
    """Whether an attempt of this commit is unanswered."""
    failed: bool = False
    todo: tuple[tuple[Part, ...], ...] = ()
    """Deletions to do, one request each."""
    deleted: tuple[Id, ...] = ()
    """Retired, and known to be gone: to be taken off the record."""
    unknown: tuple[int, int, Id] | None = None
    """Slot, operation and checkpoint of a save whose outcome is unknown."""


class State(NamedTuple):
    log: tuple[Record | None, ...]
    """By slot; None only where a mutant deletes."""
    data: frozenset[Part]
    flight: frozenset[Message]
    processes: tuple[Process, ...]
    acked: frozenset[Id]
    """Saves that were said to be done, and
    """
    denied: frozenset[Id]
    """those said not to be."""
    restarts: int
    wrong: str = ""


class Move(NamedTuple):
    """A step: who does what, with what answer, and how the operation ended if this was its end."""

    who: int
    begun: str
    """The operation that it begins with this step, if it does."""
    what: str
    detail: Any
    answer: Any
    outcome: str = ""


class Config(NamedTuple):
    processes: tuple[Process, ...]
    restarts: int = 0
    keep_all: bool = True
    """Whether saves keep all checkpoints; otherwise, as prune, the newest."""
    attempts: int = 2
    """How often a commit is sent; the library's 4 adds nothing that the second and the third do not show."""
    lag: int = 1
    """How many slots a look may be behind the newest."""
    exact: bool = False
    """Whether to remember also what can change nothing any more, as the storage does."""
    bug: str = ""


class _Turn:
    """One process making one step, on a copy of the state that it may change."""

    def __init__(self, config: Config, state: State, who: int) -> None:
        self.config = config
        self.bug = config.bug
        self.log = state.log
        self.data = state.data
        self.flight = state.flight
        self.acked = state.acked
        self.denied = state.denied
        self.wrong = ""
        self.outcome = ""
        self.state = state
        self.who = who
        self.p = state.processes[who]

    def done(self, begun: str, what: str, detail: Any, answer: Any) -> tuple[Move, State]:
        s = self.state
        processes = (*s.processes[: self.who], self.p, *s.processes[self.who + 1 :])
        new = State(self.log, self.data, self.flight, processes, self.acked, self.denied, s.restarts, self.wrong)
        return Move(self.who, begun, what, detail, answer, self.outcome), new

    def set(self, **fields: Any) -> None:
        self.p = self.p._replace(**fields)

    def record(self, slot: int) -> Record:
        return (self.log[slot - 1] if slot else EMPTY) or EMPTY

    @property
    def slot(self) -> int:
        """The slot of the commit under way."""
        return self.p.head + 1

    @property
    def op(self) -> int:
        return self.p.serial * 100 + self.p.count

    # --- operations: the code between two requests (store.py, epoch.py, transaction.py)

    def begin(self, op: str) -> None:
        p = self.p
        if op == "save":
            self.set(op=op, saves=p.saves - 1, whole=False)
            if not p.owner:
                self.set(at="look begin")
            elif p.epoch:
                self.acquired()
            else:
                self.acquire()
        else:
            others = list(p.others)
            others.remove(op)
            self.set(op=op, others=tuple(others))
            if op == "resolve":
                self.set(at="get first")
            elif op == "acquire":
                self.acquire()
            else:
                self.set(at=f"look {op}")

    def end(self, outcome: str) -> None:
        """The operation returned or raised."""
        p = self.p
        self.outcome = outcome
        if p.op == "save" and p.saving and outcome in ("failed", "fenced"):
            self.deny(p.saving)
        if p.fenced:
            self.set(saves=0, others=tuple(o for o in p.others if o in ("gc", "resolve")))
        keep = ("serial", "owner", "saves", "others", "count", "epoch", "head", "fenced", "collected", "deleted", "unknown")
        self.p = Process(**{name: getattr(self.p, name) for name in keep})

    def deny(self, checkpoint: Id) -> None:
        """Note that a checkpoint was said not to be committed, and never to be."""
        self.denied |= {checkpoint}
        if any(r and checkpoint in r.kept for r in self.log):
            self.wrong = f"committed, although it was said not to be: {checkpoint}"

    def acquire(self) -> None:
        if self.p.head:
            self.commit("acquire")
        else:
            self.set(at="look first")

    def acquired(self) -> None:
        """The process owns an epoch: go on with what it wanted it for."""
        p = self.p
        self.set(change="")
        if p.op == "prune":
            self.commit("prune")
        elif not p.collected:
            self.set(collected=True, at="look collect")
        elif p.op == "acquire":
            self.end("done")
        else:
            self.start_saving()

    def start_saving(self) -> None:
        p = self.p
        self.set(saving=(p.epoch, p.serial, p.saves))
        self.commit("save")

    def fenced_by(self, head: Record) -> bool:
        """Writer._check."""
        p = self.p
        if self.bug == "no fence" or (not p.owner and p.change != "save"):
            return False
        fenced = head.epoch != p.epoch or (p.owner > 0 and head.owner != p.owner)
        if fenced and p.owner:
            self.set(fenced=True)
        return fenced

    def commit(self, change: str) -> None:
        """Begin a commit: a new operation id, and what is known is what it builds on."""
        self.set(change=change, count=self.p.count + 1)
        self.build()

    def build(self) -> None:
        """Make the next record from the newest that is known (Log.commit)."""
        p = self.p
        head = self.record(p.head)
        if p.change == "acquire":
            owners = {r.owner for r in self.log[: p.head] if r}
            if head.owner == p.owner:
                self.set(epoch=head.epoch, count=p.count - 1)  # nothing was sent
                self.acquired()
                return
            if p.owner in owners:
                self.end("fenced")
                return
            if self.bug == "acquired without a commit":
                self.set(epoch=head.epoch + 1)
                self.acquired()
                return
        elif self.fenced_by(head):
            if p.change == "save":
                self.set(at="discard")
            else:
                self.end("fenced")
            return
        elif p.change == "prune" and self.draft()[3:] == head[3:]:
            self.end("done")
            return
        self.set(tries=0, ambiguous=False)
        if p.change == "save" and not p.whole:
            self.set(at="put" if self.bug == "commit before data is durable" else "write 1")
        else:
            self.set(at="put")
        if self.bug == "pruned before the commit":
            gone = [i for i in self.draft().retired if i not in head.retired]
            self.data = frozenset(part for part in self.data if part[0] not in gone)

    def draft(self) -> Record:
        p = self.p
        head = self.record(p.head)
        kept, retired = head.kept, head.retired
        if p.change == "acquire":
            return Record(head.epoch + 1, p.owner, self.op, kept, retired)
        if p.change != "take":
            retired = tuple(i for i in retired if i not in p.deleted)
        if p.change == "save":
            assert p.saving
            kept = (*kept, p.saving)
        if p.change == "prune" or (p.change == "save" and not self.config.keep_all):
            kept, retired = kept[-1:], (*retired, *kept[:-1])
        if self.bug == "acquired without a commit" and p.owner:
            return Record(max(head.epoch, p.epoch), p.owner, self.op, kept, retired)
        return Record(head.epoch, head.owner, self.op, kept, retired)

    def won(self) -> None:
        """The process believes that the slot is its own."""
        p = self.p
        record = self.draft()
        at = self.log[self.slot - 1] if self.slot <= len(self.log) else None
        if at is None or at.op != self.op:
            self.wrong = f"process {p.serial} believes that it won slot {self.slot}, and did not"
        if self.bug == "log slots deleted" and self.slot > 2:
            self.log = (*self.log[: self.slot - 3], None, *self.log[self.slot - 2 :])
        self.set(head=self.slot, count=0, tries=0, ambiguous=False)
        if p.change == "acquire":
            self.set(epoch=record.epoch)
            self.acquired()
        elif p.change == "take":
            self.set(at="get last")
        else:
            if p.change == "save":
                assert p.saving
                self.acked |= {p.saving}
            self.outcome = "done"
            todo = sorted(set(record.retired) - set(p.deleted))
            self.set(deleted=tuple(i for i in p.deleted if i in record.retired))
            self.delete([((i, 1), (i, 2)) for i in todo])

    def lost(self) -> None:
        """The slot is somebody else's."""
        self.set(tries=0, ambiguous=False)
        self.set(at="look race")

    def not_known(self) -> None:
        """CommitUnknown."""
        p = self.p
        if p.change == "acquire":
            self.end("unknown" if p.op == "acquire" else "failed")
        elif self.bug == "data of an ambiguous commit collected" and p.change == "save":
            self.set(at="discard", tries=0, ambiguous=False)
        else:
            if p.change == "save":
                assert p.saving
                self.set(unknown=(self.slot, self.op, p.saving))
            self.end("unknown")

    def error(self) -> None:
        """A commit failed for sure."""
        if self.p.change == "acquire":
            self.end("failed")
        else:
            self.set(at="look told", tries=0)

    def again(self) -> None:
        """The slot is still free: send the identical record once more."""
        if self.p.tries < self.config.attempts:
            self.set(at="put")
        else:
            self.not_known()

    def delete(self, todo: list[tuple[Part, ...]]) -> None:
        if todo:
            self.set(todo=tuple(todo), at="delete")
        else:
            self.deletions_done()

    def deletions_done(self) -> None:
        p = self.p
        if p.op == "gc":
            if not p.failed:
                self.set(deleted=tuple(sorted({*p.deleted, *self.record(p.head).retired})))
            self.end("failed" if p.failed else "done")
        elif p.change in ("save", "prune"):
            self.end("done")
        elif p.op == "acquire":
            self.end("done")
        else:
            self.start_saving()

    # --- requests, each with every answer there can be

    def moves(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield (request, what of, answer) for everything that can happen next."""
        p = self.p
        request, _, what = p.at.partition(" ")
        if request == "look":
            yield request, what, "lost"
            newest = len(self.log)
            for slot in range(max(p.head, newest - self.config.lag), newest + 1):
                if slot == 0 or self.log[slot - 1]:
                    yield request, what, slot
        elif request == "put":
            answers = ["refused", "unanswered"]
            free = self.slot > len(self.log) or self.log[self.slot - 1] is None
            if self.bug == "unconditional latest":
                free = True
            answers += ["created", "twice"] if free else ["exists"]
            for answer in answers:
                yield request, self.slot, answer
        elif request in ("get", "read", "peek"):
            slot = p.unknown[0] if request == "get" and p.unknown else self.slot
            yield request, slot, "lost"
            yield request, slot, "served"
        elif request == "list":
            for answer in ("lost", "stale", "served"):
                yield request, "", answer
        elif request == "write":
            for answer in ("unanswered", "done"):
                yield request, int(what), answer
        else:
            parts = p.todo[0] if request == "delete" else ((p.saving, 1), (p.saving, 2))
            for answer in ("unanswered", "done"):
                yield request, parts, answer

    def make(self, request: str, what: Any, answer: Any) -> None:
        getattr(self, f"_{request}")(what, answer)

    def _look(self, why: str, slot: Any) -> None:
        p = self.p
        ok = slot != "lost"
        if ok and slot > p.head:
            self.set(head=slot, count=1 if why == "race" else 0)
        head = self.record(self.p.head)
        if why == "told":  # Writer.tell_if_fenced: the error is Fenced if that can be seen, whatever it was
            fenced = ok and self.fenced_by(head)
            if p.change == "save":
                self.set(at="discard", failed=not fenced)
            else:
                self.end("fenced" if fenced else "failed")
        elif why == "last":
            if ok and self.fenced_by(head):
                self.set(failed=False)
            self.end("failed" if self.p.failed else "fenced")
        elif why == "collect":
            if ok and slot > 1:
                self.set(at="list")
            elif p.op == "acquire":
                self.end("done")
            else:
                self.start_saving()
        elif why == "race":
            if not ok:
                self.error()
            elif slot == p.head:
                self.not_known()  # the storage contradicts itself
            else:
                self.build()
        elif not ok:
            self.end("failed")
        elif why == "begin":
            self.set(epoch=head.epoch)
            self.start_saving()
        elif why == "first":
            self.commit("acquire")
        elif why == "gc":
            self.set(at="list")
        elif why == "prune":
            if p.owner and not p.epoch:
                self.commit("acquire")
            else:
                self.commit("prune")
        elif why == "resolve":
            assert p.unknown
            if p.unknown[0] == slot + 1:
                self.set(at="look take")
            else:
                self.set(at="get last")
        elif why == "take":
            self.commit("take")

    def _put(self, slot: int, answer: str) -> None:
        record = self.draft()
        self.set(tries=self.p.tries + 1)
        if answer in ("created", "twice"):
            self.log = (*self.log[: slot - 1], record, *self.log[slot:])
        if answer == "unanswered":
            self.flight |= {("put", slot, record)}
            self.set(ambiguous=True)
            if self.bug == "no answer taken for done":
                self.won()
                return
        elif self.bug == "log slots deleted" and answer != "refused":
            self.flight |= {("put", slot, record)}  # a copy: here slots become free again
        if answer == "created":
            self.won()
        elif answer != "refused":
            if self.bug == "exists taken for lost" and answer != "unanswered":
                self.lost()
            else:
                self.set(at="read")
        elif self.p.ambiguous and self.bug != "refusal settles an earlier attempt":
            self.again()
        else:
            self.set(at="peek")

    def _whose(self, slot: int, op: int) -> bool | None:
        """Log.took_effect."""
        found = self.log[slot - 1] if slot <= len(self.log) else None
        return None if found is None else found.op == op

    def _read(self, slot: int, answer: str) -> None:
        mine = self._whose(slot, self.op)
        if answer == "lost":
            self.not_known()
        elif mine:
            self.won()
        elif mine is None:
            self.again()
        else:
            self.lost()

    def _peek(self, slot: int, answer: str) -> None:
        if answer == "served" and self._whose(slot, self.op) is False:
            self.lost()
        else:
            self.error()

    def _get(self, slot: int, answer: str) -> None:
        assert self.p.unknown
        _, op, saved = self.p.unknown
        mine = self._whose(slot, op)
        last = self.p.at == "get last"
        if answer == "lost":
            self.end("failed")
        elif mine is None and not last and self.bug != "resolved while the slot is free":
            self.set(at="look resolve")
        elif mine is None and last:
            self.wrong = f"slot {slot} should be taken by now"
        elif mine:
            self.acked |= {saved}
            self.set(unknown=None)
            self.end("it was")
        else:
            self.deny(saved)
            self.set(unknown=None)
            self.end("it was not")

    def _write(self, part: int, answer: str) -> None:
        p = self.p
        assert p.saving
        if answer == "done":
            self.data |= {(p.saving, part)}
            self.set(whole=part == 2, at="put" if part == 2 else "write 2")
        else:
            self.flight |= {("write", (p.saving, part), 0)}
            self.set(at="discard", failed=True)

    def _discard(self, parts: tuple[Part, ...], answer: str) -> None:
        self._send_delete(parts, answer)
        self.set(at="look last")

    def _delete(self, parts: tuple[Part, ...], answer: str) -> None:
        p = self.p
        self._send_delete(parts, answer)
        if answer != "done":
            self.set(failed=True)
        elif p.change in ("save", "prune"):
            self.set(deleted=tuple(sorted({*p.deleted, parts[0][0]})))
        self.delete(list(p.todo[1:]))

    def _send_delete(self, parts: tuple[Part, ...], answer: str) -> None:
        if answer == "done":
            self.data -= set(parts)
        else:
            self.flight |= {("delete", parts, 0)}

    def _list(self, _: str, answer: str) -> None:
        p = self.p
        if answer == "lost":
            self.set(failed=True)
        head = self.record(p.head)
        found: dict[Id, list[Part]] = {}
        for part in sorted(self.data) if answer == "served" else ():
            checkpoint = part[0]
            old = checkpoint[0] < head.epoch or self.bug == "epoch-blind gc"
            old = old or (checkpoint[0] == head.epoch and self.bug == "own epoch collected")
            if checkpoint not in head.kept and (old or checkpoint in head.retired):
                found.setdefault(checkpoint, []).append(part)
        self.delete([tuple(parts) for parts in found.values()])


class Model:
    """All that can happen, from a configuration on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.start = State((), frozenset(), frozenset(), config.processes, frozenset(), frozenset(), config.restarts)

    def moves(self, state: State) -> Iterator[tuple[Move, State]]:
        """Yield every step that can come next, with the state it leads to."""
        for who, p in enumerate(state.processes):
            for begun_by, begun in [(Move(who, "", "", "", ""), state)] if p.op else self._begun(state, who):
                op = begun_by.begun
                if not begun.processes[who].op:
                    yield begun_by, begun  # it ended without any request
                    continue
                for request, what, answer in _Turn(self.config, begun, who).moves():
                    turn = _Turn(self.config, begun, who)
                    turn.make(request, what, answer)
                    move, new = turn.done(op, request, what, answer)
                    yield move, self.tidy(new)
        yield from self._arrivals(state)
        if state.restarts:
            yield from self._restarts(state)

    def _begun(self, state: State, who: int) -> Iterator[tuple[Move, State]]:
        p = state.processes[who]
        for op in dict.fromkeys((*(["save"] if p.saves else []), *p.others)):
            if op == "resolve" and not p.unknown:
                continue
            turn = _Turn(self.config, state, who)
            turn.begin(op)
            yield turn.done(op, "", "", "")

    def _arrivals(self, state: State) -> Iterator[tuple[Move, State]]:
        for message in state.flight:
            kind, what, record = message
            log, data = state.log, state.data
            if kind == "put":
                if self.config.bug == "unconditional latest" or what > len(log) or log[what - 1] is None:
                    log = (*log[: what - 1], record, *log[what:])
            elif kind == "write":
                data |= {what}
            else:
                data -= set(what)
            new = state._replace(log=log, data=data, flight=state.flight - {message})
            yield Move(-1, "", "arrives", message, ""), self.tidy(new)

    def _restarts(self, state: State) -> Iterator[tuple[Move, State]]:
        for who, p in enumerate(state.processes):
            if p.op and p.owner:
                serial = 1 + max(q.serial for q in state.processes)
                new = Process(serial, serial, max(p.saves, 1), ("acquire",))
                processes = (*state.processes[:who], new, *state.processes[who + 1 :])
                yield Move(who, "", "restart", serial, ""), state._replace(processes=processes, restarts=state.restarts - 1)

    def tidy(self, state: State) -> State:
        """Forget what can change nothing any more: puts for slots that are taken, and data of checkpoints that nothing can name.

        The latter is data of no process that may still commit it, of no put in flight, and not of the newest record. Only garbage
        collection reads it, to delete it. Should it be named all the same, it is missing, and found out.
        """
        if self.config.bug in ("log slots deleted", "unconditional latest"):
            return state
        flight = state.flight
        if flight:
            flight = frozenset(m for m in flight if m[0] != "put" or m[1] > len(state.log))
        if self.config.exact:
            return state._replace(flight=flight)
        promised = {i for m in flight if m[0] == "put" for i in m[2].kept}
        live = {p.saving for p in state.processes if p.at not in ("discard", "look last")} | promised
        live.update(state.log[-1].kept if state.log and state.log[-1] else ())
        return state._replace(
            flight=frozenset(
                m
                for m in flight
                if m[0] == "put" or (m[0] == "write" and m[1][0] in live) or (m[0] == "delete" and any(i in live for i, _ in m[1]))
            ),
            data=frozenset(part for part in state.data if part[0] in live),
            denied=frozenset(i for i in state.denied if i in promised),
        )

    def wrong(self, state: State) -> str:
        """Return what must not be in this state; an empty text if it is right."""
        if state.wrong:
            return state.wrong
        if not state.log:
            return "acknowledged without a record" if state.acked else ""
        if problem := _wrong_log(state.log):
            return problem
        newest = state.log[-1]
        assert newest
        retired = _ever_retired(state.log)
        for i in state.acked:
            if i not in newest.kept and i not in retired:
                return f"acknowledged, and missing: {i}"
        for i in newest.kept:
            if (i, 1) not in state.data or (i, 2) not in state.data:
                return f"the newest record names {i}, whose data is not there"
        for i in state.denied:
            if i in newest.kept or i in retired:
                return f"committed, although it was said not to be: {i}"
        return ""


@lru_cache(maxsize=1 << 16)
def _ever_retired(log: tuple[Record | None, ...]) -> frozenset[Id]:
    return frozenset(i for r in log if r for i in r.retired)


@lru_cache(maxsize=1 << 16)
def _wrong_log(log: tuple[Record | None, ...]) -> str:
    before = EMPTY
    for slot, record in enumerate(log, 1):
        if record is None:
            continue
        if slot > 1 and log[slot - 2] is None:
            before = record
            continue
        new = [i for i in record.kept if i not in before.kept]
        if record.epoch < before.epoch:
            return f"slot {slot} goes back to epoch {record.epoch}"
        if record.epoch > before.epoch and record[3:] != before[3:]:
            return f"the acquisition in slot {slot} did not see the newest commit of a lower epoch"
        if record.epoch == before.epoch and record.owner != before.owner:
            return f"slot {slot} was committed by another owner in the same epoch"
        if any(i[0] != record.epoch for i in new):
            return f"slot {slot} commits {new[0]} in epoch {record.epoch}: a fenced job took effect"
        if len(set(record.kept)) < len(record.kept) or set(record.kept) & set(record.retired):
            return f"slot {slot} names a checkpoint twice"
        gone = set(before.kept) - set(record.kept)
        if not gone <= set(record.retired) or (record.kept[-1:] != before.kept[-1:] and not new):
            return f"slot {slot} does not continue the record before it"
        before = record
    return ""
