"""What Accelerate saves and loads as a folder, as one checkpoint in a store.

::

    load_state(accelerator, store)  # nothing on the first start
    ...
    save_state(accelerator, store, step=step)
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..envelope import JSON
from ..errors import UsageError
from ..ranks import Ranks, ranks_of
from ..restore import restore_sampler
from ..store import Store
from ._folders import fetch, publish
from ._library import require_version

__all__ = ["BY", "load_state", "save_state"]

BY = "accelerate"
_VERSION = require_version("accelerate", "accelerate", (1, 12), 2)


def save_state(
    accelerator: Any,
    store: Store,
    name: str = "latest",
    *,
    step: int | None = None,
    sampler: Any = None,
    metrics: Mapping[str, Any] | None = None,
    metadata: JSON = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Checkpoint:
    """Do what ``accelerator.save_state`` does, into `store`: the whole folder becomes one checkpoint, or nothing does.

    To be called on every rank.

    Args:
        step, sampler, metrics, metadata: as for `Store.save`; taken of rank 0.
        folder: where to make a folder to work in, which goes afterwards; if not given, where temporary files go. Where ranks run on
            several hosts, one that they share.
        options: for ``accelerator.save_state``.

    Raises:
        RankFailed: another rank could not save; nothing was published.
    """
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise UsageError("automatic_checkpoint_naming keeps folders of its own; turn it off, the store's keep_last= does that")
    ranks = ranks_of(None, everybody=True)
    with _workplace(folder, ranks) as place:

        def save() -> None:
            accelerator.save_state(str(place), **options)

        def tell() -> Any:
            made = publish(store, place, name, BY, step=step, metrics=metrics, metadata=_noted(metadata), sampler=sampler)
            return made if ranks is None else made.entry

        if ranks is None:
            save()
            return tell()  # type: ignore[no-any-return]
        ranks.together(save)
        return Checkpoint(store._engine, ranks.on_first(tell))


def _noted(metadata: JSON) -> JSON:
    return {"accelerate": _VERSION} if metadata is None else metadata


def load_state(
    accelerator: Any,
    store: Store,
    name: str = "latest",
    *,
    sampler: Any = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Checkpoint | None:
    """Acquire `store`, and give ``accelerator.load_state`` the newest checkpoint saved under `name` that is whole.

    To be called on every rank. Arguments as for `save_state`; `options` are for ``accelerator.load_state``.

    Returns:
        That checkpoint; None for an empty store: start at the beginning then.

    Raises:
        WrongKind: something else than `save_state` wrote it.
        Damaged: there are checkpoints, and not one is whole.
    """
    ranks = ranks_of(None, everybody=True)
    with _workplace(folder, ranks) as place:

        def copy() -> Any:
            found = fetch(store, name, BY, lambda _: place / "state")
            return None if found is None else found[0] if ranks is None else found[0].entry

        found = copy() if ranks is None else ranks.on_first(copy)
        if found is None:
            return None
        checkpoint = found if ranks is None else Checkpoint(store._engine, found)

        def load() -> None:
            accelerator.load_state(str(place / "state"), **options)

        if ranks is None:
            load()
        else:
            ranks.together(load)
        restore_sampler(checkpoint, sampler, ranks)
        return checkpoint


@contextmanager
def _workplace(folder: str | os.PathLike[str] | None, ranks: Ranks | None) -> Iterator[Path]:
    """A new folder, the same for all ranks, that goes at the end."""
    if folder is None and ranks is not None and os.environ.get("LOCAL_WORLD_SIZE") not in (None, os.environ.get("WORLD_SIZE")):
        raise UsageError("ranks on several hosts need a folder that they share: give folder=")

    def make() -> Path:
        return Path(tempfile.mkdtemp(prefix="ckptstore-", dir=folder))

    place = make() if ranks is None else ranks.on_first(make)
    try:
        yield place
    finally:
        if ranks is None or ranks.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
