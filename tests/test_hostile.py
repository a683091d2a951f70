"""Files from a stranger: refused with a reason, before they can run anything or take memory out of proportion."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptstore import torchfile, torchload
from ckptstore.errors import UnsafeContent

HUGE = 10**12


def archive(pickled: bytes, storages: Iterable[tuple[str, bytes]] = (), **how: Any) -> bytes:
    """An archive as torch.save lays it out."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as out:
        out.writestr("archive/data.pkl", pickled)
        out.writestr("archive/version", b"3\n")
        out.writestr("archive/byteorder", b"little")
        for key, data in storages:
            out.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tup(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(func: bytes, *args: bytes) -> bytes:
    return func + tup(*args) + b"R"


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    return tup(text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)) + b"Q"


def tensor(
    size: list[int], stride: list[int], *, offset: int = 0, stored: bytes = b"", func: str = "_rebuild_tensor_v2"
) -> bytes:
    hooks = call(name("collections", "OrderedDict"))
    view = (stored or storage(2), number(offset), tup(*map(number, size)), tup(*map(number, stride)))
    return call(name("torch._utils", func), *view, b"\x89", hooks)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


EIGHT = [("0", bytes(8))]
TORCH = "torch._utils"

PICKLES: dict[str, tuple[bytes, str]] = {
    "storage of 10^12 elements": (tensor([2], [1], stored=storage(HUGE)), "declares 1000000000000 elements"),
    "negative storage": (tensor([2], [1], stored=storage(-1)), "declares -1 elements"),
    "storage that is not there": (tensor([2], [1], stored=storage(2, "1")), "not in the file"),
    "storage under another case": (tensor([2], [1], stored=storage(2, "A")), "not in the file"),
    "storage keyed by a number": (tup(text("storage"), name("torch", "FloatStorage"), b"K\x00", text("cpu"), b"K\x02") + b"Q", "not in"),
    "tensor of 10^12 elements": (tensor([HUGE], [1]), "reaches beyond its storage"),
    "strides beyond the storage": (tensor([2, 2], [1, HUGE]), "reaches beyond its storage"),
    "offset beyond the storage": (tensor([2], [1], offset=1), "reaches beyond its storage"),
    "negative stride": (tensor([2], [-1], offset=1), "no tensor can have"),
    "negative offset": (tensor([2], [1], offset=-1), "no tensor can have"),
    "more strides than sizes": (tensor([2], [1, 1]), "no tensor can have"),
    "10^6 dimensions": (tensor([1] * 1000, [1] * 1000), "no tensor can have"),
    "tensor v3 of wider elements": (
        call(
            name(TORCH, "_rebuild_tensor_v3"),
            *(storage(8, kind="UntypedStorage"), number(0), tup(number(8)), tup(number(1)), b"\x89", b"}", name("torch", "uint16")),
        ),
        "reaches beyond its storage",
    ),
    "tensor hidden in a subclass": (
        call(
            name("torch._tensor", "_rebuild_from_type_v2"),
            *(name(TORCH, "_rebuild_tensor_v2"), name("torch", "Tensor")),
            tup(storage(2), number(0), tup(number(HUGE)), tup(number(1)), b"\x89", b"}"),
            b"}",
        ),
        "reaches beyond its storage",
    ),
    "tensor from something else": (call(name(TORCH, "_rebuild_tensor"), b"N", b"K\x00", b")", b")"), "not made of a storage"),
    "quantized, expanded to 10^12": (
        call(
            name(TORCH, "_rebuild_qtensor"),
            *(storage(8, kind="QInt8Storage"), number(0), tup(number(HUGE)), tup(number(0))),
            tup(name("torch", "per_tensor_affine"), b"G" + struct.pack(">d", 0.1), b"K\x00"),
            *(b"\x89", call(name("collections", "OrderedDict"))),
        ),
        "larger than the whole file",
    ),
    **{
        f"quantized, {why}": (
            call(
                name(TORCH, "_rebuild_qtensor"),
                *(storage(8, kind="QUInt4x2Storage"), number(0), tup(*map(number, size)), tup(number(size[1]), number(1))),
                tup(name("torch", "per_tensor_affine"), b"G" + struct.pack(">d", 0.1), b"K\x00"),
                *(b"\x89", call(name("collections", "OrderedDict"))),
            ),
            "reaches beyond its storage",
        )
        for why, size in {"two to a byte, and one more": (1, 17), "each row of which begins with a byte of its own": (5, 3)}.items()
    },
    "legacy set_": (
        name("torch", "Tensor") + b")\x81" + tup(storage(2), number(0), tup(number(HUGE)), tup(number(1))) + b"b",
        "reaches beyond its storage",
    ),
    **{
        f"{what} of 10^12 items of a tensor": (call(name(*what.rsplit(".", 1)), tensor([HUGE], [0])), "to take apart")
        for what in ("builtins.set", "builtins.bytearray", "collections.OrderedDict", "collections.Counter", "torch.Size")
    },
    "dict of pairs, one a tensor": (call(name("collections", "OrderedDict"), b"]" + tensor([HUGE], [0]) + b"a"), "to take apart"),
    "dict of a tuple of pairs": (call(name("collections", "OrderedDict"), tup(tensor([HUGE], [0]))), "to take apart"),
    "tensor for a tuple of arguments": (name("torch", "device") + tensor([HUGE], [0]) + b"R", "not with a tuple"),
    "tensor for a sparse tensor's tuple": (call(name(TORCH, "_rebuild_sparse_tensor"), b"N", tensor([HUGE], [0])), "not made of a tuple"),
    "set_ to the items of a tensor": (name("torch", "Tensor") + b")\x81" + tensor([HUGE], [0]) + b"b", "to take apart"),
    "set_ to a tensor, enlarged": (
        tensor([2], [1]) + tup(tensor([2], [1]), number(0), tup(number(HUGE)), tup(number(1))) + b"b",
        "to take apart",
    ),
    "set_ to a new storage, enlarged": (
        tensor([2], [1])
        + tup(call(name("torch.storage", "UntypedStorage"), b"K\x08"), number(0), tup(number(HUGE)), tup(number(1)))
        + b"b",
        "reaches beyond its storage",
    ),
    "attributes from the items of a tensor": (call(name("collections", "OrderedDict")) + tensor([HUGE], [0]) + b"b", "to take apart"),
    "attributes of a storage": (storage(2) + tup(tensor([HUGE], [0])) + b"b", "to take apart"),
    "parameter set to the items of a tensor": (
        name("torch.nn.parameter", "Parameter") + tup(tensor([2], [1])) + b"\x81" + tensor([HUGE], [0]) + b"b",
        "to take apart",
    ),
    "items of a tensor without storage": (
        call(
            name("builtins", "set"),
            call(
                name(TORCH, "_rebuild_meta_tensor_no_storage"),
                *(name("torch", "float32"), tup(number(HUGE)), tup(number(1)), b"\x89"),
            ),
        ),
        "to take apart",
    ),
    "size from a tensor": (call(name("torch.storage", "UntypedStorage"), tensor([1], [1])), "to take apart"),
    "sizes from a tensor": (
        call(name("torch", "FloatTensor"), call(name("torch", "Size"), tup(tensor([1], [1])))),
        "to take apart",
    ),
    "sparse tensor converted": (
        call(
            name(TORCH, "_rebuild_device_tensor_from_cpu_tensor"),
            call(name(TORCH, "_rebuild_sparse_tensor"), b"N", tup(b"N", tensor([HUGE], [0]), b")")),
            *(name("torch", "float64"), text("cpu"), b"\x89"),
        ),
        "unknown size",
    ),
    "bytearray(10^12)": (call(name("builtins", "bytearray"), number(HUGE)), "out of proportion"),
    "one text copied into many bytearrays": (
        b"](" + call(name("_codecs", "encode"), text("x" * 100_000), text("latin1")) + b"q\x01"
        + call(name("builtins", "bytearray"), b"h\x01") * 100 + b"e",
        "copies the same bytes",
    ),
    "bytearray by its old name": (call(name("__builtin__", "bytearray"), number(HUGE)), "out of proportion"),
    "Tensor(10^12)": (call(name("torch", "Tensor"), number(HUGE)), "out of proportion"),
    "Tensor(10^6, 10^6)": (name("torch", "Tensor") + tup(number(10**6), number(10**6)) + b"\x81", "out of proportion"),
    "FloatTensor(Size)": (
        call(name("torch", "FloatTensor"), call(name("torch", "Size"), tup(number(10**6), number(10**6)))),
        "out of proportion",
    ),
    "UntypedStorage(10^12)": (call(name("torch.storage", "UntypedStorage"), number(HUGE)), "out of proportion"),
    "one long text encoded 1000 times": (
        name("_codecs", "encode") + b"q\x01" + text("x" * 10_000) + b"q\x02" + text("latin1") + b"q\x03" + b"00"
        + b"]" + b"h\x01h\x02h\x03\x86Ra" * 1000,
        "out of proportion",
    ),
    "one long list copied 1000 times": (
        name("builtins", "set") + b"q\x01](" + b"K\x01" * 10_000 + b"eq\x02" + b"]" + b"h\x01h\x02\x85Ra" * 1000,
        "copies the same containers",
    ),
    "memo entry 4 billion": (b"]r\xff\xff\xff\xff", "memo entry"),
    "text of 4 GiB": (b"X\xff\xff\xff\xffabc", "bytes more than it has"),
    "bytearray8 of 2^62": (b"\x96" + struct.pack("<Q", 1 << 62), "bytes more than it has"),
    "long of 2 GiB": (b"\x8b\xff\xff\xff\x7f", "bytes more than it has"),
    "name without end": (b"cos\nsystem", "bytes more than it has"),
    "unknown opcode": (b"\xfe", "unknown opcode"),
    "empty stack": (b"R", "malformed"),
    "memo entry never put": (b"h\x05", "malformed"),
    "no mark": (b"t", "malformed"),
}  # fmt: skip


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(("body", "why"), PICKLES.values(), ids=PICKLES.keys())
def test_pickles_that_ask_for_too_much(body: bytes, why: str, weights_only: bool) -> None:
    with pytest.raises(UnsafeContent, match=why) as caught:
        torchload.load(archive(program(body), EIGHT), name="x/state.pt", weights_only=weights_only)
    assert str(caught.value).startswith("refused to load x/state.pt")


