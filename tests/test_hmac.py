"""A store with an `hmac_key`: what was not written with it, and for this place, is refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evidence
import pytest
from stores import contents, new_memory, objects, store_on, tree, write
from test_forged import paths

import ckptstore
from ckptstore import Store, manifest, record
from ckptstore.backends.memory import MemoryBackend
from ckptstore.checksum import crc64nvme, sha256
from ckptstore.envelope import seal
from ckptstore.errors import (
    Ambiguous,
    Damaged,
    DamagedFile,
    DamagedManifest,
    DamagedRecord,
    FallbackWarning,
    Fenced,
    Forged,
    InvalidOption,
    KeyMismatch,
    UsageError,
)
from ckptstore.key import Key
from ckptstore.log import Log, slot_key
from ckptstore.testing import Fault, FaultyBackend

SECRET = b"correct horse battery staple"
KEY = Key(SECRET)
OTHER = Key(b"another key, which is as long")
BODY = 84 + 74  # where the body of an authenticated envelope begins


@pytest.fixture(autouse=True)
def _no_key_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CKPTSTORE_HMAC_KEY", "CKPTSTORE_HMAC_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)


def opened(root: Path, **options: Any) -> Store:
    return Store(root, hmac_key=SECRET, **options)


def fill(root: Path, steps: int = 2) -> Path:
    """Make a store with a checkpoint of each step from 1 on; record n is that of step n - 1."""
    with opened(root) as store:
        for step in range(1, steps + 1):
            write(store, step=step, files={"a.bin": b"bytes of %d" % step})
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two checkpoints, of steps 1 and 2, in records 2 and 3."""
    return fill(tmp_path / "store")


def body_of(data: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(data)["body"]
    return body


def folder_of(root: Path, step: int = 2) -> Path:
    return root / "data" / opened(root).checkpoint(step=step).id


def forgeries(text: bytes, original: bytes) -> Iterator[bytes]:
    """Yield what somebody who has no key can put around a body: a right SHA-256, and no HMAC, or one from elsewhere."""
    digest = sha256(text)
    yield b'{"sha256":"' + digest.encode() + b'","body":' + text + b"}\n"
    for mac in (json.loads(original)["hmac"], OTHER.sign(text).decode(), digest, "0" * 64, "\xff" * 64, "A" * 64):
        yield b'{"sha256":"' + digest.encode() + b'","hmac":"' + mac.encode("latin-1") + b'","body":' + text + b"}\n"


def text_of(body: dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), sort_keys=True).encode()


CALLS: list[Callable[[Store], object]] = [
    lambda s: s.names(),
    lambda s: s.checkpoints(),
    lambda s: s.checkpoint(),
    lambda s: "latest" in s,
    lambda s: s.load(),
    lambda s: s.verify(),
    lambda s: s.acquire(),
    lambda s: s.resume({}),
    lambda s: write(s),
    lambda s: s.tag("best", "latest"),
    lambda s: s.delete("latest"),
    lambda s: s.prune(),
    lambda s: s.gc(),
]


def refused_by_all(open_store: Callable[[], Store], error: type[Exception], match: str, root: Path) -> None:
    before = tree(root)
    for call in CALLS:
        with pytest.raises(error, match=match):
            call(open_store())
    assert tree(root) == before


def served_by_the_one_before(root: Path, n: int) -> None:
    """Readers pass record `n` over, loudly; nobody may build on it but the next owner; nothing is collected."""
    data = tree(root / "data")
    with pytest.warns(FallbackWarning, match=f"commit record {n} .*using commit record {n - 1}"):
        assert opened(root).checkpoint("latest").step == n - 2
    for call in (Store.gc, Store.prune, lambda s: s.tag("x", "latest"), lambda s: write(s)):
        with pytest.raises(DamagedRecord), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            call(opened(root, acquire=False))
    assert tree(root / "data") == data
    job = opened(root)
    with pytest.warns(FallbackWarning, match=f"going on from commit record {n - 1}"):
        job.acquire()
    write(job, step=100)
    assert opened(root).checkpoint().step == 100


