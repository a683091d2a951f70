"""Records and manifests whose checksum is right and whose content is not: only our errors come out, and nothing is touched outside."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import tree, write

from ckptstore import Store, manifest, record
from ckptstore.checkpoint import Checkpoint
from ckptstore.checksum import ALGORITHM, sha256
from ckptstore.envelope import FORMAT, seal
from ckptstore.errors import CkptStoreError, DamagedFile, DamagedManifest, DamagedRecord, FallbackWarning, NewerFormat
from ckptstore.key import Key
from ckptstore.log import slot_key

ID = "e1-s7-0123456789ab"
DIGEST = "0" * 64


def record_body(n: int = 3) -> dict[str, Any]:
    return {
        "kind": "record",
        "n": n,
        "epoch": 1,
        "owner": "host:1:ab",
        "op": "0123",
        "prev": DIGEST,
        "names": {"latest": ID},
        "checkpoints": [
            {
                "id": ID,
                "step": 7,
                "name": "latest",
                "created": 1.7e9,
                "nbytes": 10,
                "manifest": DIGEST,
                "metrics": {"loss": 0.5, "bad": "nan"},
                "verified": None,
            }
        ],
        "retired": ["e0-0123456789ab"],
        "resumed": None,
        "spared": ["e1-ba9876543210"],
        "past_owners": ["somebody"],
    }


def manifest_body() -> dict[str, Any]:
    return {
        "kind": "manifest",
        "id": ID,
        "name": "latest",
        "step": 7,
        "created": 1.7e9,
        "checksum": ALGORITHM,
        "files": [{"path": "part/a", "size": 10, "crc": "0" * 16, "chunks": [[6, "0" * 16], [4, "f" * 16]]}],
        "metrics": {"loss": 0.5},
        "metadata": {"any": ["thing"]},
        "sampler": None,
        "unsafe": {"part/a": ["Thing"]},
        "writer": {"host": "here"},
    }


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return where every value inside `value` is, as keys and indices from the top."""
    found = [above] if above else []
    if isinstance(value, dict):
        for key in value:
            found += paths(value[key], (*above, key))
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += paths(item, (*above, i))
    return found


class Gone:
    """Stands for a value that is left out."""


class Renamed:
    """Stands for a value that gets another key."""

    def __init__(self, key: str) -> None:
        self.key = key


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """Return `body` with the value at `path` replaced."""
    copy: dict[str, Any] = json.loads(json.dumps(body))
    *above, last = path
    inside: Any = copy
    for step in above:
        inside = inside[step]
    if isinstance(value, (Gone, Renamed)):
        old = inside.pop(last)
        if isinstance(value, Renamed) and isinstance(inside, dict):
            inside[value.key] = old
    else:
        inside[last] = value
    return copy


NUMBERS = [-1, 0.5, 2**63, 10**18, 10**400, -(10**400), 1e308, "inf", "nan", True]
TEXTS = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "a//b",
    "x" * 5000,
    "\x00",
    "\x1b[2J",
    "\ud800",
    "ünï",
    "latest\n",
    "e1-0123456789ab",
]
VALUES: list[Any] = [None, {}, [], [[]], {"a": {}}, [None], {"": 1}, Gone(), *NUMBERS, *TEXTS, *(Renamed(text) for text in TEXTS)]


def read_record(body: dict[str, Any], n: int = 3) -> None:
    """Read a record as anybody does, and look at everything in it."""
    found = record.decode(seal(body), n)
    if isinstance(found, record.Tombstone):
        return
    again = record.encode(found)
    assert record.encode(record.decode(again, n)) == again  # type: ignore[arg-type]
    for entry in found.checkpoints:
        checkpoint = Checkpoint(None, entry)  # type: ignore[arg-type]
        assert checkpoint.created.tzinfo
        assert isinstance(checkpoint.nbytes, int)
        repr(checkpoint)


def read_manifest(body: dict[str, Any]) -> None:
    found = manifest.decode(seal(body), ID)
    again = manifest.encode(found)
    assert manifest.encode(manifest.decode(again, ID)) == again
    assert isinstance(found.nbytes, int)
    for file in found.files:
        assert not {"", ".", ".."} & {*file.key.split("/")}
        assert file.key != "manifest.json"


CODECS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], None], type[CkptStoreError]]] = [
    (record_body(), read_record, DamagedRecord),
    (manifest_body(), read_manifest, DamagedManifest),
]


@pytest.mark.parametrize(("body", "read", "error"), CODECS, ids=["record", "manifest"])
def test_every_value_replaced_by_every_odd_one(
    body: dict[str, Any], read: Callable[[dict[str, Any]], None], error: type[Exception]
) -> None:
    read(body)
    refused = accepted = 0
    for path in paths(body):
        for value in VALUES:
            try:
                read(changed(body, path, value))
                accepted += 1
            except error:
                refused += 1
    assert refused > accepted


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        (0, ("checkpoints",), {}),
        (0, ("retired",), {}),
        (0, ("spared",), ""),
        (1, ("files", 0, "remote"), 7),
        (1, ("files", 0, "remote"), ["crc64nvme", "x"]),
        (1, ("files", 0, "crc"), "0"),
        (1, ("files", 0, "crc"), "0" * 17),
        (1, ("files", 0, "chunks", 0, 1), "0"),
    ],
)
def test_what_could_pass_for_the_right_kind_of_value(kind: int, path: tuple[Any, ...], value: Any) -> None:
    body, read, error = CODECS[kind]
    if path == ("checkpoints",):
        body = {**body, "names": {}}
    with pytest.raises(error):
        read(changed(body, path, value))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.data())