def test_a_pickle_cut_off_anywhere() -> None:
    whole = program(tensor([2], [1]))
    assert torch.equal(torchload.load(archive(whole, EIGHT)), torch.zeros(2))
    for length in range(len(whole)):
        with pytest.raises(UnsafeContent):
            torchload.load(archive(whole[:length], EIGHT))


class Runs:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_code_is_not_run_and_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"a": torch.ones(1), "b": Runs(tmp_path / "ran")}, file)
    with pytest.raises(UnsafeContent, match=r"(posix|nt)\.system.*weights_only=False"):
        torchload.load(file.getvalue())
    with torch.serialization.safe_globals([os.system]), pytest.raises(UnsafeContent):
        torchload.load(file.getvalue())  # torch never allows that module
    assert not (tmp_path / "ran").exists()
    torchload.load(file.getvalue(), weights_only=False)
    assert (tmp_path / "ran").exists(), "the file did what it was made for only when trusted"


NONSENSE = {
    "wrong argument types": call(name("torch", "device"), b"K\x01", b"K\x02", b"K\x03"),
    "too few arguments": call(name("torch._tensor", "_rebuild_from_type_v2"), b"N"),
    "items of a list": b"](K\x01K\x02u",
    "call of a text": text("eval") + tup(text("1")) + b"R",
    "global by stack": text("os") + text("system") + b"\x93",
    "storage of a storage": tup(text("storage"), b"N", text("0"), text("cpu"), b"K\x01") + b"Q",
    "other persistent id": text("module") + b"Q",
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE.keys())
def test_well_formed_nonsense_gets_our_error(body: bytes) -> None:
    with pytest.raises(UnsafeContent):
        torchload.load(archive(program(body), EIGHT))


