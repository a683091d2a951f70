"""Which checkpoints to keep. Pure: from the state and the rules to the ids that may go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .entries import Entries
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
        for name in ("keep_last", "keep_every", "keep_best"):
            value: int | None = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidOption(f"{name} must be a whole number from 1 on, not {value!r:.100}")
        if self.best_mode not in ("min", "max"):
            raise InvalidOption(f"best_mode must be min or max, not {self.best_mode!r:.100}")
        if (self.keep_best is None) != (self.best_metric is None):
            raise InvalidOption("keep_best and best_metric belong together: keep_best=3&best_metric=loss&best_mode=min")


def expired(state: Record, rules: Retention, keep: Iterable[str] = ()) -> set[str]:
    """Return the ids of `state` that neither a rule nor a promise keeps.

    Always kept: what a name points to, what the job resumed from, the newest that was read back whole, and the ids `keep`. A checkpoint
    found damaged never counts towards a rule in the place of a whole one.
    """
    if rules.keep_last is None:
        return set()
    gone = _not_last(state.checkpoints, rules.keep_last)
    if rules.keep_every is not None:
        gone = [e for e in gone if e.step is None or e.step % rules.keep_every]
    if not gone:
        return set()
    kept = {*keep, *state.names.values(), state.resumed}
    if any(e.verified for e in gone):
        kept.update([e.id for e in state.checkpoints if e.verified][-1:])
    if rules.best_metric is not None:
        whole = [e for e in state.checkpoints if e.verified is not False]
        kept |= _best(state.checkpoints, rules.best_metric, rules) | _best(whole, rules.best_metric, rules)
    return {e.id for e in gone} - kept


def _not_last(entries: Entries, keep: int) -> list[Entry]:
    """Return those that are not among the newest `keep` saved under their name, nor, if they are whole, among the newest whole ones.

    Begins with the oldest, and ends where all that come are kept: of thousands that are kept, few are looked at.
    """
    found = list[Entry]()
    left = Counter(entries.counts)
    more = {name for name, _ in left if left[name, False] + left[name, True] > keep}
    for entry in entries if more else ():
        name, damaged = entry.name, entry.verified is False
        if name in more:
            if left[name, False] + left[name, True] * damaged > keep:
                found.append(entry)
            left[name, damaged] -= 1
            if left[name, False] + left[name, True] <= keep:
                more.remove(name)
                if not more:
                    break
    return found


def _best(entries: Iterable[Entry], metric: str, rules: Retention) -> set[str]:
    sign = 1 if rules.best_mode == "min" else -1
    scored = [(sign * e.metrics[metric], -i, e.id) for i, e in enumerate(entries) if metric in e.metrics]
    # A NaN is no score at all; among equals the newer one wins.
    ranked = sorted(item for item in scored if not math.isnan(item[0]))
    return {checkpoint_id for _, _, checkpoint_id in ranked[: rules.keep_best]}
