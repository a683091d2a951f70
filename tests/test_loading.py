"""Loads that read each byte once, or only some of them: what comes out is what was saved, and what is damaged never does."""

from __future__ import annotations

import gc
import io
import mmap
import threading
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stores
import torch

from ckptstore import Store, loading, pages, torchload, userfault
from ckptstore.errors import Damaged, DamagedFile, FallbackWarning, NotFound, StateMismatch, UnsafeContent, UsageError
from ckptstore.protocol import LocalFiles
from ckptstore.testing import FaultyBackend

MIB = 1 << 20


def tensors() -> dict[str, Any]:
    """A state of many sizes, with views, shared storages and parameters."""
    base = torch.arange(3 * MIB // 4, dtype=torch.float32)
    return {
        "model": OrderedDict((f"layer{i}.weight", torch.rand(n)) for i, n in enumerate([1, 1000, 40_000, 3 * MIB, 5, 70_000])),
        "views": [base[10:20], base[::2], base.reshape(-1, 4).t(), base],
        "odd": {
            "empty": torch.zeros(0),
            "half": torch.rand(999).half(),
            "uint16": torch.arange(7).to(torch.uint16),
            "parameter": torch.nn.Parameter(torch.rand(3)),
            3: (torch.tensor(1), None, "text", 2.5),
        },
    }


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted) and found.stride() == wanted.stride() and found.requires_grad == wanted.requires_grad
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a file is read into memory whole."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the file was read whole")

    monkeypatch.setattr(torchload, "load", refuse)


@pytest.mark.parametrize("place", ["memory", "local"])
@pytest.mark.usefixtures("never_whole")
def test_plain_tensors_are_read_to_where_they_stay(place: str, tmp_path: Path) -> None:
    with Store(tmp_path / "s") if place == "local" else stores.store_on(stores.new_memory()) as store:
        state = tensors()
        store.save(state)
        loaded = store.load()
        assert_same(loaded, state)
        pointers = {view.untyped_storage().data_ptr() for view in loaded["views"]}
        assert len(pointers) == 1, "what shared memory shares it again"
        assert_same(store.load(map_location="cpu", weights_only=False), state)


ODD: dict[str, Any] = {
    "sparse": lambda: torch.eye(4).to_sparse(),
    "an object": lambda: stores.Killed,
    "a tensor with an attribute": lambda: marked(torch.ones(2)),
    "a storage": lambda: torch.arange(4.0).untyped_storage(),
}


def marked(tensor: torch.Tensor) -> torch.Tensor:
    tensor.mark = torch.ones(3)  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
