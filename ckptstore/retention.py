"""Which checkpoints to keep. Pure: from the state and the rules to the ids that may go."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .errors import InvalidOption
from .record import Entry, Record

__all__ = ["Retention", "expired"]


@dataclass(frozen=True)
class Retention:
    """What to keep besides what is always kept. Rules add up: what any of them keeps is kept."""

    keep_last: int | None = 2
    """The newest N saved under each name; None keeps all."""
    keep_every: int | None = None
    """Those whose step is a multiple of K."""
    keep_best: int | None = None
    """The best N by `best_metric`."""
    best_metric: str | None = None
    best_mode: str = "min"
    """``min``: lower is better; ``max``: higher is."""

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_every", 1), ("keep_best", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InvalidOption(f"{name} must be a whole number from {least} on, not {value!r:.100}")
        if self.best_mode not in ("min", "max"):
            raise InvalidOption(f"best_mode must be min or max, not {self.best_mode!r:.100}")
        if (self.keep_best is None) != (self.best_metric is None):
            raise InvalidOption("keep_best and best_metric belong together: keep_best=3&best_metric=loss&best_mode=min")


def expired(state: Record, rules: Retention, keep: Iterable[str] = ()) -> set[str]:
    """Return the ids of `state` that neither a rule nor a promise keeps.

    Always kept: what a name points to, what the job resumed from, the newest that was read back whole, and the ids `keep`. A checkpoint
    found damaged never counts towards a rule in the place of a whole one.
    """
    entries = state.checkpoints
    if rules.keep_last is None:
        return set()
    kept = {*keep, *state.names.values(), state.resumed}
    kept.update([e.id for e in entries if e.verified][-1:])
    whole = [e for e in entries if e.verified is not False]
    kept |= _by_rules(entries, rules) | _by_rules(whole, rules)
    return {e.id for e in entries} - kept


def _by_rules(entries: Iterable[Entry], rules: Retention) -> set[str]:
    entries = list(entries)
    kept: set[str] = set()
    if rules.keep_last is not None:
        by_name: dict[str, list[str]] = {}
        for entry in entries:
            by_name.setdefault(entry.name, []).append(entry.id)
        for ids in by_name.values():
            kept.update(ids[-rules.keep_last :])
    if rules.keep_every is not None:
        kept.update(e.id for e in entries if e.step is not None and e.step % rules.keep_every == 0)
    if rules.keep_best is not None and rules.best_metric is not None:
        sign = 1 if rules.best_mode == "min" else -1
        scored = [
            (sign * e.metrics[rules.best_metric], -i, e.id) for i, e in enumerate(entries) if rules.best_metric in e.metrics
        ]
        # A NaN is no score at all; among equals the newer one wins.
        ranked = sorted(item for item in scored if not math.isnan(item[0]))
        kept.update(checkpoint_id for _, _, checkpoint_id in ranked[: rules.keep_best])
    return kept
