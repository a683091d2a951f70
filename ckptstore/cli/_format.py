"""Values as people read them. Whatever a store holds, only printable characters reach the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from itertools import repeat

from ..envelope import JSON

__all__ = [
    "age",
    "aligned",
    "all_metrics",
    "compact",
    "count",
    "date",
    "metrics",
    "plural",
    "printable",
    "sampler",
    "size",
    "table",
]


def printable(text: str) -> str:
    """Return `text` with everything that is not printable (control characters, line ends, direction marks …) as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def count(number: int) -> str:
    """Return 12800 as "12 800"."""
    return f"{number:,}".replace(",", " ")


def plural(number: int, noun: str) -> str:
    """Return "1 file", "1 200 files"."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def size(nbytes: int) -> str:
    """Return a number of bytes in decimal units with three digits: "12.3 MB"."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB", "PB", "EB"):
        value /= 1000
        if value < 999.5 or unit == "EB":
            break
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def age(seconds: float) -> str:
    """Return a duration in its largest sensible unit, rounded down. Negative ones come from clocks that differ."""
    if seconds >= 48 * 3600:  # first, for those are the many
        return _days(int(seconds // 86400))
    if seconds < 0:
        return "0 s" if seconds > -60 else "in the future"
    unit, length = ("s", 1) if seconds < 60 else ("min", 60) if seconds < 3600 else ("h", 3600)
    return f"{int(seconds // length)} {unit}"


@lru_cache(1000)
def _days(number: int) -> str:
    return f"{number} days" if number < 730 else f"{count(number // 365)} years"


def date(timestamp: float) -> str:
    """Return seconds since 1970 as an ISO 8601 date in UTC."""
    return datetime.fromtimestamp(timestamp, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def metrics(values: Mapping[str, float]) -> str:
    """Return metrics in one line, of printable characters."""
    return _patterns[tuple(values)] % (*values.values(),)


def all_metrics(many: Sequence[Mapping[str, float]]) -> list[str]:
    """Do as `metrics` for each, without a call for each, for there may be tens of thousands."""
    kinds = {*map(tuple, many)}
    if len(kinds) != 1:
        return [*map(metrics, many)]
    lines = "\n".join([_patterns[kinds.pop()]] * len(many))
    return (lines % (*[value for values in many for value in values.values()],)).split("\n")


class _Patterns(dict[tuple[str, ...], str]):
    """The line of metrics by their names, but for the values: most checkpoints of a store have the same names."""

    def __missing__(self, names: tuple[str, ...]) -> str:
        pattern = self[names] = "  ".join([f"{printable(name).replace('%', '%%')}=%.6g" for name in names])
        return pattern


_patterns = _Patterns()


def compact(value: JSON) -> str:
    """Return JSON in one line if it is short, else indented."""
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= 100 else json.dumps(value, ensure_ascii=False, indent=2)


def sampler(state: JSON) -> str:
    """Return the state of one of our samplers in words, and any other as JSON."""
    if isinstance(state, dict):
        numbers = [n for key in ("epoch", "consumed", "length") if type(n := state.get(key)) is int and n >= 0]
        unit = state.get("unit", "samples")
        if len(numbers) == 3 and unit in ("samples", "batches"):
            return f"epoch {numbers[0]}, {count(numbers[1])} of {count(numbers[2])} {unit} consumed"
    return compact(state)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table whose first row is its head. Columns with nothing in them are left out.

    Args:
        right: the columns that are aligned to the right.
    """
    return [*aligned(list(zip(*rows, strict=True)), right)]


def aligned(columns: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Do as `table`, for columns; one line after the other, for there may be tens of thousands."""
    shown = [i for i, column in enumerate(columns) if any(column[1:])]
    if not shown:
        return repeat("", len(columns[0]))
    widths = {i: max(map(len, columns[i])) if i in right or i != shown[-1] else 0 for i in shown}
    line = "  ".join(f"%{'' if i in right else '-'}{width}s" for i, width in widths.items())
    return ((line % row).rstrip() for row in zip(*[columns[i] for i in shown], strict=True))
