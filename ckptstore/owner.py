"""Who acquires a store: one owner per launch, so that all ranks of one launch share an epoch and every relaunch gets a new one."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from .errors import UsageError

__all__ = ["default_owner"]


def default_owner(environ: Mapping[str, str] = os.environ) -> str:
    """Return the owner of this process.

    - Under torchrun: its run id and restart count (``TORCHELASTIC_RUN_ID``, ``TORCHELASTIC_RESTART_COUNT``), and Slurm's if it runs
      in a Slurm job: each launch needs an ``--rdzv-id`` of its own, but that of a requeued job may stay. Without ``--rdzv-id`` the
      run id is the word "none"; on one node the launcher's process then stands for the launch.
    - Under Slurm: job id, step id and restart count (``SLURM_JOB_ID``, ``SLURM_STEP_ID``, ``SLURM_RESTART_COUNT``).
    - Else host, process id and random digits: a launch of its own.

    Raises:
        UsageError: torchrun on several nodes without a run id: nothing the ranks share tells this launch from the next.
    """
    restart = environ.get("TORCHELASTIC_RESTART_COUNT")
    if restart is not None:
        run = environ.get("TORCHELASTIC_RUN_ID", "none")
        if run not in ("", "none"):
            # A run id made from the job's id comes again when the job is requeued, and the restarts are counted anew.
            slurm = [environ[n] for n in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT") if n in environ]
            return ":".join(["torchrun", run, restart, *slurm])[:512]
        if environ.get("LOCAL_WORLD_SIZE") == environ.get("WORLD_SIZE"):
            launcher = os.getppid()
            return f"torchrun:{socket.gethostname()}:{launcher}:{_start_time(launcher)}:{restart}"[:512]
        if "SLURM_JOB_ID" not in environ:
            raise UsageError(
                "torchrun on several nodes was started without --rdzv-id, so two launches cannot be told apart; "
                "give each launch an --rdzv-id of its own, or pass Store(..., owner=...)"
            )
    if "SLURM_JOB_ID" in environ:
        parts = (
            environ["SLURM_JOB_ID"],
            environ.get("SLURM_STEP_ID", ""),
            environ.get("SLURM_RESTART_COUNT", "0"),
            restart or "",
        )
        return f"slurm:{':'.join(parts)}"[:512]
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"


def _start_time(pid: int) -> str:
    # Process ids come again; with the start time (field 22 of /proc/<pid>/stat, proc(5)) they do not.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
