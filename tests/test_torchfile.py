"""Torch objects into any sink and back from memory: bit-exact, whatever the sink does."""

from __future__ import annotations

import argparse
import collections
import copyreg
import dataclasses
import datetime
import enum
import functools
import gc
import io
import pathlib
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ckptstore import plaintensor, torchfile, torchload
from ckptstore.errors import BackendError, NotSerializable, StorageFull, UnsafeContent

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # sparse CSR is in beta, quantization is deprecated, …


class Sink:
    """Takes what it is given, with `write` alone; fails at call number `fail_at` with `error`, or takes `short` bytes there."""

    def __init__(self, fail_at: int = -1, error: BaseException | None = None, short: Callable[[int], Any] | None = None) -> None:
        self.data = bytearray()
        self.pieces: list[int] = []
        self.fail_at, self.error, self.short = fail_at, error, short

    def write(self, data: memoryview, /) -> int:
        index = len(self.pieces)
        self.pieces.append(len(data))
        if index == self.fail_at and self.error is not None:
            raise self.error
        self.data += data
        return len(data) if index != self.fail_at or self.short is None else self.short(len(data))


def saved(obj: Any) -> tuple[tuple[str, ...], bytes]:
    sink = Sink()
    unsafe = torchfile.save(obj, sink)
    return unsafe, bytes(sink.data)


class Color(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Config:
    lr: float


class MyDict(dict[str, int]):
    pass


class MyTensor(torch.Tensor):
    pass


Point = collections.namedtuple("Point", "x y")


def quantized(per_channel: bool) -> torch.Tensor:
    values = torch.arange(12.0).reshape(3, 4)
    if per_channel:
        return torch.quantize_per_channel(values, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8)
    return torch.quantize_per_tensor(values, 0.1, 2, torch.qint8)


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex32, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy()) if tensor.numel() else b""


def bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of every kind of bits, NaNs with payload and denormals too."""
    width = torch.empty(0, dtype=dtype).element_size()
    generator = torch.Generator().manual_seed(7)
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (*shape[:-1], shape[-1] * width), dtype=torch.uint8, generator=generator).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_bit_exact(dtype: torch.dtype) -> None:
    tensor = bits(dtype, 3, 5)
    unsafe, data = saved({"t": tensor, "view": tensor[1:, ::2], "zero": tensor[:0], "scalar": tensor[1, 1]})
    assert unsafe == ()
    got = torchload.load(data)
    for key, value in {"t": tensor, "view": tensor[1:, ::2], "zero": tensor[:0], "scalar": tensor[1, 1]}.items():
        assert got[key].dtype == dtype and got[key].shape == value.shape and got[key].stride() == value.stride()
        assert raw(got[key].flatten()) == raw(value.flatten())


LOADABLE: dict[str, Callable[[], Any]] = {
    "sparse coo": lambda: torch.eye(4).to_sparse(),
    "sparse csr": lambda: torch.eye(4).to_sparse_csr(),
    "sparse bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "per tensor": lambda: quantized(False),
    "per channel": lambda: quantized(True),
    "expanded": lambda: torch.ones(1).expand(1000, 1000),
    "expanded quantized": lambda: quantized(False)[:1].expand(5, 4),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "requires grad": lambda: torch.ones(2, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "meta": lambda: torch.ones(3, device="meta"),
    "size, dtype, device, layout": lambda: [torch.Size([1, 2]), torch.float8_e5m2, torch.device("cuda:1"), torch.sparse_csr],
    "containers": lambda: {"a": [1, (2.5, None, True), {"s"}], 3: collections.OrderedDict(x=1), "c": collections.Counter("aab")},
    "numbers": lambda: [0, -1, 2**31, -(2**31) - 1, 2**2000, 1e-320, float("inf"), 1j],
    "text and bytes": lambda: ["", "é\u2028\ud800", "x" * 1000, b"ab\x00\xff", bytearray(b"xyz" * 999)],
    "bytes that can be changed": lambda: [bytearray(bytes(range(256)) * 4000), bytearray(b"x") * 3_000_000, b"y" * 2_000_000],
    "empty": dict,
    "module state": lambda: torch.nn.BatchNorm1d(3).state_dict(),
}


@pytest.mark.parametrize("make", LOADABLE.values(), ids=LOADABLE.keys())
def test_what_torch_loads_with_weights_only_is_not_reported(make: Callable[[], Any]) -> None:
    obj = make()
    unsafe, data = saved(obj)
    assert unsafe == ()
    got = torchload.load(data)
    assert type(got) is type(obj)
    if not isinstance(obj, torch.Tensor):
        assert str(got) == str(obj) if not isinstance(obj, dict) else repr(list(got.items())) == repr(list(obj.items()))
    elif not obj.is_meta:
        dense = [t.dequantize() if t.is_quantized else t.to_dense() for t in (got, obj)]
        assert torch.equal(*dense) and got.layout == obj.layout and got.requires_grad == obj.requires_grad
    torch.load(io.BytesIO(data), weights_only=True)  # and so does torch without us


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "numpy array": (lambda: np.arange(3), "numpy._core.multiarray._reconstruct"),
    "numpy scalar": (lambda: np.float64(1.5), "numpy._core.multiarray.scalar"),
    "path": (lambda: pathlib.PurePosixPath("a/b"), "pathlib.PurePosixPath"),
    "datetime": (lambda: datetime.datetime(2024, 1, 2), "datetime.datetime"),
    "dataclass": (lambda: Config(0.1), f"{__name__}.Config"),
    "enum": (lambda: Color.RED, f"{__name__}.Color"),
    "partial": (lambda: functools.partial(int, base=2), "functools.partial"),
    "namespace": (lambda: argparse.Namespace(a=1), "argparse.Namespace"),
    "module": (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    "defaultdict": (lambda: collections.defaultdict(list), "collections.defaultdict"),
    "dict subclass": (lambda: MyDict(a=1), f"{__name__}.MyDict"),
    "named tuple": (lambda: Point(1, 2), f"{__name__}.Point"),
    "tensor subclass": (lambda: torch.ones(2).as_subclass(MyTensor), f"{__name__}.MyTensor"),
    "frozenset": (lambda: frozenset([1]), "builtins.frozenset"),
    "range": (lambda: range(3), "builtins.range"),
    "function": (lambda: saved, f"{__name__}.saved"),
    "empty bytes": (lambda: b"", "builtins.bytes"),
    "huge int": (lambda: 2**3000, "an int of more than 2040 bits"),
}


@pytest.mark.parametrize(("make", "name"), REFUSED.values(), ids=REFUSED.keys())
def test_what_weights_only_refuses_is_named_when_saved(make: Callable[[], Any], name: str) -> None:
    unsafe, data = saved({"deep": [make()], "t": torch.ones(2)})
    assert name in unsafe and list(unsafe) == sorted(set(unsafe))
    with pytest.raises(UnsafeContent, match="weights_only=False") as caught:
        torchload.load(data, name="latest/state.pt")
    assert "latest/state.pt" in str(caught.value)
    if "int of" not in name:
        assert name in str(caught.value) and "add_safe_globals" in str(caught.value)
    assert str(torchload.load(data, weights_only=False)["deep"]) == str([make()])


@pytest.mark.parametrize("obj", [Config(0.5), range(3)], ids=["class", "pickled under its Python 2 name"])
def test_what_this_process_allows_is_not_reported_and_loads(obj: Any) -> None:
    with torch.serialization.safe_globals([type(obj)]):
        unsafe, data = saved([obj, torch.ones(2)])
        assert unsafe == ()
        assert torchload.load(data)[0] == obj
    name = f"{type(obj).__module__}.{type(obj).__qualname__}"
    assert saved(obj)[0] == (name,), "what was allowed for a while must not be remembered"


def test_an_allowed_class_that_torch_still_refuses_is_reported() -> None:
    """torch sets items only in dict itself, and numpy scalars need the class of their dtype allowed, too."""
    scalar: Any = np.float64(1).__reduce__()[0]
    with torch.serialization.safe_globals([MyDict, np.dtype, scalar]):
        for obj, name in ((MyDict(a=1), f"{__name__}.MyDict"), (np.float64(1), "numpy.dtypes.Float64DType")):
            unsafe, data = saved([torch.ones(1), obj])
            assert unsafe == (name,)
            with pytest.raises(UnsafeContent):
                torchload.load(data)
    with torch.serialization.safe_globals([np.dtype, scalar, np.dtypes.Float64DType]):
        assert saved([torch.ones(1), np.float64(1)])[0] == ()


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_of_a_file_that_is_not_ours_it_is_said_as_well() -> None:
    """Also where torch cannot make a tensor without its numbers."""
    for obj, names in (
        ([quantized(True), quantized(False)], ()),
        ([quantized(True), Config(0.5)], (f"{__name__}.Config",)),
        ([torch.ones(2)], ()),
        (Config(0.5), (f"{__name__}.Config",)),
    ):
        assert torchload.refused(saved(obj)[1]) == names


def test_sharing_survives() -> None:
    base = torch.arange(10.0)
    state = {"a": base[:4], "b": base[2:], "same": [base, base], "list": [shared := [1], shared]}
    got = torchload.load(saved(state)[1])
    got["a"][3] = -1
    assert got["b"][1] == -1 and got["same"][0] is got["same"][1] and got["list"][0] is got["list"][1]
    assert got["a"].untyped_storage().data_ptr() == got["b"].untyped_storage().data_ptr()


def test_many_views_of_one_large_storage() -> None:
    base = torch.zeros(1_000_000)
    data = saved([base[i:] for i in range(50)])[1]
    assert len(data) < 2 * base.nbytes and len(torchload.load(data)) == 50


def test_a_cycle_survives() -> None:
    loop: list[Any] = [torch.ones(1)]
    loop.append(loop)
    unsafe, data = saved(loop)
    got = torchload.load(data)
    assert unsafe == () and got[1] is got


def test_the_result_outlives_the_buffer() -> None:
    buffer = bytearray(saved({"t": torch.arange(100_000.0)})[1])
    got = torchload.load(buffer)
    buffer[:] = bytes(len(buffer))
    del buffer[:]  # fails while something still refers to its memory
    assert torch.equal(got["t"], torch.arange(100_000.0))


def test_the_file_is_a_plain_zip_with_checksums(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "state.pt"
    with open(path, "wb") as file:
        assert torchfile.save({"t": torch.arange(5)}, file) == ()
    done = subprocess.run([sys.executable, "-m", "zipfile", "-t", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "Done testing" in done.stdout and "bad" not in done.stdout
    assert torch.equal(torch.load(path)["t"], torch.arange(5))
    file_bytes = bytearray(path.read_bytes())
    file_bytes[file_bytes.index(torch.arange(5).numpy().tobytes()) + 8] ^= 1
    path.write_bytes(file_bytes)
    assert zipfile.ZipFile(path).testzip() is not None


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.note = [1, {"from": "the user"}]  # type: ignore[attr-defined]
    return tensor


TOLD_OTHERWISE: dict[str, Callable[[], Any]] = {
    "attributes": with_attribute,
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "not a leaf": lambda: torch.ones(3, requires_grad=True) * 2,
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "shared": lambda: [t := torch.arange(9.0), t, t[1:4], t.data],
    "a subclass": lambda: torch.ones(2).as_subclass(MyTensor),
}


@pytest.mark.parametrize("make", [*LOADABLE.values(), *TOLD_OTHERWISE.values()], ids=[*LOADABLE, *TOLD_OTHERWISE])
def test_same_bytes_as_torch_save(make: Callable[[], Any]) -> None:
    state = {"a": torch.arange(7.0), "n": [1, "x"], "big": torch.ones(300, 300), "it": make()}
    by_torch = io.BytesIO()
    torch.save(state, by_torch)
    assert saved(state)[1] == by_torch.getvalue()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bytes_as_torch_save_of_every_dtype(dtype: torch.dtype) -> None:
    tensor = bits(dtype, 3, 5)
    state = {"t": tensor, "view": tensor[1:, ::2], "zero": tensor[:0], "scalar": tensor[1, 1], "big": torch.ones(300, 300)}
    by_torch = io.BytesIO()
    torch.save(state, by_torch)
    assert saved(state)[1] == by_torch.getvalue()


def test_who_pickles_tensors_in_a_way_of_his_own_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, torch.Tensor, lambda tensor: (torch.Size, (tensor.tolist(),)))
    _, data = saved({"t": torch.arange(3), "big": [0.0] * 2000})  # not small
    assert torchload.load(data)["t"] == torch.Size([0, 1, 2])


def test_if_torch_pickles_tensors_otherwise_than_we_know_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = torch.Tensor.__reduce_ex__

    def otherwise(tensor: torch.Tensor, protocol: Any) -> Any:
        call, arguments = theirs(tensor, protocol)
        return call, (*arguments, {"new in torch 9": True})

    plaintensor._is_as_torchs.cache_clear()
    assert plaintensor.reduction(torch.ones(2)) is not NotImplemented
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", otherwise)
    plaintensor._is_as_torchs.cache_clear()
    try:
        assert plaintensor.reduction(torch.ones(2)) is NotImplemented
    finally:
        plaintensor._is_as_torchs.cache_clear()


def test_storages_come_in_one_piece_without_a_copy() -> None:
    tensor = torch.arange(1_000_000.0)

    class Peek(Sink):
        address = 0

        def write(self, data: memoryview, /) -> int:
            if len(data) == tensor.nbytes:
                self.address = np.frombuffer(data, np.uint8).ctypes.data
            return super().write(data)

    sink = Peek()
    torchfile.save(tensor, sink)
    assert sink.address == tensor.data_ptr()


STATE = {"a": [torch.arange(5000.0) + i for i in range(6)], "b": [torch.ones(3), "text"], "c": torch.zeros(0)}


@pytest.mark.parametrize("kind", [StorageFull, KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_error_in_the_sink_surfaces_as_itself_and_ends_the_writing(kind: type[BaseException]) -> None:
    whole = Sink()
    torchfile.save(STATE, whole)
    assert len(whole.pieces) > 10
    sinks: list[Sink] = []
    for index in range(len(whole.pieces)):
        error = kind("disk full")
        sink = Sink(index, error)
        with pytest.raises(kind) as caught:
            torchfile.save(STATE, sink)
        assert caught.value is error
        del caught, error
        assert len(sink.pieces) == index + 1
        assert sink.data == whole.data[: sum(whole.pieces[:index])]
        sinks.append(sink)
    gc.collect()  # the destructor of torch's writer must neither write on nor abort the process
    assert [len(sink.pieces) for sink in sinks] == [i + 1 for i in range(len(whole.pieces))]


@pytest.mark.parametrize("short", [lambda n: None, lambda n: n - 1, lambda n: 0, lambda n: n + 1], ids=["None", "-1", "0", "+1"])
def test_a_sink_that_does_not_take_everything_is_an_error(short: Callable[[int], Any]) -> None:
    """torch itself ignores what `write` returns."""
    for index in range(10):
        sink = Sink(index, short=short)
        with pytest.raises(BackendError, match="bytes were taken"):
            torchfile.save(STATE, sink)
        assert len(sink.pieces) == index + 1


def test_ctrl_c_on_entry_to_our_write_is_not_lost() -> None:
    """Python handles a signal that came while torch computed on entry to `write`, before any `try` in it is active."""
    for index in range(60):
        entered = 0

        def interrupt(frame: Any, event: str, _: Any, index: int = index) -> None:
            nonlocal entered
            if event == "call" and frame.f_code is torchfile._Guard.write.__code__:
                entered += 1
                if entered == index + 1:
                    raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                torchfile.save(STATE, Sink())
        finally:
            sys.setprofile(None)
        assert entered >= index + 1


def test_an_emergency_save_on_ctrl_c_fails_for_its_own_reason() -> None:
    for error in (StorageFull("full"), None):
        for handled in ("the interrupt", "an error while handling it"):
            try:
                try:
                    raise KeyboardInterrupt
                finally:
                    if handled != "the interrupt":
                        raise ValueError
            except (KeyboardInterrupt, ValueError):
                with pytest.raises(StorageFull if error else NotSerializable):
                    torchfile.save(STATE if error else [threading.Lock()], Sink(3, error))


@pytest.mark.parametrize("outcome", ["saved", "sink fails", "unpicklable"])
def test_nothing_large_is_kept_alive(outcome: str) -> None:
    """Not even until the next garbage collection, which may be long after the memory was needed."""
    tensor = torch.ones(1000)
    storage, sink = weakref.ref(tensor), Sink(9, short=(lambda n: 0) if outcome == "sink fails" else None)
    sink_ref = weakref.ref(sink)
    gc.collect()
    gc.disable()
    try:
        try:
            torchfile.save([tensor, threading.Lock() if outcome == "unpicklable" else 1], sink)
        except (BackendError, NotSerializable):
            assert outcome != "saved"
        del tensor, sink
        assert storage() is None and sink_ref() is None
    finally:
        gc.enable()


class Raises:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getstate__(self) -> Any:
        raise self.error


@pytest.mark.parametrize("kind", [TypeError, AttributeError, RuntimeError, ValueError, KeyError, OSError, MemoryError])
def test_an_error_in_the_users_own_code_propagates_unchanged(kind: type[Exception]) -> None:
    error = kind("mine")
    sink = Sink()
    with pytest.raises(kind) as caught:
        torchfile.save({"x": [Raises(error)]}, sink)
    assert caught.value is error and sink.pieces == []


class Holder:
    def __init__(self, inner: Any) -> None:
        self.ok = torch.ones(2)
        self.inner = inner


def nested_deeply(depth: int) -> list[Any]:
    result: list[Any] = []
    for _ in range(depth):
        result = [result]
    return result


def iter_nothing() -> Iterator[int]:
    yield from ()


def odd() -> torch.Tensor:
    """Four bytes of ten as one float: torch writes ten and then wants eight when it reads (2 floats)."""
    return torch.zeros(10, dtype=torch.uint8)[:8].view(torch.float32)


def freed(kind: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach) -> torch.Tensor:
    """A tensor whose memory is gone, as some free it for a while."""
    tensor = kind(torch.arange(8.0))
    tensor.untyped_storage().resize_(0)  # type: ignore[no-untyped-call]
    return tensor


UNLOADABLE: dict[str, Callable[[], torch.Tensor]] = {
    "freed": freed,
    "a freed parameter": lambda: freed(torch.nn.Parameter),
    "a freed one with a gradient": lambda: freed(lambda tensor: tensor.requires_grad_()),
    "freed in part": lambda: (t := torch.arange(8.0), t.untyped_storage().resize_(16))[0],  # type: ignore[no-untyped-call]
    "strides beyond the end": lambda: (t := torch.arange(8.0)[::7], t.untyped_storage().resize_(28))[0],  # type: ignore[no-untyped-call]
    "a gradient for a dtype without a storage class": lambda: torch.ones(2).to(torch.float8_e5m2).requires_grad_(),
    "quantized by rows, and made flat": lambda: quantized(True).flatten(),
}


@pytest.mark.parametrize("make", UNLOADABLE.values(), ids=UNLOADABLE.keys())
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_a_tensor_that_torch_could_not_load_is_refused_with_its_place(make: Callable[[], torch.Tensor]) -> None:
    file = io.BytesIO()
    torch.save([make()], file)
    with pytest.raises((RuntimeError, ValueError)):  # should torch learn to, the refusal can go
        torch.load(io.BytesIO(file.getvalue()))
    sink = Sink()
    with pytest.raises(NotSerializable, match=r"cannot write obj\['w'\]\[0\] .* torch.load would refuse"):
        torchfile.save({"large": torch.ones(100_000), "w": [make()]}, sink)
    assert sink.pieces == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: freed()[:0],
        lambda: torch.empty(0, 3)[:, 2:],
        lambda: torch.ones(3).as_strided((2, 2), (0, 2)),
        lambda: torch.nn.Parameter(torch.ones(2).to(torch.float8_e5m2)),
        lambda: torch.quantize_per_channel(torch.rand(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint4x2),
    ],
    ids=["nothing of it", "empty", "to the very end", "a parameter without a storage class", "two in a byte"],
)
@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_what_only_looks_so_is_saved(make: Callable[[], torch.Tensor]) -> None:
    tensor = make()
    loaded = torchload.load(saved([tensor])[1])[0]
    assert loaded.shape == tensor.shape and loaded.dtype == tensor.dtype and loaded.requires_grad == tensor.requires_grad


UNPICKLABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "lambda": (lambda: {"optimizer": {"fn": lambda: 0}}, "obj['optimizer']['fn']"),
    "lock": (lambda: [1, (2, threading.Lock())], "obj[1][1]"),
    "generator": (lambda: {3: iter_nothing()}, "obj[3]"),
    "attribute": (lambda: {"h": Holder([0, threading.Lock()])}, "obj['h'].inner[1]"),
    "file": (lambda: {"f": sys.stdout.buffer if hasattr(sys.stdout, "buffer") else io.StringIO().readline}, "obj['f']"),
    "storage that torch cannot read back": (lambda: {"m": {"w": odd()}}, "obj['m']['w']"),
    "two dtypes in one storage": (lambda: [(t := torch.zeros(8)), t.view(torch.int32)], "obj"),
}


@pytest.mark.parametrize(("make", "where"), UNPICKLABLE.values(), ids=UNPICKLABLE.keys())
def test_what_cannot_be_saved_is_named_with_its_place(make: Callable[[], Any], where: str) -> None:
    sink = Sink()
    with pytest.raises(NotSerializable) as caught:
        torchfile.save(make(), sink)
    assert f"cannot write {where} (" in str(caught.value) and caught.value.__cause__ is not None
    assert sink.pieces == [], "nothing was written for an object that cannot be saved"


def test_a_tensor_that_has_no_storage_is_named() -> None:
    """However small the state is."""

    def save(value: torch.Tensor) -> torch.Tensor:
        with pytest.raises(NotSerializable, match=r"obj\['x'\]"):
            torchfile.save({"x": value}, Sink())
        return value

    torch.vmap(save)(torch.ones(3, 2))


def test_nesting_beyond_the_stack_is_said_so() -> None:
    with pytest.raises(NotSerializable, match="nested too deeply"):
        torchfile.save(nested_deeply(100_000), Sink())


def test_why_an_odd_storage_is_refused() -> None:
    """Should torch learn to read what it writes here, the refusal can go."""
    file = io.BytesIO()
    torch.save(odd(), file)
    file.seek(0)
    with pytest.raises(RuntimeError, match="size"):
        torch.load(file, weights_only=False)


def test_map_location() -> None:
    data = saved({"t": torch.ones(3)})[1]
    assert torchload.load(data, map_location="meta")["t"].is_meta
    assert torchload.load(memoryview(data), map_location=torch.device("cpu"))["t"].device.type == "cpu"


def test_threads_may_save_and_load_at_once() -> None:
    states: list[Any] = [{"t": torch.full((50, 50), float(i)), "l": list(range(i))} for i in range(8)]
    results: list[Any] = [None] * 8

    def work(i: int) -> None:
        for _ in range(10):
            results[i] = torchload.load(saved(states[i])[1])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(torch.equal(r["t"], s["t"]) and r["l"] == s["l"] for r, s in zip(results, states, strict=True))
