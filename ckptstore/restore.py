"""Going on from the newest whole checkpoint: objects, sampler and random generators get back what was saved."""

from __future__ import annotations

import warnings
from typing import Any

from .checkpoint import RNG_FILE, Checkpoint
from .engine import Engine
from .errors import DamagedRecord, StateMismatch, StoreWarning
from .lookup import first_whole

__all__ = ["restore_newest"]


def restore_newest(
    engine: Engine, name: str, objects: Any, sampler: Any, map_location: Any, weights_only: bool, rng: bool
) -> Checkpoint | None:
    """Restore from the newest whole checkpoint saved under `name` and return it; None for an empty store. See `Store.resume`."""
    state = engine.head().record
    if not state.checkpoints:
        if state.spared:
            raise DamagedRecord(
                "the records that named this store's checkpoints are damaged or gone, and the data of these is still there: "
                f"{', '.join(state.spared)}; bring one back with tag(name, id), or delete them to start over"
            )
        return None
    from . import rng as generators
    from . import snapshot

    def read(checkpoint: Checkpoint) -> tuple[Any, Any]:
        saved = checkpoint.load(map_location=map_location, weights_only=weights_only)
        return saved, checkpoint.load(RNG_FILE, map_location="cpu") if rng and RNG_FILE in checkpoint.files else None

    checkpoint, (saved, saved_rng) = first_whole(engine, name, None, read)
    _restore_sampler(checkpoint, sampler)
    snapshot.restore(objects, saved)
    if saved_rng is not None:
        generators.restore(saved_rng)
    return checkpoint


def _restore_sampler(checkpoint: Checkpoint, sampler: Any) -> None:
    saved = checkpoint.sampler_state
    if sampler is not None:
        if saved is None:
            raise StateMismatch(f"checkpoint {checkpoint.id} has no sampler state; save with sampler=, or resume without")
        sampler.load_state_dict(saved)
    elif saved is not None:
        message = (
            f"checkpoint {checkpoint.id} has a sampler state, but resume was given no sampler: samples may be repeated or skipped"
        )
        warnings.warn(message, StoreWarning, stacklevel=4)
