"""Going on from the newest whole checkpoint: objects, sampler and random generators get back what was saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .checkpoint import LOADERS, RNG_FILE, Checkpoint
from .engine import Engine
from .errors import Damaged, FallbackWarning, StateMismatch, StoreWarning, WrongKind
from .lookup import first_whole, newest_first

if TYPE_CHECKING:
    from .ranks import Ranks

__all__ = ["newest_whole_for_all", "restore_newest", "restore_sampler"]

_R = TypeVar("_R")


def restore_newest(
    engine: Engine,
    name: str,
    objects: Any,
    sampler: Any,
    map_location: Any,
    weights_only: bool,
    rng: bool,
    ranks: Ranks | None = None,
) -> Checkpoint | None:
    """Restore from the newest whole checkpoint saved under `name` and return it; None for an empty store. See `Store.resume`."""
    from . import mapped, snapshot
    from . import rng as generators

    def read(checkpoint: Checkpoint) -> tuple[snapshot.Plan, Any]:
        plans: list[snapshot.Plan] = []

        def held(state: Any) -> list[Any]:
            plans[:] = [snapshot.Plan(objects, state)]
            return [part for target, part in plans[0].given if not mapped.takes_copies(target)]

        state = checkpoint.load_to_copy(map_location, weights_only, held)
        saved_rng = checkpoint.load(RNG_FILE, map_location="cpu") if rng and RNG_FILE in checkpoint.files else None
        return plans[0] if plans and plans[0].state is state else snapshot.Plan(objects, state), saved_rng

    def fit() -> None:
        with _naming_the_loader(checkpoint):
            plan.check()

    def apply() -> None:
        with _naming_the_loader(checkpoint):
            _restore_sampler(checkpoint, sampler)
            plan.carry_out()
        if saved_rng is not None:
            generators.restore(saved_rng)

    if ranks is None:
        if not newest_first(engine, name):
            return None
        checkpoint, (plan, saved_rng) = first_whole(engine, name, None, read)
        fit()  # before anything is changed
        apply()
        return checkpoint
    found = newest_whole_for_all(engine, name, ranks, read)
    if found is None:
        return None
    checkpoint, (plan, saved_rng) = found
    ranks.together(fit)
    ranks.together(apply)
    return checkpoint


@contextmanager
def _naming_the_loader(checkpoint: Checkpoint) -> Iterator[None]:
    """Of what a library wrote, say what loads it if it does not fit."""
    try:
        yield
    except StateMismatch as exc:
        if not checkpoint.by:
            raise
        loader = LOADERS.get(checkpoint.by, "that")
        raise WrongKind(f"checkpoint {checkpoint.id} was written by {checkpoint.by}; {loader} loads it: {exc}") from exc


def newest_whole_for_all(
    engine: Engine, name: str, ranks: Ranks, read: Callable[[Checkpoint], _R]
) -> tuple[Checkpoint, _R] | None:
    """Find, on rank 0, the newest checkpoint saved under `name`, and let every rank `read` the newest that all find whole.

    Returns:
        That checkpoint and what `read` made of it here; None on all ranks for an empty store.

    Raises:
        BaseException: on all ranks, what came in the way on rank 0, or here.
        RankFailed: something came in the way on another rank.
        Damaged: not one is whole for all: what was met here, or else on the first rank that met something.
    """
    entries = ranks.on_first(lambda: newest_first(engine, name))
    damage: Damaged | None = None
    for entry in entries:
        if damage is not None:
            url = engine.backend.url
            warnings.warn(
                f"{url}: {damage}; all ranks fall back to {entry.id} (step {entry.step})", FallbackWarning, stacklevel=4
            )
        checkpoint = Checkpoint(
            engine, entry
        )  # as rank 0 has found it: here it is not looked for, which a stale cache could spoil
        results: list[_R] = []
        outcomes = ranks.all(lambda checkpoint=checkpoint, results=results: results.append(read(checkpoint)))  # type: ignore[misc]
        failures = [o for o in outcomes if isinstance(o, BaseException)]
        if not failures:
            return checkpoint, results[0]
        if not all(isinstance(f, Damaged) for f in failures):
            ranks.raise_first([None if isinstance(o, Damaged) else o for o in outcomes])
        mine = outcomes[ranks.rank]
        engine.verdicts[entry.id] = False  # on all ranks, for any may be the next to commit
        damage = mine if isinstance(mine, Damaged) else next(f for f in failures if isinstance(f, Damaged))
    if damage is not None:
        raise damage
    return None


def restore_sampler(checkpoint: Checkpoint, sampler: Any, ranks: Ranks | None) -> None:
    """Give `sampler`, if there is one, its state back, on all ranks or none.

    Raises:
        StateMismatch: the checkpoint has none.
        RankFailed: another rank failed.
    """
    if ranks is None:
        _restore_sampler(checkpoint, sampler)
    else:
        ranks.together(lambda: _restore_sampler(checkpoint, sampler))


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
        warnings.warn(message, StoreWarning, stacklevel=5)
