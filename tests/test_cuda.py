"""On a GPU: copies by streams of their own into page-locked memory, and back to the device. Left out where there is none."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from procs import in_fork
from stores import new_memory, store_on
from torch import nn

import ckptstore
from ckptstore import ChangedWhileSaving, Store
from ckptstore.hostcopy import HostCopy
from ckptstore.hostmemory import Buffer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda:0"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "store", keep_last="all") as it:
        yield it


def net(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 1)).to(DEVICE)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.rand(8, model[0].in_features, device=DEVICE)).square().sum().backward()
    optimizer.step()


def clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.cpu().clone()
    return {k: clone(v) for k, v in value.items()} if isinstance(value, dict) else value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def busy() -> None:
    """Give the device some tens of milliseconds of work, on the current stream."""
    torch.cuda._sleep(100_000_000)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_training_on_the_device_comes_back(store: Store, asynchronous: bool) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer)
    kept = clone({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    state = {"model": model, "optimizer": optimizer}
    if asynchronous:
        store.save_async(state, rng=True).result()
    else:
        store.save(state, rng=True)
    loaded = store.load()
    assert loaded["model"]["0.weight"].device == torch.device(DEVICE)
    assert same({k: loaded[k] for k in kept}, kept)
    on_host = store.load(map_location="cpu")
    assert on_host["model"]["0.weight"].device.type == "cpu" and same(on_host["model"], kept["model"])
    drawn = torch.rand(3, device=DEVICE)
    other = net()
    fresh = {"model": other, "optimizer": torch.optim.AdamW(other.parameters(), fused=True)}
    store.resume(fresh)
    assert torch.equal(torch.rand(3, device=DEVICE), drawn)
    assert same(fresh["model"].state_dict(), kept["model"]) and other[0].weight.is_cuda
    assert same(fresh["optimizer"].state_dict(), kept["optimizer"])


def test_a_large_one_comes_back_from_a_device_and_to_it(store: Store) -> None:
    """So large that it is not held in memory besides what is made of it."""
    state = {f"{n}": torch.rand(3_000_001, device=DEVICE) for n in range(8)}
    state["view"] = state["0"][5:9]
    checkpoint = store.save(state)
    for loaded in (store.load(), store.load(map_location=DEVICE), store.load(map_location={DEVICE: "cpu"})):
        assert same(loaded, state)
        assert loaded["view"].untyped_storage().data_ptr() == loaded["0"].untyped_storage().data_ptr()
    assert all(t.is_cuda for t in store.load().values())
    assert not any(t.is_cuda for t in checkpoint.load_tensors(["3", "view"]).values())
    targets = {k: torch.zeros_like(v) for k, v in state.items()}
    store.resume(targets)
    assert same(targets, state)
    store.save({k: v.cpu() for k, v in state.items()})
    loaded = store.load(map_location="cuda")
    assert same(loaded, state) and all(t.is_cuda for t in loaded.values())


def test_a_damaged_file_is_not_loaded_to_the_device(store: Store, tmp_path: Path) -> None:
    checkpoint = store.save({f"{n}": torch.rand(3_000_001, device=DEVICE) for n in range(8)})
    (path,) = (tmp_path / "store").glob(f"**/{checkpoint.id}/state.pt")
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)
        file.seek(50_000_000)
        file.write(bytes([byte[0] ^ 1]))
    for where in (None, DEVICE):
        with pytest.raises(ckptstore.DamagedFile):
            checkpoint.load(map_location=where)


def test_what_was_queued_before_the_call_is_in_it_and_what_comes_after_is_not() -> None:
    with store_on(new_memory(), keep_last="all") as store:
        tensor = torch.zeros(1 << 22, device=DEVICE)
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                busy()
                tensor.fill_(7)
                pending = store.save_async({"x": tensor})
                tensor.fill_(9)
            assert bool((pending.result().load()["x"] == 7).all())
            torch.cuda.synchronize()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-6, momentum=0.9),
    "Adam, fused": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
    "Adam, capturable": lambda p: torch.optim.Adam(p, lr=1e-3, capturable=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_overlapped_saves_are_of_the_moment_of_the_call(kind: str) -> None:
    model = net(512)
    optimizer = OPTIMIZERS[kind](model.parameters())
    kept = []
    with store_on(new_memory(), keep_last="all") as store:
        for _ in range(8):
            busy()
            train(model, optimizer)
            pending = store.save_async({"model": model, "optimizer": optimizer}, optimizer=optimizer)
            kept.append((clone({"model": model.state_dict(), "optimizer": optimizer.state_dict()}), pending))
        train(model, optimizer)
        for expected, pending in kept:
            assert same(pending.result().load(), expected)


def test_overlapped_with_a_gradient_scaler() -> None:
    model, scaler = net(256), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with store_on(new_memory(), keep_last="all") as store:
        for _ in range(3):
            pending = store.save_async({"model": model, "scaler": scaler}, optimizer=optimizer)
            kept = clone(model.state_dict())
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(torch.rand(8, 256, device=DEVICE)).square().sum()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert same(pending.result().load()["model"], kept)


@pytest.mark.parametrize("change", ["counted", "past the count"])
def test_checked_mode_finds_a_change(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rest = HostCopy.copy_rest

    def changed_before(copy: HostCopy) -> None:
        with torch.no_grad():
            (model[0].weight if change == "counted" else model[0].weight.data).mul_(2)
        torch.cuda.synchronize()
        rest(copy)

    with store_on(new_memory()) as store:
        good = store.save_async({"model": model}, optimizer=optimizer, checked=True).result()
        monkeypatch.setattr(HostCopy, "copy_rest", changed_before)
        pending = store.save_async({"model": model}, optimizer=optimizer, checked=True)
        assert isinstance(pending.exception(), ChangedWhileSaving)
        assert store.checkpoint() == good


def test_the_buffer_is_page_locked_for_as_long_as_it_lives_and_no_larger_than_asked_for() -> None:
    size = (1 << 20) + 4096
    buffer = Buffer(size, pinned=True)
    view = torch.frombuffer(buffer.view(0, size), dtype=torch.uint8)
    assert view.is_pinned() and buffer.size == len(view)
    del buffer
    gc.collect()
    assert not view.is_pinned()


def test_where_memory_cannot_be_page_locked_the_copy_is_right_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = torch.cuda.cudart()
    refused = []

    class Refusing:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:
            refused.append(real.cudaHostRegister(address, size, 1 << 30))  # there is no such flag
            return refused[-1]

    monkeypatch.setattr(torch.cuda, "cudart", Refusing)
    with store_on(new_memory()) as store:
        tensor = torch.arange(1 << 20, device=DEVICE)
        pending = store.save_async({"x": tensor})
        tensor.zero_()
        assert torch.equal(pending.result().load(map_location="cpu")["x"], torch.arange(1 << 20))
    assert refused and int(refused[0]) != 0


def test_a_forked_child_may_let_go_of_the_buffers() -> None:
    buffers = [Buffer(1 << 20, pinned=True)]

    def let_go() -> bool:
        buffers.clear()
        gc.collect()
        return True

    assert in_fork(let_go) == 0
    assert torch.frombuffer(buffers[0].view(0, 4), dtype=torch.uint8).is_pinned()


def test_a_tensor_on_the_device_in_a_plain_file(tmp_path: Path) -> None:
    ckptstore.atomic_torch_save({"x": torch.ones(3, device=DEVICE)}, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt")["x"].is_cuda


@pytest.mark.filterwarnings("ignore::UserWarning")  # that it is not distributed
def test_dcp_from_a_device_and_to_it(store: Store) -> None:
    import torch.distributed.checkpoint as dcp

    state = {"x": torch.rand(1 << 21, device=DEVICE), "y": torch.rand(7)}
    dcp.save(state, storage_writer=store.dcp_writer(), no_dist=True)
    target = {"x": torch.zeros(1 << 21, device=DEVICE), "y": torch.zeros(7)}
    dcp.load(target, storage_reader=store.dcp_reader(), no_dist=True)
    assert same(target, state) and target["x"].is_cuda


def test_fully_sharded_on_the_device(store: Store) -> None:
    """One rank has all; what is awaited in the background is of the moment of the call."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = net()
        fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer)

        def parts() -> dict[str, Any]:
            return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

        def local(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: local(v) for k, v in value.items()}
            return clone(value.to_local() if hasattr(value, "to_local") else value)

        kept = local(parts())
        dcp.async_save(parts(), storage_writer=store.dcp_writer()).result()  # type: ignore[union-attr]
        train(model, optimizer)
        state = parts()
        dcp.load(state, storage_reader=store.dcp_reader())
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert same(local(parts()), kept)
    finally:
        dist.destroy_process_group()


def test_a_graph_that_is_replayed_after_the_call() -> None:
    tensor = torch.zeros(1 << 22, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add_(1)
    with store_on(new_memory()) as store:
        for n in range(1, 4):
            graph.replay()
            pending = store.save_async({"x": tensor})
            graph.replay()
            assert bool((pending.result().load()["x"] == 2 * n - 1).all())
