"""Every state that the model of the commit protocol can reach, and what must hold in each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from protocol_model import EMPTY, Config, Id, Log, Message, Move, Part, Process, State
from protocol_process import Turn

__all__ = ["FAULTS", "Found", "Model", "explore", "kind_of", "wrong"]

FAULTS = frozenset({"lost", "stale", "refused", "unanswered", "twice", "put", "write", "delete"})
"""Answers that are faults; the last three are requests that arrive late."""
_REMEMBERED = 200_000
_FREED = ("log slots deleted", "unconditional latest")  # mutants in which a put for a slot that is taken may take effect again


class Model:
    """All that can happen, from a configuration on."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.start = State((), frozenset(), frozenset(), config.processes, frozenset(), frozenset(), config.restarts)
        self._turns: dict[Any, list[tuple[Move, Turn]]] = {}

    def moves(self, state: State) -> Iterator[tuple[Move, State]]:
        """Yield every step that can come next, with the state it leads to."""
        log, data, flight, processes, acked, denied, restarts, _ = state
        for who, p in enumerate(processes):
            for move, turn in self._turns_of(who, log, data, flight, p):
                yield (
                    move,
                    self._tidy(
                        turn.log,
                        turn.data,
                        turn.flight,
                        (*processes[:who], turn.p, *processes[who + 1 :]),
                        acked | {turn.acked} if turn.acked else acked,
                        denied | {turn.denied} if turn.denied else denied,
                        restarts,
                        turn.wrong,
                    ),
                )
        for message in flight:
            kind, what, record = message
            now, there = log, data
            if kind == "put":
                if self.config.bug == "unconditional latest" or what > len(log) or log[what - 1] is None:
                    now = (*log[: what - 1], record, *log[what:])
            elif kind == "write":
                there = data | {what}
            else:
                there = data - set(what)
            yield (
                Move(-1, "", "arrives", message, ""),
                self._tidy(now, there, flight - {message}, processes, acked, denied, restarts, ""),
            )
        if restarts:
            for who, p in enumerate(processes):
                serial = 1 + max(q.serial for q in processes)
                new = Process(serial, serial if p.owner else 0, max(p.saves, 1), ())
                living = (*processes[:who], new, *processes[who + 1 :])
                yield (
                    Move(who, "", "restarts", serial, ""),
                    self._tidy(log, data, flight, living, acked, denied, restarts - 1, ""),
                )

    def _turns_of(
        self, who: int, log: Log, data: frozenset[Part], flight: frozenset[Message], p: Process
    ) -> list[tuple[Move, Turn]]:
        """Return what a process can do, which depends on nothing that the others know."""
        key = (who, log, data, flight, p)
        found = self._turns.get(key)
        if found is None:
            if len(self._turns) > _REMEMBERED:
                self._turns.clear()
            found = self._turns[key] = list(self._new_turns(who, log, data, flight, p))
        return found

    def _new_turns(
        self, who: int, log: Log, data: frozenset[Part], flight: frozenset[Message], p: Process
    ) -> Iterator[tuple[Move, Turn]]:
        for op in [""] if p.op else dict.fromkeys((*(["save"] if p.saves else []), *p.others)):
            if op == "resolve" and not p.unknown:
                continue
            begun = Turn(self.config, log, data, flight, p)
            if op:
                begun.begin(op)
            if not begun.p.op:  # it ended without any request
                yield Move(who, op, "", "", "", begun.outcome), begun
                continue
            for request, what, answer in begun.moves():
                turn = Turn(self.config, begun.log, begun.data, begun.flight, begun.p)
                turn.make(request, what, answer)
                yield Move(who, op, request, what, answer, turn.outcome), turn

    def _tidy(
        self,
        log: Log,
        data: frozenset[Part],
        flight: frozenset[Message],
        processes: tuple[Process, ...],
        acked: frozenset[Id],
        denied: frozenset[Id],
        restarts: int,
        wrong: str,
    ) -> State:
        """Forget what can change nothing any more: puts for slots that are taken, and data of checkpoints that nothing can name.

        The latter is data of no process that may still commit it, of no put in flight, and not of the newest record. Only garbage
        collection reads it, to delete it. Should it be named all the same, it is missing, and found out.
        """
        if self.config.bug in _FREED:
            return State(log, data, flight, processes, acked, denied, restarts, wrong)
        if flight:
            flight = frozenset(m for m in flight if m[0] != "put" or m[1] > len(log))
        if not self.config.exact:
            live = {p.saving for p in processes if p.at not in ("discard", "look last")}
            kept = log[-1].kept if log and log[-1] else ()
            live.update(kept)
            if flight or denied:
                promised = {i for m in flight if m[0] == "put" for i in m[2].kept}
                denied &= promised.union(kept)
                live |= promised
                flight = frozenset(
                    m
                    for m in flight
                    if m[0] == "put"
                    or (m[0] == "write" and m[1][0] in live)
                    or (m[0] == "delete" and any(i in live for i, _ in m[1]))
                )
            if any(part[0] not in live for part in data):
                data = frozenset(part for part in data if part[0] in live)
        return State(log, data, flight, processes, acked, denied, restarts, wrong)