# -- normal life


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_store_with_a_key_lives_as_one_without(tmp_path: Path, place: str) -> None:
    inner = new_memory()

    def job(**more: Any) -> Store:
        return opened(tmp_path / "s", **more) if place == "local" else store_on(inner, hmac_key=SECRET, **more)

    files = {"a.bin": bytes(range(200)), "empty": b"", "several chunks": os.urandom(1000) * 20_000}
    with job(keep_last=2) as store:
        for step in range(18):
            write(store, step=step, metrics={c * 900: step for c in "abc"})  # long records, to be shrunk later
            if step == 10:
                store.tag("best", "latest")
        saved = write(store, step=18, files=files)
        assert {c.step for c in store} == {10, 17, 18}
    again = job()
    assert again.checkpoint().step == 18
    assert contents(again, saved) == files
    assert again.verify() == []
    again.acquire()
    write(again, step=19)
    again.gc()
    assert {c.step for c in job()} == {10, 18, 19}
    found = tree(tmp_path / "s") if place == "local" else objects(inner)
    slots = [record.decode(v, int(k[4:]), KEY) for k, v in sorted(found.items()) if k.startswith("log/0")]
    assert len({slot.store for slot in slots} - {None}) == len({slot.store for slot in slots}) == 1
    kinds = [type(slot) for slot in slots]
    assert kinds.count(record.Tombstone) > 8
    assert kinds[-8:] == [record.Record] * 8
    for key, data in found.items():
        if key.endswith("manifest.json"):
            assert all(len(f.digests) == len(f.chunks) for f in manifest.decode(data, key.split("/")[1], KEY).files)


def test_a_store_without_a_key_is_written_as_ever(tmp_path: Path) -> None:
    write(Store(tmp_path), step=1)
    for path in (tmp_path / slot_key(2), *tmp_path.glob("data/*/manifest.json")):
        data = path.read_bytes()
        assert data == seal(body_of(data))
        assert "store" not in body_of(data)
        assert all("sha256" not in f for f in body_of(data).get("files", []))


def test_fencing_works_with_a_key(tmp_path: Path) -> None:
    old = opened(tmp_path)
    write(old, step=1)
    new = opened(tmp_path)
    new.acquire()
    for call in (lambda: write(old), lambda: old.tag("x", "latest"), old.prune):
        with pytest.raises(Fenced):
            call()
    write(new, step=2)
    write(opened(tmp_path, acquire=False), "eval", step=3)
    assert [c.step for c in opened(tmp_path)] == [1, 2, 3]


def test_a_lost_answer_is_resolved_with_a_key() -> None:
    inner = new_memory()
    write(store_on(inner, hmac_key=SECRET), step=1)
    for fault in (Fault("put_if_absent", 2, after=Ambiguous("lost")), Fault("put_if_absent", 2, before=Ambiguous("lost"))):
        write(store_on(FaultyBackend(inner, [fault]), hmac_key=SECRET), step=2)
    assert [c.step for c in store_on(inner, hmac_key=SECRET)] == [2, 2]


# -- forged


def as_forged(body: dict[str, Any], original: bytes) -> list[bytes]:
    """Return every forgery of `body` with every value replaced in turn."""
    found = list(forgeries(text_of(body), original))
    found.remove(original) if original in found else None
    for path in paths(body):
        copy = json.loads(json.dumps(body))
        inside = copy
        for step in path[:-1]:
            inside = inside[step]
        value = inside[path[-1]]
        inside[path[-1]] = (
            value + 1
            if isinstance(value, int)
            else value[:-1] + ("1" if value[-1:] == "0" else "0")
            if isinstance(value, str)
            else 0
        )
        found += forgeries(text_of(copy), original)
    return found


def counted(experiment: str, tried: list[bytes], read: Callable[[bytes], object], error: type[Exception]) -> None:
    """Read each of what was forged; what is not refused is a violation."""
    believed = []
    for data in tried:
        try:
            read(data)
        except error:
            continue
        believed.append(data)
    evidence.record(experiment, points=len(tried), fired=len(tried), violations=len(believed))
    assert not believed


def test_every_value_of_a_record_forged(root: Path) -> None:
    original = (root / slot_key(3)).read_bytes()
    tried = as_forged(body_of(original), original)
    assert len(tried) > 150
    counted("tampering with a key: every value of a record", tried, lambda data: record.decode(data, 3, KEY), Forged)


def test_every_value_of_a_manifest_forged(root: Path) -> None:
    path = folder_of(root) / "manifest.json"
    original = path.read_bytes()
    tried = as_forged(body_of(original), original)
    assert len(tried) > 150
    read = lambda data: manifest.decode(data, path.parent.name, KEY)  # noqa: E731
    counted("tampering with a key: every value of a manifest", tried, read, Forged)


