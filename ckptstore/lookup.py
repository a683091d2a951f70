"""Finding checkpoints: by name, id or step, and the newest whole one when some are damaged."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import TypeVar

from .checkpoint import Checkpoint
from .engine import Engine
from .errors import (
    CheckpointNotFound,
    CkptStoreError,
    Damaged,
    DamagedManifest,
    DamagedRecord,
    FallbackWarning,
    StoreNotFound,
    UsageError,
)
from .log import Head
from .naming import check_step, is_id
from .record import Entry, Record

__all__ = ["existing", "find", "first_whole", "newest_first", "rescue"]

_R = TypeVar("_R")


def existing(engine: Engine) -> Head:
    """Return the newest state of a store that exists. Raises `StoreNotFound`."""
    head = engine.head()
    if not head.slot:
        url = engine.backend.url
        other_files = False
        with suppress(CkptStoreError):  # only to say it better
            other_files = next(engine.backend.list(""), None) is not None
        if other_files:
            raise StoreNotFound(f"{url} is there, but it holds no store: no save was ever completed in it; check the path")
        raise StoreNotFound(f"there is no store at {url} yet: nothing has been saved there; check the path")
    return head


def find(url: str, state: Record, target: str | None, step: int | None = None) -> Entry:
    """Return the entry for a name ("latest" if nothing is given), an id, or a step (the newest with that step).

    Raises:
        CheckpointNotFound: says what there is.
        UsageError: both, or something that is no text.
    """
    if step is not None:
        return _find_step(url, state, target, step)
    wanted = "latest" if target is None else target
    if not isinstance(wanted, str):
        raise UsageError(f"a checkpoint is named by a str, or by step=, not by {type(wanted).__name__}")
    entry = state.entry(state.names.get(wanted, wanted))
    if entry is not None:
        return entry
    if is_id(wanted):
        raise CheckpointNotFound(f"{url} does not keep {wanted}; it may have been pruned")
    near = difflib.get_close_matches(wanted, state.names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(state.names)[:20]) or 'no names'}"
    raise CheckpointNotFound(f"{url} has no checkpoint named {wanted!r:.200}; {hint}")


def _find_step(url: str, state: Record, target: str | None, step: int) -> Entry:
    if target is not None:
        raise UsageError("give a name or id, or step=, not both")
    check_step(step)
    entry = next((e for e in reversed(state.checkpoints) if e.step == step), None)
    if entry is None:
        steps = ", ".join(str(e.step) for e in state.checkpoints[-8:] if e.step is not None) or "none"
        raise CheckpointNotFound(f"{url} keeps no checkpoint of step {step}; newest kept steps: {steps}")
    return entry


def newest_first(engine: Engine, name: str) -> list[Entry]:
    """Return what `name` points to and the older ones saved under that name, newest first; an empty list for an empty store.

    Raises:
        CheckpointNotFound: there are checkpoints, but none has that name.
        DamagedRecord: there were some, which only damaged records name.
    """
    state = engine.head().record
    if state.checkpoints:
        wanted = find(engine.backend.url, state, name)
        return [wanted, *_older(state, wanted, name)]
    if state.spared:
        raise DamagedRecord(
            "the records that named this store's checkpoints are damaged or gone, and the data of these is still there: "
            f"{', '.join(state.spared)}; bring one back with tag(name, id), or delete them to start over"
        )
    return []


def first_whole(engine: Engine, target: str | None, step: int | None, read: Callable[[Checkpoint], _R]) -> tuple[Checkpoint, _R]:
    """Read the wanted checkpoint, or, by name, the newest whole one saved under that name; return it and what `read` made of it.

    Raises:
        Damaged: the first damage met, when nothing whole is left.
    """
    url = engine.backend.url
    while True:
        state = existing(engine).record
        wanted = find(url, state, target, step)
        by_name = step is None and wanted.id != target
        damage: Damaged | None = None
        for entry in chain([wanted], _older(state, wanted, target or "latest") if by_name else ()):
            if damage is not None:
                warnings.warn(f"{url}: {damage}; falling back to {entry.id} (step {entry.step})", FallbackWarning, stacklevel=4)
            checkpoint = Checkpoint(engine, entry)
            try:
                result = read(checkpoint)
            except CheckpointNotFound:  # pruned while we read
                if not by_name:
                    raise
                break  # the name has moved on: read what it points to now
            except Damaged as exc:
                engine.verdicts[entry.id] = False
                damage = exc
                continue
            if checkpoint.read_whole.issuperset(checkpoint.files):
                engine.verdicts[entry.id] = True
            return checkpoint, result
        else:
            assert damage is not None  # the loop ran at least once
            raise damage


def _older(state: Record, wanted: Entry, name: str) -> Iterator[Entry]:
    before = state.checkpoints[: state.checkpoints.index(wanted)]
    yield from (e for e in reversed(before) if e.name == name)


def rescue(engine: Engine, wanted: str) -> Entry | None:
    """Return an entry made from the manifest of data that a damaged record may have named, if `wanted` is that and it is whole."""
    if wanted not in engine.head().record.spared:
        return None
    entry = engine.unrecorded(wanted)
    damage = Checkpoint(engine, entry).verify()
    if damage:
        raise DamagedManifest(f"{wanted} cannot be brought back: {damage[0].reason}")
    return entry