@pytest.mark.filterwarnings("ignore::ckptstore.errors.WeightsOnlyWarning", "ignore:TypedStorage")
def test_whatever_may_look_into_a_tensor_while_it_is_made_sees_it_whole(make: Any, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save({"odd": make(), "plain": torch.arange(9.0)})
        loaded = store.load(weights_only=False)
        assert torch.equal(loaded["plain"], torch.arange(9.0))
        if isinstance(loaded["odd"], torch.Tensor):
            assert torch.equal(loaded["odd"].to_dense(), make().to_dense())
            assert torch.equal(getattr(loaded["odd"], "mark", torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("change", ["padding", "alignment"])
def test_a_file_laid_out_in_another_way_loads_too(change: str, tmp_path: Path) -> None:
    """As from other versions of torch, or with another alignment of the storages."""
    state = {"a": torch.arange(1000.0), "b": torch.ones(5)}
    file = io.BytesIO()
    with torch.utils.serialization.config.patch({"save.storage_alignment": 4096} if change == "alignment" else {}):
        torch.save(state, file)
    data = file.getvalue()
    with Store(tmp_path / "s") as store:
        written = stores.write(store, files={"state.pt": data if change == "alignment" else shifted(data)})
        assert_same(store.load(written), state)
        assert_same(store.checkpoint(written).load_tensors(["b"]), {"b": state["b"]})
        assert_same(store.load(written, mmap=True), state)


def shifted(data: bytes) -> bytes:
    """Return the archive with no data descriptors, so that data does not end where the next header would tell."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in reversed(old.namelist()):
            new.writestr(name, old.read(name))
    return out.getvalue()


# --- damage


def data_file(store: Store, root: Path) -> Path:
    return root / "data" / store.checkpoint().id / "state.pt"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", [0.0001, 0.02, 0.3, 0.6, 0.97, 0.99999])
def test_one_bit_anywhere_is_found(where: float, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save(tensors())
        path = data_file(store, tmp_path / "s")
        flip(path, int(path.stat().st_size * where))
        for how in ({}, {"mmap": True}):
            with pytest.raises(DamagedFile, match="fails its checksum"):
                store.load(**how)  # type: ignore[arg-type]


def test_damage_half_way_leaves_the_live_model_alone(tmp_path: Path) -> None:
    """The last byte of the last tensor: everything before it is whole, and nothing of it may be in the model."""
    torch.manual_seed(0)
    with Store(tmp_path / "s") as store:
        model = torch.nn.Linear(1000, 1000)
        store.save({"model": model})
        path = data_file(store, tmp_path / "s")
        flip(path, path.read_bytes().rindex(bytes(memoryview(model.bias.detach().numpy()))) + 3999)  # type: ignore[arg-type]
        live = torch.nn.Linear(1000, 1000)
        before = {name: value.clone() for name, value in live.state_dict().items()}
        with pytest.raises(Damaged):
            store.resume({"model": live})
        assert_same(OrderedDict(live.state_dict()), OrderedDict(before))


def test_resume_falls_back_to_an_older_checkpoint(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        old = torch.nn.Linear(500, 500)
        store.save({"model": old}, step=1)
        store.save({"model": torch.nn.Linear(500, 500)}, step=2)
        path = data_file(store, tmp_path / "s")
        flip(path, path.stat().st_size // 2)
        live = torch.nn.Linear(500, 500)
        with pytest.warns(FallbackWarning, match="falling back"):
            found = store.resume({"model": live})
        assert found is not None and found.step == 1
        assert torch.equal(live.weight, old.weight)


# --- into a live model


class Keeps(torch.nn.Module):
    """Holds on to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(100_000)

    def get_extra_state(self) -> torch.Tensor:
        return self.kept

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.kept = state


def test_after_resume_nothing_refers_to_the_file(tmp_path: Path) -> None:
    """Or its blocks on disk could not be freed, and its loss would be ours."""
    with Store(tmp_path / "s") as store:
        model, keeps = torch.nn.Linear(700, 700), Keeps()
        keeps.kept = torch.rand(100_000)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(2, 700)).sum().backward()
        optimizer.step()
        plain: dict[str, Any] = {"history": {"loss": torch.rand(50_000)}, "model": model, "optimizer": optimizer, "keeps": keeps}
        store.save(plain)
        live, live_keeps = torch.nn.Linear(700, 700), Keeps()
        live_optimizer = torch.optim.Adam(live.parameters())
        objects: dict[str, Any] = {"history": {}, "model": live, "optimizer": live_optimizer, "keeps": live_keeps}
        store.resume(objects)
        gc.collect()
        path = data_file(store, tmp_path / "s")
        assert str(path) not in Path("/proc/self/maps").read_text()
        path.write_bytes(bytes(path.stat().st_size))
        assert torch.equal(live.weight, model.weight) and torch.equal(live_keeps.kept, keeps.kept)
        assert torch.equal(objects["history"]["loss"], plain["history"]["loss"])
        for index, moments in optimizer.state_dict()["state"].items():
            assert_same(live_optimizer.state_dict()["state"][index], moments)


def test_after_resume_not_even_an_empty_tensor_refers_to_the_file(tmp_path: Path) -> None:
    def trained() -> dict[str, Any]:
        model = torch.nn.Linear(2, 2)
        model.empty = torch.nn.Parameter(torch.empty(0, 3))
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.rand(1, 2)).sum().backward()
        model.empty.grad = torch.empty(0, 3)
        optimizer.step()
        return {"model": model, "optimizer": optimizer}

    with Store(tmp_path / "s") as store:
        store.save(trained())
        live = trained()
        store.resume(live)
        moments = live["optimizer"].state[live["model"].empty]
        assert moments["exp_avg"].shape == (0, 3) and moments["exp_avg"].stride() == (3, 1)
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_state_that_does_not_fit_leaves_the_sampler_alone(tmp_path: Path) -> None:
    """Who goes on with another model would begin in the middle of an epoch."""

    class Sampler:
        def __init__(self, position: int) -> None:
            self.position = position

        def state_dict(self) -> dict[str, int]:
            return {"position": self.position}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.position = state["position"]

    with Store(tmp_path / "s") as store:
        store.save({"w": torch.ones(3)}, sampler=Sampler(5))
        sampler, live = Sampler(0), {"w": torch.zeros(3)}
        with pytest.raises(StateMismatch, match=r"\['v'\] is missing"):
            store.resume({**live, "v": torch.zeros(2)}, sampler=sampler)
        assert sampler.position == 0 and not live["w"].any()
        store.resume(live, sampler=sampler)
        assert sampler.position == 5 and live["w"].all()


def test_resume_maps_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(tmp_path / "s") as store:
        model = torch.nn.Linear(100, 100)
        store.save({"model": model})
        monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("it was read into memory first"))
        live = torch.nn.Linear(100, 100)
        store.resume({"model": live})
        assert torch.equal(live.weight, model.weight)


