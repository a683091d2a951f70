"""From an exception to one line and an exit status."""

from __future__ import annotations

import re
import traceback

from ..errors import CheckpointNotFound, CkptStoreError, Damaged, UsageError

__all__ = ["BUG", "DAMAGED", "INTERRUPTED", "PIPE_CLOSED", "UNREACHABLE", "USAGE", "explain"]

DAMAGED = 1
USAGE = 2
UNREACHABLE = 3
BUG = 70
"""EX_SOFTWARE of <sysexits.h>."""
INTERRUPTED = 130
"""128 + SIGINT, as a shell has it."""
PIPE_CLOSED = 141
"""128 + SIGPIPE, as a shell has it."""

_USER_INFO = re.compile(r"(?<=://)(?:[^/\s]*:\S*|[^/\s@]*)@")
"""Also with a password that has a slash or an ``@`` in it."""
_SECRET_OPTION = re.compile(r"(?i)([?&][^=&\s]*(?:key|secret|token|pass|pwd|cred|sig|connection)[^=&\s]*=)[^&\s'\"]+")


def explain(error: BaseException) -> tuple[int, str]:
    """Return the exit status for `error` and one line that says what to do."""
    status, message = _explain(error)
    return status, _SECRET_OPTION.sub(r"\1…", _USER_INFO.sub("…@", message))  # typed in the wrong place, too


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, (UsageError, CheckpointNotFound)):
        return USAGE, str(error)
    if isinstance(error, Damaged):
        return DAMAGED, str(error)
    if isinstance(error, OSError):  # many of ours, too
        place = f"{error.filename}: " if error.filename else ""
        return UNREACHABLE, place + (error.strerror or str(error))
    if isinstance(error, CkptStoreError):
        return UNREACHABLE, str(error)
    # Python before 3.12 makes a RuntimeError of one that comes while a class is being made, in an import.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, MemoryError):
        return UNREACHABLE, "out of memory; free some, or use a machine with more"
    if isinstance(error, RecursionError):
        return UNREACHABLE, "what is stored there is nested too deeply to be shown"
    # The message of a foreign exception may hold anything, secrets too; where it was raised is what a developer needs.
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{re.sub(r'.*/', '', last.filename)}:{last.lineno}"
    return BUG, f"this is a bug in ckptstore ({type(error).__name__} in {where}); please report it with the command you typed"
