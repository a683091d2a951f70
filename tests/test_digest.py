"""BLAKE3 besides the CRC-64: what no CRC tells is found everywhere, and who cannot compute it is told what to install."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import blake3
import pytest
import torch
from test_hmac import fitted

from ckptstore import Store
from ckptstore.checksum import crc64nvme
from ckptstore.errors import Damaged, DamagedFile, DamagedManifest, InvalidOption, WrongVersion
from ckptstore.manifest import decode

STATE = {f"layer{i}": torch.rand(50_000) for i in range(12)} | {"step": torch.tensor(3)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with Store(tmp_path / "s", digest="blake3") as store:
        store.save(STATE)
    return tmp_path / "s"


def state_file(root: Path) -> Path:
    return next(root.glob("data/*/state.pt"))


def change(root: Path) -> None:
    """Change the middle of a chunk so that its CRC stays: only BLAKE3 can tell."""
    path = state_file(root)
    with Store(root) as store:
        entry = store.checkpoint().manifest.files[0]
    start = sum(length for length, _ in entry.chunks[:3])
    length, crc = entry.chunks[3]
    data = bytearray(path.read_bytes())
    chunk = bytearray(data[start : start + length])
    chunk[1000] ^= 0x40
    data[start : start + length] = fitted(bytes(chunk), crc)
    assert crc64nvme(data[start : start + length]) == crc
    path.write_bytes(data)


def test_each_chunk_has_the_right_one(root: Path) -> None:
    with Store(root) as store:
        entry = store.checkpoint().manifest.files[0]
        data = state_file(root).read_bytes()
    assert entry.digest == "blake3" and len(entry.digests) == len(entry.chunks) >= 12
    start = 0
    for (length, _), digest in zip(entry.chunks, entry.digests, strict=True):
        assert blake3.blake3(data[start : start + length]).hexdigest() == digest
        start += length


@pytest.mark.parametrize("how", ["load", "mapped", "lazy", "resume", "verify", "open", "download", "some tensors"])
def test_a_change_that_keeps_every_crc_is_found(how: str, root: Path, tmp_path: Path) -> None:
    """By stores that were not asked for a digest, too: the manifest has it."""
    change(root)
    store = Store(root)
    checkpoint = store.checkpoint()
    if how == "verify":
        assert [damage.path for damage in checkpoint.verify()] == ["state.pt"]
        return
    with pytest.raises((Damaged, DamagedFile)):
        if how == "load":
            store.load()
        elif how == "mapped":
            store.load(mmap=True)
        elif how == "lazy":
            store.load(mmap=True, verify="lazy")
            store.close()
        elif how == "resume":
            store.resume({"layer3": torch.zeros(50_000)})
        elif how == "open":
            with checkpoint.open("state.pt") as file:
                file.read()
        elif how == "download":
            checkpoint.download(tmp_path / "copy")
        else:
            checkpoint.load_tensors([name for name in STATE if name != "step"])
    assert not (tmp_path / "copy" / "state.pt").exists()


@pytest.mark.parametrize("bit", range(0, 8, 3))
@pytest.mark.parametrize("where", [0.01, 0.4, 0.9])
def test_a_flipped_bit_is_found(bit: int, where: float, root: Path) -> None:
    path = state_file(root)
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 1 << bit
    path.write_bytes(data)
    with Store(root) as store, pytest.raises(DamagedFile, match="fails its checksum"):
        store.load()


def test_with_a_key_it_takes_the_place_of_sha256(tmp_path: Path) -> None:
    how: dict[str, Any] = {"hmac_key": b"k" * 32}
    with Store(tmp_path / "s", digest="blake3", **how) as store:
        written = store.save(STATE)
        assert written.manifest.files[0].digest == "blake3"
    with Store(tmp_path / "s", **how) as store:
        assert torch.equal(store.load()["layer5"], STATE["layer5"])
        assert store.save(STATE).manifest.files[0].digest == "sha256"


def test_the_option_is_taken_from_the_url_too_and_checked(tmp_path: Path) -> None:
    with Store(f"file://{tmp_path}/s?digest=blake3") as store:
        assert store.save({"a": torch.ones(3)}).manifest.files[0].digest == "blake3"
    with Store(tmp_path / "s") as store:
        assert store.save({"a": torch.ones(3)}).manifest.files[0].digest == ""
    with pytest.raises(InvalidOption, match="digest must be 'blake3'"):
        Store(tmp_path / "s", digest="md5")


@pytest.mark.parametrize("digests", [[], ["0" * 63], [7], 7, None, ["g" * 64]])
def test_a_manifest_with_other_digests_is_damaged(digests: Any, root: Path) -> None:
    import json

    path = state_file(root).parent / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    body["files"][0]["blake3"] = digests

    from ckptstore.envelope import seal

    with pytest.raises(DamagedManifest):
        decode(seal(body), path.parent.name)


def test_without_the_package_one_line_says_what_to_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is taken for damaged: no load goes back to an older checkpoint because of it."""
    with Store(root) as store:
        store.save({"a": torch.ones(3)})  # older than the next, and readable
    with Store(root, digest="blake3") as store:
        newest = store.save(STATE).id
    monkeypatch.setitem(sys.modules, "blake3", None)
    with warnings.catch_warnings(), Store(root) as store:
        warnings.simplefilter("error")
        assert store.checkpoint().id == newest and store.checkpoint().files
        for read in (store.load, lambda: store.load(mmap=True), lambda: store.resume({}), store.verify):
            with pytest.raises(WrongVersion, match=r"pip install 'ckptstore\[blake3\]'") as caught:
                read()
            assert "\n" not in str(caught.value)
    with pytest.raises(WrongVersion, match="not installed"):
        Store(root.parent / "new", digest="blake3")
    assert not (root.parent / "new").exists()