def test_a_name_that_plays_with_the_terminal_is_escaped() -> None:
    with pytest.raises(UnsafeContent) as caught:
        torchload.load(archive(program(name("evil\x1b[2J", "x" * 5000))))
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 2000


GOOD = archive(program(tensor([2], [1])), EIGHT)


def patched(old: bytes, new: bytes, nth: int = 0) -> bytes:
    at = -1
    for _ in range(nth + 1):
        at = GOOD.index(old, at + 1)
    return GOOD[:at] + new + GOOD[at + len(old) :]


def entry_field(path: str, offset: int, fmt: str, value: int) -> bytes:
    """`GOOD` with one field of one entry in the central directory changed; offsets as in APPNOTE 4.3.12."""
    at = GOOD.index(path.encode(), GOOD.index(b"PK\x01\x02")) - 46
    changed = bytearray(GOOD)
    struct.pack_into(fmt, changed, at + offset, value)
    return bytes(changed)


def end_field(offset: int, *values: int) -> bytes:
    """`GOOD` with 2-byte fields of its end record changed; offsets as in APPNOTE 4.3.16."""
    changed = bytearray(GOOD)
    struct.pack_into(f"<{len(values)}H", changed, len(GOOD) - 22 + offset, *values)
    return bytes(changed)


def legacy() -> bytes:
    file = io.BytesIO()
    torch.save(torch.ones(3), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def with_entry(path: str, data: bytes, compressed: dict[str, bytes] | None = None) -> bytes:
    file = io.BytesIO(GOOD)
    with zipfile.ZipFile(file, "a") as out:
        for name, text in (compressed or {}).items():
            out.writestr(name, text, zipfile.ZIP_DEFLATED)
        out.writestr(path, data)
    return file.getvalue()


def twice() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return with_entry("archive/data/0", bytes(8))


ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "not a zip archive"),
    "text": (lambda: b"hello, world", "not a zip archive"),
    "only a signature": (lambda: b"PK\x03\x04", "directory is missing"),
    "legacy format": (legacy, "before torch 1.6"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "not a zip archive"),
    "other zip": (lambda: patched(b"archive/data.pkl", b"archive/data.txt").replace(b"/data.pkl", b"/data.txt"), "no data.pkl"),
    "TorchScript": (lambda: with_entry("archive/constants.pkl", b"x"), "TorchScript"),
    "TorchScript, with its code": (
        lambda: with_entry("archive/constants.pkl", b"x", {"archive/code/__torch__.py": b"code" * 100}),
        "TorchScript",
    ),
    "deflate bomb": (
        lambda: archive(program(text("x" * 50_000_000)), compression=zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "cut off": (lambda: GOOD[:-1], "directory is missing"),
    "appended to": (lambda: GOOD + b"x", "directory is missing"),
    "comment": (lambda: end_field(20, 1) + b"x", "directory"),
    "encrypted": (lambda: entry_field("archive/data/0", 8, "<H", 1), "compressed or encrypted"),
    "packed size differs": (lambda: entry_field("archive/data/0", 20, "<L", 9), "two different sizes"),
    "size beyond the file": (
        lambda: patched(struct.pack("<2L", 8, 8), struct.pack("<2L", 10**9, 10**9), 1),
        "overlap or reach beyond",
    ),
    "on another disk": (lambda: entry_field("archive/data/0", 34, "<H", 1), "malformed"),
    "header beyond the file": (lambda: entry_field("archive/data/0", 42, "<L", 10**9), "outside the file"),
    "header of another entry": (lambda: entry_field("archive/data/0", 42, "<L", 0), "two different ways"),
    "same name twice": (twice, "two entries named"),
    "names that differ in case": (lambda: with_entry("archive/DATA/0", bytes(8)), "two entries named"),
    "NUL in a name": (lambda: GOOD.replace(b"archive/version", b"archive/vers\0on"), "cannot be told apart"),
    "more entries than there are": (lambda: end_field(8, 60_000, 60_000), "directory is cut off"),
    "fewer entries than there are": (lambda: end_field(8, 3, 3), "as many entries"),
    "directory of another size": (lambda: end_field(12, 50, 0), "malformed"),
    "large byteorder": (lambda: archive_with_large_byteorder(), "is large"),
    "directory elsewhere": (lambda: end_field(16, 0, 0), "malformed"),
    "zip64 locator to nowhere": (lambda: zip64(HUGE), "zip64"),
    "zip64 entry without its field": (lambda: entry_field("archive/data/0", 24, "<L", 0xFFFFFFFF), "zip64"),
}


def archive_with_large_byteorder() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", program(b"N"))
        out.writestr("archive/byteorder", b"x" * 100_000)
    return file.getvalue()


def zip64(where: int) -> bytes:
    return GOOD[:-22] + struct.pack("<4sLQL", b"PK\x06\x07", 0, where, 1) + GOOD[-22:]


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize(("make", "why"), ARCHIVES.values(), ids=ARCHIVES.keys())
def test_archives_that_torch_does_not_write(make: Callable[[], bytes], why: str, weights_only: bool) -> None:
    with pytest.raises(UnsafeContent, match=why):
        torchload.load(make(), weights_only=weights_only)


def test_overlapping_entries() -> None:
    """Two directory entries for one run of bytes: with thousands of them, a small file fills the memory."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("archive/data.pkl", program(b"N"))
        out.writestr("archive/data/0", zipfile_entry("archive/data/1", bytes(100)))
        inner = out.infolist()[1].header_offset + 30 + len("archive/data/0")
        ghost = zipfile.ZipInfo("archive/data/1")
        ghost.header_offset, ghost.file_size, ghost.compress_size, ghost.CRC = inner, 100, 100, 0
        out.filelist.append(ghost)
    with pytest.raises(UnsafeContent, match="overlap"):
        torchload.load(file.getvalue())


def zipfile_entry(path: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        out.writestr(path, data)
    return file.getvalue()[: 30 + len(path) + len(data)]


CHILD = """
import resource, sys
sys.path[:0] = [{root!r}]
import torch
from ckptstore import torchfile, torchload
from ckptstore.errors import UnsafeContent

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))
"""


def in_child(code: str) -> str:
    root = str(Path(torchfile.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", CHILD.format(root=root) + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_the_whole_corpus_within_twice_its_size(tmp_path: Path) -> None:
    """Address space, not just what is touched: one request for 10^12 bytes would show, whether it is granted or not."""
    largest = 0
    for i, (body, _) in enumerate(PICKLES.values()):
        (tmp_path / f"p{i}.pt").write_bytes(archive(program(body), EIGHT))
    for i, (make, _) in enumerate(ARCHIVES.values()):
        (tmp_path / f"a{i}.pt").write_bytes(data := make())
        largest = max(largest, len(data))
    out = in_child(f"""
