"""Whole folders as checkpoints, for libraries that save into one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..envelope import JSON
from ..errors import UsageError, WrongKind
from ..lookup import first_whole, newest_first
from ..store import Store

__all__ = ["fetch", "publish"]


def publish(
    store: Store,
    folder: str | os.PathLike[str],
    name: str,
    by: str,
    *,
    step: int | None = None,
    metrics: Mapping[str, Any] | None = None,
    metadata: JSON = None,
    sampler: Any = None,
) -> Checkpoint:
    """Save all files below `folder` as one checkpoint, marked as written `by` a library.

    Raises:
        UsageError: there is no file below it.
    """
    with store.transaction(name, step=step, metrics=metrics, metadata=metadata, sampler=sampler) as tx:
        tx.by = by
        tx.add_tree(folder)
        if not any(files for _, _, files in os.walk(folder)):
            raise UsageError(f"{os.fspath(folder)} is empty, so there is nothing to publish")
    return tx.checkpoint


def fetch(store: Store, name: str, by: str, place: Callable[[Checkpoint], Path]) -> tuple[Checkpoint, Path] | None:
    """Copy the newest checkpoint saved under `name` that is whole to the folder that `place` says, whose content it replaces.

    The store is acquired first. Half a copy never has the folder's name.

    Returns:
        The checkpoint and the folder; None for an empty store.

    Raises:
        WrongKind: another library wrote it.
    """
    store.acquire()

    def copy(checkpoint: Checkpoint) -> Path:
        if checkpoint.by != by:
            writer = checkpoint.by or "Store.save or a transaction"
            raise WrongKind(f"checkpoint {checkpoint.id} was written by {writer}, not by {by}")
        folder = place(checkpoint)
        partial = folder.with_name(f"{folder.name}.{checkpoint.id}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            checkpoint.download(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        checkpoint.read_whole.update(checkpoint.files)
        return folder

    if not newest_first(store._engine, name):
        return None
    found = first_whole(store._engine, name, None, copy)
    store._note_resumed(found[0], None)
    return found
