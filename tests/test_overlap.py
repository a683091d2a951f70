"""Copies that go on while a model is trained: a step waits for them, and whoever does not wait is found out."""

from __future__ import annotations

import gc
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require
from stores import new_memory, store_on

from ckptstore import ChangedWhileSaving, PendingSave, Store, UsageError
from ckptstore.hostcopy import HostCopy
from ckptstore.overlap import stable_tensors


class Held:
    """Copies in the background do not begin before `go`; `asked` tells that somebody waits for one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.asked = threading.Event()
        self.copied: list[int] = []
        rest, wait = HostCopy.copy_rest, HostCopy.wait

        def copy_rest(copy: HostCopy) -> None:
            assert self.go.wait(60)
            self.copied.append(len(copy._later))
            rest(copy)

        def wait_for_it(copy: HostCopy) -> None:
            self.asked.set()
            wait(copy)

        monkeypatch.setattr(HostCopy, "copy_rest", copy_rest)
        monkeypatch.setattr(HostCopy, "wait", wait_for_it)

    def release_when_asked(self) -> None:
        """Let the copy begin once a step waits for it: had it not waited, the copy would be of what the step made."""

        def release() -> None:
            assert self.asked.wait(60)
            self.go.set()

        threading.Thread(target=release).start()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    it = Held(monkeypatch)
    yield it
    it.go.set()


@pytest.fixture
def store() -> Iterator[Store]:
    with store_on(new_memory(), keep_last="all") as it:
        yield it


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.out = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.norm(self.linear(x))))


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}


def clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    return [clone(v) for v in value] if isinstance(value, (list, tuple)) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.rand(8, 4)).square().sum()
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def state_of(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    return clone({"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]})


def begin(store: Store, model: torch.nn.Module, *optimizers: torch.optim.Optimizer, **more: Any) -> PendingSave:
    one = optimizers[0] if len(optimizers) == 1 else list(optimizers)
    return store.save_async({"model": model, "optimizers": list(optimizers)}, optimizer=one, **more)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_step_waits_for_the_copy(store: Store, held: Held, make: Make) -> None:
    model = Net()
    optimizer = make(model.parameters())
    one_step(model, optimizer)
    expected = state_of(model, optimizer)
    pending = begin(store, model, optimizer, checked=True)
    held.release_when_asked()
    one_step(model, optimizer)  # its forward changes the buffers at once
    after = state_of(model, optimizer)
    assert not same(after["model"], expected["model"]) and not same(after["optimizers"], expected["optimizers"])
    assert held.copied[0] >= 6, "all parameters were left for later"
    assert same(pending.result(60).load(), expected)


def test_gradients_are_accumulated_meanwhile(store: Store, held: Held) -> None:
    model = Net()
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    one_step(model, optimizer)
    expected = state_of(model, optimizer)
    pending = begin(store, model, optimizer)
    optimizer.zero_grad()
    for _ in range(3):
        model(torch.rand(8, 4)).sum().backward()
    assert not held.asked.is_set()
    held.release_when_asked()
    optimizer.step()
    assert same(pending.result(60).load(), expected)


def test_several_optimizers(store: Store, held: Held) -> None:
    model = Net()
    first = OPTIMIZERS["SGD"](model.linear.parameters())
    second = OPTIMIZERS["Adam"](model.out.parameters())
    for optimizer in (first, second):
        one_step(model, optimizer)
    expected = state_of(model, first, second)
    pending = begin(store, model, first, second)
    held.release_when_asked()
    one_step(model, second)
    one_step(model, first)
    assert same(pending.result(60).load(), expected)


class Wrapper(torch.optim.Optimizer):
    """Has another one do its steps, and no hooks of its own: like accelerate's, and torch's PostLocalSGDOptimizer."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        self.inner = inner[0]
        self.inners = inner

    param_groups = property(lambda self: [group for one in self.inners for group in one.param_groups])  # type: ignore[assignment]
    state = property(lambda self: {p: state for one in self.inners for p, state in one.state.items()})  # type: ignore[assignment]

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.inners:
            one.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in self.inners:
            one.step(closure)


