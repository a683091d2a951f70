"""Objects made without torch's unpickler: the same that torch makes, and nothing that a pickle from a stranger could do with them."""

from __future__ import annotations

import io
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from test_hostile import EIGHT, NONSENSE, PICKLES, archive, call, name, number, program, storage, tensor, text, tup
from test_loading import assert_same, tensors
from test_torchfile import DTYPES, bits, raw

from ckptstore import Store, rebuild, torchload
from ckptstore import archive as zipped
from ckptstore.errors import UnsafeContent
from ckptstore.loading import on_cpu
from ckptstore.rebuild import NotPlain


def rebuilt(data: bytes) -> Any:
    """Make the object in a ``.pt`` file, as a load of a stored one does."""
    outline = zipped.outline(lambda start, length: memoryview(data)[start : start + length], len(data), "it")
    if outline is None:
        raise NotPlain
    value = rebuild.hollow(outline.pickle, outline.records, len(data), on_cpu(None))
    storages = {}
    for hollow in rebuild.hollows(value):
        start, size = hollow.record.start, hollow.record.size
        storages[start] = torch.UntypedStorage(size)
        if size:
            torch.empty(0, dtype=torch.uint8).set_(storages[start]).copy_(
                torch.frombuffer(bytearray(data[start : start + size]), dtype=torch.uint8)
            )
    return rebuild.fill(value, storages)


