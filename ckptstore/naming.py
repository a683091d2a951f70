"""Names of checkpoints, their ids, and the keys of their files. Everything that becomes part of a path is checked here."""

from __future__ import annotations

import operator
import re
import secrets
from collections.abc import Iterable

from .errors import InvalidName

__all__ = [
    "DATA",
    "MANIFEST",
    "are_ids",
    "check_name",
    "check_path",
    "check_step",
    "data_key",
    "epoch_of",
    "file_key",
    "id_of_key",
    "is_id",
    "new_id",
]

DATA = "data/"
MANIFEST = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ID = re.compile(r"e(0|[1-9][0-9]{0,17})(-s(0|[1-9][0-9]{0,17}))?-[0-9a-f]{12}")
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")


def check_name(name: object) -> str:
    """Return `name` if it may name a checkpoint: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not ``.`` or ``..``, not shaped like an id.

    Raises:
        InvalidName
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in (".", ".."):
        raise InvalidName(f"{name!r:.200} cannot name a checkpoint: use 1 to 128 of the characters A-Z a-z 0-9 . _ -")
    if is_id(name):
        raise InvalidName(f"{name!r} has the shape of a checkpoint id; choose another name")
    return name


def check_step(step: object) -> int | None:
    """Return `step` if it is None or an integer from 0 to 10**18 - 1.

    Raises:
        InvalidName
    """
    if step is None:
        return None
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]  # what is none raises TypeError
    except (TypeError, ValueError, RuntimeError):  # also a float tensor, or one of several elements
        number = -1
    if not 0 <= number < 10**18:
        raise InvalidName(f"step must be a whole number from 0 on, not {step!r:.100}")
    return int(number)


def new_id(epoch: int, step: int | None) -> str:
    """Return an id never used before: the epoch that may commit it, the step if there is one, and 48 random bits."""
    middle = "" if step is None else f"-s{step}"
    return f"e{epoch}{middle}-{secrets.token_hex(6)}"


def is_id(text: str) -> bool:
    """Say whether `text` has the shape of a checkpoint id."""
    return _ID.fullmatch(text) is not None


def are_ids(texts: Iterable[str]) -> bool:
    """Say whether `is_id` holds for all of `texts`, without a call for each, for there may be tens of thousands."""
    return all(map(_ID.fullmatch, texts))


def epoch_of(checkpoint_id: str) -> int:
    """Return the epoch in a checkpoint id (which `is_id` accepts)."""
    match = _ID.fullmatch(checkpoint_id)
    if match is None:
        raise InvalidName(f"{checkpoint_id!r:.200} is not a checkpoint id")
    return int(match[1])


def check_path(path: object) -> str:
    """Return `path` if it may name a file inside a checkpoint: relative, ``/``-separated, no ``.``, ``..``, control characters.

    Raises:
        InvalidName
    """
    if not isinstance(path, str) or not 0 < len(path) <= 4096:
        raise InvalidName(f"a file in a checkpoint is named by a relative path, not by {path!r:.100}")
    for segment in path.split("/"):
        if segment in ("", ".", "..") or any(ord(c) < 32 or ord(c) == 127 for c in segment):
            raise InvalidName(
                f"{path!r:.200} cannot name a file in a checkpoint: give a relative path without empty, '.' or '..' parts"
            )
        try:
            escaped = _escape(segment)
        except UnicodeEncodeError:
            raise InvalidName(f"{path!r:.200} cannot name a file in a checkpoint: it has half of a surrogate pair") from None
        if len(escaped) > 255:
            raise InvalidName(f"{path!r:.300} is too long to name a file in a checkpoint")
    return path


def _escape(segment: str) -> str:
    if _PLAIN.fullmatch(segment):
        return segment
    # Surrogates stand for undecodable bytes in names that came from a directory; they survive the round trip.
    raw = segment.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if _PLAIN.fullmatch(chr(b)) else f"={b:02X}" for b in raw)


def file_key(path: str) -> str:
    """Return the key, below the checkpoint's folder, of the file `path` (which `check_path` accepts).

    Other characters than ``A-Z a-z 0-9 . _ -`` become ``=`` and two hexadecimal digits per UTF-8 byte, and so does one character of
    names that are taken: the manifest's own, and the suffix that backends use for unfinished files.
    """
    segments = [_escape(s) for s in path.split("/")]
    segments = [s[: -len(".partial")] + "=2Epartial" if s.endswith(".partial") else s for s in segments]
    key = "/".join(segments)
    return "=6D" + key[1:] if key == MANIFEST or key.startswith(MANIFEST + "/") else key


def data_key(checkpoint_id: str, key: str = "") -> str:
    """Return the key of a checkpoint's folder (with a final ``/``), or of one object in it."""
    return f"{DATA}{checkpoint_id}/{key}"


def id_of_key(key: str) -> str:
    """Return the checkpoint id in a key below ``data/``, whatever it looks like."""
    return key[len(DATA) :].partition("/")[0]