@pytest.mark.parametrize("digests", [None, [], ["0" * 63], [7], ["0" * 64] * 2])
def test_a_manifest_without_a_digest_of_every_chunk(root: Path, digests: list[Any] | None) -> None:
    """Only who has the key can have made it, and did not know how."""
    path = folder_of(root) / "manifest.json"
    body = body_of(path.read_bytes())
    manifest.decode(seal(body, KEY), path.parent.name, KEY)
    body["files"][0].pop("sha256")
    if digests is not None:
        body["files"][0]["sha256"] = digests
    with pytest.raises(DamagedManifest):
        manifest.decode(seal(body, KEY), path.parent.name, KEY)


def test_a_tombstone_forged(root: Path) -> None:
    original = record.encode_tombstone(3, "0" * 32, "somewhere", KEY)
    tried = as_forged(body_of(original), original)
    counted("tampering with a key: every value of a tombstone", tried, lambda data: record.decode(data, 3, KEY), Forged)


@pytest.mark.parametrize("which", range(7))
def test_a_forged_record_is_passed_over(root: Path, which: int) -> None:
    """The newest record is changed so that it names the older checkpoint, which is all that a forger would need."""
    original = (root / slot_key(3)).read_bytes()
    body = body_of(original)
    body["names"]["latest"] = body["checkpoints"][0]["id"]
    (root / slot_key(3)).write_bytes(list(forgeries(text_of(body), original))[which])
    served_by_the_one_before(root, 3)


@pytest.mark.parametrize("which", range(7))
def test_a_forged_manifest_is_damage(root: Path, which: int) -> None:
    path = folder_of(root) / "manifest.json"
    original = path.read_bytes()
    path.write_bytes(list(forgeries(text_of({**body_of(original), "metadata": "lies"}), original))[which])
    with pytest.raises(DamagedManifest):
        opened(root).checkpoint(path.parent.name).metadata  # noqa: B018
    assert [(d.id, d.path) for d in opened(root).verify()] == [(path.parent.name, "")]


def fitted(data: bytes, crc: int) -> bytes:
    """Return `data` with its last 8 bytes changed so that it has this CRC-64: a CRC is linear, so that is a system of 64 equations."""
    base = crc64nvme(data[:-8] + bytes(8))
    rows: list[tuple[int, int]] = []  # (what it does to the CRC, the bits that do it), with distinct leading bits
    for bit in range(64):
        effect, bits = crc64nvme(data[:-8] + (1 << bit).to_bytes(8, "little")) ^ base, 1 << bit
        for other, its_bits in rows:
            if effect ^ other < effect:
                effect, bits = effect ^ other, bits ^ its_bits
        rows.append((effect, bits))
        rows.sort(reverse=True)
    wanted, tail = crc ^ base, 0
    for effect, bits in rows:
        if wanted ^ effect < wanted:
            wanted, tail = wanted ^ effect, tail ^ bits
    assert not wanted
    return data[:-8] + tail.to_bytes(8, "little")


def test_data_changed_so_that_its_crc_fits(tmp_path: Path) -> None:
    """Without a key it comes out, which is why a key asks for more than a CRC."""
    honest = b"weights" * 1000
    forged = fitted(b"poisons" * 999 + bytes(7), crc64nvme(honest))
    assert len(forged) == len(honest)
    assert forged != honest
    saved = write(Store(tmp_path / "plain"), files={"a.bin": honest})
    (tmp_path / "plain" / "data" / saved / "a.bin").write_bytes(forged)
    assert contents(Store(tmp_path / "plain"), saved) == {"a.bin": forged}

    store = opened(tmp_path / "store")
    checkpoint = store.checkpoint(write(store, files={"a.bin": honest}))
    (tmp_path / "store" / "data" / checkpoint.id / "a.bin").write_bytes(forged)
    ways: list[Callable[[], object]] = [
        lambda: checkpoint.open("a.bin").read(),
        lambda: checkpoint.load("a.bin"),
        lambda: checkpoint.download(tmp_path / "out"),
    ]
    with evidence.experiment("tampering with a key: data with a fitting CRC") as tally:
        for way in ways:
            tally.strike()
            with pytest.raises(DamagedFile):
                way()
        tally.strike()
        assert [(d.path, d.ranges) for d in checkpoint.verify()] == [("a.bin", ((0, len(honest)),))]


# -- replayed


def put_back(root: Path, n: int, data: bytes) -> None:
    (root / slot_key(n)).write_bytes(data)


