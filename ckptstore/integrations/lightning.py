"""Lightning on a store: checkpoints of the Trainer and of Fabric, and runs that go on in the middle of an epoch.

::

    io = StoreCheckpointIO("s3://bucket/run-42")
    trainer = Trainer(plugins=[io], callbacks=[ModelCheckpoint(every_n_train_steps=100), ExactResume()])
    trainer.fit(model, ckpt_path="latest")

For `lightning` as well as for `pytorch_lightning`, whichever is imported.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import PurePath
from typing import Any

from .. import rng
from ..background import PendingSave
from ..checkpoint import Checkpoint
from ..errors import CheckpointNotFound, NotSerializable, StateMismatch, StoreWarning, UsageError, WrongKind
from ..lookup import existing, find, first_whole, newest_first
from ..naming import is_id
from ..ranks import Ranks, ranks_of
from ..restore import newest_whole_for_all
from ..sampler._progress import Interruptable
from ..store import Store
from ..transaction import Draft, Transaction
from ..workers import Job
from ._library import require_version
from ._pins import let_go, pin_for

__all__ = ["BY", "ExactResume", "StoreCheckpointIO"]

BY = "lightning"
_LATEST = "latest"
_WEIGHTS = "weights"
"""What checkpoints are saved under that hold weights only: nothing can be resumed from them."""

_OWN_WAYS = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")
"""Strategies of the Trainer that pass a `CheckpointIO` by, without a word; those of Fabric refuse one."""

_pytorch = "lightning" not in sys.modules and ("pytorch_lightning" in sys.modules or find_spec("lightning") is None)
_VERSION = require_version("pytorch-lightning" if _pytorch else "lightning", "lightning", (2, 6), 3)
_Callback: Any = import_module("pytorch_lightning.callbacks" if _pytorch else "lightning.pytorch.callbacks").Callback


class StoreCheckpointIO:
    """A `CheckpointIO` plugin: what the Trainer, `ModelCheckpoint` or Fabric saves to a path goes into a store.

    Every checkpoint is saved under the name ``latest``, so that ``ckpt_path="latest"`` is the newest, or the newest older one if that is
    damaged; in an empty store it is none, and training starts at the beginning. Its path becomes a second name, which keeps it until
    `ModelCheckpoint` lets it go: ``checkpoints.epoch0-step100`` for ``…/checkpoints/epoch=0-step=100.ckpt``. What it lets go stays as
    long as the store's retention says. ``ckpt_path=`` takes such a path, a name of the store, or the id of a checkpoint.

    Args:
        store: a path, a URL or a `Store`.
        asynchronous: save in the background, one at a time, as `Store.save_async` does. A failure is raised by the next save, or when
            training ends.
    """

    def __init__(self, store: Store | str | os.PathLike[str], *, asynchronous: bool = False) -> None:
        self.store = store if isinstance(store, Store) else Store(store)
        self._asynchronous = asynchronous
        self._pending: PendingSave | None = None
        self._pin = ""
        """The name, for its path, of what was saved last."""
        self._leaving: list[Job[None]] = []
        """What lets checkpoints go when that save is done."""
        self.fitting: bool | None = None
        """Whether what is loaded next is to be trained on, and the store has been acquired; None: not known. `ExactResume` sets it."""
        for package in ("lightning.fabric", "lightning_fabric"):
            if package in sys.modules:  # which asks whether a plugin is of this class
                import_module(f"{package}.plugins.io.checkpoint_io").CheckpointIO.register(type(self))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None) -> None:
        """Save, atomically and durably; on rank 0, which is the only one that Lightning calls."""
        if storage_options is not None:
            raise UsageError("a store has its options in its URL; leave out storage_options")
        if not isinstance(checkpoint, dict):
            raise NotSerializable(f"a checkpoint of Lightning is a dict, not a {type(checkpoint).__name__}")
        resumable = "pytorch-lightning_version" not in checkpoint or "optimizer_states" in checkpoint
        pin = pin_for(path)
        name = pin if _passing(path) else _LATEST if resumable else _WEIGHTS
        step = _step(checkpoint)
        metadata = {"path": str(path), "lightning": _VERSION}
        draft = Draft.check(name, step, None, metadata, None)
        pins = () if pin in (_LATEST, name) else (pin,)

        def begin(draft: Draft) -> Transaction:
            tx = self.store._begin_now(draft)
            tx.by, tx.pins = BY, pins
            return tx

        self._wait()
        self._pin = pin
        background = self.store._background
        if self._asynchronous:
            self._pending = background.save(begin, checkpoint, draft, when_busy="wait", rng=False, optimizer=None, checked=False)
            return
        background.wait()
        with begin(draft) as tx:
            tx.save(checkpoint)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        leaving, self._leaving = self._leaving, []
        if pending is not None:
            pending.result()
        for job in leaving:
            job.result()

    def load_checkpoint(self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load, with every byte checked. All ranks must call this; they get the same checkpoint.

        Args:
            weights_only: False runs code that is in the checkpoint; None means True.

        Raises:
            CheckpointNotFound: neither a path that was saved here nor a name or id.
            Exception: what a save in the background failed with.
            WrongKind: another integration wrote it.
            Damaged, UnsafeContent: see `Checkpoint.load`.
        """
        safe = True if weights_only is None else weights_only
        place = map_location if map_location is not None else "cpu"

        def read(checkpoint: Checkpoint) -> Any:
            _check_kind(checkpoint)
            return checkpoint.load(map_location=place, weights_only=safe)

        ranks = ranks_of(None, everybody=True)
        self._wait() if ranks is None else ranks.on_first(self._wait)  # it may be what is being saved
        if str(path) == _LATEST:
            return self._newest(read, ranks)
        wanted = str(path) if is_id(str(path)) else self._name(path)
        engine = self.store._engine
        if ranks is None:
            return read(Checkpoint(engine, find(self.store.url, existing(engine).record, wanted)))
        entry = ranks.on_first(lambda: find(self.store.url, existing(engine).record, wanted))
        return ranks.together(lambda: read(Checkpoint(engine, entry)))[ranks.rank]

    def _newest(self, read: Any, ranks: Ranks | None) -> Any:
        engine = self.store._engine
        found: tuple[Checkpoint, Any] | None
        if ranks is not None:
            found = newest_whole_for_all(engine, _LATEST, ranks, read)
        else:
            found = first_whole(engine, _LATEST, None, read) if newest_first(engine, _LATEST) else None
        if found is None and self.fitting is False:
            raise CheckpointNotFound(f"{self.store.url} is empty: there is nothing to evaluate")
        if found is None:
            return _Nothing(self.store.url)
        if self.fitting:
            self.store._note_resumed(found[0], ranks)
        return found[1]

    def _name(self, path: str | os.PathLike[str]) -> str:
        """Return the name that `path` is known by: as it was saved, or as it stands."""
        pin = pin_for(path)
        return pin if pin in self.store or str(path) not in self.store else str(path)

    def file_exists(self, path: str | os.PathLike[str], trainer: Any) -> bool:
        """Say, on all ranks, whether there is a checkpoint at `path`: `ModelCheckpoint` asks, and counts up a name that comes again."""
        ranks = ranks_of(None, everybody=True)

        def look() -> bool:
            pin = pin_for(path)
            return pin == self._pin or pin in self.store

        return look() if ranks is None else ranks.on_first(look)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Let a checkpoint go: it stays only as long as the store's retention says. Not before what was saved last is durable."""
        pin, pending = pin_for(path), self._pending
        if pin == self._pin:
            self._pin = ""
        if pending is None:
            let_go(self.store, pin, _passing(path))
            return
        leaving = Job(let_go, self.store, pin, _passing(path))
        self._leaving.append(leaving)
        # In the thread that saves; here, if that is done already.
        pending.add_done_callback(lambda saved: leaving.cancel() if saved.cancelled() or saved.exception() else leaving.run())

    def teardown(self) -> None:
        """Wait for what is being saved, and give back the memory for it.

        Raises:
            Exception: what it failed with.
        """
        try:
            self._wait()
        finally:
            self.store._background.close()


