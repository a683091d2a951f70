"""Files that torch's own reader makes the objects of: it sees only checked bytes, and they are not in memory twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import stores
import torch
from test_hostile import ARCHIVES, EIGHT, PICKLES, archive, program
from test_loading import data_file, flip

from ckptstore import Store, loading, torchload
from ckptstore.errors import DamagedFile, UnsafeContent
from ckptstore.reading import StoredFile

MIB = 1 << 20


@pytest.fixture(autouse=True)
def never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take small files for large ones, and fail if one is read into memory whole."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the file was read whole")

    monkeypatch.setattr(loading, "_SMALL", 0)
    monkeypatch.setattr(StoredFile, "whole", refuse)


class Named(torch.Tensor):
    """A subclass as people write them."""


def large_and_small(extra: object) -> dict[str, Any]:
    """A state of which the first tensors are read to where they stay, and the last come out of a chunk that is kept."""
    return {
        "large": [torch.rand(MIB), torch.rand(3 * MIB // 4)],
        "extra": extra,
        "small": [torch.full((n,), n) for n in range(100)],
    }


def same(found: object, wanted: object) -> bool:
    if isinstance(wanted, torch.Tensor):
        assert type(found) is type(wanted)
        assert (found.layout, found.dtype, found.requires_grad) == (wanted.layout, wanted.dtype, wanted.requires_grad)
        return torch.equal(found.to_dense().detach(), wanted.to_dense().detach())
    if isinstance(wanted, (list, dict)):
        assert type(found) is type(wanted) and len(found) == len(wanted)  # type: ignore[arg-type]
        items = wanted.items() if isinstance(wanted, dict) else enumerate(wanted)
        return all(same(found[key], item) for key, item in items)  # type: ignore[index]
    return found == wanted


@pytest.mark.parametrize(
    ("extra", "how"),
    [
        (lambda: torch.eye(700).to_sparse(), {}),
        (lambda: torch.eye(700).to_sparse_csr(), {}),
        (lambda: torch.nn.Buffer(torch.ones(5)), {}),
        (lambda: torch.ones(5).as_subclass(Named), {"weights_only": False}),
        (lambda: Path("a/b"), {"weights_only": False}),
        (lambda: None, {"map_location": lambda storage, _: storage}),
    ],
    ids=["sparse", "sparse rows", "a buffer", "a subclass", "an object", "a map_location that is called"],
)
@pytest.mark.filterwarnings("ignore::ckptstore.errors.WeightsOnlyWarning", "ignore:Sparse CSR")
def test_what_is_not_plain_comes_back_as_it_was(extra: Any, how: dict[str, Any], tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        state = large_and_small(extra())
        store.save(state)
        assert same(store.load(**how), state)


def test_on_another_device(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as store:
        store.save(large_and_small(None))
        assert all(tensor.is_meta for tensor in store.load(map_location="meta")["large"])


@pytest.mark.parametrize("where", [0.0001, 0.3, 0.8, 0.9, 0.99999])
def test_one_bit_anywhere_is_found_before_torch_sees_any(where: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch was given a damaged file")

    monkeypatch.setattr(torchload, "load_open", refuse)
    with Store(tmp_path / "s") as store:
        store.save(large_and_small(torch.eye(4).to_sparse()))
        path = data_file(store, tmp_path / "s")
        flip(path, int(path.stat().st_size * where))
        with pytest.raises(DamagedFile, match="fails its checksum"):
            store.load()


@pytest.mark.parametrize("which", ["large", "small"])
def test_what_changes_after_it_was_checked_does_not_come_out(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = large_and_small(torch.eye(4).to_sparse())
    with Store(tmp_path / "s") as store:
        store.save(state)
        path = data_file(store, tmp_path / "s")
        where = path.read_bytes().rindex(bytes(memoryview(state[which][-1].numpy())))
        load_open = torchload.load_open

        def too_late(*args: Any, **more: Any) -> Any:
            flip(path, where + 40)
            return load_open(*args, **more)

        monkeypatch.setattr(torchload, "load_open", too_late)
        with pytest.raises(DamagedFile, match="fails its checksum"):
            store.load()


def test_a_signal_while_torch_reads_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Signal(BaseException):
        pass

    with Store(tmp_path / "s") as store:
        store.save(large_and_small(torch.eye(4).to_sparse()))
        load_open = torchload.load_open

        def interrupted(*args: Any, **more: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(StoredFile, "fill", signalled)
                return load_open(*args, **more)

        def signalled(*_: Any, **__: Any) -> None:
            raise Signal

        monkeypatch.setattr(torchload, "load_open", interrupted)
        with pytest.raises(Signal):
            store.load()


def test_what_is_refused_of_bytes_in_memory_is_refused_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a stranger has made: a file whose layout is not known may be read whole, once it was checked."""
    monkeypatch.undo()
    monkeypatch.setattr(loading, "_SMALL", 0)
    files = [archive(program(body), EIGHT) for body, _ in PICKLES.values()] + [make() for make, _ in ARCHIVES.values()]
    with Store(tmp_path / "s") as store:
        for data in files:
            written = stores.write(store, files={"state.pt": data})
            with pytest.raises(UnsafeContent):
                torchload.load(data)
            with pytest.raises(UnsafeContent):
                store.load(written)


CHILD = """
import sys, torch
from ckptstore import Store

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key))

size = 128 << 20
with Store(sys.argv[1]) as store:
    store.save({"it": torch.ones(1).to_sparse()}, "warm")
    store.save({"sparse": torch.eye(4).to_sparse(), "large": [torch.ones(size // 16), torch.ones(3 * size // 16)]}, "it")
    store.load("warm")
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS:")
    loaded = store.load("it")
    print(status("VmHWM:") - before - size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_it_is_in_memory_once(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64 * MIB
