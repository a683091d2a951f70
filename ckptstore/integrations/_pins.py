"""Names that stand for paths: other libraries save to paths, and keep and remove what is there by these."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import replace
from pathlib import PurePath

from ..log import new_op
from ..record import Record
from ..retention import expired
from ..store import Store

__all__ = ["let_go", "pin_for"]

_LONGEST = 100


def pin_for(path: str | os.PathLike[str]) -> str:
    """Return the name for a path: its last folder and file, so that a run may move to another place.

    ``runs/checkpoints/epoch=0-step=10.ckpt`` is ``checkpoints.epoch0-step10``; what else a name cannot hold is replaced, and a digest
    of the original tells such names apart.
    """
    last = PurePath(os.fspath(path))
    folder = last.parent.name
    whole = f"{folder}.{last.name}" if folder else last.name
    text = whole.removesuffix(".ckpt").replace("=", "")
    name = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:_LONGEST]
    if name != text or name.strip(".") == "":
        name = f"{name}-{hashlib.sha256(whole.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return name


def let_go(store: Store, name: str, gone: bool = False) -> None:
    """Take `name` off what it points to, which then goes or stays by the store's retention. Nothing happens if there is no such name.

    With `gone` it goes, unless it has another name.
    """

    def change(state: Record) -> Record | None:
        if name not in state.names:
            return None
        state = store._engine.write_down(state)
        was = state.names[name]
        state = replace(state, names={n: i for n, i in state.names.items() if n != name})
        leaving = {was} if gone and was not in state.names.values() else set()
        return state.without(expired(state, store._retention) | leaving)

    store._engine.committed(store._writer.commit(change, new_op()))
