"""The Trainer of Hugging Face's transformers on a store.

::

    store = StoreCallback("s3://bucket/run-42")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[store])
    trainer.train(resume_from_checkpoint=store.newest(args.output_dir))
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
        self._published: int | None = None
        """The step that was published last."""
        self._found: dict[str, tuple[int, int]] = {}
        """What was in `output_dir` when training began, perhaps halves of what a killed run wrote; see `_written`."""

    def newest(self, output_dir: str | os.PathLike[str]) -> str | None:
        """Acquire the store, and copy its newest whole checkpoint to ``output_dir/checkpoint-<step>``, in place of what is there.

        To be called on every rank, before training.

        Returns:
            That folder, for ``trainer.train(resume_from_checkpoint=…)``; None for an empty store.

        Raises:
            UsageError: there are several ranks, and no process group yet.
            WrongKind: something else than this callback wrote it.
            Damaged: there are checkpoints, and not one is whole.
        """

        def copy() -> str | None:
            found = fetch(self.store, "latest", BY, lambda checkpoint: Path(output_dir) / f"checkpoint-{checkpoint.step}")
            return None if found is None else str(found[1])

        ranks = ranks_of(None, everybody=True)
        if ranks is None and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but there is no process group yet, and each rank would copy to the same "
                "folder: make the TrainingArguments first, which join the ranks"
            )
        return copy() if ranks is None else ranks.on_first(copy)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish what was just saved, when all ranks have saved their part."""
        self._publish(args, state, lambda folder: True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look what is there already."""
        folders = Path(args.output_dir).glob("checkpoint-*")
        self._found = {folder.name: when for folder in folders if (when := _written(folder))}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Publish what ``enable_jit_checkpoint`` has made the Trainer save because of SIGTERM: of that, it tells nobody."""
        if (
            control.should_training_stop
            and getattr(args, "enable_jit_checkpoint", False)
            and state.global_step != self._published
        ):
            self._publish(args, state, lambda folder: _written(folder) not in (None, self._found.get(folder.name)))

    on_pre_optimizer_step = on_step_end = on_epoch_end = on_step_begin

    def _publish(self, args: Any, state: Any, wanted: Callable[[Path], bool]) -> None:
        step: int = state.global_step
        folder = Path(args.output_dir) / f"checkpoint-{step}"

        def save() -> bool:
            if not wanted(folder):
                return False
            if not folder.is_dir():
                raise UsageError(
                    f"the Trainer has saved, but not to {folder}: a search of hyperparameters needs a store for each trial"
                )
            logged = {k: v for entry in state.log_history if entry.get("step") == step for k, v in entry.items() if _number(v)}
            name = "weights" if args.save_only_model else "latest"
            publish(self.store, folder, name, BY, step=step, metrics=logged, metadata={"transformers": _VERSION})
            return True

        ranks = ranks_of(None, everybody=True)
        if ranks is not None:
            ranks.together(lambda: None)
        if save() if ranks is None else ranks.on_first(save):
            self._published = step


def _written(folder: Path) -> tuple[int, int] | None:
    """Return what tells when the Trainer wrote the last file of a checkpoint into `folder`; None if it did not."""
    try:
        status = os.stat(folder / "trainer_state.json")
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
