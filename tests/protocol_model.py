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

from typing import Any, NamedTuple

__all__ = ["BUGS", "EMPTY", "Config", "Id", "Log", "Message", "Move", "Part", "Process", "Record", "State"]

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
    "fence not looked at after a lost race",
    "resolved while the slot is free",
)
"""What can be wrong with the protocol; the first six are the ones its design warns of."""


class Record(NamedTuple):
    epoch: int
    owner: int
    op: int
    kept: tuple[Id, ...]
    retired: tuple[Id, ...]


Log = tuple[Record | None, ...]
"""By slot; None only where a mutant deletes."""
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
    log: Log
    data: frozenset[Part]
    flight: frozenset[Message]
    processes: tuple[Process, ...]
    acked: frozenset[Id]
    """Saves that were said to be done."""
    denied: frozenset[Id]
    """Saves that were said not to have taken effect, and never to."""
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
