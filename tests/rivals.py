"""Other ways to save what one trains, for the same experiments as the store, each as its users do it."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

__all__ = ["REFUSALS", "RIVALS", "Mixture", "Rival", "is_violation", "state_of_step", "step_of_state", "warm_up"]

_NUMEL = 40_000  # more than one write of any buffer on the way

REFUSALS = (Exception, dcp.CheckpointException)
"""Whatever torch raises about a broken file; DCP's is no Exception."""


class Mixture(ValueError):
    """What was loaded, without an error, is not what was ever saved."""


def state_of_step(step: int) -> dict[str, Any]:
    return {
        "step": torch.tensor(step),
        "weights": torch.full((_NUMEL,), float(step)),
        "momentum": torch.full((_NUMEL,), float(step)),
    }


def step_of_state(state: dict[str, Any]) -> int:
    """Return the step that the state is of. Raises `Mixture` when it is of none."""
    step = int(state["step"])
    for name in ("weights", "momentum"):
        if not torch.equal(state[name], torch.full((_NUMEL,), float(step))):
            raise Mixture(f"{name} is not of step {step}")
    return step


def _torch_save(folder: Path, step: int) -> None:
    torch.save(state_of_step(step), folder / "latest.pt")


def _tmp_replace(folder: Path, step: int) -> None:
    temporary = folder / "latest.tmp"
    torch.save(state_of_step(step), temporary)
    os.replace(temporary, folder / "latest.pt")


def _torch_load(folder: Path) -> int | None:
    path = folder / "latest.pt"
    return step_of_state(torch.load(path)) if path.exists() else None


def _dcp_save(folder: Path, step: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state_of_step(step), checkpoint_id=folder / f"step-{step}", no_dist=True)


def _dcp_load(folder: Path) -> int | None:
    """Load the newest that is finished: DCP writes ``.metadata`` last."""
    steps = [int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/.metadata")]
    if not steps:
        return None
    state = state_of_step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder / f"step-{max(steps)}", no_dist=True)
    return step_of_state(state)


@dataclass(frozen=True)
class Rival:
    """One of them."""

    save: Callable[[Path, int], None]
    """Save the state of a step in a folder; acknowledged when it returns."""
    load: Callable[[Path], int | None]
    """Return the step of what a resuming job finds there, None when there is nothing; raises when that is damaged."""


RIVALS = {
    "torch.save": Rival(_torch_save, _torch_load),
    "tmp + os.replace": Rival(_tmp_replace, _torch_load),
    "DCP": Rival(_dcp_save, _dcp_load),
}


def is_violation(rival: Rival, folder: Path, acknowledged: int | None, begun: int | None) -> bool:
    """Return whether a job that resumes finds neither what was acknowledged last nor what was being saved, or cannot read it."""
    try:
        found = rival.load(folder)
    except REFUSALS:
        return True
    return found != acknowledged and (begun is None or found != begun)


def warm_up() -> None:
    """For a nursery: have everything imported and initialised."""
    with tempfile.TemporaryDirectory() as folder:
        for rival in RIVALS.values():
            rival.save(Path(folder), 1)
            assert rival.load(Path(folder)) == 1
