"""The key that authenticates a store, and where it comes from: never a URL, which ends up in logs, histories and lists of processes."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Iterable
from typing import Any

from .errors import InvalidOption, UsageError

__all__ = ["HOW", "KEY_FILE_VARIABLE", "KEY_VARIABLE", "Key", "find_key", "refuse_key_in_url"]

KEY_VARIABLE = "CKPTSTORE_HMAC_KEY"
KEY_FILE_VARIABLE = "CKPTSTORE_HMAC_KEY_FILE"
HOW = f"give it as the keyword hmac_key (bytes, or the path of a file), or by {KEY_FILE_VARIABLE} or {KEY_VARIABLE}"
_SHORTEST, _LONGEST = 16, 4096


class Key:
    """A secret that nobody gets to see: not by `repr`, and not in a pickle, which holds where the key came from instead."""

    __slots__ = ("_again", "_secret")

    def __init__(self, secret: bytes, again: tuple[Callable[..., Key | None], tuple[Any, ...]] | None = None) -> None:
        """Take the bytes of a key, and how to find it again in another process.

        Raises:
            InvalidOption: too short or too long. Line ends after it are not part of it: editors and shells add them.
        """
        self._secret = bytes(secret).rstrip(b"\r\n")
        self._again = again
        if not _SHORTEST <= len(self._secret) <= _LONGEST:
            raise InvalidOption(f"hmac_key must have {_SHORTEST} to {_LONGEST} bytes; 'openssl rand -hex 32' makes a good one")

    def sign(self, data: bytes) -> bytes:
        """Return the HMAC-SHA-256 of `data` in lower-case hexadecimal."""
        return hmac.digest(self._secret, data, "sha256").hex().encode("ascii")

    def signed(self, data: bytes, mac: bytes) -> bool:
        """Say whether `mac` is what `sign` returns for `data`."""
        return hmac.compare_digest(self.sign(data), mac)

    def __repr__(self) -> str:
        return "<Key>"

    def __reduce__(self) -> tuple[Callable[..., Key | None], tuple[Any, ...]]:
        if self._again is None:
            raise UsageError(
                "a Store with an hmac_key given as bytes is not pickled, as the key would be; name a file that has it"
            )
        return self._again


def find_key(given: bytes | os.PathLike[str] | Key | None) -> Key | None:
    """Return the key that was given, else that of the environment, else None.

    Raises:
        InvalidOption: it cannot be read, or is none; says what to do. Never shows it.
    """
    if isinstance(given, Key):
        return given
    if isinstance(given, (bytes, bytearray)):
        return Key(given)
    if isinstance(given, os.PathLike):
        return _from_file(os.path.abspath(os.fsdecode(given)))
    if given is not None:
        raise InvalidOption(f"hmac_key is bytes or an os.PathLike, not {type(given).__name__}; {HOW}")
    return _from_environment()


def refuse_key_in_url(options: Iterable[str]) -> None:
    """Raise `InvalidOption` if a URL's options have a key."""
    if any(name.lower().replace("-", "_").startswith("hmac_key") for name in options):
        raise InvalidOption(f"a key does not belong in a URL; {HOW}")


def _from_environment() -> Key | None:
    text, path = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
    if text is not None and path is not None:
        raise InvalidOption(f"set {KEY_VARIABLE} or {KEY_FILE_VARIABLE}, not both")
    if path is not None:
        return _from_file(os.path.abspath(path)) if path else _nothing(KEY_FILE_VARIABLE)
    if text is not None:
        return Key(os.fsencode(text), (_from_environment, ())) if text else _nothing(KEY_VARIABLE)
    return None


def _nothing(variable: str) -> Key:
    raise InvalidOption(f"{variable} is empty; unset it to go without a key")


def _from_file(path: str) -> Key:
    try:
        with open(path, "rb") as file:
            secret = file.read(_LONGEST + 3)  # one too many, with a line end
    except (OSError, ValueError) as exc:
        raise InvalidOption(f"the file with the hmac_key cannot be read: {path}: {exc}") from None
    return Key(secret, (_from_file, (path,)))
