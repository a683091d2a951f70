"""A state held still: what is saved is what was there at the call, to the byte, whatever becomes of the live objects."""

from __future__ import annotations

import argparse
import collections
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ckptstore import ChangedWhileSaving, NotSerializable, capture, snapshot, torchfile
from ckptstore.overlap import stable_tensors
from ckptstore.still import Place, Still


class Tagged(torch.Tensor):
    """A subclass with an attribute."""


class Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def written(state: Any) -> bytes:
    """Return the file that a save makes of `state`."""
    file = io.BytesIO()
    torchfile.save(snapshot.to_state(state), file)
    return file.getvalue()


def held(state: Any, place: Place | None = None) -> Still:
    """Return `state` as a save in the background takes it."""
    still = Still(snapshot.to_state(state), [])
    still.copy(place or Place(), False)
    return still


def written_later(still: Still) -> bytes:
    """Return the file that a save in the background makes."""
    still.finish_copy()
    state, locations = still.state()
    file = io.BytesIO()
    torchfile.save(state, file, locations)
    still.drop()
    return file.getvalue()


def _tied() -> Any:
    weight = torch.arange(6.0)
    return {"a": weight, "b": weight, "view": weight[2:4], "t": weight.view(2, 3).T, "late": [weight[::2]]}


def _tagged() -> Any:
    tensor = torch.arange(3.0).as_subclass(Tagged)
    tensor.note = ["kept"]  # type: ignore[attr-defined]
    return tensor


def _with_attribute() -> Any:
    tensor = torch.arange(3.0)
    tensor.note = ["kept"]  # type: ignore[attr-defined]
    return tensor


def _mixed() -> Any:
    one, two = torch.arange(3.0), torch.arange(4.0)
    return [torch.ones(5).untyped_storage(), two, two.storage(), one, torch.eye(2).untyped_storage(), torch.eye(2).to_sparse()]


def _model() -> Any:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return {"model": model, "optimizer": optimizer, "schedule": schedule, "step": 7}


_NOT_BYTES = (
    "torch.q",
    "torch.bits",
    "torch.uint",
    "torch.int",
)  # quantized ones, and integers of odd sizes, which torch cannot save
DTYPES = sorted(
    {d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith(_NOT_BYTES)}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64},
    key=str,
)


def _odd_with_attribute() -> Any:
    tensor = torch.ones(3, dtype=torch.uint16)
    tensor.note = ["kept"]  # type: ignore[attr-defined]
    return tensor


STATES: dict[str, Callable[[], Any]] = {
    "model": _model,
    "tied and views": _tied,
    "not contiguous": lambda: torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1)[1:],
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.ones(1, 3).expand(5, 3),
    "empty": lambda: [torch.empty(0), torch.empty(3, 0), torch.ones(4)[:0], torch.tensor(3.5)],
    "parameter": lambda: torch.nn.Parameter(torch.arange(3.0)),
    "requires grad": lambda: torch.arange(3.0, requires_grad=True),
    "subclass": _tagged,
    "with an attribute": _with_attribute,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse, compressed": lambda: torch.eye(3).to_sparse_csr(),
    "no storage class, subclass": lambda: torch.ones(3).to(torch.float8_e5m2).as_subclass(Tagged),
    "no storage class, attribute": _odd_with_attribute,
    "no storage class, conjugate": lambda: torch.empty(3, dtype=torch.complex32).fill_(1j).conj(),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(4.0), 0.5, 2, torch.quint8),
    "conjugate": lambda: torch.view_as_complex(torch.arange(8.0).view(4, 2)).conj(),
    "negative view": lambda: torch.view_as_complex(torch.arange(8.0).view(4, 2)).conj().imag,
    "meta": lambda: torch.empty(3, device="meta"),
    "storages": lambda: [torch.arange(3.0).untyped_storage(), torch.arange(3.0).storage()],
    "storages among tensors": _mixed,
    "one with a gradient among others": lambda: [torch.ones(2), torch.ones(2, requires_grad=True), torch.zeros(3)],
    "shared memory": lambda: torch.arange(3.0).share_memory_(),
    **{str(dtype): lambda dtype=dtype: torch.empty(16, dtype=torch.uint8).fill_(1).view(dtype) for dtype in DTYPES},  # type: ignore[misc]
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
@pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|Sparse CSR tensor support|quantization|quantize|ComplexHalf)")
def test_the_file_is_the_one_that_a_save_makes(make: Callable[[], Any]) -> None:
    state = {"it": make(), "again": None}
    state["again"] = state["it"]
    assert written_later(held(state)) == written(state)


@pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
@pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|Sparse CSR tensor support|quantization|quantize|ComplexHalf)")
def test_what_happens_to_the_numbers_later_does_not_matter(make: Callable[[], Any]) -> None:
    state = snapshot.to_state({"it": make()})
    before = written(state)
    still = held(state)
    spoil_storages(state)
    if not isinstance(state["it"], torch.Tensor) or not state["it"].is_meta:
        assert written(state) != before or "empty" in str(state)
    assert written_later(still) == before


def optimizer_of(value: Any) -> torch.optim.Optimizer:
    """Return an optimizer that has `value`, a tensor or a list of them, in its state."""
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter])
    optimizer.state[parameter]["value"] = value
    return optimizer


@pytest.mark.parametrize("make", STATES.values(), ids=STATES.keys())
@pytest.mark.filterwarnings("ignore:.*(TypedStorage is deprecated|Sparse CSR tensor support|quantization|quantize|ComplexHalf)")
def test_what_only_a_step_changes_makes_the_same_file(make: Callable[[], Any]) -> None:
    state = {"it": make(), "other": torch.arange(5.0)}
    optimizers = [state["it"]["optimizer"]] if isinstance(state["it"], dict) and "optimizer" in state["it"] else []
    still = Still(snapshot.to_state(state), [*optimizers, optimizer_of(state["it"])])
    still.copy(Place(), True)
    before = written(state)
    state["other"].zero_()
    assert written_later(still) == before


@pytest.mark.parametrize("state", ["requires grad", "negative view", "conjugate", "quantized"])
@pytest.mark.filterwarnings("ignore:.*(quantization|quantize)")
def test_what_is_told_by_more_than_how_it_lies_is_found_in_time(state: str) -> None:
    it = STATES[state]()
    memory = torch.empty(0, dtype=torch.uint8).set_(it.untyped_storage())
    still = Still([it, it], [optimizer_of(memory)])  # its memory is known to be steady by another tensor
    still.copy(Place(), False)
    assert written_later(still) == written([it, it])


def test_a_tensor_that_is_given_other_memory_before_it_was_copied_is_told() -> None:
    tensor = torch.arange(3.0)
    still = Still({"t": tensor}, [optimizer_of(tensor)])
    still.copy(Place(), False)
    tensor.data = torch.zeros(2, 2)
    with pytest.raises(ChangedWhileSaving, match="before the next step"):
        still.finish_copy()
    still.drop()


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "exchanged": lambda t: setattr(t, "data", torch.zeros(2)),
    "transposed": lambda t: t.t_(),
    "shrunk": lambda t: t.resize_(2),
    "with a gradient": lambda t: t.requires_grad_(),
    "with an attribute that cannot be saved": lambda t: setattr(t, "note", lambda: 0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_no_step_changes_may_change_at_once(change: Callable[[torch.Tensor], object]) -> None:
    """Not only its numbers: what it is, and how it lies in its memory, are those of the call as well."""
    steady, other = torch.arange(3.0, requires_grad=True), torch.arange(6.0).view(2, 3)
    state = [other, steady, torch.ones(5).untyped_storage(), steady.detach()[1:], other[1:]]
    before = written(state)
    still = Still(state, [optimizer_of(steady)])
    still.copy(Place(), False)
    change(other)
    assert written_later(still) == before


def test_attributes_are_those_of_the_call() -> None:
    tensor = _with_attribute()
    before = written([tensor])
    still = Still([tensor], [optimizer_of(tensor)])
    still.copy(Place(), False)
    tensor.note.append("later")
    assert written_later(still) == before


def test_storages_that_are_seen_by_nobody_else_keep_their_place() -> None:
    """The id of a storage is that of its Python object: what is alive no longer must not be taken for what came after it."""
    parameter = torch.nn.Parameter(torch.ones(4))
    stable = stable_tensors([torch.optim.SGD([parameter])])
    assert stable.keys == [id(parameter.untyped_storage())] and stable.alive[0] is parameter.untyped_storage()


def spoil_storages(state: Any) -> None:
    """Overwrite the bytes of all tensors in `state`."""

    seen = set()

    class Spoiler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, (torch.TypedStorage, torch.UntypedStorage)):
                return None
            storage = getattr(obj, "_untyped_storage", obj)
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                torch.empty(0, dtype=torch.uint8).set_(storage).bitwise_not_()
            return "storage"

    Spoiler(io.BytesIO(), 2).dump(state)


