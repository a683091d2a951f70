"""A store's options: from the URL or from keywords, checked, the same either way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import InvalidOption
from .retention import Retention
from .url import unknown_option

__all__ = ["STORE_OPTIONS", "split_options"]

STORE_OPTIONS = {
    "keep_last": "keep the newest N saved under each name, or 'all' (default 2)",
    "keep_every": "also keep checkpoints whose step is a multiple of K",
    "keep_best": "also keep the best N by best_metric",
    "best_metric": "the metric that keep_best compares",
    "best_mode": "'min' (default) if lower is better, 'max' if higher is",
    "single_writer": "'1' allows storage without create-if-absent; you make sure that only one job ever writes",
}
"""Options of every store: name -> one line of help. Backends add their own."""


def split_options(given: Mapping[str, Any], backend_options: Mapping[str, str]) -> tuple[Retention, bool, dict[str, str]]:
    """Sort options into retention, ``single_writer``, and those of the backend (as text).

    Raises:
        InvalidOption: unknown, with the nearest match, or with a bad value.
    """
    rules: dict[str, Any] = {}
    for name in ("keep_last", "keep_every", "keep_best"):
        if name in given:
            rules[name] = None if name == "keep_last" and given[name] == "all" else _number(name, given[name])
    for name in ("best_metric", "best_mode"):
        if name in given:
            rules[name] = str(given[name])
    rest = {name: str(value) for name, value in given.items() if name not in STORE_OPTIONS}
    for name in rest:
        if name not in backend_options:
            raise unknown_option(name, {*STORE_OPTIONS, *backend_options})
    return Retention(**rules), _flag("single_writer", given.get("single_writer", "0")), rest


def _number(name: str, value: Any) -> int:
    try:
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return int(value)
    except ValueError:
        pass
    raise InvalidOption(f"{name} must be a whole number, not {value!r:.100}")


def _flag(name: str, value: Any) -> bool:
    if str(value).lower() in ("1", "true"):
        return True
    if str(value).lower() in ("0", "false"):
        return False
    raise InvalidOption(f"{name} must be 0 or 1, not {value!r:.100}")