import pathlib
files = [path.read_bytes() for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir())]
torch.save({{"t": torch.ones(3)}}, "{tmp_path}/warm.pt")
torchload.load(open("{tmp_path}/warm.pt", "rb").read())
limit = status("VmSize:") + (2 * {largest}) + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
refused = 0
for data in files:
    for weights_only in (True, False):
        try:
            torchload.load(data, weights_only=weights_only)
        except UnsafeContent:
            refused += 1
print(refused, len(files))
""")
    refused, files = map(int, out.split())
    assert refused == 2 * files == 2 * (len(PICKLES) + len(ARCHIVES))


@linux
def test_loading_takes_the_buffer_and_the_result() -> None:
    out = in_child("""
class Sink:
    def __init__(self): self.data, self.n = bytearray((1 << 28) + (1 << 20)), 0
    def write(self, piece):
        self.data[self.n : self.n + len(piece)] = piece
        self.n += len(piece)
        return len(piece)

state = {i: torch.zeros(1 << 24) for i in range(4)}  # 4 × 64 MiB
sink = Sink()
before = status("VmHWM:")
torchfile.save(state, sink)
print(status("VmHWM:") - before - sink.n)
del state
open("/proc/self/clear_refs", "w").write("5")  # forget the peak
before = status("VmRSS:")
state = torchload.load(memoryview(sink.data)[: sink.n])
print(status("VmHWM:") - before - (1 << 28))
""")
    saving, loading = map(int, out.split())
    assert saving < 64 << 20
    assert loading < 64 << 20


@linux
def test_random_damage_never_ends_the_process() -> None:
    """Bytes are changed where structure is: in the pickle and the zip headers. Any typed error will do, and so will a result."""
    out = in_child("""
