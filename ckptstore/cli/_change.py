"""``ckptstore tag``, ``rm`` and ``gc``. They commit beside the training job and fence nobody."""

from __future__ import annotations

import argparse
import shlex
import warnings

from ..errors import StoreWarning
from ..record import Record
from ..store import Store
from . import _format
from ._output import Output
from ._state import lookup, names_of, newest

__all__ = ["gc", "rm", "tag"]


def tag(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Let a name point to a checkpoint."""
    newest(store)  # no store is told as such
    checkpoint = store.tag(args.name, args.target)
    out.document.update(name=args.name, id=checkpoint.id, step=checkpoint.step)
    step = "" if checkpoint.step is None else f" (step {checkpoint.step})"
    out.say(f"{args.name} now points to {checkpoint.id}{step}")
    return 0


def rm(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Delete checkpoints, or names of checkpoints that have others. Nothing goes if one of them is not there."""
    deleted: list[str] = []
    unnamed: list[str] = []
    out.document.update(deleted=deleted, unnamed=unnamed)
    head = newest(store)
    state = head.record
    ids = {t: t if t in state.spared else lookup(store, head, t).id for t in args.targets}
    for target, checkpoint_id in ids.items():
        if checkpoint_id in deleted:  # named twice, in different ways
            continue
        gone = store.delete(target)
        if gone is None:
            unnamed.append(target)
            others = ", ".join(name for name in names_of(state, checkpoint_id) if name not in unnamed)
            out.say(f"removed the name {target}; its checkpoint {checkpoint_id} stays, as {others}")
        else:
            deleted.append(gone)
            out.say(f"deleted {gone}{_details(state, gone)}")
            if gone not in store._engine.deleted:
                message = (
                    f"what {gone} is made of could not be deleted yet; 'ckptstore gc' tries again, and says what is in the way"
                )
                warnings.warn(message, StoreWarning, stacklevel=1)
    return 0


def _details(state: Record, checkpoint_id: str) -> str:
    entry = state.entry(checkpoint_id)
    if entry is None:
        return ""
    step = "" if entry.step is None else f"step {entry.step}, "
    return f" ({step}{_format.size(entry.nbytes)})"


def gc(args: argparse.Namespace, store: Store, out: Output) -> int:
    """Delete what can never be committed, and say what was left alone."""
    newest(store)  # no store is told as such
    garbage = store.gc()
    out.document["deleted"] = {"ids": list(garbage.ids), "files": len(garbage.keys), "nbytes": garbage.nbytes}
    out.document["spared"] = list(garbage.spared)
    out.document["foreign"] = list(garbage.foreign)
    if garbage.keys:
        of = f" of {_format.plural(len(garbage.ids), 'unfinished or pruned checkpoint')}" if garbage.ids else ""
        what = f"{_format.plural(len(garbage.keys), 'file')}{of}"
        out.say(f"deleted {_format.size(garbage.nbytes)}: {what}")
    else:
        out.say("nothing to delete")
    url = shlex.quote(args.url)  # as typed, for its options may be needed
    for checkpoint_id in garbage.spared:
        out.say(
            f"left alone: {checkpoint_id}, which a damaged record may have named. Bring it back with\n"
            f"  ckptstore tag {url} NAME {checkpoint_id}\nor delete it with\n  ckptstore rm {url} {checkpoint_id}"
        )
    for folder in garbage.foreign:
        out.say(f"left alone: data/{folder}, which ckptstore did not make")
    return 0
