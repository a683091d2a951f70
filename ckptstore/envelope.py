"""The envelope of records and manifests: JSON that carries the SHA-256 of its own body.

The bytes are exactly ``{"sha256":"<64 hex digits>","body":<body>}`` and a newline, where the digits are the SHA-256 of the bytes of
``<body>``. So every flipped bit and every truncation is found before the body is parsed, and the file is still plain JSON.
With a key, ``,"hmac":"<64 hex digits>"`` follows the SHA-256: the HMAC-SHA-256 of the same bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from .checksum import sha256
from .errors import Damaged, Forged, KeyMismatch, NewerFormat, UsageError
from .key import HOW, Key

__all__ = [
    "FORMAT",
    "JSON",
    "body_of",
    "check_json",
    "dumps",
    "from_number",
    "in_pieces",
    "parse",
    "seal",
    "to_number",
    "to_time",
    "unseal",
]

FORMAT = 2
"""Newest version of records and manifests that this library reads."""
_OLDEST = 1
"""What it writes where nothing newer is used, so that older libraries go on reading it."""

_DEEPEST = 100
"""Deeper JSON is not written: how deep the json module can read depends on how deep its caller already is."""

JSON = Any
"""A value of plain JSON: dict with str keys, list, str, int, finite float, bool, None."""

_HEAD, _MAC, _MIDDLE, _TAIL = b'{"sha256":"', b'","hmac":"', b'","body":', b"}\n"
_DIGITS = 64
_START = len(_HEAD) + _DIGITS + len(_MIDDLE)  # of the body, where there is no HMAC


def seal(
    body: dict[str, JSON], key: Key | None = None, *, encoded: Mapping[str, str] | None = None, version: int | None = None
) -> bytes:
    """Return the bytes of an envelope around `body`, with the format number added; authenticated if there is a `key`.

    `version` is that number, the oldest if not given. `encoded` has more fields, as JSON by the same rules: compact, ASCII, keys sorted.
    """
    data = _object({"format": version or _OLDEST, **body}, encoded or {}).encode("ascii")
    return _frame(data, key.sign(data) if key else None)


dumps = json.JSONEncoder(separators=(",", ":"), sort_keys=True, allow_nan=False).encode  # json.dumps would make one each time
"""JSON as records and manifests have it: compact, ASCII, keys sorted, no NaN."""


def _object(body: Mapping[str, JSON], encoded: Mapping[str, str]) -> str:
    """Return the JSON object with the fields of both, in few calls: each costs as much as the JSON of some ten fields."""
    pieces: list[str] = []
    for name in sorted(encoded):
        before = {k: body[k] for k in body if k < name}
        body = {k: body[k] for k in body if k > name}
        pieces += [dumps(before)[1:-1], f"{dumps(name)}:{encoded[name]}"]
    pieces.append(dumps(body)[1:-1])
    return "{" + ",".join(filter(None, pieces)) + "}"


def _frame(body: bytes, mac: bytes | None) -> bytes:
    return _HEAD + sha256(body).encode("ascii") + (b"" if mac is None else _MAC + mac) + _MIDDLE + body + _TAIL


def unseal(data: bytes, what: str, key: Key | None = None) -> dict[str, JSON]:
    """Check an envelope and return its body. With a `key`, nothing is parsed that was not written with it.

    Raises:
        Damaged: the bytes are not what was written; `what` names them in the message.
        Forged: they are whole, but not authentic.
        KeyMismatch: they are authenticated, and there is no key to check them with.
        NewerFormat: they are whole, but of a newer format.
    """
    start, mac = len(_HEAD) + _DIGITS, None
    if data.startswith(_MAC, start):
        start += len(_MAC) + _DIGITS
        mac = data[start - _DIGITS : start]
    body = data[start + len(_MIDDLE) : -len(_TAIL)]
    if data != _frame(body, mac):
        raise Damaged(f"{what} is damaged: its bytes do not match its own checksum")
    if key is None:
        if mac is not None:
            raise KeyMismatch(f"{what} was written with an hmac_key, and none is given here; {HOW}")
    elif mac is None:
        raise Forged(f"{what} is not authentic: it was written without an hmac_key")
    elif not key.signed(body, mac):
        raise Forged(f"{what} is not authentic: it was not written with this hmac_key")
    return parse(body, what)


def body_of(data: bytes) -> memoryview:
    """Return the body of an envelope without HMAC whose bytes are known to be right, because the SHA-256 of them all is."""
    return memoryview(data)[_START : -len(_TAIL)]


def parse(body: bytes | memoryview, what: str) -> dict[str, JSON]:
    """Read a body whose bytes have been checked.

    Raises:
        Damaged: it is no JSON, or has no format number.
        NewerFormat
    """
    try:
        value = _loads(str(body, "ascii"))
    except RecursionError:
        frame, depth = sys._getframe(), 0
        while frame.f_back is not None:
            frame, depth = frame.f_back, depth + 1
        if depth > sys.getrecursionlimit() // 2:
            raise  # it is the caller who is deep, so this says nothing about the bytes
        raise Damaged(f"{what} is nested too deeply") from None
    except ValueError as exc:
        raise Damaged(f"{what} is not JSON: {type(exc).__name__}") from None
    version = value.get("format") if isinstance(value, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise Damaged(f"{what} has no format number")
    if version > FORMAT:
        raise NewerFormat(
            f"{what} has format {version}, and this ckptstore reads up to {FORMAT}; upgrade ckptstore. Nothing was changed."
        )
    assert isinstance(value, dict)
    return value


def in_pieces(data: bytes, others: dict[str, JSON], name: str, version: int) -> Iterator[list[JSON]]:
    """Read an envelope without HMAC, whose bytes are known to be right and its body made of the fields `others` and of `name`.

    That is a long list of objects, of which some hundreds are yielded at a time.

    Raises:
        ValueError: it has other fields, or is no JSON, or only not the way `seal` makes it.
        RecursionError
    """
    before, after = _object({"format": version, **others}, {name: "[\n]"}).encode().split(b"\n")
    start, end = _START + len(before), len(data) - len(after) - len(_TAIL)
    first, colon, _ = data[start : start + 1000].partition(b":")
    if not (data.startswith(before, _START) and data.endswith(after + _TAIL) and first.startswith(b'{"') and colon):
        raise ValueError("not as it is written here")
    between = b"},%b:" % first  # stands in no string: a quotation mark that does has a backslash before it
    while start < end:
        cut = data.find(between, start + _PIECE, end)
        cut = end if cut < 0 else cut + 1
        yield _loads(f"[{str(data[start:cut], 'ascii')}]")
        start = cut + 1


_PIECE = 1 << 15
"""Bytes that are read at a time, or some more."""


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_loads = json.JSONDecoder(parse_constant=_refuse).decode


def check_json(value: object, what: str) -> JSON:
    """Return `value` if it is plain JSON that reads back equal.

    Raises:
        UsageError: it is not; says what to do.
    """
    if value is None:
        return None
    try:
        same = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise UsageError(f"{what} must be plain JSON (dict, list, str, int, finite float, bool, None): {exc}") from None
    if same != value:
        raise UsageError(f"{what} must be plain JSON that reads back equal: use lists for tuples, and str keys in dicts")
    level = [same]
    for _ in range(_DEEPEST):
        if not level:
            break
        level = [inner for v in level if isinstance(v, (dict, list)) for inner in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise UsageError(f"{what} is nested more than {_DEEPEST} levels deep; make it flatter")
    return same


def from_number(value: float) -> float | str:
    """Return a metric as JSON holds it: JSON has no NaN and no infinities, so those become strings."""
    return value if math.isfinite(value) else repr(value)


def to_number(value: JSON) -> float:
    """Undo `from_number`. Raises ValueError for anything else."""
    if type(value) is float:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    if value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError("not a number")


def to_time(value: JSON) -> float:
    """Return a time, in seconds since 1970. Raises ValueError unless it is in the years 1 to 9999, those that Python knows."""
    seconds = to_number(value)
    if not -62_135_596_800 <= seconds < 253_402_300_800:
        raise ValueError("not a time")
    return seconds
