"""The ``ckptstore`` command: from words to a command, from whatever happens to an exit status."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence

from ..errors import StoreWarning, UsageError
from ..store import Store
from . import _change, _look, _verify
from ._arguments import check_command, parser_for, top_parser
from ._errors import INTERRUPTED, PIPE_CLOSED, explain
from ._output import Output

__all__ = ["main"]

_COMMANDS: dict[str, Callable[[argparse.Namespace, Store, Output], int]] = {
    "ls": _look.ls,
    "show": _look.show,
    "verify": _verify.verify,
    "tag": _change.tag,
    "rm": _change.rm,
    "gc": _change.gc,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (else what was typed) asks for, and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    out = Output("--json" in words)
    if not logging.root.handlers:  # else what libraries log as a warning goes to standard error, where each line is ours
        logging.root.addHandler(logging.NullHandler())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", StoreWarning)
            warnings.showwarning = out.show_warning
            return _guarded(words, out)
    except KeyboardInterrupt:  # another one, while the first was being told
        return INTERRUPTED


def _guarded(words: list[str], out: Output) -> int:
    try:
        document = None
        try:
            status = _run(words, out)
            if out.as_json:
                document = out.render()
        except BrokenPipeError:
            raise
        except (Exception, KeyboardInterrupt) as exc:
            status, document = _failed(exc, out)
        out.finish(document)
    except OSError as exc:  # of the output itself
        out.abandon(sys.stdout)
        if isinstance(exc, BrokenPipeError):  # who reads it has seen enough
            return PIPE_CLOSED
        out.as_json = False
        status, _ = _failed(exc, out)
    return status


def _failed(error: BaseException, out: Output) -> tuple[int, str | None]:
    status, message = explain(error)
    if isinstance(error, RecursionError):  # the document cannot be printed either
        out.document.clear()
    out.fail(type(error).__name__, message)
    return status, out.render() if out.as_json else None


def _run(words: list[str], out: Output) -> int:
    start = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    try:
        top_parser().parse_args(words[:start])
        if start == len(words):
            raise UsageError("no command given; try 'ckptstore ls runs/42', or see 'ckptstore --help'")
        command = check_command(words[start:])
        parser = parser_for(command)
        rest = words[start + 1 :]
        # Only this one takes names after options, too; it cannot have sub-commands, which a demo might.
        args = parser.parse_args(rest) if command == "demo" else parser.parse_intermixed_args(rest)
    except SystemExit:  # --help and --version
        out.as_json = False
        return 0
    if command == "demo":
        from . import _demo

        if out.as_json:
            raise UsageError("demo tells a story and has no --json")
        return _demo.run(args)
    out.as_json = args.json or "--json" in words[:start]
    with Store(None if args.url == "-" else args.url, acquire=False) as store:
        out.document["store"] = store.url
        return _COMMANDS[command](args, store, out)
