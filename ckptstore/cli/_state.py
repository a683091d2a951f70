"""One look at a store: everything a command shows comes from the same commit record."""

from __future__ import annotations

from ..checkpoint import Checkpoint, Damage
from ..envelope import JSON, from_number
from ..errors import CheckpointNotFound, DamagedRecord
from ..log import Head
from ..lookup import existing, find
from ..record import Entry, Record
from ..store import Store
from ._format import date

__all__ = ["as_checkpoint", "damage_json", "entry_json", "lookup", "names_of", "newest", "record_damage"]


# Store's own methods read the newest record each time; between two of them a training job may have saved and pruned.
def newest(store: Store) -> Head:
    """Return the newest state. Warns about a damaged record that was passed over. Raises `StoreNotFound`."""
    return existing(store._engine)


def as_checkpoint(store: Store, entry: Entry) -> Checkpoint:
    """Return the checkpoint of an entry."""
    return Checkpoint(store._engine, entry)


def lookup(store: Store, head: Head, target: str | None, step: int | None = None) -> Entry:
    """Return the entry for a name, an id or a step.

    Raises:
        CheckpointNotFound
        DamagedRecord: it is not there, but a damaged record may have named it.
    """
    try:
        return find(store.url, head.record, target, step)
    except CheckpointNotFound as exc:
        if head.damaged:
            raise DamagedRecord(f"{exc} (but {head.damaged[0]}; it may have named it)") from None
        raise


def names_of(state: Record, checkpoint_id: str) -> list[str]:
    """Return the names that point to a checkpoint, sorted."""
    return sorted(name for name, target in state.names.items() if target == checkpoint_id)


def record_damage(head: Head) -> list[Damage]:
    """Return the damage to the newest commit records."""
    return [Damage("", "", (), message) for message in head.damaged]


def damage_json(found: list[Damage]) -> JSON:
    """Return damage as a JSON list."""
    return [{"id": d.id, "path": d.path, "ranges": [list(span) for span in d.ranges], "reason": d.reason} for d in found]


def entry_json(state: Record, entry: Entry) -> dict[str, JSON]:
    """Return what a record knows of a checkpoint, as JSON."""
    return {
        "id": entry.id,
        "name": entry.name,
        "names": names_of(state, entry.id),
        "step": entry.step,
        "created": date(entry.created),
        "nbytes": entry.nbytes,
        "metrics": {name: from_number(value) for name, value in entry.metrics.items()},
        "verified": entry.verified,
        "resumed": entry.id == state.resumed,
    }