def saved(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def trained() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


PLAIN: dict[str, Any] = {
    "many kinds": tensors,
    "a model and its optimizer": trained,
    "a tensor alone": lambda: torch.arange(3.0),
    "tuples in tuples": lambda: (torch.ones(1), ((torch.zeros(2), [torch.ones(3)]), 5)),
    "no tensor": lambda: {
        "a": [1, -(2**70), 0.5, None, True, "ö", (), torch.Size([2, 3]), torch.device("cuda:1"), torch.float16]
    },
    "numbers of all sizes": lambda: [i for n in range(0, 70, 3) for i in (2**n, -(2**n))],
    "a parameter without gradient": lambda: torch.nn.Parameter(torch.ones(2), requires_grad=False),
    "a tensor with gradient": lambda: torch.ones(2, requires_grad=True),
    "keys of all kinds": lambda: {1: 1, "a": 2, None: 3, (1, "b"): 4, 0.5: 5, torch.float32: 6},
    "hundreds of names": lambda: {f"layer{i}": torch.full((2,), i) for i in range(700)},
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_what_is_plain_is_made_as_torch_makes_it(make: Any) -> None:
    data = saved(make())
    ours, theirs = rebuilt(data), torch.load(io.BytesIO(data), weights_only=True)
    assert_same(ours, theirs)
    for one, other in zip(rebuild.tensors_of(ours), rebuild.tensors_of(theirs), strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype and one.is_leaf == other.is_leaf
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_is_made_as_it_was(dtype: torch.dtype) -> None:
    data = saved([bits(dtype, 3, 5)])
    ours, theirs = rebuilt(data)[0], torch.load(io.BytesIO(data))[0]
    assert ours.dtype == dtype and ours.shape == theirs.shape and raw(ours) == raw(theirs)


def test_what_is_one_object_stays_one() -> None:
    shared, pair = torch.ones(3), (torch.zeros(1), "x")
    state: dict[str, Any] = {"a": shared, "b": [shared, pair, pair]}
    state["b"].append(state["b"])
    got = rebuilt(saved(state))
    assert got["a"] is got["b"][0] and got["b"][1] is got["b"][2] and got["b"][3] is got["b"]


def test_a_tensor_in_an_attribute_of_a_dict_is_filled_too(tmp_path: Path) -> None:
    """Where nobody looks for one: `load_state_dict` reads `_metadata`."""
    state: Any = OrderedDict(a=torch.ones(2))
    state._metadata = {"scale": torch.full((1000,), 7.0)}
    with Store(tmp_path / "s") as store:
        store.save(state)
        assert torch.equal(store.load()._metadata["scale"], state._metadata["scale"])
        assert torch.equal(store.load(mmap=True)._metadata["scale"], state._metadata["scale"])


def test_another_kind_of_tensor_is_torchs_affair(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with Store(tmp_path / "s") as store:
        store.save({"a": torch.ones(2)})
        with FakeTensorMode():
            assert isinstance(store.load()["a"], FakeTensor)
        with torch.device("meta"):
            loaded = store.load()["a"]
        assert torch.equal(loaded, torch.ones(2))


# --- from a stranger


def builds(target: bytes, state: bytes) -> bytes:
    return target + state + b"b"


ORDERED = name("collections", "OrderedDict")
REFUSED: dict[str, bytes] = {
    "a storage left as it is": storage(2),
    "a function left as it is": name("torch._utils", "_rebuild_tensor_v2"),
    "a function in an attribute": builds(call(ORDERED), b"}" + text("a") + name("torch._utils", "_rebuild_parameter") + b"s"),
    "an attribute of a function": builds(name("torch._utils", "_rebuild_tensor_v2"), b"}" + text("__defaults__") + b")s"),
    "a slot of a function": builds(name("torch._utils", "_rebuild_parameter"), b"N}" + text("_call") + b"Ns\x86"),
    "a slot of a storage": builds(storage(2), b"N}" + text("record") + b"Ns\x86"),
    "a slot of a tensor": builds(tensor([2], [1]), b"N}" + text("_layout") + tup(number(10**6)) + b"s\x86"),
    "the state of a tensor": builds(tensor([2], [1]), tup(storage(2), number(0), tup(number(2)), tup(number(1)))),
    "an item of a tensor": tensor([2], [1]) + b"K\x00G" + bytes(8) + b"s",
    "items of a tensor": tensor([2], [1]) + b"(K\x00K\x01u",
    "more behind a tensor": tensor([2], [1]) + b"K\x01a",
    "a number made of a tensor": call(name("torch", "Size"), tup(tensor([1], [1]))),
    "a tensor as a key": b"}" + tensor([2], [1]) + b"K\x01s",
    "a tensor in a key": b"}" + tup(tensor([2], [1])) + b"K\x01s",
    "a called storage": call(storage(2)),
    "a called text": call(text("print")),
    "an instance of a function": name("torch._utils", "_rebuild_parameter") + b")\x81",
    "a copied list": call(ORDERED, b"]"),
    "a set": call(name("builtins", "set"), b"]"),
    "code": call(name("os", "system"), text("true")),
    "a parameter of a parameter": call(
        name("torch._utils", "_rebuild_parameter"),
        call(name("torch._utils", "_rebuild_parameter"), tensor([2], [1]), b"\x88", call(ORDERED)), b"\x88", call(ORDERED),
    ),
    "one dict copied into many": b"}q\x01(" + b"".join(number(i) + b"N" for i in range(2000)) + b"u0]("
    + builds(call(ORDERED), b"h\x01") * 1000 + b"e",
    "an offset that no tensor has": tensor([0], [1], offset=1 << 64),
    "a size that no tensor has": tensor([0, 1 << 64], [1, 1]),
    "a stride that no tensor has": tensor([0], [1 << 64]),
    "a short storage": tensor([1], [1], stored=storage(1)),
    "a tuple that holds itself": b"]q\x01h\x01\x85q\x020h\x01h\x02a0" + b"(" * 1 + b"h\x02" + tensor([2], [1]) + b"t" + b"\x85" * 300,
}  # fmt: skip


@pytest.mark.parametrize("body", [*REFUSED.values(), *(b for b, _ in PICKLES.values()), *NONSENSE.values()])
def test_nothing_else_is_made(body: bytes) -> None:
    with pytest.raises(NotPlain):
        rebuilt(archive(program(body), EIGHT))


@pytest.mark.parametrize(("body", "why"), PICKLES.values(), ids=PICKLES.keys())
def test_a_store_refuses_it_with_the_same_words(body: bytes, why: str, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        written = stores.write(store, files={"state.pt": archive(program(body), EIGHT)})
        for how in ({}, {"mmap": True}, {"mmap": True, "verify": "lazy"}):
            with pytest.raises(UnsafeContent, match=why):
                store.load(written, **how)  # type: ignore[arg-type]
        with pytest.raises(UnsafeContent, match=why):
            store.checkpoint(written).load_tensors(["a"])


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_makes_the_same_as_torch_or_nothing() -> None:
    """Of bytes whose checksums are right all the same: a stranger can write what they like."""
    rng = random.Random(20261126)
    whole = program(b"}(" + text("a") + tensor([2], [1]) + text("b") + tup(tensor([1], [1], offset=1), number(5)) + b"u")
    made = 0
    for _ in range(1500):
        pickled = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            pickled[rng.randrange(len(pickled))] = rng.choice([rng.randrange(256), *whole])
        data = archive(bytes(pickled), EIGHT)
        try:
            ours = rebuilt(data)
        except NotPlain:
            continue
        made += 1
        assert_same(ours, torchload.load(data))
    assert made > 50


def test_the_pickle_that_torch_writes_is_read_by_the_fast_way() -> None:
    """If torch comes to pickle tensors in another way, loads are right but slow: this notices."""
    rebuilt(saved(trained()))
