"""The random generators of this process: Python's, NumPy's global one, torch's on the CPU and on every CUDA device."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .errors import StateMismatch, StoreWarning

__all__ = ["capture", "restore"]


def capture() -> dict[str, Any]:
    """Return the states of all generators in use, as tensors, tuples and numbers that ``weights_only=True`` loads.

    NumPy's is taken if NumPy has been imported, those of CUDA if CUDA is initialised: before that, nothing was drawn from them.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "state": torch.tensor(words, device="cpu"), "gauss": gauss},
        "torch": torch.get_rng_state(),
    }
    if "numpy" in sys.modules:
        import numpy as np

        state["numpy"] = _packed(np.random.get_state(legacy=False))
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: Any) -> None:
    """Set the generators to a state from `capture`. All parts are tried on generators of their own before any is set.

    Warns (`StoreWarning`) and restores the rest if NumPy is not installed or another number of CUDA devices was saved.

    Raises:
        StateMismatch: the state is not one that `capture` made, or is for another kind of generator; nothing was changed.
    """
    if not isinstance(state, dict):
        raise StateMismatch(f"the state of the random generators must be a dict, not {type(state).__name__}")
    parts = {"python": _python, "torch": _torch, "numpy": _numpy, "cuda": _cuda}
    steps: list[Callable[[], object]] = []
    for name, value in state.items():
        if name not in parts:
            raise StateMismatch(f"unknown random generator {name!r}: saved by a newer ckptstore?")
        try:
            steps += parts[name](value)
        except StateMismatch:
            raise
        except Exception as exc:
            raise StateMismatch(f"the saved state of the {name} random generator is malformed: {exc}") from exc
    for step in steps:
        step()


def _python(state: Any) -> list[Callable[[], object]]:
    full = (state["version"], tuple(state["state"].tolist()), state["gauss"])
    random.Random().setstate(full)
    return [lambda: random.setstate(full)]


def _torch(state: Any) -> list[Callable[[], object]]:
    state = state.cpu()  # load(map_location="cuda") moves every tensor
    torch.Generator().set_state(state)
    return [lambda: torch.set_rng_state(state)]


def _numpy(state: Any) -> list[Callable[[], object]]:
    try:
        import numpy as np
    except ImportError:
        warnings.warn("NumPy is not installed here: its random generator is not restored", StoreWarning, stacklevel=4)
        return []
    full, now = _unpacked(state), np.random.get_state(legacy=False)
    if full["bit_generator"] != now["bit_generator"]:
        raise StateMismatch(f"NumPy's global generator is {now['bit_generator']}, but {full['bit_generator']} was saved")
    kind = getattr(np.random, full["bit_generator"])
    np.random.RandomState(kind()).set_state(full)
    return [lambda: np.random.set_state(full)]


def _cuda(states: Any) -> list[Callable[[], object]]:
    states = [state.cpu() for state in states]
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here != len(states):
        message = (
            f"{len(states)} CUDA devices were saved and {here} are here: only the first {min(here, len(states))} are restored"
        )
        warnings.warn(message, StoreWarning, stacklevel=4)
    steps: list[Callable[[], object]] = []
    for index, state in enumerate(states[:here]):
        torch.Generator(device=f"cuda:{index}").set_state(state)
        steps.append(partial(torch.cuda.set_rng_state, state, index))
    return steps


def _packed(value: Any) -> Any:
    """Return a NumPy state with its arrays as (dtype, numbers): torch has no restricted way to load arrays."""
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return ("array", str(value.dtype), tuple(value.tolist())) if getattr(value, "shape", ()) else value.tolist()
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unpacked(item) for key, item in value.items()}
    if isinstance(value, tuple):
        import numpy as np

        return np.array(value[2], dtype=value[1])
    return value
