"""The Trainer of Hugging Face's transformers on a store.

::

    store = StoreCallback("s3://bucket/run-42")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[store])
    trainer.train(resume_from_checkpoint=store.newest(args.output_dir))
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..ranks import ranks_of
from ..store import Store
from ._folders import fetch, publish
from ._library import require_version

__all__ = ["BY", "StoreCallback"]

BY = "transformers"
_VERSION = require_version("transformers", "transformers", (5,), 6)
_Callback: Any = import_module("transformers").TrainerCallback  # only if its version is known


class StoreCallback(_Callback):  # type: ignore[misc]
    """A callback that publishes every folder ``checkpoint-<step>`` that the Trainer saves, whole, as one checkpoint.

    What the Trainer logged at that step becomes the checkpoint's metrics. The folders in `output_dir` are only a place to work in, which
    ``save_total_limit=1`` keeps small: a run is resumed from the store. With several hosts they must share `output_dir`.

    Args:
        store: a path, a URL or a `Store`.
    """

    def __init__(self, store: Store | str | os.PathLike[str]) -> None:
        self.store = store if isinstance(store, Store) else Store(store)

    def newest(self, output_dir: str | os.PathLike[str]) -> str | None:
        """Acquire the store, and copy its newest whole checkpoint to ``output_dir/checkpoint-<step>``, in place of what is there.

        To be called on every rank, before training.

        Returns:
            That folder, for ``trainer.train(resume_from_checkpoint=…)``; None for an empty store.

        Raises:
            WrongKind: something else than this callback wrote it.
            Damaged: there are checkpoints, and not one is whole.
        """

        def copy() -> str | None:
            found = fetch(self.store, "latest", BY, lambda checkpoint: Path(output_dir) / f"checkpoint-{checkpoint.step}")
            return None if found is None else str(found[1])

        ranks = ranks_of(None, everybody=True)
        return copy() if ranks is None else ranks.on_first(copy)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish what was just saved, when all ranks have saved their part."""
        step: int = state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"

        def save() -> None:
            if not folder.is_dir():
                raise UsageError(
                    f"the Trainer has saved, but not to {folder}: a search of hyperparameters needs a store for each trial"
                )
            logged = {k: v for entry in state.log_history if entry.get("step") == step for k, v in entry.items() if _number(v)}
            name = "weights" if args.save_only_model else "latest"
            publish(self.store, folder, name, BY, step=step, metrics=logged, metadata={"transformers": _VERSION})

        ranks = ranks_of(None, everybody=True)
        if ranks is None:
            save()
        else:
            ranks.together(lambda: None)
            ranks.on_first(save)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