def _passing(path: str | os.PathLike[str]) -> bool:
    """Whether Lightning's tuner saves to `path` what it puts back, and removes, when it has tried something out. Not to be resumed from:
    it tries before a run is resumed."""
    return PurePath(path).name.startswith((".lr_find_", ".scale_batch_size_"))


def _step(checkpoint: dict[str, Any]) -> int | None:
    for key in ("global_step", "step"):  # of the Trainer; what one would call it in Fabric
        value = checkpoint.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
    return None


def _check_kind(checkpoint: Checkpoint) -> None:
    by = checkpoint.by
    if by != BY:
        raise WrongKind(f"checkpoint {checkpoint.id} was written by {by or 'Store.save or a transaction'}, not by Lightning")


class _Nothing(dict[str, Any]):
    """What an empty store has to load. False, and so passed over by the Trainer; Fabric is told that there is nothing."""

    def __init__(self, url: str) -> None:
        super().__init__({"pytorch-lightning_version": _VERSION})
        self._url = url

    def __bool__(self) -> bool:
        return False

    def keys(self) -> Any:
        raise CheckpointNotFound(f"{self._url} is empty: there is nothing to load; start at the beginning")


class ExactResume(_Callback):  # type: ignore[misc]
    """A callback that lets a run go on at the very next batch, with the random generators as they were.

    The training loader must draw from one of our samplers, of which this keeps the count; or be stateful itself, like torchdata's
    `StatefulDataLoader`. Its state, and the generators of every rank, are part of each checkpoint of the Trainer.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._trainer: Any = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Acquire the store before a run is resumed from it, and let `ModelCheckpoint` look there, and not on this disk, for its files.

        Raises:
            UsageError: it is to make links on this disk, or the strategy would pass the store by.
        """
        self._trainer = trainer
        io = _io(trainer)
        if io is None:
            return
        for kind in type(trainer.strategy).__mro__:
            if kind.__name__ in _OWN_WAYS:
                raise UsageError(f"Lightning's {kind.__name__} saves in a way of its own, and not into a store: use dcp_writer")
        io.fitting = stage == "fit"
        if not io.fitting:
            return
        for saver in trainer.checkpoint_callbacks:
            if getattr(saver, "save_last", None) == "link":
                raise UsageError(
                    'save_last="link" makes a link on this disk, and the checkpoints are in a store; use save_last=True'
                )
            if hasattr(saver, "file_exists"):
                saver.file_exists = io.file_exists
        if trainer.is_global_zero:
            io.store.acquire()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Warn of a run that starts at the beginning although there is something to resume from."""
        io = _io(trainer)
        begins = trainer.ckpt_path is None and trainer.global_step == 0
        if io is not None and begins and trainer.is_global_zero and _LATEST in io.store:
            message = f'{io.store.url} has checkpoints, and this run starts at step 0; ckpt_path="latest" goes on with the newest'
            warnings.warn(f'{message} (Lightning looks for "last" and "hpc" on this disk only)', StoreWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        if self._trainer is None or (not self._trainer.training and not self._trainer.validating):
            return {}
        sampler = _sampler(self._trainer)
        ranks = ranks_of(None, everybody=True)
        generators = [rng.capture()] if ranks is None else ranks.together(rng.capture)
        return {"sampler": None if sampler is None else sampler.state_dict(), "generators": generators}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore, now that the loader is there and has not been asked for a batch yet."""
        saved, self._saved = self._saved, None
        sampler = _sampler(trainer)
        if sampler is not None:
            _count_of(trainer, sampler)  # fail now if it cannot be counted
        progress = trainer.fit_loop.epoch_progress.current
        begins = progress.ready == progress.processed  # an epoch; otherwise one is gone on with
        if saved is None:
            if sampler is not None and begins and (sampler.consumed or sampler.epoch != progress.processed):
                # An earlier run in this process, which was interrupted perhaps, has left its count there.
                sampler.reset_progress()
                sampler.set_epoch(progress.processed)
                iter(trainer.fit_loop._data_fetcher)  # again: workers may have been given what was next then
            return
        if saved["sampler"] is not None:
            if sampler is None:
                raise StateMismatch(
                    "the checkpoint has a sampler's state, but the training loader draws from none of ckptstore's samplers"
                )
            sampler.load_state_dict(saved["sampler"])
            if begins:  # what was saved at the last batch says that the epoch before is still under way
                sampler.reset_progress()
                sampler.set_epoch(progress.processed)
            else:
                iter(trainer.fit_loop._data_fetcher)  # again: workers may have been given the start of the epoch
        elif not begins and not _stateful(trainer):
            message = "this epoch is gone on with, but the training loader can only start anew: samples will be repeated"
            warnings.warn(f"{message}; give it one of ckptstore's samplers", StoreWarning, stacklevel=2)
        _restore_generators(trainer, saved["generators"])
        if begins and not trainer.fit_loop.done:  # no epoch begins after the last one
            if _stateful(trainer):  # what was saved at the last batch would have it yield nothing in this epoch
                for inside in _samplers(trainer):
                    if callable(getattr(inside, "set_epoch", None)):
                        inside.set_epoch(progress.processed)
            iter(trainer.fit_loop._data_fetcher)  # draws a seed from the generators, as at the start of every epoch

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the generators of a run that had ended, and so was not started."""
        saved, self._saved = self._saved, None
        if saved is not None:
            _restore_generators(trainer, saved["generators"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the batch, before `ModelCheckpoint`, which Lightning calls last, may save."""
        if trainer.fit_loop.epoch_loop._should_accumulate():
            # Nothing has been stepped on, but after a resume `ModelCheckpoint` does not know that this step is saved. Saved again now,
            # it would be gone on with from the middle of its batches, without the gradients of those before.
            for saver in trainer.checkpoint_callbacks:
                if getattr(saver, "_every_n_train_steps", 0):
                    saver._last_global_step_saved = trainer.global_step
        sampler = _sampler(trainer)
        if sampler is not None:
            sampler.advance(min(_count_of(trainer, sampler), sampler._left(sampler.consumed)))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        sampler = _sampler(trainer)
        if sampler is not None:
            sampler.reset_progress()
            sampler.set_epoch(sampler.epoch + 1)


