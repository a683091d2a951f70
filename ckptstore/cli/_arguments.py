"""What may be typed: the commands and their arguments."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

from .. import __version__
from ..errors import UsageError

__all__ = ["COMMANDS", "check_command", "parser_for", "top_parser"]

COMMANDS = {
    "ls": "list the checkpoints, newest last",
    "show": "everything about one checkpoint",
    "verify": "read every byte of one, several or all checkpoints and report damage",
    "tag": "let a name point to a checkpoint, which is kept then",
    "rm": "delete checkpoints, or names",
    "gc": "delete what dead jobs left behind",
    "demo": "train, be killed, resume, be damaged, fall back: see it work",
}

_EXIT = """\
exit status:
  0   fine
  1   damage found
  2   wrong usage; no such name, id or step
  3   the store cannot be reached, is not there, or was written by a newer ckptstore
"""

_EXAMPLES = {
    "ls": "ckptstore ls runs/42\n  ckptstore ls runs/42 --json",
    "show": "ckptstore show runs/42\n  ckptstore show runs/42 best\n  ckptstore show runs/42 --step 1000",
    "verify": "ckptstore verify runs/42\n  ckptstore verify runs/42 latest best\n  ckptstore verify runs/42 --step 1000\n"
    "  ckptstore verify s3://my-bucket/run-42 --remote",
    "tag": "ckptstore tag runs/42 best latest\n  ckptstore tag runs/42 paper e1-s1000-0123456789ab",
    "rm": "ckptstore rm runs/42 best\n  ckptstore rm runs/42 e1-s1000-0123456789ab e1-s2000-ba9876543210",
    "gc": "ckptstore gc runs/42",
}

_MORE = {
    "verify": "Without NAME, ID or --step, all checkpoints are read.",
    "tag": "The job that is training is not disturbed.",
    "rm": "By name: if other names point to the same checkpoint, only the name goes. By id: all its names go too.\n"
    "The job that is training is not disturbed.",
    "gc": "Only what can never be committed goes, so the job that is training is not disturbed.",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _parser(prog: str, description: str, epilog: str) -> _Parser:
    formatter = argparse.RawDescriptionHelpFormatter
    return _Parser(prog, description=description, epilog=epilog, formatter_class=formatter, allow_abbrev=False)


def top_parser() -> argparse.ArgumentParser:
    """Return the parser of what stands before the command."""
    lines = "\n".join(f"  {name:<8}{summary}" for name, summary in COMMANDS.items())
    parser = _parser(
        "ckptstore",
        "Look at checkpoints, check them, and keep house.",
        f"commands:\n{lines}\n\nexamples:\n  ckptstore ls runs/42\n  ckptstore verify runs/42 latest\n  ckptstore show --help\n\n{_EXIT}",
    )
    parser.usage = "ckptstore COMMAND URL ..."
    parser.add_argument("--version", action="version", version=f"ckptstore {__version__}")
    _add_json(parser)
    return parser


def check_command(words: list[str]) -> str:
    """Return the command that `words` begin with. Raises UsageError with the nearest one."""
    word = words[0]
    if word in COMMANDS:
        return word
    near = difflib.get_close_matches(word, COMMANDS, 1)
    if near:
        raise UsageError(f"there is no command {word!r:.100}; did you mean '{near[0]}'?")
    if words[1:] and words[1] in COMMANDS:
        raise UsageError(f"the command comes first: ckptstore {words[1]} {word}")
    raise UsageError(f"there is no command {word!r:.100}; the commands are: {', '.join(COMMANDS)}")


def parser_for(command: str) -> argparse.ArgumentParser:
    """Return the parser of what follows `command`."""
    prog, summary = f"ckptstore {command}", COMMANDS[command]
    if command == "demo":
        from . import _demo

        parser = _parser(prog, summary, "")
        _demo.add_arguments(parser)
        return parser
    description = "\n".join([summary[0].upper() + summary[1:] + ".", *([_MORE[command]] if command in _MORE else [])])
    parser = _parser(prog, description, f"examples:\n  {_EXAMPLES[command]}\n\n{_EXIT}")
    may_be_left_out = "?" if command in ("ls", "show", "verify", "gc") else None
    help_text = (
        f"path or URL of the store, such as runs/42; '-'{' or nothing' if may_be_left_out else ''} stands for $CKPTSTORE_URL"
    )
    parser.add_argument("url", metavar="URL", nargs=may_be_left_out, default="-", help=help_text)
    if command == "show":
        parser.add_argument("target", metavar="NAME|ID", nargs="?", help="which checkpoint (default: latest)")
    elif command == "verify":
        parser.add_argument("targets", metavar="NAME|ID", nargs="*", help="which checkpoints (default: all)")
        parser.add_argument(
            "--remote",
            action="store_true",
            help="download nothing: compare the sizes and checksums that the service has recorded",
        )
    elif command == "tag":
        parser.add_argument("name", metavar="NAME", help="the name to set: 1 to 128 of A-Z a-z 0-9 . _ -")
        parser.add_argument("target", metavar="TARGET", help="name or id of the checkpoint it shall point to")
    elif command == "rm":
        parser.add_argument("targets", metavar="TARGET", nargs="+", help="names or ids")
    if command in ("show", "verify"):
        parser.add_argument("--step", type=int, metavar="N", help="the newest checkpoint of this step")
    _add_json(parser)
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
