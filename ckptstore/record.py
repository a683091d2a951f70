"""Commit records: the whole state of a store in one immutable object. Field by field in docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .entries import BASE_FORMAT, Base, Entries, check_base
from .entry import Entry, check_count, check_digest, check_id, check_text, decode_entry
from .envelope import JSON, seal, unseal
from .errors import Damaged, DamagedRecord
from .key import Key
from .naming import check_name

__all__ = ["EMPTY", "RECORD_LIMIT", "Entry", "Record", "Tombstone", "decode", "encode", "encode_tombstone"]

RECORD_LIMIT = 256 << 20
"""Records larger than this many bytes are refused: about a million checkpoints."""


@dataclass(frozen=True)
class Record:
    """The state of a store after commit `n`."""

    n: int
    epoch: int
    """Grows by one each time a new owner acquires the store."""
    owner: str
    """Who acquired this epoch."""
    op: str = ""
    """Operation id of the commit that made this record."""
    prev: str | None = None
    """SHA-256 of the bytes of the record before, None for the first."""
    names: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Entries = field(default_factory=Entries)
    """Oldest commit first. May be given as any sequence of entries."""
    retired: tuple[str, ...] = ()
    """Ids no longer kept whose data may not have been deleted yet."""
    resumed: str | None = None
    """The checkpoint that the current job resumed from."""
    spared: tuple[str, ...] = ()
    """Ids of data that a damaged record may have named: never collected, only deleted by hand."""
    past_owners: tuple[str, ...] = ()
    """Owners of earlier epochs, newest last, bounded: none of them may come back."""
    store: str | None = None
    """With a key: what tells this store's records from those that another one has at the same slots. None without a key."""

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoints, Entries):
            object.__setattr__(self, "checkpoints", Entries(self.checkpoints))

    def entry(self, checkpoint_id: str) -> Entry | None:
        """Return the entry with this id, if it is kept."""
        return self.checkpoints.get(checkpoint_id)

    def but(self, **changes: Any) -> Record:
        """Do as `dataclasses.replace`, which takes five times as long, and each save makes four records of one another."""
        other = object.__new__(Record)
        vars(other).update(vars(self), **changes)
        return other

    def without(self, ids: set[str]) -> Record:
        """Return this state with the checkpoints `ids`, and the names that point to them, retired."""
        checkpoints, gone = self.checkpoints.without(ids)
        if not gone:
            return self
        return self.but(
            checkpoints=checkpoints,
            names={name: i for name, i in self.names.items() if i not in ids},
            retired=self.retired + gone,
            resumed=None if self.resumed in ids else self.resumed,
        )


EMPTY = Record(n=0, epoch=0, owner="")
"""The state of a store before its first commit."""


@dataclass(frozen=True)
class Tombstone:
    """What is left of an old log slot: enough to know that it was taken, and by which operation."""

    n: int
    op: str
    store: str | None = None


def encode(record: Record, key: Key | None = None) -> bytes:
    """Return the bytes of `record`. What a name points to is listed in it, so that whoever loads it needs no base."""
    entries = record.checkpoints
    listed = entries.listed([*record.names.values(), *([record.resumed] if record.resumed else [])] if entries.base else ())
    return seal(
        {
            "kind": "record",
            "n": record.n,
            "epoch": record.epoch,
            "owner": record.owner,
            "op": record.op,
            "prev": record.prev,
            "names": dict(record.names),
            "retired": list(record.retired),
            "resumed": record.resumed,
            "spared": list(record.spared),
            "past_owners": list(record.past_owners),
            **_store_field(record.store),
            **_base_field(entries),
        },
        key,
        encoded={"checkpoints": f"[{','.join(e.json for e in listed)}]"},
        version=BASE_FORMAT if entries.base else None,
    )


def _base_field(entries: Entries) -> dict[str, JSON]:
    base = entries.base
    if base is None:
        return {}
    return {"base": {"name": base.name, "sha256": base.digest, "before": base.before, "without": sorted(entries.gone)}}


def _store_field(store: str | None) -> dict[str, JSON]:
    return {} if store is None else {"store": store}


def encode_tombstone(n: int, op: str, store: str | None = None, key: Key | None = None) -> bytes:
    """Return the bytes that a record is shrunk to once newer ones are in place."""
    return seal({"kind": "tombstone", "n": n, "op": op, **_store_field(store)}, key)


def decode(data: bytes, n: int, key: Key | None = None) -> Record | Tombstone:
    """Read what slot `n` holds, trusting nothing.

    Raises:
        DamagedRecord: the bytes are not a record of this slot, or contradict themselves. `Forged` if they are not authentic.
        KeyMismatch, NewerFormat
    """
    what = f"commit record {n}"
    try:
        body = unseal(data, what, key)
        if body.get("n") != n:
            raise ValueError("it belongs to another slot")
        if body.get("kind") == "tombstone":
            return Tombstone(n, check_text(body["op"]), _store(body))
        if body.get("kind") != "record":
            raise ValueError("it is neither record nor tombstone")
        return _decode_record(body)
    except DamagedRecord:
        raise
    except Damaged as exc:
        raise DamagedRecord(str(exc)) from None
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DamagedRecord(f"{what} is not valid: {type(exc).__name__}: {exc!s:.200}") from None


def _decode_record(body: dict[str, JSON]) -> Record:
    listed = [decode_entry(e) for e in _list(body["checkpoints"])]
    record = Record(
        n=check_count(body["n"]),
        epoch=check_count(body["epoch"]),
        owner=check_text(body["owner"]),
        op=check_text(body["op"]),
        prev=None if body["prev"] is None else check_digest(body["prev"]),
        names={check_name(k): check_id(v) for k, v in body["names"].items()},
        checkpoints=_entries(listed, body),
        retired=tuple(check_id(i) for i in _list(body["retired"])),
        resumed=None if body["resumed"] is None else check_id(body["resumed"]),
        spared=tuple(check_id(i) for i in _list(body["spared"])),
        past_owners=tuple(check_text(o) for o in _list(body["past_owners"])),
        store=_store(body),
    )
    ids = record.checkpoints.own.keys()
    if len(ids) != len(listed):
        raise ValueError("a checkpoint is listed twice")
    if not ids >= {*record.names.values()}:
        raise ValueError("a name points to a checkpoint that is not listed")
    if not ids.isdisjoint(record.retired) or not ids.isdisjoint(record.checkpoints.gone):
        raise ValueError("a checkpoint is both kept and retired")
    return record


def _entries(listed: list[Entry], body: dict[str, JSON]) -> Entries:
    if body.get("base") is None:
        return Entries(listed)
    found = body["base"]
    before = found["before"]
    base = Base(check_base(found["name"]), check_digest(found["sha256"]), None if before is None else check_base(before))
    if base.slot > body["n"]:
        raise ValueError("its base is newer than it is")
    return Entries(listed, base, frozenset(check_id(i) for i in _list(found["without"])))


def _store(body: dict[str, JSON]) -> str | None:
    return check_text(body["store"]) if "store" in body else None


def _list(value: JSON) -> list[JSON]:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return value