def test_a_step_of_a_wrapped_optimizer_waits_for_the_copy(store: Store, held: Held) -> None:
    model = Net()
    optimizer = Wrapper(OPTIMIZERS["Adam"](model.parameters()))
    one_step(model, optimizer)
    expected = state_of(model, optimizer)
    pending = begin(store, model, optimizer, checked=True)
    held.release_when_asked()
    one_step(model, optimizer)
    assert held.copied[0] >= 6, "all parameters were left for later"
    assert same(pending.result(60).load(), expected)
    store.close()
    assert not optimizer.inner._optimizer_step_pre_hooks


def test_a_wrapper_before_whose_steps_nothing_can_be_called_is_refused(store: Store, held: Held) -> None:
    held.go.set()
    model = Net()
    optimizers = [OPTIMIZERS["SGD"](part.parameters()) for part in (model.linear, model.out)]
    with pytest.raises(UsageError, match="give the optimizers that it wraps"):
        begin(store, model, Wrapper(*optimizers))
    assert begin(store, model, *optimizers).result(60).load().keys() == {"model", "optimizers"}


def test_what_is_of_an_optimizer_that_was_not_given_is_copied_at_once(store: Store, held: Held) -> None:
    model = Net()
    first = OPTIMIZERS["SGD"](model.linear.parameters())
    second = OPTIMIZERS["SGD"](model.out.parameters())
    expected = clone(model.state_dict())
    pending = store.save_async({"model": model}, optimizer=first)
    one_step(model, second)
    assert not held.asked.is_set()
    held.go.set()
    assert same(pending.result(60).load()["model"], expected)


def test_a_state_that_shares_memory_with_a_gradient_is_copied_at_once(store: Store, held: Held) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.full((3,), 2.0)
    optimizer.state[parameter]["last"] = parameter.grad
    pending = store.save_async({"o": optimizer}, optimizer=optimizer)
    parameter.grad.zero_()
    held.go.set()
    assert pending.result(60).load()["o"]["state"][0]["last"].tolist() == [2, 2, 2]


def test_memory_that_a_parameter_shares_with_something_else_is_copied_at_once(store: Store, held: Held) -> None:
    flat = torch.ones(10)
    parameter = torch.nn.Parameter(flat[:4])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    pending = store.save_async({"p": parameter.data, "counter": flat[8:]}, optimizer=optimizer)
    flat[8:] += 1
    held.go.set()
    assert pending.result(60).load()["counter"].tolist() == [1, 1]
    both = torch.nn.Parameter(flat[:4]), torch.nn.Parameter(flat[4:])
    assert len(set(stable_tensors([torch.optim.SGD(both)])[0])) == 1, (
        "flattened parameters can wait: all of their memory is parameters"
    )


def test_inside_a_step_all_is_copied_at_once(store: Store, held: Held) -> None:
    """A closure that saves: the step goes on to change what it saves, and there is no hook any more that could wait."""
    model = Net()
    optimizer = OPTIMIZERS["LBFGS"](model.parameters())
    one_step(model, optimizer)
    saved: list[tuple[PendingSave, Any]] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.rand(8, 4)).square().sum()
        loss.backward()
        if not saved:
            saved.append((store.save_async({"model": model}, optimizer=optimizer), clone(model.state_dict())))
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert not held.asked.is_set()
    held.go.set()
    pending, expected = saved[0]
    assert held.copied in ([], [0])
    assert same(pending.result(60).load()["model"], expected)