def test_random_changes(data: st.DataObject) -> None:
    body, read, error = data.draw(st.sampled_from(CODECS))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(paths(body)))
        body = changed(body, path, data.draw(json_values | st.sampled_from(VALUES)))
        if not body:
            break
    with suppress(error):
        read(body)


@given(st.dictionaries(st.sampled_from(["kind", "n", "id", "format", "epoch", "files", "names"]) | st.text(), json_values))
def test_random_bodies(body: dict[str, Any]) -> None:
    for _, read, error in CODECS:
        with pytest.raises((error, NewerFormat)):
            read(body)


@given(st.binary())
def test_random_bytes(data: bytes) -> None:
    with pytest.raises(DamagedRecord):
        record.decode(data, 1)
    with pytest.raises(DamagedManifest):
        manifest.decode(data, ID)


def sealed(text: bytes) -> bytes:
    """Return an envelope around a body that may be no JSON at all."""
    return b'{"sha256":"' + sha256(text).encode() + b'","body":' + text + b"}\n"


BODIES = {
    "nothing": b"",
    "null": b"null",
    "list": b"[]",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep dict": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a million digits": b'{"format":1,"n":' + b"9" * 1_000_000 + b"}",
    "format of a million digits": b'{"format":' + b"9" * 1_000_000 + b"}",
    "NaN": b'{"format":1,"n":NaN}',
    "not UTF-8": b'{"format":1,"n":"\xff"}',
    "UTF-16": '{"format":1}'.encode("utf-16"),
    "two values": b"{}{}",
    "format 0": b'{"format":0}',
    "format true": b'{"format":true}',
    "format 1.0": b'{"format":1.0}',
    "format text": b'{"format":"1"}',
    "the same key twice": b'{"format":1,"format":1,"n":3}',
}


@pytest.mark.parametrize("text", BODIES.values(), ids=BODIES.keys())
def test_bodies_that_are_no_record(text: bytes) -> None:
    with pytest.raises(DamagedRecord):
        record.decode(sealed(text), 3)
    with pytest.raises(DamagedManifest):
        manifest.decode(sealed(text), ID)


