"""Live objects to state and back in place."""

from __future__ import annotations

import collections
import io
from typing import Any

import pytest
import torch

from ckptstore import snapshot, torchfile, torchload
from ckptstore.errors import StateMismatch

Pair = collections.namedtuple("Pair", "first second")


class Counter:
    """The smallest thing with a state."""

    def __init__(self, n: int = 0, error: Exception | None = None) -> None:
        self.n, self.asked, self.loaded, self.error = n, 0, 0, error

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        if self.error:
            raise self.error
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.error:
            raise self.error
        self.loaded += 1
        self.n = state["n"]


def through_a_file(obj: Any) -> Any:
    file = io.BytesIO()
    assert torchfile.save(snapshot.to_state(obj), file) == ()
    return torchload.load(file.getvalue())


# to_state


def test_values_with_a_state_dict_are_replaced_wherever_they_are() -> None:
    obj = {
        "a": Counter(1),
        "l": [Counter(2), 5],
        "t": (Counter(3), "x"),
        "o": collections.OrderedDict(z=Counter(4)),
        "p": Pair(1, Counter(5)),
    }
    state = snapshot.to_state(obj)
    assert state == {"a": {"n": 1}, "l": [{"n": 2}, 5], "t": ({"n": 3}, "x"), "o": {"z": {"n": 4}}, "p": (1, {"n": 5})}
    assert type(state["o"]) is collections.OrderedDict and type(state["p"]) is Pair
    assert isinstance(obj["a"], Counter), "the object itself is not changed"
    assert snapshot.to_state(Counter(7)) == {"n": 7}


def test_what_holds_nothing_to_replace_is_returned_itself() -> None:
    plain = {"a": [1, (2, 3)], "t": torch.ones(2)}
    assert snapshot.to_state(plain) is plain
    mixed = {"plain": plain, "c": Counter()}
    assert snapshot.to_state(mixed)["plain"] is plain


def test_other_containers_and_classes_are_left_alone() -> None:
    default: Any = collections.defaultdict(list, a=Counter())
    assert snapshot.to_state({"d": default, "cls": Counter})["d"] is default
    assert snapshot.to_state(Counter) is Counter
    module = torch.nn.Linear(2, 2)
    assert list(snapshot.to_state([module])[0]) == ["weight", "bias"]


def test_an_object_that_occurs_twice_is_asked_once() -> None:
    counter = Counter(3)
    shared = [counter]
    state = snapshot.to_state({"a": counter, "b": (counter,), "s1": shared, "s2": shared})
    assert counter.asked == 1
    assert state["a"] is state["b"][0] and state["s1"] is state["s2"]


def test_cycles_are_kept() -> None:
    loop: dict[str, Any] = {"c": Counter(1)}
    loop["self"] = loop
    loop["list"] = [loop, (loop, [])]
    state = snapshot.to_state(loop)
    assert state["c"] == {"n": 1} and state["self"] is state and state["list"][0] is state and state["list"][1][0] is state
    inner: list[Any] = [Counter(2)]
    through_tuple = (inner,)
    inner.append(through_tuple)
    result = snapshot.to_state(through_tuple)
    assert result[0][0] == {"n": 2} and result[0][1] is result
    plain: list[Any] = [1]
    plain.append(plain)
    assert snapshot.to_state(plain) is plain


def test_an_exception_in_a_state_dict_propagates() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        snapshot.to_state({"x": [Counter(error=error)]})
    assert caught.value is error


# restore


def trained() -> dict[str, Any]:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def train(run: dict[str, Any], steps: int) -> None:
    for step in range(steps):
        data = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        run["optimizer"].zero_grad()
        run["model"](data).square().mean().backward()
        run["optimizer"].step()
        run["scheduler"].step()