def test_parameters_that_are_saved_as_they_are(store: Store, held: Held) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    pending = store.save_async({"p": parameter, "view": parameter.detach()[1:]}, optimizer=optimizer)
    held.release_when_asked()
    parameter.grad = torch.ones(3)
    optimizer.step()
    loaded = pending.result(60).load()
    assert isinstance(loaded["p"], torch.nn.Parameter)
    assert loaded["p"].tolist() == [1, 1, 1] and loaded["view"].tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the compiler itself
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_model_and_step(store: Store, held: Held, backend: str) -> None:
    require(backend == "eager" or shutil.which("g++"), "the compiler needs g++")
    torch._dynamo.reset()
    model: Any = torch.compile(Net(), backend=backend)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    step = torch.compile(lambda: optimizer.step(), backend=backend)

    def train() -> None:
        optimizer.zero_grad()
        model(torch.rand(8, 4)).sum().backward()
        step()

    train()
    for _ in range(3):
        held.go.clear()
        held.asked.clear()
        expected = state_of(model, optimizer)
        pending = begin(store, model, optimizer, checked=True)
        held.release_when_asked()
        train()
        assert same(pending.result(60).load(), expected)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    begin(store, model, optimizer).result(60)
    train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled, "a save makes nothing to be compiled anew"
    torch._dynamo.reset()


# -- changes by hand


def in_place(p: torch.nn.Parameter) -> None:
    with torch.no_grad():
        p.mul_(2)


def behind_torchs_back(p: torch.nn.Parameter) -> None:
    p.data.mul_(2)


def shrunk(p: torch.nn.Parameter) -> None:
    p.untyped_storage().resize_(0)


@pytest.mark.parametrize("change", [in_place, shrunk])
@pytest.mark.parametrize("checked", [False, True])
def test_a_change_that_torch_counts_is_found(
    store: Store, held: Held, change: Callable[[torch.nn.Parameter], None], checked: bool
) -> None:
    found_out(store, held, change, checked)


def test_any_change_is_found_when_checked(store: Store, held: Held) -> None:
    found_out(store, held, behind_torchs_back, True)


def found_out(store: Store, held: Held, change: Callable[[torch.nn.Parameter], None], checked: bool) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    before = store.save({"p": parameter.data})
    pending = store.save_async({"p": parameter.data}, optimizer=optimizer, checked=checked)
    change(parameter)
    held.go.set()
    assert isinstance(pending.exception(60), ChangedWhileSaving)
    assert store.names() == {"latest": before.id}
    optimizer.step()
    parameter.data = torch.ones(2)
    assert store.save_async({"p": parameter.data}, optimizer=optimizer, checked=checked).result(60).load()["p"].tolist() == [1, 1]


def test_a_tensor_that_is_exchanged_is_saved_as_it_was(store: Store, held: Held) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    pending = store.save_async({"p": parameter.data}, optimizer=optimizer, checked=True)
    parameter.data = torch.zeros(5)
    held.go.set()
    assert pending.result(60).load()["p"].tolist() == [1, 1, 1]


# -- what is left behind


def test_nothing_is_left_behind(held: Held, tmp_path: Path) -> None:
    held.go.set()
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with Store(tmp_path) as store:
        for _ in range(3):
            store.save_async({"p": parameter.data, "o": optimizer}, optimizer=optimizer).result(60)
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        weak = weakref.ref(parameter)
        other = torch.nn.Parameter(torch.ones(3))
        optimizer.param_groups[0]["params"][:] = [other]
        del parameter
        gc.collect()
        assert weak() is None, "what was saved is let go of"
    assert not optimizer._optimizer_step_pre_hooks
    gone = weakref.ref(optimizer)
    with Store(tmp_path) as store:
        store.save_async({"o": optimizer}, optimizer=optimizer).result(60)
        del optimizer, other
        gc.collect()
        assert gone() is None, "the store does not keep an optimizer alive"


def test_a_failed_save_lets_the_optimizer_go_on(store: Store, held: Held) -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    pending = store.save_async({"p": parameter.data}, optimizer=optimizer)
    assert pending.cancel()
    held.release_when_asked()
    optimizer.step()
    store.close()
    assert store.names() == {}