# --- mapped


def test_a_mapped_load_refers_to_the_file_and_does_not_change_it(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        state = tensors()
        store.save(state)
        path = data_file(store, tmp_path / "s")
        before = path.read_bytes()
        loaded = store.load(mmap=True)
        assert_same(loaded, state)
        assert str(path) in Path("/proc/self/maps").read_text()
        loaded["model"]["layer3.weight"].zero_()
        assert path.read_bytes() == before
        assert store.verify() == []


def test_mmap_where_there_is_no_local_file_says_so() -> None:
    backend = stores.new_memory()
    assert not isinstance(backend, LocalFiles)
    with stores.store_on(backend) as store:
        store.save(tensors())
        with pytest.raises(UsageError, match="only files in a folder of a local disk can be mapped"):
            store.load(mmap=True)


def test_mmap_is_refused_where_a_change_would_reach_the_file(tmp_path: Path) -> None:
    import mmap

    with Store(tmp_path / "s") as store:
        store.save(tensors())
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED), pytest.raises(UsageError, match="MAP_PRIVATE"):
            store.load(mmap=True)
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            store.resume({"model": {}})  # finds another way


@pytest.mark.parametrize("arguments", [{"verify": "lazy"}, {"verify": "never", "mmap": True}, {"verify": False}])
def test_less_than_full_is_only_for_mapped_files(arguments: Any, tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save({"a": torch.ones(1)})
        with pytest.raises(UsageError, match="verify must be"):
            store.load(**arguments)


@pytest.mark.parametrize("then", ["load", "save", "resume", "close"])
def test_damage_found_late_is_raised_by_the_next_call_once(then: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.save({"model": torch.ones(2 * MIB), "next": torch.ones(MIB)})
    flip(data_file(store, tmp_path / "s"), 4 * MIB)
    assert (store.load(mmap=True, verify="lazy")["model"] != 1).any()
    for job in store._engine._jobs.checks:
        job.wait()
    calls = {
        "load": store.load,
        "save": lambda: store.save({"a": 1}),
        "resume": lambda: store.resume({}),
        "close": store.close,
    }
    with pytest.raises(DamagedFile, match="must not be used"):
        calls[then]()
    store.close()


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_what_is_pruned_before_its_late_check_is_checked_all_the_same(damaged: bool, tmp_path: Path) -> None:
    busy = threading.Lock()

    def check_another_large_file() -> None:
        busy.acquire()

    store = Store(tmp_path / "s", keep_last=1)
    store.save({"model": torch.ones(2 * MIB), "next": torch.ones(MIB)})
    path = data_file(store, tmp_path / "s")
    if damaged:
        flip(path, 4 * MIB)
    with busy:
        store._engine.check_later(check_another_large_file)
        store.load(mmap=True, verify="lazy")
        stores.write(store)
        store._engine.settle()
        assert not path.exists()
    with pytest.raises(DamagedFile, match="must not be used") if damaged else nullcontext():
        store.close()
    store.close()


def test_lazy_checks_names_and_places_at_once(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save(tensors())
        flip(data_file(store, tmp_path / "s"), 100)  # in the pickle
        with pytest.raises(DamagedFile, match="fails its checksum"):
            store.load(mmap=True, verify="lazy")


@pytest.mark.parametrize("extra", [5, torch.eye(3).to_sparse()], ids=["plain", "not plain"])
def test_lazy_checks_the_places_of_tensors_far_from_the_names(extra: Any, tmp_path: Path) -> None:
    """torch would take a tensor from where a damaged header leads."""
    with Store(tmp_path / "s") as store:
        store.save({"extra": extra, **{f"t{i}": torch.full((MIB,), i) for i in range(4)}})
        path = data_file(store, tmp_path / "s")
        data = path.read_bytes()
        header = data.rindex(b"PK\x03\x04", 0, data.index(bytes(torch.full((9,), 2).numpy())))
        flip(path, header + 28)  # how long the padding is
        with pytest.raises(DamagedFile, match="fails its checksum"):
            store.load(mmap=True, verify="lazy")


def test_a_whole_file_loaded_lazily_raises_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        state = tensors()
        store.save(state)
        assert_same(store.load(mmap=True, verify="lazy"), state)


# --- some tensors


class Counting(FaultyBackend):
    """Counts the bytes that are read of data files."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.count = 0
        self._counting = threading.Lock()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        super().read_into(key, offset, buffer)
        with self._counting:
            self.count += buffer.nbytes


@pytest.mark.parametrize("place", ["memory", "remote"])
def test_one_tensor_costs_little_more_than_its_bytes(place: str) -> None:
    """On a service too, where a part has several megabytes."""
    inner = stores.new_memory()
    if place == "remote":
        inner.capabilities = replace(inner.capabilities, remote=True, min_part=5 * MIB, max_parts=10_000)  # type: ignore[misc]
    backend = Counting(inner)
    with stores.store_on(backend) as store:
        sizes = {"first": 3 * MIB, "small": 20_000, "middle": 150_000, "large": 5 * MIB // 4, "odd": 300_001, "last": MIB}
        state = {"model": {name: torch.rand(n) for name, n in sizes.items()}, "step": torch.tensor(3.0)}
        store.save(state)
        checkpoint = store.checkpoint()
        for name, wanted in state["model"].items():  # type: ignore[union-attr]
            backend.count = 0
            assert_same(checkpoint.load_tensors([f"model.{name}"]), {f"model.{name}": wanted})
            # Besides: what is smaller than a grain and shares its chunk, the pickle and the directory.
            assert backend.count <= wanted.nbytes * 1.05 + (64 << 10) + 4096
        backend.count = 0
        assert checkpoint.load_tensors(["step"])["step"] == 3
        assert backend.count < 128 << 10


def test_a_thousand_small_tensors_share_chunks() -> None:
    with stores.store_on(stores.new_memory()) as store:
        store.save({f"layer{i}": torch.rand(200) for i in range(1200)})
        entry = store.checkpoint().manifest.files[0]
        assert entry.size // (80 << 10) <= len(entry.chunks) <= entry.size // (64 << 10) + 1


def test_some_tensors_come_in_the_order_asked_for(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        state = tensors()
        store.save(state)
        checkpoint = store.checkpoint()
        wanted = ["odd.3.0", "views.1", "model.layer3.weight", "odd.empty"]
        found = checkpoint.load_tensors(wanted)
        assert list(found) == wanted
        assert_same(found["views.1"], state["views"][1])
        assert_same(found["odd.3.0"], state["odd"][3][0])
        assert_same(found["model.layer3.weight"], state["model"]["layer3.weight"])
        names = checkpoint.tensor_names()
        assert len(names) == 15 and set(wanted) <= set(names) and names[0] == "model.layer0.weight"


def test_a_tensor_that_is_not_there(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save(tensors())
        with pytest.raises(NotFound, match=r"has no tensor 'model.layer3.weigth'; it has model.layer3.weight"):
            store.checkpoint().load_tensors(["model.layer3.weigth"])
        with pytest.raises(UsageError, match="a list of paths"):
            store.checkpoint().load_tensors("model.layer3.weight")
        with pytest.raises(UsageError, match="must be paths"):
            store.checkpoint().load_tensors([0])  # type: ignore[list-item]


@pytest.mark.parametrize("leaf", [torch.ones(1), 5, torch.eye(2).to_sparse()], ids=["a tensor", "a number", "not plain"])
def test_a_small_file_with_too_many_paths(leaf: Any, tmp_path: Path) -> None:
    twice = [leaf]
    for _ in range(60):
        twice = [twice, twice]
    with Store(tmp_path / "s") as store:
        checkpoint = store.save({"twice": twice})
        with pytest.raises(UnsafeContent, match="too many paths"):
            checkpoint.tensor_names()
        with pytest.raises(UnsafeContent, match="too many paths"):
            checkpoint.load_tensors(["twice.0"])


def test_two_tensors_of_one_path(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.zeros(1), "d": torch.ones(2)}})
        with pytest.raises(UsageError, match="two tensors"):
            store.checkpoint().load_tensors(["a.b.c"])
        assert torch.equal(store.checkpoint().load_tensors(["a.b.d"])["a.b.d"], torch.ones(2))


def test_a_damaged_tensor_does_not_come_out_and_the_others_do(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        state = {f"t{i}": torch.rand(MIB // 2) for i in range(4)}
        store.save(state)
        path = data_file(store, tmp_path / "s")
        flip(path, path.read_bytes().index(bytes(memoryview(state["t2"].numpy()))) + 5)  # type: ignore[arg-type]
        checkpoint = store.checkpoint()
        with pytest.raises(DamagedFile, match="fails its checksum"):
            checkpoint.load_tensors(["t2"])
        assert_same(checkpoint.load_tensors(["t1"]), {"t1": state["t1"]})


def test_some_tensors_of_a_file_that_is_not_plain(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save({"sparse": torch.eye(3).to_sparse(), "plain": torch.arange(5.0)})
        found = store.checkpoint().load_tensors(["plain", "sparse"])
        assert torch.equal(found["plain"], torch.arange(5.0)) and torch.equal(found["sparse"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("placed", [True, False])
def test_large_tensors_come_to_new_memory_whole_or_not_at_all(
    placed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_free", lambda: 0)  # no large pages
    monkeypatch.setattr(pages, "_is_there", lambda _: False)  # malloc may have kept some
    if not placed:
        monkeypatch.setattr(userfault, "_CALL", None)
    put: list[int] = []
    there = userfault.Placing.put
    monkeypatch.setattr(userfault.Placing, "put", lambda self, view, data: (put.append(len(view)), there(self, view, data))[1])
    sizes = [9 * MIB + 3, 1, 4 * MIB, 17, 25 * MIB - 1, 5 * MIB + 4097]
    state = {f"t{n}": torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes}
    with Store(tmp_path / "s") as store:
        store.save(state, "alone")
        assert_same(store.load("alone"), state)
        live = [torch.nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1, requires_grad=True)], momentum=0.9)]
        store.save({"model": live[0], "optimizer": live[1], "more": [state]})
        more: dict[str, Any] = {"model": live[0], "optimizer": live[1], "more": [{}]}
        store.resume(more)
        assert_same(more["more"][0], state)
        assert bool(put) == (placed and _places())
        flip(data_file(store, tmp_path / "s"), 30 * MIB)
        more["more"][0] = {}
        with pytest.raises(Damaged):
            store.resume(more)
        assert more["more"][0] == {}


def _places() -> bool:
    one = userfault.Placing()
    try:
        return one.register(memoryview(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)))
    finally:
        one.close()