import io, json, random
file = io.BytesIO()
torch.save({"a": torch.arange(10.0)[::2], "b": [1, "x", torch.eye(3).to_sparse()], "c": torch.Size([3])}, file)
good = file.getvalue()
rng = random.Random(5)
limit = status("VmSize:") + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
counts = {}
for _ in range(1500):
    bad = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        bad[rng.randrange(len(bad))] = rng.choice((rng.randrange(256), 0x28, 0x52, 0x71, 0x68, 0x74, 0x51, 0xFF))
    try:
        torchload.load(bad)
        kind = "loaded"
    except (UnsafeContent, RuntimeError) as exc:
        kind = type(exc).__name__
    counts[kind] = counts.get(kind, 0) + 1
print(json.dumps(counts))
""")
    counts = json.loads(out)
    assert counts["UnsafeContent"] > 100 and counts["loaded"] > 100


def test_random_pickles_of_plain_objects_are_never_refused() -> None:
    """The other side: what torch.save writes passes the check, whatever the shape of the object."""
    rng = random.Random(11)

    def value(depth: int) -> Any:
        kind = rng.randrange(14 if depth else 9)
        if kind == 0:
            return rng.choice([None, True, False, (), "", 0, 1.5, 1j, b"\xff" * 5])
        if kind == 1:
            return rng.randrange(-(1 << rng.randrange(1, 200)), 1 << rng.randrange(1, 200))
        if kind == 2:
            return "é" * rng.choice([1, 100, 1000])
        if kind == 3:
            return rng.choice(shared)
        if kind == 4:
            return torch.zeros(
                rng.choice([(), (0,), (3,), (2, 0), (2, 3)]), dtype=rng.choice([torch.int8, torch.float64, torch.uint16])
            )
        if kind == 5:
            base = torch.zeros(20)
            return [base[rng.randrange(20) :], base[:: rng.randrange(1, 5)], base.expand(3, 20), base[5:5]]
        if kind == 6:
            return torch.nn.Parameter(torch.zeros(2, 2).t())
        if kind == 7:
            return bytearray(rng.randrange(1000))
        if kind == 8:
            return set(range(rng.randrange(20)))
        items = [value(depth - 1) for _ in range(rng.choice([0, 1, 2, 3, 4, 30]))]
        return items if kind < 11 else tuple(items) if kind < 13 else dict(enumerate(items))

    for _ in range(20):
        shared: list[Any] = [torch.zeros(4), [1, 2, 3], "same" * 100, torch.Size([1, 2])]
        obj = [value(4) for _ in range(5)]
        file = io.BytesIO()
        assert torchfile.save(obj, file) == ()
        assert repr(torchload.load(file.getvalue())) == repr(obj)