def test_an_older_record_at_a_new_slot(root: Path) -> None:
    for n in (1, 2, 3):
        put_back(root, 4, (root / slot_key(n)).read_bytes())
        with pytest.warns(FallbackWarning, match="another slot"):
            assert opened(root).checkpoint().step == 2
    shutil.copy(root / slot_key(2), root / slot_key(4))
    served_by_the_one_before(root, 4)


def test_records_in_each_others_place(root: Path) -> None:
    two, three = ((root / slot_key(n)).read_bytes() for n in (2, 3))
    put_back(root, 2, three)
    put_back(root, 3, two)
    with pytest.warns(FallbackWarning, match="another slot"):
        assert opened(root).checkpoints() == []
    with pytest.raises(DamagedRecord):
        opened(root, acquire=False).gc()


@pytest.mark.parametrize("alone", [False, True])
def test_a_record_of_another_store_with_the_same_key(root: Path, tmp_path: Path, alone: bool) -> None:
    """Not even when those before it are gone, with which it does not agree."""
    other = fill(tmp_path / "other", 2)
    put_back(root, 3, (other / slot_key(3)).read_bytes())
    if not alone:
        served_by_the_one_before(root, 3)
        return
    put_back(root, 2, b"")
    with pytest.warns(FallbackWarning) as told:
        assert opened(root).checkpoints() == []
    assert "commit record 3 is not authentic: it was written for another store" in str(told[0].message)


def test_a_tombstone_of_another_store_with_the_same_key(root: Path) -> None:
    put_back(root, 3, record.encode_tombstone(3, "0" * 32, "elsewhere", KEY))
    served_by_the_one_before(root, 3)


def test_a_record_from_before_a_roll_back(tmp_path: Path) -> None:
    """Records 4 and 5 are removed, which cannot be noticed; the job goes on; then the old 5 comes back, and a hint that vouches for it."""
    root = fill(tmp_path / "store", 4)
    four, five = (root / slot_key(4), root / slot_key(5))
    data = five.read_bytes()
    four.unlink()
    five.unlink()
    with opened(root) as job:
        job.acquire()  # another record 4
    five.write_bytes(data)
    (root / "log" / "hint").write_bytes(f"5 {sha256(data)}".encode())
    with pytest.warns(FallbackWarning, match="does not continue commit record 4"):
        assert opened(root).checkpoint().step == 2


def test_files_of_another_checkpoint(root: Path) -> None:
    old, new = folder_of(root, 1), folder_of(root, 2)
    for file in ("a.bin", "manifest.json"):
        before = (new / file).read_bytes()
        (new / file).write_bytes((old / file).read_bytes())
        with pytest.raises(Damaged):
            contents(opened(root), new.name)
        (new / file).write_bytes(before)
    assert contents(opened(root), new.name) == {"a.bin": b"bytes of 2"}


def test_forged_data_that_a_damaged_record_may_have_named_is_not_brought_back(root: Path) -> None:
    lost = folder_of(root)
    put_back(root, 3, b"")
    job = opened(root)
    with pytest.warns(FallbackWarning):
        job.acquire()
    path = lost / "manifest.json"
    whole = path.read_bytes()
    for forged in forgeries(whole[BODY:-2], whole):
        if forged != whole:
            path.write_bytes(forged)
            with pytest.raises(Forged):
                job.tag("back", lost.name)
    path.write_bytes(whole)
    assert job.tag("back", lost.name).step == 2


def test_records_that_are_all_damaged_are_no_empty_store(root: Path) -> None:
    for n in (1, 2, 3):
        put_back(root, n, b"")
    refused_by_all(lambda: opened(root), DamagedRecord, "none of the newest commit records can be read", root)


# -- with another key, without one, or with one for a store that has none


@pytest.mark.parametrize("steps", [2, 12])
def test_another_key(tmp_path: Path, steps: int) -> None:
    root = fill(tmp_path / "s", steps)
    refused_by_all(
        lambda: Store(root, hmac_key=b"x" * 32), KeyMismatch, "not one of the newest commit records is authentic", root
    )


@pytest.mark.parametrize("steps", [2, 12])
def test_no_key(tmp_path: Path, steps: int) -> None:
    root = fill(tmp_path / "s", steps)
    refused_by_all(lambda: Store(root), KeyMismatch, "was written with an hmac_key, and none is given here", root)


