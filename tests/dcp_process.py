"""What the ranks of the distributed tests do, each in a process of its own."""

from __future__ import annotations

import gc
import hashlib
import os
import resource
import signal
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from procs import Channel
from stores import store_on
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.futures import Future

from ckptstore import InterruptableSampler, Store, atomic_torch_save
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import BackendError, FallbackWarning, NotSerializable
from ckptstore.testing import Fault, FaultyBackend

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # of one process


def warm_up() -> None:
    """Have imported and initialised what a save and a load need."""
    state = {"x": torch.arange(4.0), "n": 1}
    with Store("memory://warm") as store:
        dcp.save(state, storage_writer=store.dcp_writer())
        dcp.load(state, storage_reader=store.dcp_reader())
    model, optimizer = network(0)
    train(model, optimizer)


def network(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Return a network, sharded over the job with FSDP2 if there are several ranks, and its optimizer."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 27), torch.nn.ReLU(), torch.nn.Linear(27, 10), torch.nn.LayerNorm(10))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Train on the same data on each rank."""
    data = torch.Generator().manual_seed(7)
    for _ in range(steps):
        model(torch.randn(8, 16, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class App:
    """A `Stateful` of a network and its optimizer, as torch's tutorials make it."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def digest(self) -> str:
        """Return a hash of all numbers, which does not depend on how they are sharded; on rank 0 only."""
        whole = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return digest({"model": whole[0], "optimizer": whole[1]})


def digest(value: Any) -> str:
    """Return a hash of nested containers of tensors and plain values."""
    found = hashlib.sha256()

    def add(path: str, part: Any) -> None:
        if isinstance(part, dict):
            for key in sorted(part, key=str):
                add(f"{path}/{key}", part[key])
        elif isinstance(part, (list, tuple)):
            for index, item in enumerate(part):
                add(f"{path}/{index}", item)
        elif isinstance(part, torch.Tensor):
            found.update(f"{path} {part.dtype} {list(part.shape)}".encode())
            found.update(part.detach().contiguous().view(torch.uint8).numpy().tobytes() if part.dim() else str(part).encode())
        else:
            found.update(f"{path} {part!r}".encode())

    add("", value)
    return found.hexdigest()


def placed(values: torch.Tensor) -> dict[str, DTensor | torch.Tensor]:
    """Return `values` in all ways that a tensor can be spread over a job of 1, 2 or 4 ranks."""
    if not dist.is_initialized():
        return {name: values.clone() for name in ("rows", "columns", "same", "plain", "grid")}
    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (world // 2, 2))
    return {
        "rows": distribute_tensor(values, line, [Shard(0)]),
        "columns": distribute_tensor(values, line, [Shard(1)]),
        "same": distribute_tensor(values, line, [Replicate()]),
        "plain": values.clone(),
        "grid": distribute_tensor(values, grid, [Shard(0), Shard(1)]),
    }


def full(value: Any) -> torch.Tensor:
    """Return the whole of a tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


VALUES = torch.arange(7 * 9, dtype=torch.float32).reshape(7, 9)


def save_all(channel: Channel, rank: int, url: str, step: int) -> Any:
    """Save a trained FSDP2 network, and tensors that are spread in all ways; return the network's digest."""
    model, optimizer = network(step)
    train(model, optimizer)
    app = App(model, optimizer)
    with Store(url) as store:
        state = {"app": app, "tensors": placed(VALUES * step), "step": step, "text": "some words"}
        dcp.save(state, storage_writer=store.dcp_writer("latest", step=step, metrics={"loss": 0.5}))
    return app.digest()


def load_all(channel: Channel, rank: int, url: str, how: str) -> Any:
    """Load what `save_all` saved into a network that knows nothing, and return its digest."""
    model, optimizer = network(99)
    app = App(model, optimizer)
    state: dict[str, Any] = {"app": app, "tensors": placed(torch.zeros(7, 9)), "step": 0, "text": ""}
    with Store(url) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        if how == "resume":
            assert store.dcp_resume(state) is not None
        else:
            dcp.load(state, storage_reader=store.dcp_reader(how))
    for name, value in state["tensors"].items():
        assert full(value).equal(VALUES * state["step"]), name
    assert state["text"] == "some words"
    return [app.digest(), state["step"], sum(issubclass(w.category, FallbackWarning) for w in caught)]


class Slow(dcp.DefaultSavePlanner):
    """A planner that says when its rank is in the middle of writing, and waits."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def resolve_data(self, write_item: Any) -> Any:
        found = super().resolve_data(write_item)
        if write_item.index.fqn == "b":
            self._channel.send("writing")
            self._channel.recv()
        return found


def sharded(value: float, names: str = "abc", rows: int = 64) -> dict[str, Any]:
    """Return tensors of one value each, of which every rank has some rows."""
    whole = torch.full((rows, 1024), value)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(whole, mesh, [Shard(0)]) for name in names}


def save_slowly(channel: Channel, rank: int, url: str, value: float) -> Any:
    """Save tensors of one value; stop in the middle until told."""
    with Store(url) as store:
        dcp.save(sharded(value), storage_writer=store.dcp_writer(step=int(value)), planner=Slow(channel))
        return store.checkpoint().id


def save_value(channel: Channel, rank: int, url: str, value: float) -> Any:
    """Save tensors of one value."""
    with Store(url) as store:
        metadata = dcp.save(sharded(value), storage_writer=store.dcp_writer(step=int(value)))
    return metadata.storage_meta.checkpoint_id


def load_values(channel: Channel, rank: int, url: str, target: str | None = None) -> Any:
    """Load what `save_value` saved; return all the different numbers in it."""
    state = sharded(0.0)
    with Store(url) as store:
        dcp.load(state, storage_reader=store.dcp_reader(target))
    return sorted({x for value in state.values() for x in full(value).unique().tolist()})


def load_apart(channel: Channel, rank: int, url: str, ids: list[str]) -> Any:
    """Load a checkpoint of one's own on each rank."""
    with Store(url) as store:
        dcp.load(sharded(0.0), storage_reader=store.dcp_reader(ids[rank]))


def resume_values(channel: Channel, rank: int, url: str) -> Any:
    """Load with `dcp_resume`; return the numbers, the id, and how often it fell back."""
    state = sharded(0.0)
    with Store(url) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        checkpoint = store.dcp_resume(state)
    if checkpoint is None:
        return None
    numbers = sorted({x for value in state.values() for x in full(value).unique().tolist()})
    return [numbers, checkpoint.id, sum(issubclass(w.category, FallbackWarning) for w in caught)]


def save_on_a_full_disk(channel: Channel, rank: int, url: str, bad_rank: int) -> Any:
    """Try to save on ranks one of which cannot write files of more than 64 KiB; then, with that mended, again."""
    gc.disable()  # whose moment would be anybody's guess: what the first save leaves is cleared up because the second one looks for it
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == bad_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    with Store(url) as store:
        told: Any = None
        try:
            dcp.save(sharded(2.0), storage_writer=store.dcp_writer(step=2))
        except dcp.CheckpointException as exc:
            told = {str(r): type(e).__name__ for r, (e, _) in exc.failures.items()}
        before = [c.step for c in store.checkpoints()]
        dist.barrier()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        dcp.save(sharded(3.0), storage_writer=store.dcp_writer(step=3))
        return [told, before]


class Odd(Exception):
    """An exception that cannot be unpickled, as many cannot."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"odd: {first + second}")


class Failing(dcp.DefaultSavePlanner):
    """A planner that raises such an exception."""

    def resolve_data(self, write_item: Any) -> Any:
        raise Odd(1, 2)


def save_oddly(channel: Channel, rank: int, url: str) -> Any:
    """Save with a planner that fails, on the last rank, in a way that cannot be told to others."""
    planner = Failing() if rank == dist.get_world_size() - 1 else dcp.DefaultSavePlanner()
    with Store(url) as store:
        dcp.save(sharded(1.0), storage_writer=store.dcp_writer(), planner=planner)


def save_in_background(channel: Channel, rank: int, url: str, kind: str) -> Any:
    """Save with `dcp.async_save`, change the state meanwhile, and return the checkpoint's id."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    state = sharded(4.0)
    with Store(url) as store:
        writer = store.dcp_writer(step=4)
        future = dcp.async_save(state, storage_writer=writer, async_checkpointer_type=AsyncCheckpointerType(kind))
        for value in state.values():
            value.to_local().fill_(5.0)
        found = future.result() if hasattr(future, "result") else future.upload_completion.result()
        return found.storage_meta.checkpoint_id


def save_when_told(channel: Channel, rank: int, url: str) -> Any:
    """Acquire, wait, and save: perhaps after another job has acquired the store."""
    with Store(url) as store:
        dcp.save(sharded(1.0), storage_writer=store.dcp_writer(step=1))
        channel.send("saved")
        channel.recv()
        dcp.save(sharded(2.0), storage_writer=store.dcp_writer(step=2))


# -- collective habits


def save_how(channel: Channel, rank: int, url: str, how: str) -> Any:
    """Save on rank 0 only, on all ranks under names of their own, or on all ranks together; return the id."""
    with Store(url, owner="one launch") as store:
        state = {"rank": torch.tensor(rank)}
        if how == "first":
            # The others are in a collective of the job's own meanwhile: one more would get into its way.
            found = store.save(state, step=1).id if rank == 0 else ""
            dist.barrier()
            return found
        if how == "each":
            return store.save(state, f"rank-{rank}", step=1).id
        if how == "same":
            return store.save(state, step=1).id
        return store.save(state, step=1, process_group=dist.group.WORLD).id


def resume_what_does_not_fit(channel: Channel, rank: int, url: str) -> Any:
    """Resume, on all ranks together, what does not fit on the last; return what is said, and what is there afterwards."""
    held, sampler = {"x": torch.zeros(3 + rank), "n": 0}, InterruptableSampler(range(9))
    with Store(url) as store:
        try:
            store.resume(held, sampler=sampler, process_group=dist.group.WORLD)
            told = "nothing"
        except Exception as exc:
            told = type(exc).__name__
    return [told, held["x"].tolist(), held["n"], sampler.consumed]  # type: ignore[attr-defined]


def save_parts(channel: Channel, rank: int, url: str, file: str, kind: str) -> Any:
    """Try on one rank, in each way there is, to save what all ranks have parts of; then save what each has all of."""
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec

    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    told: dict[str, str] = {}
    with Store(url) as store:
        older = kind == "ShardedTensor"
        parts: Any = sharded_tensor.ones(ChunkShardingSpec(0, ["rank:0/cpu", "rank:1/cpu"]), 4, 3) if older else sharded(1.0)["a"]
        same = distribute_tensor(torch.ones(3), mesh, [Replicate()])
        cycle: dict[str, Any] = {"deep": [{"x": parts}]}
        cycle["self"] = cycle
        if rank == 0:
            ways: dict[str, Any] = {
                "save": store.save,
                "save_async": lambda state: store.save_async(state).result(),
                "atomic_torch_save": lambda state: atomic_torch_save(state, file),
            }
            for way, save in ways.items():
                try:
                    save(cycle)
                except NotSerializable as exc:
                    told[way] = str(exc)
            store.save({"x": same}, "same")
            store.save_async({"x": same}, "same-async").result()
            atomic_torch_save({"x": same}, file)
            store.save({"x": parts.local_shards()[0].tensor if older else parts.to_local()}, "rank-0")
        dist.barrier()
    return told


def save_together_badly(channel: Channel, rank: int, url: str, how: str) -> Any:
    """Save on all ranks together what cannot be, and then what can."""
    bad: dict[str, Any] = {
        "unpicklable": {"x": lambda: 0},
        "sharded": {"deep": [sharded(1.0)]},
        "one rank": {"model": _Sick(rank == 1)},
    }[how]
    with Store(url) as store:
        told = ""
        try:
            store.save(bad, process_group=dist.group.WORLD)
        except Exception as exc:
            told = type(exc).__name__
        names = store.names()
        store.save({"x": 1}, process_group=dist.group.WORLD)
        return [told, names]


class _Sick:
    def __init__(self, sick: bool) -> None:
        self._sick = sick

    def state_dict(self) -> dict[str, Any]:
        if self._sick:
            raise Odd(1, 2)
        return {}


def resume_together(channel: Channel, rank: int, url: str, fault: str, bad_rank: int) -> Any:
    """Resume on all ranks together, one of which may have a sick disk; then save something on each rank."""
    backend = FaultyBackend(LocalBackend.open(url, {}))
    if rank == bad_rank:
        error: BaseException = BackendError("the disk is sick")
        if fault == "damage":
            from ckptstore.errors import Unreadable

            error = Unreadable("these bytes are lost")
        # Nothing of what a record says can be had; or nothing of the newest checkpoint's data.
        backend.plan.append(Fault("list", 0, before=error) if fault == "listing" else Fault("read_into", 1, before=error))
        if fault == "listing":
            backend.plan += [Fault("get", 0, before=error), Fault("stat", 0, before=error)]
    with store_on(backend) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        state = {"x": torch.zeros(3)}
        checkpoint = store.resume(state, process_group=dist.group.WORLD)
        store.save(state, f"rank-{rank}")
        if checkpoint is None:
            return None
        return [checkpoint.step, state["x"].tolist(), sum(issubclass(w.category, FallbackWarning) for w in caught)]


def resume_in_vain(channel: Channel, rank: int, url: str) -> Any:
    """Resume together into objects that, on one rank, do not fit."""
    with Store(url) as store:
        store.resume({"x": torch.zeros(3 if rank else 4)}, process_group=dist.group.WORLD)


def no_group(channel: Channel, rank: int, url: str) -> Any:
    """Name a process group that this is no member of."""
    alone = dist.new_group([0])
    with Store(url) as store:
        if rank:
            store.save({}, process_group=alone)
    return os.getpid()


# -- harder lives


def save_on_mounts(channel: Channel, rank: int, urls: list[str], value: float) -> Any:
    """Save as `save_value` does, each rank through a mount of its own."""
    return save_value(channel, rank, urls[rank], value)


def load_on_mounts(channel: Channel, rank: int, urls: list[str]) -> Any:
    """Load as `load_values` does, each rank through a mount of its own, the other way round."""
    return load_values(channel, rank, urls[1 - rank])


def save_with_a_key_on_one(channel: Channel, rank: int, url: str) -> Any:
    """Save with an `hmac_key` on rank 0 only."""
    with Store(url, hmac_key=None if rank else b"sixteen bytes or more") as store:
        dcp.save(sharded(1.0), storage_writer=store.dcp_writer())


def save_for_ever(channel: Channel, rank: int, url: str) -> Any:
    """Resume, and save one value after the other until killed; say what was acknowledged."""
    with Store(url) as store:
        state = sharded(0.0, rows=16)
        checkpoint = store.dcp_resume(state)
        value = checkpoint.step if checkpoint and checkpoint.step else 0
        assert all(full(t).eq(value).all() for t in state.values())
        channel.send("resumed", value)
        while True:
            value += 1
            dcp.save(sharded(float(value), rows=16), storage_writer=store.dcp_writer(step=value))
            channel.send("saved", value)


# -- what torch's own tests ask


def _failed_everywhere(call: Any, bad_rank: int) -> str:
    """Return what is wrong with how `call`, in which something fails on one rank, ended on this one; "" if all is well."""
    try:
        call()
    except dcp.CheckpointException as exc:
        causes = {at: type(cause).__name__ for at, (cause, _) in exc.failures.items()}
        return "" if causes == {bad_rank: "ValueError"} else str(causes)
    return "no error"


def resume_with_a_state_that_fails(channel: Channel, rank: int, url: str, bad_rank: int) -> Any:
    """Resume objects one of which, on one rank, cannot say its state; then ones that can."""

    class App:
        fails = rank == bad_rank

        def __init__(self) -> None:
            self.state = sharded(0.0, rows=4)

        def state_dict(self) -> Any:
            if self.fails:
                raise ValueError("no state")
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    app = App()
    with Store(url) as store:
        dcp.save({"app": sharded(1.0, rows=4), "step": 1}, storage_writer=store.dcp_writer(step=1))
        state: dict[str, Any] = {"app": app, "step": 0}
        try:
            store.dcp_resume(state)
            told = "no error"
        except Exception as exc:
            told = f"{type(exc).__name__}: {exc}"
        app.fails = False
        assert store.dcp_resume(state) is not None
    assert all(full(t).eq(1).all() for t in app.state.values())
    return [told, state["step"], state["app"] is app]


def fail_at_each_step(channel: Channel, rank: int, url: str) -> Any:
    """Save and load with storages of which one method fails on one rank, each method and each rank in turn."""
    wrong: dict[str, Any] = {"save": [], "load": []}

    def fails(step: str, bad_rank: int, store: Store, spoil: Any, late: bool) -> str:
        writer, reader = store.dcp_writer(step=2), store.dcp_reader()
        storage = writer if spoil == "save" else reader

        def fail(*_: Any, **__: Any) -> Any:
            if not late:
                raise ValueError(step)
            future: Future[Any] = Future()
            future.set_exception(ValueError(step))
            return future

        if rank == bad_rank:
            setattr(storage, step, fail)
        if spoil == "save":
            return _failed_everywhere(lambda: dcp.save(sharded(2.0, rows=4), storage_writer=writer), bad_rank)
        return _failed_everywhere(lambda: dcp.load(sharded(0.0, rows=4), storage_reader=reader), bad_rank)

    steps = {
        "save": ["set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"],
        "load": ["set_up_storage_reader", "prepare_local_plan", "prepare_global_plan", "read_data"],
    }
    with Store(url) as store:
        dcp.save(sharded(1.0, rows=4), storage_writer=store.dcp_writer(step=1))
        for spoil, names in steps.items():
            for step in names:
                for bad_rank in (0, 1) if step not in ("prepare_global_plan", "finish") else (0,):
                    for late in (False, True) if step in ("write_data", "read_data") else (False,):
                        problem = fails(step, bad_rank, store, spoil, late)
                        if problem:
                            wrong[spoil].append([step, bad_rank, late, problem])
        value = sharded(0.0, rows=4)
        dcp.load(value, storage_reader=store.dcp_reader())
        dist.barrier()
        return {
            **wrong,
            "steps": [c.step for c in store.checkpoints()],
            "value": sorted({x for t in value.values() for x in full(t).unique().tolist()}),
        }


def coordinate(channel: Channel, rank: int, url: str, coordinator: int) -> Any:
    """Save and load by the older calls, which let another rank than 0 coordinate."""
    warnings.simplefilter("ignore", FutureWarning)
    with Store(url) as store:
        dcp.save_state_dict(sharded(4.0, rows=4), store.dcp_writer(step=1), coordinator_rank=coordinator)
        state = sharded(0.0, rows=4)
        dcp.load_state_dict(state, store.dcp_reader(), coordinator_rank=coordinator)
    return sorted({x for value in state.values() for x in full(value).unique().tolist()})


def order_differently(channel: Channel, rank: int, url: str) -> Any:
    """Save and load objects whose loading is collective, in dictionaries that are ordered differently."""
    order: list[str] = []

    class Collective:
        def __init__(self, name: str) -> None:
            self.name = name

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            found: list[Any] = [None, None]
            dist.all_gather_object(found, self.name)
            assert found == [self.name] * 2
            order.append(self.name)

    state = {name: Collective(name) for name in ("AB" if rank == 0 else "BA")}
    with Store(url) as store:
        dcp.save(state, storage_writer=store.dcp_writer())
        dcp.load(state, storage_reader=store.dcp_reader())
    return order


def reshard_old_kind(channel: Channel, rank: int, url: str) -> Any:
    """Save a `ShardedTensor` cut in one way and load it cut in another, for all pairs of ways; return the pairs that differ."""
    warnings.simplefilter("ignore")  # of its age
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.sharding_spec import ChunkShardingSpec, EnumerableShardingSpec, ShardMetadata

    def cut(*rows: int) -> Any:
        starts = [sum(rows[:i]) for i in range(len(rows))]
        shards = [
            ShardMetadata(shard_offsets=[start, 0], shard_sizes=[count, 6], placement=f"rank:{i % 2}/cpu")
            for i, (start, count) in enumerate(zip(starts, rows, strict=True))
        ]
        return EnumerableShardingSpec(shards=shards)

    ways: dict[str, Any] = {
        "rows": ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu"]),
        "columns": ChunkShardingSpec(dim=1, placements=["rank:0/cpu", "rank:1/cpu"]),
        "four": ChunkShardingSpec(dim=0, placements=["rank:0/cpu", "rank:1/cpu", "rank:1/cpu", "rank:0/cpu"]),
        "uneven": cut(2, 1, 3, 3, 1),
    }

    def whole(tensor: Any) -> torch.Tensor | None:
        found = torch.zeros(10, 6) if rank == 0 else None
        tensor.gather(out=found)
        return found

    wrong = []
    with Store(url) as store:
        for before in ways:
            torch.manual_seed(rank)
            saved = sharded_tensor.rand(ways[before], 10, 6)
            dcp.save({"x": saved}, storage_writer=store.dcp_writer())
            for after in ways:
                loaded = sharded_tensor.zeros(ways[after], 10, 6)
                dcp.load({"x": loaded}, storage_reader=store.dcp_reader())
                mine, theirs = whole(saved), whole(loaded)
                if rank == 0 and not (mine is not None and theirs is not None and mine.equal(theirs) and mine.any()):
                    wrong.append([before, after])
    return wrong


def reshard_grid(channel: Channel, rank: int, url: str) -> Any:
    """Save DTensors placed on a grid in all ways, and load each as all others; return those that differ."""
    grid, line = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
    kinds = [Replicate(), Shard(0), Shard(1)]
    placements: list[Any] = [(grid, [a, b]) for a in kinds for b in kinds] + [(line, [a]) for a in kinds]
    with Store(url) as store:
        saved = {str(i): distribute_tensor(VALUES * (i + 1), mesh, how) for i, (mesh, how) in enumerate(placements)}
        dcp.save(saved, storage_writer=store.dcp_writer())
        wrong = []
        for mesh, how in placements:
            loaded = {name: distribute_tensor(torch.zeros_like(VALUES), mesh, how) for name in saved}
            dcp.load(loaded, storage_reader=store.dcp_reader())
            wrong += [[name, str(how)] for name, value in loaded.items() if not full(value).equal(VALUES * (int(name) + 1))]
    return wrong


TORCHRUN = """
import os, signal, sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from ckptstore import Store, atomic_torch_save

dist.init_process_group("gloo")
rank, restarts = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
state = {"x": distribute_tensor(torch.zeros(8, 4), mesh, [Shard(0)]), "step": 0}
with Store(sys.argv[1]) as store:
    found = store.dcp_resume(state)
    assert (found is None) == (restarts == 0), (found, restarts)
    while state["step"] < 6:
        state["step"] += 1
        state["x"] += 1
        dcp.save(state, storage_writer=store.dcp_writer(step=state["step"]))
        if restarts == 0 and rank == 1 and state["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
assert state["x"].full_tensor().eq(6).all()
dist.destroy_process_group()
"""
"""Six steps of two ranks, one of which is killed after the third of the first start."""
