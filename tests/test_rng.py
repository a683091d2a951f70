"""The random generators: captured, through a file, and drawn from again."""

from __future__ import annotations

import copy
import io
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ckptstore import rng, torchfile, torchload
from ckptstore.errors import StateMismatch, StoreWarning


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def draw() -> list[Any]:
    """Both kinds of numbers of each generator; Gaussian ones come in pairs, of which one waits in the state."""
    return [
        *(random.random(), random.gauss(0, 1), random.getrandbits(100)),
        *(np.random.random(), np.random.normal(), int(np.random.randint(1 << 60))),
        *(torch.rand(3).tolist(), torch.randn(1).tolist(), torch.randperm(5).tolist()),
    ]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    assert torchfile.save(state, file) == ()
    return torchload.load(file.getvalue())


@pytest.mark.parametrize("seed", range(5))
def test_the_very_same_numbers_follow(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(seed):
        draw()
    state = through_a_file(rng.capture())
    expected = [draw() for _ in range(3)]
    draw()
    rng.restore(state)
    assert [draw() for _ in range(3)] == expected


def test_the_default_device_makes_no_difference() -> None:
    with torch.device("meta"):
        state = rng.capture()
    expected = draw()
    rng.restore(state)
    assert draw() == expected


def test_a_capture_does_not_follow_later_draws() -> None:
    state = rng.capture()
    copied = copy.deepcopy(state)
    draw()
    assert torch.equal(state["torch"], copied["torch"]) and torch.equal(state["python"]["state"], copied["python"]["state"])


def test_another_bit_generator_of_numpy() -> None:
    code = """
import io, numpy as np
from ckptstore import rng, torchfile, torchload
for kind in (np.random.PCG64, np.random.Philox, np.random.SFC64):
    np.random.set_bit_generator(kind(3))
    np.random.random(5)
    file = io.BytesIO()
    assert torchfile.save(rng.capture(), file) == ()
    expected = np.random.random(9).tolist()
    rng.restore(torchload.load(file.getvalue()))
    assert np.random.random(9).tolist() == expected, kind
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(rng.__file__).parents[1])


def broken(**changes: Any) -> dict[str, Any]:
    return {**rng.capture(), **changes}


def python_state(**changes: Any) -> dict[str, Any]:
    return {**rng.capture()["python"], **changes}


MALFORMED: dict[str, Any] = {
    "no dict": lambda: [1, 2],
    "unknown": lambda: broken(jax=1),
    "python: nothing": lambda: broken(python=None),
    "python: short": lambda: broken(python=python_state(state=torch.zeros(3))),
    "python: version": lambda: broken(python=python_state(version=99)),
    "torch: not a tensor": lambda: broken(torch="x"),
    "torch: short": lambda: broken(torch=torch.zeros(10, dtype=torch.uint8)),
    "torch: dtype": lambda: broken(torch=torch.get_rng_state().float()),
    "numpy: nothing": lambda: broken(numpy={}),
    "numpy: other kind": lambda: broken(numpy={"bit_generator": "PCG64"}),
    "numpy: short": lambda: broken(
        numpy={**rng.capture()["numpy"], "state": {"key": ("array", "uint32", (1, 2)), "pos": 1}},
    ),
    "cuda: no list": lambda: broken(cuda=5),
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_state_changes_nothing(make: Any) -> None:
    state = make()
    draw()  # so that the good parts of the state differ from the present one
    before = rng.capture()
    with pytest.raises(StateMismatch):
        rng.restore(state)
    after = rng.capture()
    assert torch.equal(before["torch"], after["torch"]) and repr(before["numpy"]) == repr(after["numpy"])
    assert torch.equal(before["python"]["state"], after["python"]["state"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_cuda_states_on_a_machine_without_are_warned_about_and_the_rest_restored() -> None:
    state = broken(cuda=[torch.zeros(16, dtype=torch.uint8)] * 2)
    expected = draw()
    with pytest.warns(StoreWarning, match="2 CUDA devices were saved and 0 are here"):
        rng.restore(through_a_file(state))
    assert draw() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_generators() -> None:
    devices = range(torch.cuda.device_count())
    torch.cuda.manual_seed_all(3)
    torch.rand(1, device="cuda")  # initialises CUDA, and applies the seed
    state = through_a_file(rng.capture())
    expected = [torch.rand(5, device=f"cuda:{i}").tolist() for i in devices]
    rng.restore(state)
    assert [torch.rand(5, device=f"cuda:{i}").tolist() for i in devices] == expected
    with pytest.warns(StoreWarning, match="CUDA devices were saved"):
        rng.restore({**state, "cuda": state["cuda"][:-1]})


def test_numpy_is_not_imported_for_the_sake_of_it() -> None:
    code = """
import sys
sys.modules["numpy"] = None  # as if it were not installed
import warnings
from ckptstore import rng
del sys.modules["numpy"]
state = rng.capture()
assert "numpy" not in state and "numpy" not in sys.modules, state.keys()
sys.modules["numpy"] = None
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    rng.restore({**state, "numpy": {"bit_generator": "MT19937"}})
assert [str(w.message) for w in seen if "NumPy is not installed" in str(w.message)], seen
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=Path(rng.__file__).parents[1])