@pytest.mark.parametrize("steps", [2, 12])
def test_a_key_for_a_store_without(tmp_path: Path, steps: int) -> None:
    root = tmp_path / "s"
    with Store(root) as store:  # closed: it deletes in the background
        for step in range(steps):
            write(store, step=step)
    refused_by_all(lambda: opened(root), KeyMismatch, "was written without an hmac_key", root)


def test_a_downgrade_of_every_record(root: Path) -> None:
    """What the forger would like is a store that looks as if it never had a key."""
    for path in (root / "log").glob("0*"):
        path.write_bytes(seal(body_of(path.read_bytes())))
    refused_by_all(lambda: opened(root), KeyMismatch, "was written without an hmac_key", root)


@pytest.mark.parametrize("first", [None, SECRET])
def test_who_comes_second_to_an_empty_store_with_another_key(first: bytes | None) -> None:
    inner = new_memory()
    late = store_on(inner, hmac_key=SECRET if first is None else None)
    assert late.checkpoints() == []
    write(store_on(inner, hmac_key=first), step=1)
    before = dict(objects(inner))
    with pytest.raises(KeyMismatch):
        late.acquire()
    with pytest.raises(KeyMismatch):
        write(late)
    assert objects(inner) == before


def test_the_slot_is_taken_with_another_key_while_committing() -> None:
    """Somebody with the key wins the very slot that one without is about to create."""
    inner = new_memory()

    def other_first() -> None:
        write(store_on(inner, hmac_key=SECRET), step=1)

    late = store_on(FaultyBackend(inner, [Fault("put_if_absent", 1, before=other_first)]))
    with pytest.raises(KeyMismatch):
        write(late, step=2)
    assert [c.step for c in store_on(inner, hmac_key=SECRET)] == [1]


def test_one_record_of_another_key_among_damaged_ones_tells_of_the_key() -> None:
    backend = new_memory()
    for n in (1, 2, 3):
        objects(backend)[slot_key(n)] = b"rust"
    objects(backend)[slot_key(2)] = record.encode(record.Record(n=2, epoch=1, owner="me", op="op2"), OTHER)
    with pytest.raises(KeyMismatch, match="not one of the newest commit records is authentic"):
        Log(backend, KEY).head()


def test_the_first_record_is_read_once() -> None:
    """That others are of its store, it tells; of itself it is not asked."""
    backend = FaultyBackend(new_memory())
    write(store_on(backend.inner, hmac_key=SECRET, acquire=False))
    Log(backend, KEY).head()
    assert backend.calls["get"] == 2, "the hint, and the record"


# -- where the key comes from, and where it does not go


def given(root: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> dict[str, Any]:
    """Give the key in one of the ways; return the keywords for that."""
    file = root / "key file"
    file.write_bytes(SECRET + b"\n")
    match way:
        case "bytes":
            return {"hmac_key": SECRET + b"\r\n"}
        case "file":
            return {"hmac_key": file}
        case "environment":
            monkeypatch.setenv("CKPTSTORE_HMAC_KEY", SECRET.decode())
        case "file in the environment":
            monkeypatch.setenv("CKPTSTORE_HMAC_KEY_FILE", str(file))
    return {}


@pytest.mark.parametrize("way", ["bytes", "file", "environment", "file in the environment"])
def test_the_key_is_used_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    caplog.set_level(logging.DEBUG)
    root = tmp_path / "store"
    store = Store(root, **given(tmp_path, monkeypatch, way))
    write(store, step=1)
    shown = [repr(store), str(store), repr(vars(store)), repr(vars(store._engine)), repr(store.checkpoint()), caplog.text]
    try:
        pickled = pickle.dumps(store)
    except UsageError as exc:
        assert way == "bytes"
        assert "name a file" in str(exc)
        shown.append(str(exc))
    else:
        assert way != "bytes"
        shown.append(repr(pickled))
        worker = pickle.loads(pickled)
        write(worker, step=2)
        assert contents(worker, "latest") == contents(store, "latest")
    assert SECRET not in b"".join(tree(root).values())
    max((root / "log").glob("0*")).write_bytes(b"")
    damaged = Store(root, **given(tmp_path, monkeypatch, way))
    with pytest.warns(FallbackWarning) as told:
        damaged.names()
    shown += [str(w.message) for w in told] + [repr(d) for d in damaged.verify()]
    for text in shown:
        assert SECRET.decode() not in text and SECRET.hex() not in text


def test_a_pickled_store_does_not_come_back_without_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(Store(tmp_path / "store", **given(tmp_path, monkeypatch, "file")))
    (tmp_path / "key file").unlink()
    with pytest.raises(InvalidOption, match="cannot be read"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        (b"", "16 to 4096 bytes"),
        (b"fifteen bytes..\n", "16 to 4096 bytes"),
        (b"x" * 5000, "16 to 4096 bytes"),
        ("a key as text, which could be a path", "bytes or an os.PathLike, not str"),
        (7, "bytes or an os.PathLike, not int"),
        (Path("/nowhere/at all"), "cannot be read: /nowhere/at all"),
        (Path("/"), "cannot be read"),
        (Path("/dev/zero"), "16 to 4096 bytes"),
        (Path("nul\0"), "cannot be read"),
    ],
)
def test_a_key_that_is_none(tmp_path: Path, key: Any, says: str) -> None:
    with pytest.raises(InvalidOption, match=says) as caught:
        Store(tmp_path / "s", hmac_key=key)
    assert "which could be" not in str(caught.value)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CKPTSTORE_HMAC_KEY": SECRET.decode(), "CKPTSTORE_HMAC_KEY_FILE": "/dev/null"}, "not both"),
        ({"CKPTSTORE_HMAC_KEY": ""}, "CKPTSTORE_HMAC_KEY is empty"),
        ({"CKPTSTORE_HMAC_KEY_FILE": ""}, "CKPTSTORE_HMAC_KEY_FILE is empty"),
        ({"CKPTSTORE_HMAC_KEY": "hunter2"}, "16 to 4096 bytes"),
        ({"CKPTSTORE_HMAC_KEY_FILE": "/dev/null"}, "16 to 4096 bytes"),
    ],
)
def test_an_environment_that_says_something_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidOption, match=says) as caught:
        Store(tmp_path / "s")
    assert "hunter2" not in str(caught.value) and SECRET.decode() not in str(caught.value)


