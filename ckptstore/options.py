"""A store's options: from the URL or from keywords, checked, the same either way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .checksum import new_digest
from .errors import InvalidOption
from .retention import Retention
from .url import unknown_option

__all__ = ["STORE_OPTIONS", "Options", "split_options"]

STORE_OPTIONS = {
    "keep_last": "keep the newest N saved under each name, or 'all' (default 2)",
    "keep_every": "also keep checkpoints whose step is a multiple of K",
    "keep_best": "also keep the best N by best_metric",
    "best_metric": "the metric that keep_best compares",
    "best_mode": "'min' (default) if lower is better, 'max' if higher is",
    "digest": "'blake3' adds a cryptographic checksum to the CRC-64 of each chunk; needs ckptstore[blake3]",
    "retry_seconds": "how long to repeat what a service over a network could not answer (default 120; 0: not at all)",
    "single_writer": "'1' allows storage without create-if-absent; you make sure that only one job ever writes",
}
"""Options of every store: name -> one line of help. Backends add their own."""


@dataclass(frozen=True)
class Options:
    """A store's options, sorted."""

    retention: Retention
    single_writer: bool
    retry_seconds: float
    digest: str
    """Empty if none is asked for."""
    backend: Mapping[str, str]
    """What is left for the backend, as text."""


def split_options(given: Mapping[str, Any], backend_options: Mapping[str, str]) -> Options:
    """Sort and check options.

    Raises:
        InvalidOption: unknown, with the nearest match, or with a bad value.
        WrongVersion: `digest` needs a package that is not installed.
    """
    rules: dict[str, Any] = {}
    for name in ("keep_last", "keep_every", "keep_best"):
        if name in given:
            rules[name] = None if name == "keep_last" and given[name] == "all" else _number(name, given[name])
    for name in ("best_metric", "best_mode"):
        if name in given:
            rules[name] = given[name]
            if not isinstance(rules[name], str) or not rules[name]:
                raise InvalidOption(f"{name} must be a text, not {rules[name]!r:.100}")
    rest = {name: str(value) for name, value in given.items() if name not in STORE_OPTIONS}
    for name in rest:
        if name not in backend_options:
            raise unknown_option(name, {*STORE_OPTIONS, *backend_options})
        if given[name] is None:
            raise InvalidOption(f"option {name!r} has no value, but is None; leave it out")
    return Options(
        Retention(**rules),
        _flag("single_writer", given.get("single_writer", "0")),
        _seconds(given.get("retry_seconds", 120)),
        _digest(given.get("digest", "")),
        rest,
    )


def _digest(value: Any) -> str:
    if value not in ("", "blake3"):
        raise InvalidOption(f"digest must be 'blake3', or not be given, not {value!r:.100}")
    if value:
        new_digest(value)  # or say what to install
    return str(value)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise InvalidOption(f"retry_seconds must be a number from 0 to 86400, not {value!r:.100}")
    return seconds


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
