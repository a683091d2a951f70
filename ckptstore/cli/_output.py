"""Where results go: lines for people, or one JSON document. Errors and warnings are one line each on standard error."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import TextIO

from ..envelope import JSON
from ._format import printable

__all__ = ["Output"]

_PLAIN = bytes(range(32, 127)) + b"\n"


class Output:
    """The output of one command. With `as_json`, nothing but the finished document is printed."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.document: dict[str, JSON] = {}
        """What the command found, filled in as it goes: it is printed also if the command fails half-way."""
        self.warnings: list[str] = []
        for stream in (sys.stdout, sys.stderr):
            # A terminal that lacks a character must not make us fail.
            with suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]

    def say(self, text: str = "") -> None:
        """Print a text for people, whose line ends are kept."""
        if not self.as_json:
            # Many lines at once, for there may be tens of thousands.
            plain = text.isascii() and not text.encode().translate(None, _PLAIN)
            self._print(text if plain else "\n".join(map(printable, text.split("\n"))))

    def fail(self, kind: str, message: str) -> None:
        """Report the error that ends the command; `kind` is its type's name."""
        if self.as_json:
            self.document["error"] = {"type": kind, "message": message}
        else:
            self._complain(message)

    def show_warning(
        self, message: Warning | str, category: object, filename: str, lineno: int, file: object = None, line: str | None = None
    ) -> None:
        """Report a warning; takes the place of `warnings.showwarning`."""
        self.warnings.append(str(message))
        if not self.as_json:
            self._complain(f"warning: {message}")

    def render(self) -> str:
        """Return the document."""
        return json.dumps({**self.document, "warnings": self.warnings}, indent=2, allow_nan=False)

    def finish(self, document: str | None) -> None:
        """Print the document, if there is one. All output has left this process on return."""
        self._print(document, flush=True)

    @staticmethod
    def _print(line: str | None, flush: bool = False) -> None:
        if sys.stdout is None:  # closed by who started us
            return
        try:
            if line is not None:
                print(line)
            if flush:
                sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as exc:
            raise OSError(exc.errno, f"could not write this: {exc.strerror}", "the output") from exc

    @staticmethod
    def abandon(stream: TextIO) -> None:
        """Let what was not written to `stream` go nowhere; else the interpreter tries again at its end, and changes our exit status."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)

    def _complain(self, message: str) -> None:
        if sys.stderr is not None:
            try:
                print(printable(f"ckptstore: {message}"), file=sys.stderr, flush=True)
            except OSError:
                self.abandon(sys.stderr)