# -- in a store


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A store with two checkpoints, in records 2 and 3."""
    with Store(tmp_path / "store") as store:
        write(store, step=1)
        write(store, step=2)
    return tmp_path / "store"


def newest(root: Path) -> dict[str, Any]:
    """Return the body of the newest record."""
    body: dict[str, Any] = json.loads((root / slot_key(3)).read_bytes())["body"]
    return body


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name with ../": lambda b: b["names"].update({"../../x": b["names"]["latest"]}),
    "an id with /": lambda b: b["checkpoints"][0].update(id="e1-../../../etc"),
    "a dangling name": lambda b: b["names"].update(best="e1-000000000000"),
    "the same checkpoint twice": lambda b: b["checkpoints"].append(b["checkpoints"][0]),
    "kept and retired": lambda b: b["retired"].append(b["checkpoints"][0]["id"]),
    "retired outside": lambda b: b["retired"].append("../../outside"),
    "spared outside": lambda b: b["spared"].append("../../outside"),
    "resumed from outside": lambda b: b.update(resumed="/etc"),
    "a number that is none": lambda b: b.update(epoch=1.5),
    "a huge number": lambda b: b.update(epoch=10**300),
    "a time that never comes": lambda b: b["checkpoints"][0].update(created=1e300),
    "a manifest by no checksum": lambda b: b["checkpoints"][0].update(manifest="x"),
    "another slot's": lambda b: b.update(n=2),
    "neither record nor tombstone": lambda b: b.update(kind="surprise"),
}


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED.keys())
def test_a_forged_record_is_passed_over(root: Path, forge: Callable[[dict[str, Any]], object]) -> None:
    body = newest(root)
    forge(body)
    (root / slot_key(3)).write_bytes(seal(body))
    with pytest.warns(FallbackWarning, match="commit record 3"):
        assert Store(root).checkpoint("latest").step == 1
    outside = tree(root.parent)
    with pytest.raises(DamagedRecord):
        Store(root, acquire=False).gc()
    assert tree(root.parent) == outside
    job = Store(root)
    with pytest.warns(FallbackWarning, match="going on from commit record 2"):
        write(job, step=5)
    job.gc()
    assert {c.step for c in Store(root)} == {1, 5}


def test_a_tombstone_with_nothing_above_it(root: Path) -> None:
    (root / slot_key(3)).write_bytes(record.encode_tombstone(3, "0" * 32))
    for call in (
        lambda s: s.names(),
        lambda s: s.load(),
        lambda s: write(s),
        lambda s: s.acquire(),
        lambda s: s.gc(),
        lambda s: s.verify(),
    ):
        with pytest.raises(DamagedRecord):
            call(Store(root))


def test_a_record_of_a_newer_format_stops_everything(root: Path) -> None:
    body = {**newest(root), "format": FORMAT + 1, "surprise": {}}
    text = json.dumps(body).encode()
    (root / slot_key(3)).write_bytes(sealed(text))
    before = tree(root)
    calls: list[Callable[[Store], object]] = [
        lambda s: s.names(),
        lambda s: s.load(),
        lambda s: s.load(step=1),
        lambda s: s.checkpoints(),
        lambda s: "latest" in s,
        lambda s: s.verify(),
        lambda s: s.acquire(),
        lambda s: s.resume({}),
        lambda s: write(s),
        lambda s: s.tag("best", "latest"),
        lambda s: s.delete("latest"),
        lambda s: s.prune(),
        lambda s: s.gc(),
    ]
    for call in calls:
        with pytest.raises(NewerFormat, match="upgrade ckptstore"):
            call(Store(root))
    assert tree(root) == before


def forge_manifest(root: Path, checkpoint_id: str, forge: Callable[[dict[str, Any]], object], number: int = 1) -> None:
    """Change a manifest, and the newest record so that it names this one."""
    path = root / "data" / checkpoint_id / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    forge(body)
    path.write_bytes(sealed(json.dumps({**body, "format": number}).encode()))
    top = newest(root)
    for entry in top["checkpoints"]:
        if entry["id"] == checkpoint_id:
            entry["manifest"] = sha256(path.read_bytes())
    (root / slot_key(3)).write_bytes(seal(top))


def test_a_manifest_of_a_newer_format_is_told(root: Path) -> None:
    latest = Store(root).checkpoint("latest")
    forge_manifest(root, latest.id, lambda body: body.update(surprise=1), number=FORMAT + 1)
    before = tree(root)
    calls: list[Callable[[Store], object]] = [
        lambda s: s.load(),
        lambda s: s.load(latest.id),
        lambda s: s.checkpoint().files,
        lambda s: s.verify(latest.id),
    ]
    for call in calls:
        with pytest.raises(NewerFormat, match="upgrade ckptstore"):
            call(Store(root))
    assert tree(root) == before


def first(body: dict[str, Any]) -> dict[str, Any]:
    file: dict[str, Any] = body["files"][0]
    return file


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a file outside": lambda b: first(b).update(path="../../../secret"),
    "an absolute file": lambda b: first(b).update(path="/etc/passwd"),
    "a huge file": lambda b: first(b).update(size=10**15, chunks=[[10**15, "0" * 16]]),
    "chunks that do not add up": lambda b: first(b).update(size=11),
    "a size that is no whole number": lambda b: first(b).update(size=10.0),
    "a negative chunk": lambda b: first(b).update(chunks=[[11, "0" * 16], [-1, "0" * 16]]),
    "a file twice": lambda b: b["files"].append(first(b)),
    "another checkpoint's": lambda b: b.update(id=ID),
    "an unknown checksum": lambda b: b.update(checksum="md5"),
}


@pytest.mark.parametrize("forge", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_forged_manifest_is_damage(root: Path, forge: Callable[[dict[str, Any]], object]) -> None:
    latest = Store(root).checkpoint("latest")
    forge_manifest(root, latest.id, forge)
    with pytest.raises(DamagedManifest):
        assert Store(root).checkpoint(latest.id).files
    assert [(d.id, d.path) for d in Store(root).verify()] == [(latest.id, "")]


@pytest.mark.parametrize("key", [None, b"correct horse battery staple"], ids=["no key", "key"])
def test_a_whole_manifest_that_was_never_committed_is_damage(tmp_path: Path, key: bytes | None) -> None:
    """The checkpoint's own id, a right checksum, even a right HMAC: it is still not the one that the record names."""
    store = Store(tmp_path, hmac_key=key)
    saved = write(store, metadata="as saved")
    path = tmp_path / "data" / saved / "manifest.json"
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(seal({**body, "metadata": "another"}, Key(key) if key else None))
    with pytest.raises(DamagedManifest, match="not the one that was committed"):
        Store(tmp_path, hmac_key=key).checkpoint(saved).metadata  # noqa: B018
    assert [(d.id, d.path) for d in Store(tmp_path, hmac_key=key).verify()] == [(saved, "")]


def test_a_manifest_that_promises_more_than_there_is_costs_no_memory(root: Path) -> None:
    latest = Store(root).checkpoint("latest")
    size = 64 << 20
    forge_manifest(root, latest.id, lambda b: first(b).update(size=size * 100_000, chunks=[[size, "0" * 16]] * 100_000))
    with pytest.raises(DamagedFile, match="instead of 6710886400000"):
        Store(root).checkpoint().open("a.bin")
    with pytest.raises(DamagedFile):
        Store(root).checkpoint().load("a.bin")