@pytest.mark.parametrize("name", ["hmac_key", "hmac-key", "HMAC_KEY", "hmac_key_file"])
def test_a_key_in_a_url_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{tmp_path}/s?{name}=hunter2hunter2hunter2"
    monkeypatch.setenv("CKPTSTORE_URL", url)
    for arguments in ((url,), ()):
        with pytest.raises(InvalidOption, match="does not belong in a URL; give it as") as caught:
            Store(*arguments)
        assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_the_command_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(SECRET + b"\n")
    source = str(Path(ckptstore.__file__).parent.parent)

    def run(*words: str, **variables: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "ckptstore", *words]
        environment = {**os.environ, "PYTHONPATH": source, **variables}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout, done.stderr

    key = {"CKPTSTORE_HMAC_KEY_FILE": str(tmp_path / "key")}
    assert run("verify", str(root), **key)[::2] == (0, "")
    assert run("tag", str(root), "best", "latest", **key)[::2] == (0, "")
    assert "best" in opened(root)
    for variables, status, says in (
        ({}, 3, "was written with an hmac_key, and none is given here"),
        ({"CKPTSTORE_HMAC_KEY": "x" * 20}, 3, "not one of the newest commit records is authentic"),
        ({"CKPTSTORE_HMAC_KEY": "hunter2"}, 2, "16 to 4096 bytes"),
    ):
        got, out, error = run("verify", str(root), **variables)
        assert (got, out, error.count("\n")) == (status, "", 1)
        assert says in error and "hunter2" not in error


# -- rot


def flips(data: bytes, every: int) -> Iterator[bytes]:
    for bit in range(0, 8 * len(data), every):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_every_flipped_bit_and_every_length(root: Path, every: int) -> None:
    path = folder_of(root) / "manifest.json"
    for original, read in (
        ((root / slot_key(3)).read_bytes(), lambda data: record.decode(data, 3, KEY)),
        (path.read_bytes(), lambda data: manifest.decode(data, path.parent.name, KEY)),
    ):
        read(original)
        tried = [*flips(original, every), *(original[:n] for n in range(0, len(original), every)), original + b"\n"]
        counted("tampering with a key: bits and lengths", tried, read, Damaged)


def test_what_backends_see_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backend is handed the key, so none can put it into a request or a message."""
    seen: list[Any] = []
    open_it = MemoryBackend.open

    def watched(location: str, options: Any) -> Any:
        seen.append((location, dict(options)))
        return open_it(location, options)

    monkeypatch.setattr(MemoryBackend, "open", watched)
    write(Store("memory://hmac-seen?keep_last=3", hmac_key=SECRET))
    assert seen == [("hmac-seen", {})]
