"""``ckptstore ls`` and ``ckptstore show``."""

from __future__ import annotations

import argparse
import gc
import time
from functools import cache
from itertools import islice

from ..envelope import JSON
from ..errors import Damaged, UsageError
from ..manifest import Manifest
from ..record import Entry, Record
from ..store import Store
from . import _format
from ._errors import DAMAGED
from ._output import Output
from ._state import as_checkpoint, damage_json, entry_json, lookup, names_of, newest, record_damage

__all__ = ["ls", "show"]


def ls(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Print a table of all checkpoints, newest last."""
    collecting = gc.isenabled()
    gc.disable()  # tens of thousands of objects, none of them garbage, would be looked through again and again: a tenth of the time
    try:
        return _ls(store, out)
    finally:
        if collecting:
            gc.enable()


def _ls(store: Store, out: Output) -> int:
    head = newest(store)
    state = head.record
    if out.as_json:
        out.document["checkpoints"] = [entry_json(state, entry) for entry in state.checkpoints]
    out.document["names"] = dict(sorted(state.names.items()))
    out.document["spared"] = sorted(state.spared)
    out.document["damage"] = damage_json(record_damage(head))
    if state.checkpoints and not out.as_json:
        lines = _format.aligned(_columns(state), right=(1, 2, 3))
        while some := [*islice(lines, 500)]:
            out.say("\n".join(some))
    elif not state.checkpoints:
        out.say(f"{store.url} holds no checkpoints")
    for checkpoint_id in sorted(state.spared):
        out.say(
            f"{checkpoint_id} may have been named by a damaged record: bring it back with 'ckptstore tag', or 'ckptstore rm' it"
        )
    return DAMAGED if head.damaged else 0


def _columns(state: Record) -> list[list[str]]:
    """Return the table, column by column and some rows at a time, for there may be tens of thousands."""
    names = {i: ", ".join(names_of(state, i)) for i in {*state.names.values()}}
    now, resumed = time.time(), state.resumed
    size = cache(_format.size)  # of which there are few
    columns = [["ID"], ["STEP"], ["AGE"], ["SIZE"], ["SAVED AS"], ["NAMES"], ["METRICS"], ["NOTE"]]
    for entries in state.checkpoints.passing():
        ids = [e.id for e in entries]
        more = [
            ids,
            ["" if e.step is None else str(e.step) for e in entries],
            [_format.age(now - e.created) for e in entries],
            [size(e.nbytes) for e in entries],
            [e.name for e in entries],
            [names.get(i, "") for i in ids],
            _format.all_metrics([e.metrics for e in entries]),
            [_note(e, resumed) for e in entries]
            if resumed in ids or any(e.verified is False for e in entries)
            else [""] * len(ids),
        ]
        for column, values in zip(columns, more, strict=True):
            column += values
    return columns


def _note(entry: Entry, resumed: str | None) -> str:
    notes = {"resumed from": entry.id == resumed, "found damaged": entry.verified is False}
    return ", ".join(note for note, holds in notes.items() if holds)


def show(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Print everything about one checkpoint."""
    if args.target is not None and args.step is not None:
        raise UsageError("give a name, an id or --step, only one of them")
    head = newest(store)
    state = head.record
    entry = lookup(store, head, args.target, args.step)
    found = record_damage(head)
    out.document.update(entry_json(state, entry))
    out.document["damage"] = damage_json(found)
    _say_entry(out, state, entry)
    try:
        manifest = as_checkpoint(store, entry).manifest
    except Damaged as exc:
        out.document["damage"].append({"id": entry.id, "path": "", "ranges": [], "reason": str(exc)})
        raise
    out.document.update(_manifest_json(manifest))
    _say_manifest(out, manifest)
    return DAMAGED if found else 0


def _manifest_json(manifest: Manifest) -> dict[str, JSON]:
    return {
        "files": [{"path": f.path, "size": f.size} for f in manifest.files],
        "metadata": manifest.metadata,
        "sampler_state": manifest.sampler,
        "writer": dict(manifest.writer),
        "unsafe": dict(manifest.unsafe),
    }


def _say_entry(out: Output, state: Record, entry: Entry) -> None:
    date = _format.date(entry.created).replace("T", " ").replace("Z", " UTC")
    _say(out, "checkpoint", entry.id)
    _say(out, "saved as", entry.name)
    _say(out, "names", ", ".join(names_of(state, entry.id)) or "none")
    _say(out, "step", "none" if entry.step is None else str(entry.step))
    _say(out, "age", f"{_format.age(time.time() - entry.created)} (saved {date})")
    exact = f" ({_format.count(entry.nbytes)} bytes)" if entry.nbytes >= 1000 else ""
    _say(out, "size", _format.size(entry.nbytes) + exact)
    if entry.verified is not None:
        _say(out, "last check", "whole" if entry.verified else "damaged")
    if entry.metrics:
        _say(out, "metrics", _format.metrics(entry.metrics))


def _say_manifest(out: Output, manifest: Manifest) -> None:
    if manifest.sampler is not None:
        _say(out, "sampler", _format.sampler(manifest.sampler))
    if manifest.metadata is not None:
        _say(out, "metadata", _format.compact(manifest.metadata))
    _say(out, "written by", ", ".join(f"{name} {value}" for name, value in manifest.writer.items()))
    for path, classes in manifest.unsafe.items():
        _say(out, "unsafe", f"{path} loads only with weights_only=False: it holds {', '.join(classes)}")
    rows = [("", "")] + [(_format.size(f.size), f.path) for f in manifest.files]
    _say(out, "files", "\n".join(_format.table(rows, right=(0,))[1:]) or "none")


def _say(out: Output, label: str, text: str) -> None:
    out.say(f"{label:<12}" + text.replace("\n", "\n" + " " * 12))