def _restore_generators(trainer: Any, saved: list[Any]) -> None:
    if len(saved) == trainer.world_size:
        rng.restore(saved[trainer.global_rank])
    else:
        message = f"the random generators of {len(saved)} ranks were saved, and there are {trainer.world_size}: not restored"
        warnings.warn(message, StoreWarning, stacklevel=3)


def _io(trainer: Any) -> StoreCheckpointIO | None:
    """Return ours, if the Trainer has one, also within Lightning's `AsyncCheckpointIO`."""
    io = getattr(trainer.strategy.checkpoint_io, "checkpoint_io", trainer.strategy.checkpoint_io)
    return io if isinstance(io, StoreCheckpointIO) else None


def _loader(trainer: Any) -> Any:
    return trainer.train_dataloader


def _stateful(trainer: Any) -> bool:
    return hasattr(_loader(trainer), "load_state_dict")


def _sampler(trainer: Any) -> Interruptable[Any] | None:
    """Return the sampler of ours that the training loader draws from, None if there is none or the loader keeps its state itself."""
    found = next((sampler for sampler in _samplers(trainer) if isinstance(sampler, Interruptable)), None)
    if found is None or not _stateful(trainer):
        return found
    # It takes the sampler's own state, in which nobody has counted, for all that it needs to go on.
    raise UsageError(
        "this stateful loader does not count for the sampler in it: use torch's DataLoader, or "
        "sampler=ckptstore.integrations.torchdata.InLoader(sampler)"
    )


def _samplers(trainer: Any) -> tuple[Any, ...]:
    loader = _loader(trainer)
    batches = getattr(loader, "batch_sampler", None)
    return batches, getattr(batches, "sampler", None), getattr(loader, "sampler", None)


def _count_of(trainer: Any, sampler: Interruptable[Any]) -> int:
    return sampler._batch_items(_loader(trainer))