def test_metadata_that_changes_later_does_not_matter() -> None:
    state: Any = {"t": torch.arange(6.0), "u": torch.arange(4.0), "v": torch.arange(4.0), "w": torch.arange(3.0)}
    before = written(state)
    still = held(state)
    state["t"].resize_(2)
    state["u"].data = torch.zeros(1)
    state["v"].transpose_(0, 0).unsqueeze_(0)
    state["w"].untyped_storage().resize_(0)
    assert written_later(still) == before


def test_objects_that_are_no_tensors_may_change_later() -> None:
    inner = {"list": [1, [2]], "set": {1}, "bytes": bytearray(b"abc"), "deque": collections.deque([1])}
    state: Any = {
        **inner,
        "default": collections.defaultdict(list, a=[1]),
        "ordered": collections.OrderedDict(a=[torch.ones(2)]),
        "config": Config(depth=[3]),
        "args": argparse.Namespace(lr=[0.1]),
        "same": inner["list"],
    }
    before = written(state)
    still = held(state)
    for value in ("list", "deque"):
        state[value].append(9)
    state["set"].add(9)
    state["bytes"].extend(b"9")
    state["default"]["a"].append(9)
    state["ordered"]["b"] = 9
    state["config"].depth.append(9)
    state["args"].lr = 9
    assert written(state) != before
    after = torch.load(io.BytesIO(written_later(still)), weights_only=False)
    expected = torch.load(io.BytesIO(before), weights_only=False)
    assert after["list"] == [1, [2]] and after["same"] is after["list"]
    assert after["config"].depth == [3] and after["args"].lr == [0.1]
    for key in ("set", "bytes", "deque", "default"):
        assert after[key] == expected[key] and type(after[key]) is type(expected[key])
    assert list(after["ordered"]) == ["a"]


def test_cycles_are_kept() -> None:
    state: dict[str, Any] = {"t": torch.ones(2)}
    state["me"] = state
    loaded = torch.load(io.BytesIO(written_later(held(state))))
    assert loaded["me"] is loaded


def test_what_cannot_be_saved_is_told_at_the_call() -> None:
    with pytest.raises(NotSerializable, match=r"obj\['f'\]"):
        held({"f": lambda: 0})

    class Angry:
        def __reduce__(self) -> Any:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        held({"a": Angry()})


class Whole:
    """What may be a part of something, as a `DTensor` may, but is not."""

    full_tensor = None


def test_whether_there_are_only_parts_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are looked at then; for each of thousands, it would take seconds, for which the training waits."""
    looked: list[object] = []
    monkeypatch.setattr(capture, "refuse_parts", looked.append)
    state = {"a": [Whole() for _ in range(5)]}
    held(state)
    assert looked == [state]


def _refuse() -> None:
    raise ValueError("not twice")


class OneWay:
    """Can be pickled, but not unpickled."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def test_what_could_never_be_loaded_is_refused() -> None:
    still = held({"o": OneWay()})
    still.finish_copy()
    with pytest.raises(NotSerializable, match="not twice"):
        still.state()


@pytest.mark.parametrize(
    "kind", [torch.Tensor.detach, torch.nn.Parameter, torch.Tensor.requires_grad_], ids=["plain", "parameter", "with a gradient"]
)
@pytest.mark.parametrize("left", [0, 16])
def test_a_tensor_whose_memory_was_freed_is_refused(kind: Callable[[torch.Tensor], torch.Tensor], left: int) -> None:
    """torch would give it new memory, with whatever is in there."""
    tensor = kind(torch.arange(8.0))
    tensor.untyped_storage().resize_(left)  # type: ignore[no-untyped-call]
    still = held({"ok": torch.ones(3), "empty": torch.ones(0), "freed": tensor})
    still.finish_copy()
    with pytest.raises(NotSerializable):
        still.state()


def test_two_types_over_one_memory_are_refused_as_in_a_save() -> None:
    storage = torch.arange(4.0)
    state = {"f": storage, "i": storage.view(torch.int32)}
    with pytest.raises(NotSerializable, match="different types"):
        written(state)
    still = held(state)
    with pytest.raises(NotSerializable, match="different types"):
        written_later(still)


def test_memory_is_used_again_and_nothing_of_the_last_state_is_left() -> None:
    place = Place()
    large = {"a": torch.rand(1000), "b": torch.rand(77)}
    still = held(large, place)
    expected = written(large)
    assert written_later(still) == expected
    kept = place.buffers._free
    assert kept is not None
    small = copy.deepcopy({"b": torch.zeros(77)})
    still = held(small, place)
    assert place.buffers._free is None
    assert written_later(still) == written(small)
    assert place.buffers._free is kept, "a smaller state takes the same memory"
    grown = {"a": torch.rand(5000)}
    assert written_later(held(grown, place)) == written(grown)
    assert place.buffers._free is not kept
