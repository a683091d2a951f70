"""What a process does between one request of the commit protocol and the next: log.py, epoch.py, transaction.py, store.py as a model.

`Turn.moves` says what can happen to the request that a process waits for, `Turn.make` what it does then, up to its next request.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from protocol_model import EMPTY, Config, Id, Log, Message, Part, Process, Record

__all__ = ["Turn"]


class Turn:
    """One process making one step, on a copy of what it may change."""

    def __init__(self, config: Config, log: Log, data: frozenset[Part], flight: frozenset[Message], process: Process) -> None:
        self.config = config
        self.bug = config.bug
        self.log = log
        self.data = data
        self.flight = flight
        self.p = process
        self.acked: Id | None = None
        self.denied: Id | None = None
        self.wrong = ""
        self.outcome = ""

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
                self.commit("acquire")
        else:
            others = list(p.others)
            others.remove(op)
            self.set(op=op, others=tuple(others))
            self.set(at="get first" if op == "resolve" else f"look {op}")

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
        self.denied = checkpoint
        if any(r and checkpoint in r.kept for r in self.log):
            self.wrong = f"committed, although it was said not to be: {checkpoint}"

    def acquired(self) -> None:
        """The process owns an epoch: go on with what it wanted it for."""
        p = self.p
        self.set(change="")
        if p.op == "prune":
            self.commit("prune")
        elif not p.collected:
            self.set(collected=True, at="look collect")
        else:
            self.start_saving()

    def start_saving(self) -> None:
        p = self.p
        self.set(saving=(p.epoch, p.serial, p.saves), failed=False)
        self.commit("save")

    def fenced_by(self, head: Record) -> bool:
        """Writer._check."""
        p = self.p
        if self.bug == "fence not looked at after a lost race" and p.at == "look race":
            return False
        if self.bug == "no fence" or (not p.owner and p.change != "save"):
            return False
        fenced = head.epoch != p.epoch or (p.owner > 0 and head.owner != p.owner)
        if fenced and p.owner:
            self.set(fenced=True)
        return fenced

    def commit(self, change: str) -> None:
        """Begin a commit: a new operation id, and what is known is what it builds on."""
        self.set(change=change, count=self.p.count + 1)
        if self.p.head:
            self.build()
        else:
            self.set(at="look first")

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
        elif self.fenced_by(head):
            if p.change == "save":
                self.set(at="discard")
            else:
                self.end("fenced")
            return
        elif p.change == "prune" and self.draft()[3:] == head[3:]:
            self.set(count=p.count - 1)  # nothing was sent
            self.collect_retired(head)
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
        return Record(head.epoch, head.owner, self.op, kept, retired)

    def won(self) -> None:
        """The process believes that the slot is its own."""
        p = self.p
        record = self.draft()
        at = self.log[self.slot - 1] if self.slot <= len(self.log) else None
        if at is None or at.op != self.op:
            self.wrong = f"process {p.serial} believes that it won slot {self.slot}, and did not"
        if self.bug == "log slots deleted" and self.slot > 1:
            self.log = (*self.log[: self.slot - 2], None, *self.log[self.slot - 1 :])
        self.set(head=self.slot, count=0, tries=0, ambiguous=False)
        if p.change == "acquire":
            self.set(epoch=record.epoch)
            self.acquired()
        elif p.change == "take":
            self.set(at="get last")
        else:
            if p.change == "save":
                assert p.saving
                self.acked = p.saving
            self.collect_retired(record)

    def collect_retired(self, record: Record) -> None:
        """Engine.committed."""
        todo = sorted(set(record.retired) - set(self.p.deleted))
        self.set(deleted=tuple(i for i in self.p.deleted if i in record.retired))
        self.delete([((i, 1), (i, 2)) for i in todo])

    def lost(self) -> None:
        """The slot is somebody else's."""
        self.set(tries=0, ambiguous=False)
        self.set(at="look race")

    def not_known(self) -> None:
        """CommitUnknown."""
        p = self.p
        if p.change == "acquire":
            self.end("failed")  # of what the store was acquired for, that is sure
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
        if not p.failed and p.change not in ("save", "prune"):  # all that was retired then is gone
            self.set(deleted=tuple(sorted({*p.deleted, *self.record(p.head).retired})))
        if p.op == "gc":
            self.end("failed" if p.failed else "done")
        elif p.change in ("save", "prune"):
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
            self.set(head=slot, count=1 if why in ("first", "race") else 0)
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
            else:
                self.start_saving()
        elif why == "first":
            if ok:
                self.build()
            else:
                self.error()
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
            self.acked = saved
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
