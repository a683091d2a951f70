"""From what a user types to a scheme, a location and options."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote

from .errors import InvalidOption, InvalidURL

__all__ = ["StoreURL", "parse_url", "unknown_option"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_ALMOST = re.compile(r"[^/]{2,}:/")
"""A scheme with one slash, as in RFC 8089's ``file:/data/x`` or after `os.path.normpath`, or with something before it; no ``C:/``."""
_USER_INFO = re.compile(r"[^/]*@|[^/:]*:(?!\d*(?:/|$)).*@", re.DOTALL)
"""Something before an ``@``: also a password with a slash in it, unquoted, but not a port and then a path with an ``@``."""


@dataclass(frozen=True)
class StoreURL:
    """A parsed store URL; `location` is what stands behind ``scheme://``, or the path."""

    scheme: str
    location: str
    options: Mapping[str, str] = field(default_factory=dict)


def parse_url(text: str | os.PathLike[str]) -> StoreURL:
    """Parse a path or URL with options after ``?``. An `os.PathLike` is taken literally: no scheme, no options.

    A plain path is not percent-decoded; the location of a ``file://`` URL is, as RFC 8089 says.

    Raises:
        InvalidURL: empty, or a URL written amiss, or with user information before an ``@`` (secrets do not belong in URLs).
        InvalidOption: an option without a value, or given twice.
    """
    if isinstance(text, os.PathLike):
        path = os.fspath(text)
        if not isinstance(path, str) or not path or "\0" in path:
            raise InvalidURL("the store's path must be a non-empty str path without NUL")
        return StoreURL("file", _encodable(path))
    if not isinstance(text, str):
        raise InvalidURL(f"a store is named by a str or os.PathLike, not by {type(text).__name__}")
    body, _, query = text.partition("?")
    match = _SCHEME.fullmatch(body)
    if not match and _ALMOST.match(body):
        raise InvalidURL(
            "the store's URL is written amiss: write s3://bucket/prefix, or for a path file:///data/run-42 or shared:///mnt/run-42; "
            "a folder whose name ends in ':' is given as ./name:/…"
        )
    scheme, location = (match[1].lower(), match[2]) if match else ("file", body)
    if match and _USER_INFO.match(location):
        raise InvalidURL(
            f"the {scheme}:// URL has user information before '@'; give credentials by the environment, never in a URL"
        )
    if match and scheme == "file":
        host, slash, rest = location.partition("/")
        if host not in ("", "localhost") or not slash:
            raise InvalidURL("a file URL has three slashes, file:///absolute/path; for a relative path leave out file://")
        location = unquote("/" + rest, errors="surrogateescape")  # as os.fsdecode: paths are bytes
    if not location or "\0" in location:
        raise InvalidURL("the store URL names no place; write a path such as runs/42 or a URL such as file:///data/run-42")
    return StoreURL(scheme, _encodable(location), _options(query))


def _encodable(location: str) -> str:
    try:
        os.fsencode(location)  # a surrogate that stands for a byte, as os.listdir gives it, is fine
    except UnicodeEncodeError:
        raise InvalidURL(f"the store's place {location!a:.200} has half of a surrogate pair, which no path can have") from None
    return location


def _options(query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise InvalidOption("options after '?' are written name=value&name=value") from None
    options: dict[str, str] = {}
    for name, value in pairs:
        if name in options:
            raise InvalidOption(f"option {name!r} is given twice")
        if not value:
            raise InvalidOption(f"option {name!r} has no value")
        options[name] = value
    return options


def unknown_option(name: str, known: Iterable[str]) -> InvalidOption:
    """Return the error for an option that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return InvalidOption(f"unknown option {name!r}{hint} Known here: {', '.join(known)}")
