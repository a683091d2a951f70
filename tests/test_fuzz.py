"""Hostile input at random: only our own errors come out, and no byte is touched outside of the store."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import evidence
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import write
from test_forged import ID, VALUES, changed, json_values, manifest_body, paths, record_body, sealed
from test_hostile import in_child, linux

from ckptstore import Store, manifest, record
from ckptstore.checksum import sha256
from ckptstore.envelope import seal
from ckptstore.errors import CkptStoreError, DamagedManifest, DamagedRecord, FallbackWarning, InvalidURL, NewerFormat
from ckptstore.key import Key
from ckptstore.log import slot_key
from ckptstore.url import parse_url

KEY = Key(b"correct horse battery staple")


def amounts(sampled: int, full: int) -> pytest.MarkDecorator:
    """How many examples in the plain run, and how many in the soak."""
    return pytest.mark.parametrize(
        "examples", [pytest.param(sampled, id="sampled"), pytest.param(full, id="full", marks=pytest.mark.soak)]
    )


def hunt(experiment: str, examples: int, inputs: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Call `check` with that many `inputs`, the same ones each time."""
    tried, done = 0, False

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs)
    def run(found: Any) -> None:
        nonlocal tried
        tried += 1
        check(found)

    try:
        run()
        done = True
    finally:
        evidence.record(experiment, points=tried, fired=tried, violations=0 if done else 1)
    assert tried >= examples // 2


@st.composite
def bodies(draw: st.DrawFn, body: dict[str, Any]) -> bytes:
    """The text of a body with something wrong in it: values replaced, or bytes."""
    for _ in range(draw(st.integers(0, 3))):
        places = paths(body)
        if places:
            body = changed(body, draw(st.sampled_from(places)), draw(st.sampled_from(VALUES) | json_values))
    text = bytearray(json.dumps({"format": 1, **body}).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text[at : at + draw(st.integers(0, 4))] = draw(
            st.binary(max_size=3) | st.sampled_from([b"[", b"]", b"{", b'"', b"9" * 5000])
        )
    return bytes(text)


def authentic(text: bytes) -> bytes:
    """The envelope of somebody who has the key."""
    mac = KEY.sign(text)
    return b'{"sha256":"' + sha256(text).encode() + b'","hmac":"' + mac + b'","body":' + text + b"}\n"


def with_digests() -> dict[str, Any]:
    body = manifest_body()
    body["files"][0]["sha256"] = ["0" * 64, "f" * 64]
    return body


@amounts(60, 3_000)
@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "key"])
def test_parsers(examples: int, key: Key | None) -> None:
    frame = authentic if key else sealed
    assert isinstance(record.decode(frame(json.dumps({"format": 1, **record_body()}).encode()), 3, key), record.Record)
    assert manifest.decode(frame(json.dumps({"format": 1, **with_digests()}).encode()), ID, key).files

    def read_record(text: bytes) -> None:
        with suppress(DamagedRecord, NewerFormat):
            found = record.decode(frame(text), 3, key)
            if isinstance(found, record.Record):
                again = record.encode(found, key)
                assert record.decode(again, 3, key) is not None

    def read_manifest(text: bytes) -> None:
        with suppress(DamagedManifest, NewerFormat):
            found = manifest.decode(frame(text), ID, key)
            assert manifest.decode(manifest.encode(found, key), ID, key).files == found.files
            assert all({"", ".", ".."}.isdisjoint(file.key.split("/")) for file in found.files)

    hunt("hostile records", examples, bodies({**record_body(), "store": "0123"}), read_record)
    hunt("hostile manifests", examples, bodies(with_digests()), read_manifest)


# -- in a store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two checkpoints, and things beside it that are nobody's business."""
    folder = tmp_path_factory.mktemp("place")
    with Store(folder / "store") as store:
        write(store, step=1, files={"a": b"one", "deep/b": b"two"})
        write(store, step=2, files={"a": b"three", "deep/b": b"four"})
    outside = folder / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (outside / "folder").mkdir()
    (outside / "folder" / "file").write_bytes(b"keep")
    return folder


@pytest.fixture(autouse=True)
def _no_flushes() -> Iterator[None]:
    with mock.patch.object(os, "fsync", lambda fd: None):
        yield


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Return what is below `folder`, no link followed."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        found[str(path.relative_to(folder))] = mode, path.read_bytes() if path.is_file() and not path.is_symlink() else ""
    return found


