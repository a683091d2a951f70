"""Commit records: the whole state of a store in one immutable object. Field by field in docs/format.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .envelope import JSON, from_number, seal, to_number, to_time, unseal
from .errors import Damaged, DamagedRecord, InvalidName
from .key import Key
from .naming import check_name, check_step, is_id

__all__ = ["EMPTY", "RECORD_LIMIT", "Entry", "Record", "Tombstone", "decode", "encode", "encode_tombstone"]

RECORD_LIMIT = 256 << 20
"""Records larger than this many bytes are refused: about a million checkpoints."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One committed checkpoint, as records know it."""

    id: str
    step: int | None
    name: str
    """The name it was saved under; names may have moved on since."""
    created: float
    """Seconds since 1970 by the writer's clock; for people, nothing depends on it."""
    nbytes: int
    """Bytes of all its files, without the manifest."""
    manifest: str
    """SHA-256 of its manifest's bytes."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    verified: bool | None = None
    """True: read back whole since it was saved. False: last found damaged. None: not read back yet."""


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
    checkpoints: tuple[Entry, ...] = ()
    """Oldest commit first."""
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

    def entry(self, checkpoint_id: str) -> Entry | None:
        """Return the entry with this id, if it is kept."""
        return next((e for e in self.checkpoints if e.id == checkpoint_id), None)

    def without(self, ids: set[str]) -> Record:
        """Return this state with the checkpoints `ids`, and the names that point to them, retired."""
        gone = tuple(e.id for e in self.checkpoints if e.id in ids)
        return replace(
            self,
            checkpoints=tuple(e for e in self.checkpoints if e.id not in ids),
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
    """Return the bytes of `record`."""
    return seal(
        {
            "kind": "record",
            "n": record.n,
            "epoch": record.epoch,
            "owner": record.owner,
            "op": record.op,
            "prev": record.prev,
            "names": dict(record.names),
            "checkpoints": [_encode_entry(e) for e in record.checkpoints],
            "retired": list(record.retired),
            "resumed": record.resumed,
            "spared": list(record.spared),
            "past_owners": list(record.past_owners),
            **_store_field(record.store),
        },
        key,
    )


def _store_field(store: str | None) -> dict[str, JSON]:
    return {} if store is None else {"store": store}


def _encode_entry(entry: Entry) -> JSON:
    return {
        "id": entry.id,
        "step": entry.step,
        "name": entry.name,
        "created": entry.created,
        "nbytes": entry.nbytes,
        "manifest": entry.manifest,
        "metrics": {k: from_number(v) for k, v in entry.metrics.items()},
        "verified": entry.verified,
    }


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
            return Tombstone(n, _text(body["op"]), _store(body))
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
    record = Record(
        n=_count(body["n"]),
        epoch=_count(body["epoch"]),
        owner=_text(body["owner"]),
        op=_text(body["op"]),
        prev=None if body["prev"] is None else _digest(body["prev"]),
        names={check_name(k): _id(v) for k, v in body["names"].items()},
        checkpoints=tuple(_decode_entry(e) for e in _list(body["checkpoints"])),
        retired=tuple(_id(i) for i in _list(body["retired"])),
        resumed=None if body["resumed"] is None else _id(body["resumed"]),
        spared=tuple(_id(i) for i in _list(body["spared"])),
        past_owners=tuple(_text(o) for o in _list(body["past_owners"])),
        store=_store(body),
    )
    ids = {e.id for e in record.checkpoints}
    if len(ids) != len(record.checkpoints):
        raise ValueError("a checkpoint is listed twice")
    if not ids.issuperset(record.names.values()):
        raise ValueError("a name points to a checkpoint that is not listed")
    if not ids.isdisjoint(record.retired):
        raise ValueError("a checkpoint is both kept and retired")
    return record


def _decode_entry(item: JSON) -> Entry:
    verified = item["verified"]
    if verified is not None and not isinstance(verified, bool):
        raise ValueError("verified is neither true, false nor null")
    return Entry(
        id=_id(item["id"]),
        step=check_step(item["step"]),
        name=check_name(item["name"]),
        created=to_time(item["created"]),
        nbytes=_count(item["nbytes"]),
        manifest=_digest(item["manifest"]),
        metrics={_text(k): to_number(v) for k, v in item["metrics"].items()},
        verified=verified,
    )


def _count(value: JSON) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError("a number is out of range")
    return value


def _text(value: JSON) -> str:
    if not isinstance(value, str) or len(value) > 1024:
        raise ValueError("a text is missing or too long")
    return value


def _store(body: dict[str, JSON]) -> str | None:
    return _text(body["store"]) if "store" in body else None


def _digest(value: JSON) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("a SHA-256 is malformed")
    return value


def _id(value: JSON) -> str:
    if not isinstance(value, str) or not is_id(value):
        raise InvalidName("a checkpoint id is malformed")
    return value


def _list(value: JSON) -> list[JSON]:
    if not isinstance(value, list):
        raise ValueError("a list is missing")
    return value
