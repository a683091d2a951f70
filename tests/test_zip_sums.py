"""torch's slow CRC-32s are left out and filled in: the file is the same to the last byte as the one that torch writes."""

from __future__ import annotations

import collections
import io
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from ckptstore import Store, torchfile
from ckptstore.errors import BackendError
from ckptstore.zipsums import ZipSums


class Sink:
    """Keeps what it is given, but for large pieces only how long they are."""

    def __init__(self, keep: int = sys.maxsize) -> None:
        self.pieces: list[bytes | int] = []
        self._keep = keep

    def write(self, data: memoryview, /) -> int:
        self.pieces.append(bytes(data) if len(data) <= self._keep else len(data))
        return len(data)

    def flush(self) -> None: ...


def by_us(obj: Any) -> bytes:
    """As `torchfile.save` writes it piece by piece; what it first writes to memory because it is small is no other."""
    sink = Sink()
    torchfile.save(obj, sink)
    piece_by_piece = Sink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchfile, "_is_small", lambda obj: False)
        torchfile.save(obj, piece_by_piece)
    data = b"".join(p for p in piece_by_piece.pieces if isinstance(p, bytes))
    assert b"".join(p for p in sink.pieces if isinstance(p, bytes)) == data
    return data


@pytest.mark.parametrize(
    ("obj", "small"),
    [
        ({"a": [torch.ones(3), (1, "x")], "b": collections.OrderedDict(c=torch.nn.Parameter(torch.ones(2)))}, True),
        (torch.ones(20_000), False),
        ([torch.ones(20_000)[:1]], False),  # all of its storage is written
        ("x" * 70_000, False),
        ({b"x" * 70_000: 1}, False),
        ([1 << 1_000_000], False),
        (list(range(2000)), False),
        ([dict.fromkeys(range(30), j) for j in range(30)], False),
        (torch.ones(2).to_sparse(), False),
        (bytearray(70_000), False),  # what else is large is not known
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_what_is_surely_small_is_written_to_memory_first(obj: Any, small: bool) -> None:
    """Else it would take memory, or the summing a thread's time, that was promised to the training."""
    assert torchfile._is_small(obj) is small
    sink = Sink()
    torchfile.save(obj, sink)
    assert len(sink.pieces) == 1 or not small


def test_a_state_that_holds_itself_is_not_looked_at_for_ever() -> None:
    inside: list[Any] = []
    inside.append(inside)
    assert not torchfile._is_small(inside)


def by_torch(obj: Any) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file)
    return file.getvalue()


def raw(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


STATES: dict[str, Any] = {
    "nothing": None,
    "a scalar": torch.tensor(1),
    "empty tensors": [torch.empty(0), torch.ones(1), torch.empty(0)],
    "sizes around what is gathered": [torch.arange(n, dtype=torch.uint8) for n in (1, 16, 24, 16383, 16384, 16385, 70000)],
    "many": {str(i): torch.full((i % 50,), i) for i in range(2000)},
    "a large one between small ones": [torch.ones(3), torch.arange(3_000_000.0), torch.ones(3)],
    # What looks like a descriptor, of the size of one, also one that would fit what came before it.
    "like descriptors": [
        raw(b"PK\x07\x08" + bytes(12)),
        raw(b"PK\x07\x08abcd" + (16).to_bytes(4, "little") * 2),
        raw(b"PK\x07\x08abcd" + (24).to_bytes(8, "little") * 2),
    ],
    "like an archive": raw(by_torch({"inner": torch.ones(5)})),
    "like headers": [raw(b"PK\x03\x04" + bytes(26)), raw(b"PK\x01\x02" + bytes(42)), raw(b"PK\x05\x06" + bytes(18))],
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
def test_the_file_is_the_very_one_that_torch_writes(state: Any) -> None:
    assert torchfile._sums_may_be_ours(), "torch has changed: its own CRC-32, slower, is used from now on"
    found = by_us(state)
    assert found == by_torch(state)
    assert zipfile.ZipFile(io.BytesIO(found)).testzip() is None


@pytest.mark.soak
def test_so_it_is_beyond_four_gigabytes() -> None:
    state = [torch.ones(3), torch.zeros((1 << 32) + 5, dtype=torch.uint8), torch.ones(3)]  # never touched, so it takes no memory
    theirs, ours = Sink(1 << 20), Sink(1 << 20)
    torch.save(state, theirs)
    torchfile.save(state, ours)
    large = (1 << 32) + 5
    for sink in (theirs, ours):
        assert sink.pieces.count(large) == 1
    halves = [(sink.pieces[: (at := sink.pieces.index(large))], sink.pieces[at + 1 :]) for sink in (theirs, ours)]
    joined = [[b"".join(p for p in half if isinstance(p, bytes)) for half in pair] for pair in halves]
    assert joined[0] == joined[1]


def test_any_zip_reader_is_content_with_what_a_store_keeps(tmp_path: Path) -> None:
    with Store(tmp_path / "store") as store:
        found = store.save({"large": torch.rand(5_000_000), "small": torch.ones(3)}, rng=True)
    paths = sorted((tmp_path / "store" / "data" / found.id).glob("*.pt"))
    assert len(paths) == 2
    for path in paths:
        done = subprocess.run([sys.executable, "-m", "zipfile", "-t", path], capture_output=True, text=True, check=True)
        assert "Done testing" in done.stdout
        assert "not OK" not in done.stdout and "bad" not in done.stdout.lower()
        torch.load(path, weights_only=True)


class Passing:
    """Is pickled as a tensor that nobody else knows."""

    def __init__(self, fill: float) -> None:
        self.fill = fill

    def __reduce__(self) -> Any:
        return torch.clone, (torch.full((300_000,), self.fill),)


@pytest.mark.parametrize("key", [None, b"k" * 32], ids=["CRC", "SHA-256"])
def test_what_a_store_keeps_is_the_very_file_as_well(tmp_path: Path, key: bytes | None) -> None:
    """Tensors of all sizes, written by several threads from where they lie, while others are being looked at."""
    state = {
        "sizes": [torch.rand(n) for n in (1, 100, 5_000, 20_000, 300_000, 2_097_152, 2_097_153, 5_000_000, 3)],
        "views": torch.rand(3_000_000)[5:700_000:3],
        "passing": [Passing(i) for i in range(5)],
        "many": [torch.full((40_000,), i) for i in range(60)],
        "noncontiguous": torch.rand(1000, 700).t(),
        "bfloat16": torch.rand(700_000).to(torch.bfloat16),
    }
    with Store(tmp_path / "store", hmac_key=key) as store, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.clone is only for weights_only=False
        found = store.save(state)
        assert store.verify() == []
    assert (tmp_path / "store" / "data" / found.id / "state.pt").read_bytes() == by_torch(state)


class Inner:
    """Is pickled as what torch.save makes of it, as TorchScript modules and others do."""

    saved = b""

    def __reduce__(self) -> Any:
        file = io.BytesIO()
        torch.save(torch.ones(100), file)
        Inner.saved = file.getvalue()
        return bytes, (Inner.saved,)


def test_what_an_object_saves_while_it_is_pickled_is_torchs_own_affair() -> None:
    by_us([Inner()])
    assert zipfile.ZipFile(io.BytesIO(Inner.saved)).testzip() is None


class Fails:
    def __reduce__(self) -> Any:
        raise ZeroDivisionError


@pytest.mark.parametrize("option", [True, False])
def test_the_users_own_option_is_left_as_it_was(option: bool) -> None:
    set_crc32_options(option)
    try:
        assert zipfile.ZipFile(io.BytesIO(by_us(STATES["many"]))).testzip() is None
        assert get_crc32_options() is option
        with pytest.raises(ZeroDivisionError):
            by_us(Fails())
        assert get_crc32_options() is option
    finally:
        set_crc32_options(True)


def test_other_threads_save_as_ever() -> None:
    """Torch looks at the option before it asks the file for anything else."""
    seen: list[bool] = []

    class Watching(Sink):
        def write(self, data: memoryview, /) -> int:
            thread = threading.Thread(target=lambda: seen.append(get_crc32_options()))
            thread.start()
            thread.join()
            return super().write(data)

    torchfile.save(torch.ones(10_000), Watching())
    assert seen and all(seen)

    class Looking(torchfile._Guard):
        @property
        def write(self) -> Any:  # type: ignore[override]
            thread = threading.Thread(target=lambda: seen.append(get_crc32_options()))
            thread.start()
            thread.join()
            mine.append(get_crc32_options())
            return super().write

    mine: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchfile, "_Guard", Looking)
        torchfile.save(torch.ones(100_000), Sink())
    assert False in mine, "this has looked at the wrong moment"
    assert all(seen)


def test_a_torch_that_will_not_have_it_computes_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "_sums_may_be_ours", lambda: False)
    assert by_us(STATES["many"]) == by_torch(STATES["many"])


@pytest.mark.parametrize("change", ["an option for all threads", "another way to write"])
def test_that_is_found_out_before_the_first_save(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    option = [True]

    def set_option(value: bool) -> None:
        option[0] = value

    if change == "an option for all threads":
        monkeypatch.setattr(torchfile, "get_crc32_options", lambda: option[0])
        monkeypatch.setattr(torchfile, "set_crc32_options", set_option)
    else:
        monkeypatch.setattr(ZipSums, "frame", lambda self, piece: bytes(piece))
    assert not torchfile._sums_may_be_ours.__wrapped__()
    assert option == [True]


@pytest.mark.parametrize("piece", [b"", b"PK\x03\x04", b"PK\x01\x02" + bytes(60), b"something else"])
def test_what_is_not_known_is_refused(piece: bytes) -> None:
    with pytest.raises(BackendError, match="not known here"):
        ZipSums().frame(piece)