def everything(root: Path, copies: Path) -> list[Callable[[], object]]:
    """What anybody may do with a store, readers first."""

    def with_store(call: Callable[[Store], object]) -> Callable[[], object]:
        def run() -> None:
            with Store(root, keep_last=1) as store:
                call(store)

        return run

    def read_all(store: Store) -> None:
        for checkpoint in store:
            for path in checkpoint.files:
                with checkpoint.open(path) as file:
                    file.read()

    calls: list[Callable[[Store], object]] = [
        lambda s: (s.names(), s.checkpoints(), repr(s.checkpoints()), "latest" in s),
        lambda s: s.checkpoint().download(copies),
        lambda s: s.checkpoint().metadata,
        read_all,
        lambda s: s.load(),
        lambda s: s.verify(),
        lambda s: s.resume({}),
        lambda s: s.tag("best", "latest"),
        lambda s: write(s, step=3),
        lambda s: s.prune(),
        lambda s: s.gc(),
        lambda s: s.delete("latest"),
    ]
    return [with_store(call) for call in calls]


def all_in_the_root(place: Path, work: Path, harm: Callable[[Path], object]) -> None:
    """Do everything with a store after `harm` was done to it; `work` is a new folder for that."""
    shutil.copytree(place, work, symlinks=True)
    try:
        harm(work)
        before = snapshot(work / "outside")
        for call in everything(work / "store", work / "copies"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                with suppress(CkptStoreError):
                    call()
        assert snapshot(work / "outside") == before
        assert {path.name for path in work.iterdir()} <= {"store", "outside", "copies"}
    finally:
        shutil.rmtree(work)


@amounts(12, 1_000)
def test_a_store_with_a_forged_record_or_manifest(place: Path, tmp_path: Path, examples: int) -> None:
    newest = json.loads((place / "store" / slot_key(3)).read_bytes())["body"]
    saved = newest["names"]["latest"]
    inside = json.loads((place / "store" / "data" / saved / "manifest.json").read_bytes())["body"]

    def forged_record(text: bytes) -> None:
        all_in_the_root(place, tmp_path / "work", lambda work: (work / "store" / slot_key(3)).write_bytes(sealed(text)))

    def forged_manifest(text: bytes) -> None:
        def harm(work: Path) -> None:
            (work / "store" / "data" / saved / "manifest.json").write_bytes(sealed(text))
            top = json.loads(json.dumps(newest))
            for entry in top["checkpoints"]:
                if entry["id"] == saved:
                    entry["manifest"] = sha256(sealed(text))
            (work / "store" / slot_key(3)).write_bytes(seal(top))

        all_in_the_root(place, tmp_path / "work", harm)

    hunt("a store with a hostile record", examples, bodies(newest), forged_record)
    hunt("a store with a hostile manifest", examples, bodies(inside), forged_manifest)


KINDS = (
    "link to a file",
    "link to a folder",
    "dangling link",
    "link into nothing outside",
    "loop",
    "fifo",
    "folder",
    "empty file",
)


def plant(path: Path, kind: str, outside: Path) -> None:
    """Put something else where `path` is."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    match kind:
        case "link to a file":
            path.symlink_to(outside / "secret")
        case "link to a folder":
            path.symlink_to(outside / "folder")
        case "dangling link":
            path.symlink_to(path.name + ".gone")
        case "link into nothing outside":
            path.symlink_to(outside / "new")
        case "loop":
            path.symlink_to(path.name)
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "empty file":
            path.touch()


@pytest.mark.parametrize("stride", [pytest.param(3, id="sampled"), pytest.param(1, id="full", marks=pytest.mark.soak)])
def test_a_store_with_something_planted_anywhere(place: Path, tmp_path: Path, stride: int) -> None:
    spots = sorted(str(path.relative_to(place)) for path in (place / "store").rglob("*"))
    cases = [(spot, kind) for spot in spots for kind in KINDS][::stride]
    with evidence.experiment("links and the like planted in a store") as tally:
        tally.points = len(cases)
        for spot, kind in cases:
            tally.strike()
            all_in_the_root(place, tmp_path / "work", lambda work, s=spot, k=kind: plant(work / s, k, work / "outside"))  # type: ignore[misc]
    assert len(cases) > 100 // stride


# -- names and URLs

ODD = st.text(max_size=20) | st.text("./\\\0~ea1-s\n\ud800\udcff", max_size=12) | st.sampled_from(VALUES) | st.binary(max_size=5)


@amounts(40, 3_000)
def test_names(place: Path, tmp_path: Path, examples: int) -> None:
    work = tmp_path / "work"
    shutil.copytree(place, work)
    before = snapshot(work / "outside")
    store = Store(work / "store", keep_last=1)

    def check(odd: Any) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.load(odd),
            lambda: store.checkpoint(odd),
            lambda: odd in store,
            lambda: store.tag(odd, "latest"),
            lambda: store.tag("best", odd),
            lambda: store.verify(odd) if odd is not None else None,
            lambda: store.checkpoint().open(odd),
            lambda: store.delete(odd),
            lambda: write(store, odd),
            lambda: write(store, files={odd: b"x"}) if isinstance(odd, str) else None,
        ]
        for call in calls:
            with suppress(CkptStoreError):
                call()
        if "latest" not in store:
            write(store)
        assert snapshot(work / "outside") == before
        assert {path.name for path in work.iterdir()} == {"store", "outside"}

    hunt("hostile names", examples, ODD, check)
    assert not store.verify()


@pytest.mark.parametrize("url", ["runs/\ud800", "file:///runs/\ud800", Path("runs/\ud800"), "memory://\ud800"])
def test_half_of_a_surrogate_pair_in_a_url(url: str | Path) -> None:
    with pytest.raises(InvalidURL, match="half of a surrogate pair"):
        Store(url)


def test_a_path_that_is_not_unicode(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    write(Store(root), step=1)
    assert Store(root).checkpoint().step == 1


PARTS = st.sampled_from(
    ["file:", "memory:", "nowhere:", "//", "/", "?", "=", "&", "%00", "%", "@", "keep_last", "..", "\0", "\ud800", "~"]
)


@amounts(200, 20_000)
def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.chdir(tmp_path)

    def check(text: str) -> None:
        try:
            found = parse_url(text)
        except InvalidURL:
            return
        if found.scheme in ("file", "memory", "nowhere"):
            with suppress(CkptStoreError):
                Store(text).names()
        assert not list(tmp_path.iterdir())

    hunt("hostile URLs", examples, st.lists(PARTS | st.text(max_size=5), max_size=8).map("".join), check)


# -- .pt files


@linux
@amounts(300, 20_000)
def test_programs_of_a_pickle(examples: int) -> None:
    """Well-formed pickles of all that torch lets a file call, with any arguments: in bounded memory, a result or an error with a type."""
    code = f"""
sys.path[:0] = [{str(Path(__file__).parent)!r}]
import json, random, warnings
from torch import _weights_only_unpickler
from contextlib import suppress
from test_hostile import EIGHT, HUGE, PICKLES, archive, call, name, number, program, storage, tensor, text, tup
from test_rebuild import NotPlain, rebuilt

warnings.simplefilter("ignore")
known = sorted(_weights_only_unpickler._get_allowed_globals()) + ["os.system"]
favourites = [n for n in known if "_rebuild" in n or n.rpartition(".")[2] in ("Size", "bytearray", "set", "Counter", "encode", "Tensor")]
rng = random.Random(20261124)

def value(depth):
    kind = rng.randrange(14 if depth else 8)
    if kind < 2:
        return number(rng.choice([0, 1, 2, 3, 8, -1, 1000, 1 << 31, 1 << 62, HUGE]))
    if kind == 2:
        return rng.choice([b"N", b"\\x88", b")", b"]", b"}}", text("cpu"), text("0"), text("latin1"), text("x" * 300)])
    if kind == 3:
        return name(*rng.choice(known).rpartition(".")[::2])
    if kind == 4:
        return storage(rng.choice([0, 1, 2, 3, HUGE]), rng.choice("00001"), rng.choice(["FloatStorage", "UntypedStorage", "QInt8Storage"]))
    if kind == 5:
        sizes = [rng.choice([0, 1, 2, 2, HUGE]) for _ in range(rng.randrange(3))]
        return tensor(sizes, [rng.choice([0, 1, 1, 2, -1]) for _ in sizes], offset=rng.choice([0, 0, 0, 1, HUGE]))
    if kind == 6:
        return rng.choice(bodies)
    if kind == 7:
        return b"h" + bytes([rng.randrange(3)])
    parts = [value(depth - 1) for _ in range(rng.randrange(6))]
    if kind == 8:
        return tup(*parts)
    if kind == 9:
        return b"](" + b"".join(parts) + b"e"
    if kind == 10:
        return b"}}(" + b"".join(parts[: len(parts) // 2 * 2]) + b"u"
    func = name(*rng.choice(favourites if rng.random() < 0.7 else known).rpartition(".")[::2])
    made = func + tup(*parts) + rng.choice([b"R", b"R", b"\\x81"])
    return made + value(depth - 1) + b"b" if kind == 13 else made

bodies = [body for body, _ in PICKLES.values()]
limit = status("VmSize:") + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
counts = {{}}
for _ in range({examples}):
    body = b"Nq\\x00]q\\x01)q\\x02" + value(3)
    try:
        torchload.load(archive(program(body), EIGHT))
        kind = "loaded"
    except UnsafeContent:
        kind = "refused"
    except RuntimeError as exc:
        assert "alloc" not in str(exc).lower(), (body, exc)
        kind = "torch's error"
    counts[kind] = counts.get(kind, 0) + 1
print(json.dumps(counts))
"""
    with evidence.experiment("hostile pickles") as tally:
        tally.points = tally.fired = examples
        out = in_child(code)
    counts = json.loads(out)
    print(counts)
    assert sum(counts.values()) == examples
    assert min(counts["loaded"], counts["refused"]) > examples // 50
