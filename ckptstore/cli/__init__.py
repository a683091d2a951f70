"""The ``ckptstore`` command. See docs/cli.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (else what was typed) asks for, and return its exit status."""
    try:
        from ._main import main as run  # half of the time that most commands take, in which Ctrl-C may come, too

        return run(argv)
    except KeyboardInterrupt:
        if sys.stderr is not None:
            with suppress(OSError):
                print("ckptstore: interrupted", file=sys.stderr, flush=True)
        return 130  # as _errors.INTERRUPTED, which may be what was not imported yet
