"""What ``ckptstore demo`` compares: two states bit for bit, and what each step was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Log", "Step", "differences", "fingerprint", "order_problems"]


class Step(NamedTuple):
    """One step of training: which, in which epoch, and the numbers of the samples it was trained on, in their order."""

    step: int
    epoch: int
    samples: list[int]


@dataclass(frozen=True)
class Log:
    """What the processes of one run wrote down, one after the other, each step when it was done."""

    resumed: list[int]
    """The step that each process began with."""
    steps: list[Step]

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read the file, which may be growing, or not be there yet."""
        text = path.read_text() if path.exists() else ""
        lines = [json.loads(line) for line in text.split("\n")[:-1]]  # what follows the last newline is being written
        resumed = [line["resumed"] for line in lines if "resumed" in line]
        return cls(resumed, [Step(**line) for line in lines if "resumed" not in line])

    @property
    def done_again(self) -> int:
        """How many steps were done again after a kill."""
        return len(self.steps) - len({s.step for s in self.steps})


def order_problems(run: Log, reference: Log, length: int) -> list[str]:
    """Return how the order of the samples in `run` differs from that of `reference`: empty if every step was done, each time on the same
    samples as there, and every epoch had each of its `length` samples exactly once."""
    expected = {s.step: s for s in reference.steps}
    problems = [f"step {s.step} was trained on other samples" for s in run.steps if s != expected.get(s.step)]
    final = {
        s.step: s for s in run.steps
    }  # of a step done twice, the last time: the first one's effect was lost with the process
    problems += [f"step {step} was never done" for step in sorted(expected.keys() - final.keys())]
    drawn: dict[int, list[int]] = {}
    for step in final.values():
        drawn.setdefault(step.epoch, []).extend(step.samples)
    problems += [
        f"epoch {epoch + 1} did not have every sample exactly once"
        for epoch, samples in drawn.items()
        if sorted(samples) != list(range(length))
    ]
    return problems


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places where two loaded states differ, in a bit or in kind; empty if nowhere."""
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        # As bytes, because -0.0 equals 0.0, and NaN not even itself.
        same = a.dtype == b.dtype and a.shape == b.shape and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
        return [] if same else [where]
    if type(a) is not type(b):
        return [where]
    if isinstance(a, Mapping):
        if list(a) != list(b):
            return [where]
        return [place for key in a for place in differences(a[key], b[key], f"{where}[{key!r}]")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [where]
        return [place for i, (x, y) in enumerate(zip(a, b, strict=True)) for place in differences(x, y, f"{where}[{i}]")]
    return [] if repr(a) == repr(b) else [where]


def fingerprint(tensors: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the bytes of all tensors, as hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
