"""Garbage collection: deletes what can never be committed. Needs no clock, and may be stopped at any point.

Data belongs to the epoch in its id, and only that epoch can commit it. So once the newest record has a higher epoch, data that it does
not name never will be named, whoever is still writing it. Data of the current epoch is left alone unless it was retired: another
rank, or a cooperating writer, may be about to commit it. Of what is committed, an unfinished write that could not be removed may be left.
"""

from __future__ import annotations

from dataclasses import dataclass

from .bases import BASE_ENDS, base_keys, bases_of
from .errors import DamagedRecord
from .log import HINT, LOG, Head, slot_of
from .naming import DATA, epoch_of, id_of_key, is_id
from .protocol import Backend

__all__ = ["Garbage", "find_garbage", "unfinished_records"]

_UNFINISHED = ".partial"
"""How keys of unfinished writes end: see `protocol`."""


@dataclass(frozen=True)
class Garbage:
    """What may be deleted, and what was left alone on purpose."""

    keys: tuple[str, ...]
    ids: tuple[str, ...]
    """The checkpoints that never came to be, or were retired."""
    nbytes: int
    spared: tuple[str, ...] = ()
    """Data that a damaged record may have named: bring it back with `Store.tag`, or delete it with `Store.delete`."""
    foreign: tuple[str, ...] = ()
    """Folders below ``data/`` that no ckptstore made."""


def find_garbage(backend: Backend, head: Head) -> Garbage:
    """List the data that can go, judged by `head`.

    Raises:
        DamagedRecord: the newest record is damaged, so what it named is not known.
    """
    state = head.record
    if head.damaged:
        raise DamagedRecord(
            f"{head.damaged[0]}. Nothing was collected; the next job that resumes or acquires the store passes it over"
        )
    kept = state.checkpoints.ids()
    retired, spared = set(state.retired), set(state.spared)
    keys: list[str] = []
    ids: dict[str, None] = {}
    foreign: dict[str, None] = {}
    nbytes = 0
    for info in backend.list(DATA):
        checkpoint_id = id_of_key(info.key)
        if checkpoint_id in kept and info.key.endswith(_UNFINISHED):  # all that it is made of was finished before its commit
            keys.append(info.key)
            nbytes += info.size
            continue
        if checkpoint_id in kept or checkpoint_id in spared:
            continue
        if not is_id(checkpoint_id):
            foreign[checkpoint_id] = None
        elif checkpoint_id in retired or epoch_of(checkpoint_id) < state.epoch:
            keys.append(info.key)
            ids[checkpoint_id] = None
            nbytes += info.size
    return Garbage(tuple(keys), tuple(ids), nbytes, tuple(sorted(spared)), tuple(foreign))


def unfinished_records(backend: Backend, head: Head) -> list[str]:
    """List leftovers in the log of writers that died: of records aimed at slots that are taken since, and of hints; and bases that no
    record names, or will."""
    needed = {key for name in bases_of(head.record) for key in base_keys(name)}
    leftovers = (
        info.key for info in backend.list(LOG) if info.key.endswith((_UNFINISHED, *BASE_ENDS)) and info.key not in needed
    )
    # A live writer that loses its leftover here has lost its slot already, or else fails to leave a hint, which does no harm.
    # What has another name is not ours: people put stores into folders that had a folder `log` before.
    return [key for key in leftovers if key.startswith(f"{HINT}.") or ((slot := slot_of(key)) is not None and slot <= head.slot)]
