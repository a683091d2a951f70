"""``ckptstore verify``."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from shutil import get_terminal_size
from typing import TYPE_CHECKING, NoReturn

from ..checkpoint import Damage
from ..errors import BackendError, CheckpointNotFound, DamagedRecord
from ..log import Head
from ..record import EMPTY, Entry, Record
from ..store import Store
from . import _format
from ._errors import DAMAGED, explain
from ._output import Output
from ._state import as_checkpoint, damage_json, lookup, names_of, newest

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["verify"]

_RESULTS = {
    "damaged": "damaged",
    "whole": "whole",
    "sizes": "of the right size, of which this storage has no checksum to compare (leave out --remote to read every byte)",
    "pruned": "pruned",
}


def verify(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Read every byte of the checkpoints asked for, or of all, and report what is damaged."""
    found: list[Damage] = []
    results: list[dict[str, object]] = []
    # Filled in as it goes: what was found is told also when the storage fails half-way.
    out.document.update(good=False, checkpoints=results, damage=[])
    head, records = _head(store)
    _report(out, found, [Damage("", "", (), message) for message in records])
    entries = _wanted(args, store, head)
    header, *lines = _lines(head.record, entries)
    if entries:
        out.say(f"{'RESULT':<9}{header}")
    with closing(_Bar(0 if args.remote else sum(e.nbytes for e in entries))) as bar:
        for entry, line in zip(entries, lines, strict=True):
            try:
                result, damage = _compare(store, entry) if args.remote else _examine(store, entry, bar)
            except BackendError as exc:
                if not found:
                    raise
                out.fail(type(exc).__name__, explain(exc)[1])  # but what was found is certain
                return DAMAGED
            results.append({"id": entry.id, "step": entry.step, "nbytes": entry.nbytes, "result": result})
            bar.clear()
            out.say(f"{result:<9}{line}")
            _report(out, found, damage)
            bar.refresh()
    out.document["good"] = not found
    out.say(_summary(store, results, found))
    return DAMAGED if found else 0


def _head(store: Store) -> tuple[Head, list[str]]:
    try:
        return newest(store), store._engine.log.damaged()
    except DamagedRecord as exc:  # not one can be read
        return Head(0, EMPTY), [str(exc)]


def _wanted(args: argparse.Namespace, store: Store, head: Head) -> list[Entry]:
    if not args.targets and args.step is None:
        return list(head.record.checkpoints)
    entries = [lookup(store, head, target) for target in args.targets]
    if args.step is not None:
        entries.append(lookup(store, head, None, args.step))
    return list({e.id: e for e in entries}.values())


def _examine(store: Store, entry: Entry, bar: _Bar) -> tuple[str, list[Damage]]:
    try:
        damage = as_checkpoint(store, entry).verify(bar.update)
    except CheckpointNotFound:
        return "pruned", []
    return "damaged" if damage else "whole", damage


def _compare(store: Store, entry: Entry) -> tuple[str, list[Damage]]:
    try:
        damage, sizes_only = as_checkpoint(store, entry).verify_remote()
    except CheckpointNotFound:
        return "pruned", []
    return "damaged" if damage else "sizes" if sizes_only else "whole", damage


def _lines(state: Record, entries: list[Entry]) -> list[str]:
    rows: list[tuple[str, ...]] = [("ID", "STEP", "SIZE", "NAMES")]
    for e in entries:
        step = "" if e.step is None else str(e.step)
        rows.append((e.id, step, _format.size(e.nbytes), ", ".join(names_of(state, e.id))))
    return _format.table(rows, right=(1, 2))


def _report(out: Output, found: list[Damage], damage: list[Damage]) -> None:
    found += damage
    out.document["damage"] += damage_json(damage)
    for item in damage:
        if not item.ranges:  # a record or a manifest
            out.say(f"{'' if item.id else 'damaged':<9}{item.reason}")
        for start, stop in item.ranges:
            bad = f"bytes {start}-{stop - 1} are missing or wrong ({_format.size(stop - start)})"
            out.say(f"{'':<9}{item.path}: {bad if start < stop else 'this empty file is missing'}")


def _summary(store: Store, results: list[dict[str, object]], found: list[Damage]) -> str:
    parts = ["a commit record is damaged"] if any(not d.id for d in found) else []
    for result, words in _RESULTS.items():
        if number := sum(r["result"] == result for r in results):
            parts.append(f"{_format.plural(number, 'checkpoint')} {words}")
    return ", ".join(parts) or f"{store.url} holds no checkpoints: nothing to verify"


class _Bar:
    """A progress bar on a terminal; nothing anywhere else."""

    def __init__(self, total: int) -> None:
        self._bar: tqdm[NoReturn] | None = None
        if total and sys.stderr is not None and sys.stderr.isatty():
            from tqdm import tqdm

            # Asked for by us: where a terminal says that it has no columns or rows, tqdm would show nothing.
            columns, rows = get_terminal_size()
            self._bar = tqdm(
                total=total, unit="B", unit_scale=True, leave=False, desc="verify", file=sys.stderr, ncols=columns, nrows=rows
            )

    def update(self, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.update(nbytes)

    def clear(self) -> None:
        """Make room for a line of text."""
        if self._bar is not None:
            self._bar.clear()

    def refresh(self) -> None:
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