def wrong(state: State) -> str:
    """Return what must not be in this state; an empty text if it is right."""
    if state.wrong:
        return state.wrong
    if not state.log:
        return "acknowledged without a record" if state.acked else ""
    if problem := _wrong_newest(state.log):
        return problem
    newest = state.log[-1] or EMPTY
    retired = _ever_retired(state.log)
    for i in state.acked:
        if i not in newest.kept and i not in retired:
            return f"acknowledged, and missing: {i}"
    for i in newest.kept:
        if (i, 1) not in state.data or (i, 2) not in state.data:
            return f"the newest record names {i}, whose data is not there"
        if i in state.denied:
            return f"committed, although it was said not to be: {i}"
    return ""


@lru_cache(maxsize=1 << 16)
def _ever_retired(log: Log) -> frozenset[Id]:
    return frozenset(i for r in log if r for i in r.retired)


@lru_cache(maxsize=1 << 16)
def _wrong_newest(log: Log) -> str:
    """Say what is wrong with the newest record beside the one before it; each was the newest once."""
    before = log[-2] if len(log) > 1 else EMPTY
    slot, record = len(log), log[-1]
    if record is None:
        return f"the newest slot, {slot}, is gone"
    if before is None:  # by a mutant
        return ""
    new = [i for i in record.kept if i not in before.kept]
    if record.epoch < before.epoch:
        return f"slot {slot} goes back to epoch {record.epoch}"
    if record.epoch > before.epoch and (record.kept, record.retired) != (before.kept, before.retired):
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
    return ""


@dataclass
class Found:
    """What a search found."""

    states: int = 0
    steps: int = 0
    depth: int = 0
    """Steps from the beginning to the farthest state."""
    violation: str = ""
    trace: list[Move] = field(default_factory=list)
    """A shortest way to the violation."""
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each (request, answer) was taken: the fault points that fired."""
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each operation had each outcome."""

    def told(self) -> str:
        """Return the counter-example, a line per step."""
        lines = [f"{n:3}. {_told(move)}" for n, move in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"   → {self.violation}"])


def _told(move: Move) -> str:
    if move.who < 0:
        return f"a request arrives: {' '.join(map(str, move.detail))}"
    begun = f"begins to {move.begun}; " if move.begun else ""
    answer = f"{move.answer}" if move.what != "look" or move.answer == "lost" else f"sees slot {move.answer}"
    ended = f"; it ended: {move.outcome}" if move.outcome else ""
    return f"process {move.who + 1} {begun}{move.what} {move.detail} → {answer}{ended}"


def kind_of(move: Move, state: State) -> tuple[str, str]:
    """Return the request, with its reason if it is a look, and what became of it."""
    if move.what == "look":
        fresh = "lost" if move.answer == "lost" else "newest" if move.answer == len(state.log) else "stale"
        return f"look {move.detail}", fresh
    return move.what, str(move.detail[0] if move.who < 0 else move.answer)


def explore(config: Config) -> Found:
    """Visit every state that can be reached, nearest first, until there is none left or one is wrong.

    Visited states are remembered by a 64-bit hash: the chance that any of n states was taken for another is below n²/2⁶⁵,
    3 in a million for ten million.
    """
    model = Model(config)
    found = Found(states=1)
    before = {hash(model.start): 0}
    queue = deque([(model.start, 0)])
    while queue:
        state, depth = queue.popleft()
        origin = hash(state)
        for move, new in model.moves(state):
            found.steps += 1
            found.kinds[kind_of(move, state)] += 1
            if move.outcome:
                op = move.begun or state.processes[move.who].op
                found.outcomes[op, move.outcome] += 1
            mark = hash(new)
            if mark in before:
                continue
            before[mark] = origin
            found.states += 1
            found.depth = depth + 1
            found.violation = wrong(new)
            if found.violation:
                found.trace = _way(model, before, mark)
                return found
            queue.append((new, depth + 1))
    return found


def _way(model: Model, before: dict[int, int], end: int) -> list[Move]:
    """Return the steps that lead to the state with hash `end`."""
    marks = [end]
    start = hash(model.start)
    while marks[-1] != start:
        marks.append(before[marks[-1]])
    trace: list[Move] = []
    state = model.start
    for mark in marks[-2::-1]:
        move, state = next((m, s) for m, s in model.moves(state) if hash(s) == mark)
        trace.append(move)
    return trace