def test_a_training_goes_on_bit_for_bit() -> None:
    run = trained()
    train(run, 3)
    state = through_a_file(run)
    again = trained()
    snapshot.restore(again, state)
    train(run, 4)
    train(again, 4)
    for one, other in zip(run["model"].state_dict().values(), again["model"].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert run["scheduler"].state_dict() == again["scheduler"].state_dict()


def test_top_level_target_with_load_state_dict() -> None:
    counter = Counter()
    snapshot.restore(counter, {"n": 9})
    assert counter.n == 9


def test_tensors_are_copied_into_in_place_and_plain_values_replaced() -> None:
    weight = torch.zeros(3, requires_grad=True)
    history: list[Any] = [0]
    config = {"lr": 0.0}
    target = {"w": weight, "deep": [torch.zeros(2, dtype=torch.int64), 0], "step": 0, "history": history, "config": config}
    saved = {
        "w": torch.arange(3.0),
        "deep": [torch.tensor([4, 5]), 6],
        "step": 7,
        "history": [1, 2],
        "config": {"lr": 1.0, "wd": 2.0},
    }
    snapshot.restore(target, through_a_file(saved))
    assert target["w"] is weight and weight.tolist() == [0, 1, 2] and weight.requires_grad
    assert target["deep"][0].tolist() == [4, 5] and target["deep"][1] == 6 and target["step"] == 7  # type: ignore[index]
    assert target["history"] is history == [1, 2]
    assert target["config"] is config == {"lr": 1.0, "wd": 2.0}


def test_more_than_is_wanted_may_be_saved() -> None:
    model = Counter()
    snapshot.restore({"model": model}, {"model": {"n": 4}, "optimizer": {"n": 5}, "step": 3})
    assert model.n == 4


def test_special_tensors_are_restored() -> None:
    target = {
        "sparse": torch.zeros(3, 3).to_sparse(),
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "view": torch.zeros(4, 4).t(),
        "scalar": torch.tensor(0),
        "none": torch.zeros(0, 5),
    }
    saved = {
        "sparse": torch.eye(3).to_sparse(),
        "half": torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
        "view": torch.arange(16.0).reshape(4, 4),
        "scalar": torch.tensor(5),
        "none": torch.zeros(0, 5),
    }
    snapshot.restore(target, through_a_file(saved))
    assert torch.equal(target["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(target["half"].view(torch.int16), saved["half"].view(torch.int16))
    assert torch.equal(target["view"], saved["view"]) and target["view"].stride() == (1, 4)
    assert target["scalar"].item() == 5


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_restored(layout: torch.layout) -> None:
    def nested(*lengths: int, value: float) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.full((n, 2), value) for n in lengths], layout=layout)

    target = {"n": nested(2, 3, value=0)}
    snapshot.restore(target, through_a_file({"n": nested(2, 3, value=7)}))
    assert [part.tolist() for part in target["n"].unbind()] == [[[7.0] * 2] * 2, [[7.0] * 2] * 3]
    for other, why in (
        (nested(2, 4, value=1), r"\['n'\]\[1\] has shape \[3, 2\], but \[4, 2\] was saved"),
        (nested(2, value=1), r"\['n'\] has 2 items, but 1 were saved"),
        (torch.ones(5, 2), r"\['n'\] has is_nested True, but False was saved"),
    ):
        with pytest.raises(StateMismatch, match=why):
            snapshot.restore(target, {"n": other})


def test_shared_objects_are_restored_once() -> None:
    counter = Counter()
    state = through_a_file({"a": (shared := Counter(5)), "b": [shared]})
    snapshot.restore({"a": counter, "b": [counter]}, state)
    assert counter.n == 5 and counter.loaded == 1


def test_cycles_in_the_target() -> None:
    target: dict[str, Any] = {"c": Counter(), "n": 0}
    target["self"] = target
    saved: dict[str, Any] = {"c": Counter(8), "n": 1}
    saved["self"] = saved
    snapshot.restore(target, through_a_file(saved))
    assert target["c"].n == 8 and target["n"] == 1 and target["self"] is target


MISMATCHES: dict[str, tuple[Any, Any, list[str]]] = {
    "missing keys": (
        {"a": {"b": 1}, "c": Counter(), 3: 1},
        {"a": {}},
        ["['a']['b'] is missing", "['c'] is missing", "[3] is missing"],
    ),
    "shape": ({"w": torch.zeros(2, 3)}, {"w": torch.zeros(3, 2)}, ["['w'] has shape [2, 3], but [3, 2] was saved"]),
    "dtype": ([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)], ["[0] has dtype torch.float32, but torch.float64"]),
    "layout": ([torch.zeros(2)], [torch.zeros(2).to_sparse()], ["[0] has layout torch.strided, but torch.sparse_coo"]),
    "no tensor": ({"w": torch.zeros(2)}, {"w": [0, 0]}, ["['w'] is a tensor, but a list was saved"]),
    "no dict": ({"a": {"c": Counter()}}, {"a": 5}, ["['a'] is a dict, but a int was saved"]),
    "no list": ({"a": [Counter()]}, {"a": {}}, ["['a'] is a list, but a dict was saved"]),
    "fewer items": ([Counter(), Counter()], [{"n": 1}], ["has 2 items, but 1 were saved"]),
    "value in a tuple": ({"t": (Counter(), 5)}, {"t": ({"n": 1}, 6)}, ["['t'][1] differs"]),
    "lazy target": ([torch.nn.UninitializedParameter()], [torch.zeros(2)], ["[0] has no shape yet"]),
    "lazy state": ([torch.zeros(2)], [torch.nn.UninitializedBuffer()], ["[0] has no shape yet"]),
    "meta": ([torch.zeros(2, device="meta")], [torch.zeros(2)], ["[0] is on the meta device"]),
}


@pytest.mark.parametrize(("target", "state", "messages"), MISMATCHES.values(), ids=MISMATCHES.keys())
def test_what_does_not_fit_is_listed_and_nothing_is_changed(target: Any, state: Any, messages: list[str]) -> None:
    witness, values = Counter(1), {"x": 1}
    whole = {"first": witness, "values": values, "target": target}
    with pytest.raises(StateMismatch) as caught:
        snapshot.restore(whole, {"first": {"n": 2}, "values": {"x": 2}, "target": state})
    for message in messages:
        assert message in str(caught.value)
    assert "['target']" in str(caught.value)
    assert witness.n == 1 and values == {"x": 1}


def test_a_target_that_cannot_be_changed() -> None:
    with pytest.raises(StateMismatch, match=r"the object \(int\) cannot be restored in place"):
        snapshot.restore(5, 6)


def test_nesting_beyond_the_stack_is_said_so() -> None:
    def nested() -> Any:
        result: Any = torch.zeros(1)
        for _ in range(100_000):
            result = [result]
        return result

    with pytest.raises(StateMismatch, match="nested too deeply"):
        snapshot.restore(nested(), nested())


def test_an_equal_value_in_a_tuple_is_fine() -> None:
    counter = Counter()
    snapshot.restore({"t": (counter, 5, "x", None)}, {"t": ({"n": 1}, 5, "x", None)})
    assert counter.n == 1


def test_a_failing_load_names_its_path_and_keeps_its_cause() -> None:
    error = RuntimeError("size mismatch for weight")
    with pytest.raises(StateMismatch, match=r"\['net'\]\[1\] could not take its saved state: size mismatch") as caught:
        snapshot.restore({"net": [Counter(), Counter(error=error)]}, {"net": [{"n": 1}, {"n": 2}]})
    assert caught.value.__cause__ is error


def test_another_model_is_named() -> None:
    with pytest.raises(StateMismatch, match=r"\['model'\] .*size mismatch"):
        snapshot.restore({"model": torch.nn.Linear(3, 3)}, {"model": torch.nn.Linear(2, 2).state_dict()})


def test_an_expanded_target_is_named() -> None:
    with pytest.raises(StateMismatch, match=r"\['w'\]"):
        snapshot.restore({"w": torch.zeros(1).expand(3)}, {"w": torch.ones(3)})
