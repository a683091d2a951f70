"""The public interface, as far as it needs no torch: plain files in, plain files out."""

from __future__ import annotations

import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from procs import litter
from stores import Killed, Mortal, contents, new_memory, objects, state_of, store_on, tree, write

import ckptstore
from ckptstore import Store
from ckptstore.backends.local import LocalBackend
from ckptstore.errors import (
    AlreadyExists,
    BackendError,
    CheckpointNotFound,
    DamagedFile,
    Fenced,
    InvalidName,
    InvalidURL,
    NotFound,
    NotSerializable,
    StoreNotFound,
    UnknownScheme,
    UnsafeContent,
    UsageError,
    WeightsOnlyWarning,
)
from ckptstore.naming import check_path, file_key
from ckptstore.protocol import Backend
from ckptstore.testing import Fault, FaultyBackend
from ckptstore.transfer import FileSink
from ckptstore.url import StoreURL, parse_url
from ckptstore.verifiedfile import VerifiedFile


@pytest.fixture(params=["memory", "local"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    return new_memory() if request.param == "memory" else LocalBackend.open(str(tmp_path / "run"), {})


@pytest.fixture
def store(backend: Backend) -> Iterator[Store]:
    with store_on(backend, keep_last="all") as opened:
        yield opened


def folders(backend: Backend) -> set[str]:
    """Return the ids below ``data/``."""
    return {info.key.split("/")[1] for info in backend.list("data/")}


# --- where a store is


@pytest.mark.parametrize(
    ("text", "scheme", "location", "options"),
    [
        ("runs/42", "file", "runs/42", {}),
        ("runs/my run", "file", "runs/my run", {}),
        ("runs/100%25#1", "file", "runs/100%25#1", {}),
        ("runs/42?keep_last=3", "file", "runs/42", {"keep_last": "3"}),
        ("runs/42?best_metric=a%20b", "file", "runs/42", {"best_metric": "a b"}),
        ("runs/42?", "file", "runs/42", {}),
        ("~/runs", "file", "~/runs", {}),
        ("C:/runs", "file", "C:/runs", {}),
        ("./s3:/runs", "file", "./s3:/runs", {}),
        ("at 12:30/runs:", "file", "at 12:30/runs:", {}),
        ("mail@host/x", "file", "mail@host/x", {}),
        ("file:///data/a%20b%3F", "file", "/data/a b?", {}),
        ("file:///data/z%C3%BC%FF", "file", "/data/zü\udcff", {}),
        ("file://localhost/data/x", "file", "/data/x", {}),
        ("FILE:///data/x", "file", "/data/x", {}),
        ("memory://x", "memory", "x", {}),
        ("memory://a%20b/c?keep_last=1", "memory", "a%20b/c", {"keep_last": "1"}),
        ("s3://bucket/path/me@home", "s3", "bucket/path/me@home", {}),
        (Path("runs/a?keep_last=3"), "file", "runs/a?keep_last=3", {}),
        (Path("/data/memory:/x%20y"), "file", "/data/memory:/x%20y", {}),
    ],
)
def test_urls(text: str | Path, scheme: str, location: str, options: dict[str, str]) -> None:
    assert parse_url(text) == StoreURL(scheme, location, options)


class BytesPath(os.PathLike[bytes]):
    def __fspath__(self) -> bytes:
        return b"runs"

    def __repr__(self) -> str:
        return "BytesPath()"


BAD_URLS: list[Any] = [
    "",
    "?keep_last=3",
    "file://",
    "file://data/x",
    "file://host/data",
    "memory://",
    "a\0b",
    "file:///a%00b",
    "file:/data/x",
    "s3:/bucket/x",
    " s3://bucket/x",
    "simplecache::s3://bucket/x",
    b"runs",
    None,
    42,
    BytesPath(),
]


@pytest.mark.parametrize("url", BAD_URLS, ids=repr)
def test_bad_urls(url: Any) -> None:
    with pytest.raises(InvalidURL) as caught:
        Store(url)
    assert isinstance(caught.value, ValueError)


def test_a_secret_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(InvalidURL) as caught:
        Store("s3://key:hunter2@bucket/run")
    assert "hunter2" not in str(caught.value)


def test_an_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(UnknownScheme, match="did you mean memory://"):
        Store("memroy://x")


def test_without_a_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BackendError, match="current folder"):
        Store("runs")
    with Store(str(tmp_path / "runs")) as store:
        write(store)
        assert pickle.loads(pickle.dumps(store)).names() == store.names()


@pytest.mark.parametrize("name", ["a b", "100%25", "a#b", "Zürich", "new\nline", "-rf"])
def test_a_path_is_taken_as_it_stands(tmp_path: Path, name: str) -> None:
    for url in (str(tmp_path / name), tmp_path / name):
        with Store(url) as store:
            write(store)
    assert (tmp_path / name / "log" / "000000000001").is_file()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_question_mark_needs_a_path_object(tmp_path: Path) -> None:
    with Store(tmp_path / "a?keep_last=3") as store:
        write(store)
    assert [p.name for p in tmp_path.iterdir()] == ["a?keep_last=3"]


def test_the_same_place_by_path_and_by_url(tmp_path: Path) -> None:
    with Store(tmp_path / "a b") as store, Store(f"file://{tmp_path}/a%20b") as same:
        assert write(store) == same.checkpoint().id


def test_a_relative_path_stays_where_it_was_when_the_store_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Store("run") as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        write(store)
    assert (tmp_path / "run" / "log").is_dir()


@pytest.mark.parametrize("owner", ["", "x" * 513, 7])
def test_bad_owners(owner: Any) -> None:
    with pytest.raises(UsageError, match="owner"):
        Store("memory://x", owner=owner)


# --- a place without a store


def test_reading_where_nothing_is_creates_nothing(tmp_path: Path) -> None:
    with Store(tmp_path / "no" / "run") as store:
        for read in (store.checkpoint, lambda: store.checkpoint(step=3), store.load):
            with pytest.raises(StoreNotFound, match="run") as caught:
                read()
            assert isinstance(caught.value, FileNotFoundError)
        assert store.checkpoints() == list(store) == []
        assert store.names() == {}
        assert "latest" not in store
        assert store.verify() == []
        assert store.gc().keys == ()
    with Store(tmp_path / "no" / "run", acquire=False) as store:
        for change in (lambda: store.tag("best", "latest"), lambda: store.delete("latest")):
            with pytest.raises(NotFound):
                change()
        assert store.prune() == []
    assert list(tmp_path.iterdir()) == []


def test_opening_a_store_touches_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "run").close()
    assert list(tmp_path.iterdir()) == []


# --- names, steps, order


@pytest.mark.parametrize("name", ["a", "A-Z_0.9", "..a", "...", "-", "_", "x" * 128, "latest", "e1", "e1-s2", "con"])
def test_names(store: Store, name: str) -> None:
    made = write(store, name)
    assert store.names() == {name: made}
    assert name in store
    assert store.checkpoint(name).name == name


BAD_NAMES: list[Any] = [
    "",
    ".",
    "..",
    "a/b",
    "a b",
    "é",
    "a\n",
    "\0",
    "x" * 129,
    "a%41",
    "e1-0123456789ab",
    "e12-s3-0123456789ab",
    None,
    7,
    b"latest",
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_bad_names(store: Store, backend: Backend, name: Any) -> None:
    with pytest.raises(InvalidName):
        store.transaction(name)
    assert list(backend.list("")) == [], "refused before anything was touched"
    made = write(store)
    with pytest.raises(InvalidName):
        store.tag(name, made)
    assert store.names() == {"latest": made}


@pytest.mark.parametrize("step", [0, 1, 10**18 - 1, np.int64(5), np.uint8(200), None])
def test_steps(store: Store, step: Any) -> None:
    made = write(store, step=step)
    found = store.checkpoint()
    assert found.step == step
    assert step is None or (type(found.step) is int and store.checkpoint(step=step).id == made)


@pytest.mark.parametrize("step", [-1, True, 1.0, "1", 10**18, np.float64(3)], ids=repr)
def test_bad_steps(store: Store, step: Any) -> None:
    for call in (store.transaction, store.checkpoint):
        with pytest.raises(UsageError if call == store.transaction else (UsageError, StoreNotFound)):
            call(step=step)
    write(store)
    with pytest.raises(UsageError, match="step"):
        store.checkpoint(step=step)


def test_checkpoints_come_in_the_order_of_their_commits(store: Store) -> None:
    made = [write(store, name, step=step) for name, step in [("b", 9), ("a", 1), ("b", 5), ("a", 9), ("c", None)]]
    assert [c.id for c in store.checkpoints()] == [c.id for c in store] == made
    assert [(c.name, c.step) for c in store] == [("b", 9), ("a", 1), ("b", 5), ("a", 9), ("c", None)]
    assert store.names() == {"a": made[3], "b": made[2], "c": made[4]}
    assert list(store.names()) == ["a", "b", "c"]
    assert store.checkpoint(step=9).id == made[3], "the newest of that step"
    assert store.checkpoint(step=5).id == made[2]


def test_what_is_not_there_is_told_with_what_is(store: Store) -> None:
    made = write(store, "latest", step=7)
    with pytest.raises(CheckpointNotFound, match="did you mean 'latest'"):
        store.checkpoint("lates")
    with pytest.raises(CheckpointNotFound, match="it has: latest"):
        store.checkpoint("zzz")
    with pytest.raises(CheckpointNotFound, match=r"step 8.*: 7"):
        store.checkpoint(step=8)
    with pytest.raises(CheckpointNotFound, match="pruned"):
        store.checkpoint("e1-0123456789ab")
    with pytest.raises(UsageError, match="not both"):
        store.checkpoint(made, step=7)
    with pytest.raises(UsageError):
        store.checkpoint(7)  # type: ignore[arg-type]


def test_in(store: Store) -> None:
    made = write(store, "latest")
    found = store.checkpoint()
    assert "latest" in store
    assert made in store
    assert found in store
    assert "lates" not in store
    assert 7 not in store
    assert None not in store
    store.delete(made)
    assert made not in store
    assert found not in store


# --- what a checkpoint says


def test_what_was_saved_comes_back(store: Store) -> None:
    files = {"a.bin": b"abc", "b/c.txt": b"", "b/d": bytes(1000)}
    metadata = {"note": "Grüße\n", "n": [1, 2.5, None, True, {"deep": []}], "big": 10**30}
    before = datetime.now(timezone.utc)
    made = write(store, "best", files, step=3, metrics={"loss": 0.25}, metadata=metadata)
    found = store.checkpoint("best")
    assert (found.id, found.name, found.step, found.metrics) == (made, "best", 3, {"loss": 0.25})
    assert (found.metadata, found.sampler_state) == (metadata, None)
    assert found.files == {path: len(data) for path, data in files.items()}
    assert found.nbytes == 1003
    assert abs(found.created - before) < timedelta(minutes=5)
    assert found.created.tzinfo is timezone.utc
    assert contents(store, made) == files
    assert made.startswith("e1-s3-")
    assert made in repr(found)


def test_the_checkpoint_of_a_transaction_is_the_one_in_the_store(store: Store) -> None:
    with store.transaction(metadata={"a": 1}) as tx, tx.open("x") as file:
        file.write(b"y")
        with pytest.raises(UsageError, match="not committed"):
            _ = tx.checkpoint
    assert tx.checkpoint == store.checkpoint()
    assert hash(tx.checkpoint) == hash(store.checkpoint())
    assert tx.checkpoint.id == tx.id
    assert tx.checkpoint.metadata == store.checkpoint().metadata == {"a": 1}
    assert tx.checkpoint != tx.id
    with store_on(new_memory()) as other:
        write(other)
        assert other.checkpoint() != store.checkpoint()


class Sampler:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


def test_sampler_state(store: Store) -> None:
    write(store, sampler=Sampler({"epoch": 3, "consumed": 12800}))
    assert store.checkpoint().sampler_state == {"epoch": 3, "consumed": 12800}


@pytest.mark.parametrize(
    "sampler", [{"epoch": 3}, 7, Sampler({1: 2}), Sampler({"x": object()})], ids=["dict", "int", "keys", "values"]
)
def test_bad_samplers(store: Store, backend: Backend, sampler: Any) -> None:
    with pytest.raises(UsageError, match="sampler"):
        store.transaction(sampler=sampler)
    assert list(backend.list("")) == []


RECURSIVE: list[Any] = []
RECURSIVE.append(RECURSIVE)


NO_JSON = [{1, 2}, object(), (1, 2), {"a": (1,)}, {1: 2}, {"a": b"x"}, float("nan"), [float("inf")], RECURSIVE, np.float32(1)]


@pytest.mark.parametrize("metadata", NO_JSON, ids=lambda v: type(v).__name__)
def test_metadata_that_is_no_json(store: Store, backend: Backend, metadata: Any) -> None:
    with pytest.raises(UsageError, match="metadata must be plain JSON"):
        store.transaction(metadata=metadata)
    assert list(backend.list("")) == []


def test_metadata_that_nobody_would_read_back(store: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptstore.transaction.MANIFEST_LIMIT", 2000)
    write(store, metadata="short")
    before, data = state_of(backend), folders(backend)
    with pytest.raises(UsageError, match="as a file"):
        write(store, metadata="long" * 500)
    assert (state_of(backend), folders(backend)) == (before, data)


def test_metadata_is_as_it_was_when_the_transaction_began(store: Store) -> None:
    metadata = {"a": [1]}
    with store.transaction(metadata=metadata):
        metadata["a"].append(2)
    assert store.checkpoint().metadata == {"a": [1]}


def test_metrics_of_many_kinds(store: Store) -> None:
    given_metrics = {
        "np": np.float32(0.5),
        "zero_dim": np.array(2),
        "int": 3,
        "bool": True,
        "inf": float("inf"),
        "-inf": -np.inf,
        "Ünï": 1e-300,
    }
    write(store, metrics=given_metrics)
    assert store.checkpoint().metrics == {k: float(v) for k, v in given_metrics.items()}
    assert all(type(v) is float for v in store.checkpoint().metrics.values())
    write(store, metrics={"loss": float("nan")})
    assert np.isnan(store.checkpoint().metrics["loss"])
    assert np.isnan(store.checkpoint().manifest.metrics["loss"])


NO_METRICS: list[Any] = [
    {"a": "x"},
    {"a": [1, 2]},
    {"a": None},
    {"a": 1j},
    {1: 2.0},
    {"a" * 1025: 1.0},
    "loss",
    [("a", 1)],
    7,
    0.0,
    "",
]


@pytest.mark.parametrize("metrics", [*NO_METRICS, {"a": 10**400}], ids=lambda v: repr(v)[:20])
def test_bad_metrics(store: Store, backend: Backend, metrics: Any) -> None:
    with pytest.raises(UsageError, match="metrics"):
        store.transaction(metrics=metrics)
    assert list(backend.list("")) == []


# --- transactions


def test_an_exception_inside_publishes_nothing_and_leaves_nothing(store: Store, backend: Backend) -> None:
    write(store)
    before, data = state_of(backend), folders(backend)
    with pytest.raises(ZeroDivisionError), store.transaction() as tx:
        with tx.open("a") as file:
            file.write(b"complete")
        unfinished = tx.open("b")
        unfinished.write(b"half")
        raise ZeroDivisionError
    assert (state_of(backend), folders(backend)) == (before, data)
    with pytest.raises(UsageError):
        _ = tx.checkpoint
    with pytest.raises(UsageError, match="not open"):
        tx.open("c")


def refused(store: Store, backend: Backend, match: str, act: Callable[[Any], object]) -> None:
    """Check that a transaction in which `act` was done refuses to commit, and leaves nothing."""
    write(store)
    before, data = state_of(backend), folders(backend)
    with pytest.raises(UsageError, match=match), store.transaction() as tx:
        with tx.open("good") as file:
            file.write(b"good")
        act(tx)
    assert (state_of(backend), folders(backend)) == (before, data)


def test_half_a_file_is_never_published(store: Store, backend: Backend) -> None:
    def leave(tx: Any) -> None:
        try:
            with tx.open("half") as file:
                file.write(b"half")
                raise ZeroDivisionError
        except ZeroDivisionError:
            pass

    refused(store, backend, "half was left by ZeroDivisionError", leave)


def test_a_file_that_is_still_open_is_never_published(store: Store, backend: Backend) -> None:
    refused(store, backend, "still open.*: open.txt", lambda tx: tx.open("open.txt").write(b"x"))


def test_half_a_tree_is_never_published(store: Store, backend: Backend, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    source.mkdir()
    (source / "a").write_bytes(b"a")
    (source / "b").symlink_to("nowhere")

    def add(tx: Any) -> None:
        with pytest.raises(NotFound):
            tx.add_tree(source)

    refused(store, backend, "tree", add)


def test_a_write_that_failed_and_was_ignored_is_never_published(backend: Backend) -> None:
    faulty = FaultyBackend(backend)
    with store_on(faulty) as store:

        def ignore(tx: Any) -> None:
            faulty.plan.append(Fault("writer.write", faulty.calls["writer.write"] + 1, before=KeyboardInterrupt()))
            file = tx.open("big")
            with pytest.raises(KeyboardInterrupt):
                file.write(bytes(9 << 20))
            faulty.plan.clear()
            file.write(b"more")
            with pytest.raises(BaseException):  # noqa: B017 - that it fails is enough, and that it may be ignored again
                file.close()

        refused(store, faulty, "big", ignore)


def test_a_write_interrupted_between_two_parts_is_never_published(
    store: Store, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, sent = FileSink._send, 0

    def interrupted(self: FileSink) -> None:
        nonlocal sent
        sent += 1
        if sent == 3:  # the first has nothing to send
            raise KeyboardInterrupt
        send(self)

    def ignore(tx: Any) -> None:
        monkeypatch.setattr(FileSink, "_send", interrupted)
        with tx.open("big") as file:
            with pytest.raises(KeyboardInterrupt):
                file.write(bytes(24 << 20))
            file.write(b"more")

    refused(store, backend, "big could not be written", ignore)


def test_a_transaction_is_used_once(store: Store) -> None:
    tx = store.transaction()
    with pytest.raises(UsageError, match="not open"):
        tx.open("early")
    with tx, tx.open("a") as file:
        file.write(b"x")
    with pytest.raises(UsageError, match="once"), tx:
        pass
    with pytest.raises(UsageError, match="not open"):
        tx.open("late")
    with pytest.raises(ValueError, match="closed"):
        file.write(b"more")
    assert len(store.checkpoints()) == 1


def test_a_checkpoint_may_be_empty(store: Store) -> None:
    with store.transaction(metadata="just this"):
        pass
    assert (store.checkpoint().files, store.checkpoint().nbytes, store.checkpoint().metadata) == ({}, 0, "just this")
    assert store.verify() == []


def test_transactions_may_overlap(store: Store) -> None:
    with store.transaction("outer") as outer, outer.open("a") as file:
        file.write(b"outer")
        inner = write(store, "inner")
        file.write(b" more")
    assert [c.name for c in store] == ["inner", "outer"]
    assert contents(store, outer.id) == {"a": b"outer more"}
    assert contents(store, inner) == {"a.bin": b"some bytes"}


WEIRD = [
    "manifest.json",
    "manifest.json.partial",
    "MANIFEST.JSON",
    "x",
    "x.partial",
    "dir.partial/x",
    ".hidden",
    "...",
    "-rf",
    "~",
    "CON",
]
WEIRD += [
    "=41",
    "A",
    "%2F",
    "ä/ö",
    "a\u0308",
    "a b",
    "a:b",
    "a\\b",
    "q?x=1#y",
    "'\"`$(x)",
    "🚀",
    "caf\udce9",
    "a\u2028b",
    "é" * 42,
    "x" * 255,
]
WEIRD += ["deep/" * 60 + "er"]


def test_weird_file_names(store: Store, tmp_path: Path) -> None:
    files = {path: path.encode("utf-8", "surrogateescape") for path in WEIRD}
    made = write(store, files=files)
    assert set(store.checkpoint().files) == set(WEIRD)
    assert contents(store, made) == files
    assert store.verify() == []
    store.checkpoint().download(tmp_path / "out")
    assert tree(tmp_path / "out") == files


@pytest.mark.parametrize("order", [1, -1])
def test_a_download_is_not_confused_by_names_like_its_own(store: Store, tmp_path: Path, order: int) -> None:
    files = {path: path.encode() for path in ["x", "x.partial", "x.partial.partial"][::order]}
    write(store, files=files)
    store.checkpoint().download(tmp_path / "out")
    assert tree(tmp_path / "out") == files


def test_the_manifests_own_name_and_a_folder_of_that_name(store: Store) -> None:
    for files in ({"manifest.json": b"mine"}, {"manifest.json/x": b"mine"}):
        assert contents(store, write(store, files=files)) == files


BAD_PATHS: list[Any] = [
    "",
    "/",
    "/abs",
    "a/",
    "a//b",
    ".",
    "..",
    "./a",
    "a/./b",
    "a/../b",
    "../x",
    "new\nline",
    "nul\0",
    "del\x7f",
    "x" * 256,
    "é" * 43,
    "a/" * 3000 + "b",
    "\ud800",
    None,
    7,
    b"x",
    Path("x"),
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda v: repr(v)[:20])
def test_bad_file_names(store: Store, path: Any) -> None:
    with store.transaction() as tx:
        with pytest.raises(InvalidName):
            tx.open(path)
        with tx.open("good") as file:  # nothing was begun, so the transaction goes on
            file.write(b"x")
    assert set(store.checkpoint().files) == {"good"}


@pytest.mark.parametrize(
    ("first", "second"),
    [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/b/c", "a"), ("manifest.json/x", "manifest.json"), ("ä/x", "ä")],
)
@pytest.mark.parametrize("closed", [True, False])
def test_a_path_is_a_file_or_a_folder_and_only_once(store: Store, first: str, second: str, closed: bool) -> None:
    with store.transaction() as tx:
        file = tx.open(first)
        if closed:
            file.close()
        with pytest.raises(InvalidName, match="already"):
            tx.open(second)
        file.close()
        with tx.open(first + "b") as other:  # begins alike, but is another name
            other.write(b"x")
    assert set(store.checkpoint().files) == {first, first + "b"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=2, unique=True))
@example(["=41", "A"])
@example(["manifest.json", "=6Danifest.json"])
@example(["x.partial", "x=2Epartial"])
def test_no_two_paths_share_a_key(paths: list[str]) -> None:
    keys = []
    for path in paths:
        try:
            keys.append(file_key(check_path(path)))
        except InvalidName:
            return
    assert keys[0] != keys[1]
    assert all(set(k) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-=/") for k in keys)


@pytest.mark.parametrize("mode", ["w", "rb", "ab", "xb", "r+b"])
def test_files_are_opened_for_writing_bytes(store: Store, mode: str) -> None:
    with store.transaction() as tx, pytest.raises(UsageError, match="wb"):
        tx.open("x", mode)


def test_text_through_a_wrapper(store: Store) -> None:
    with store.transaction() as tx, tx.open("notes.txt") as raw, io.TextIOWrapper(raw, "utf-8", write_through=True) as text:
        text.write("Grüße\n")
    assert contents(store, store.checkpoint().id) == {"notes.txt": "Grüße\n".encode()}


def test_libraries_take_its_files_for_files(store: Store) -> None:
    with store.transaction() as tx:
        with tx.open("arrays.npz") as file:
            np.savez(file, ones=np.ones(3))  # only if it can also be asked to read
        with tx.open("lines") as file:
            file.writelines([b"a", b"b"])
            assert isinstance(file, io.IOBase)
            with pytest.raises(io.UnsupportedOperation):
                file.seek(0)
    checkpoint = tx.checkpoint
    with checkpoint.open("arrays.npz") as arrays:
        assert np.load(arrays)["ones"].tolist() == [1, 1, 1]
    assert checkpoint.open("lines").read() == b"ab"


BLOCK = bytes(range(256)) * 40_000  # 10 MB: more than one part
SIZES = [
    [0],
    [1],
    [len(BLOCK)],
    [len(BLOCK), len(BLOCK)],
    [5 << 20, 1, 3 << 20, 4 << 20],
    [1000] * 100,
    [8 << 20],
    [(8 << 20) + 1],
    [(4 << 20) - 1, 2, 4 << 20],
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"{len(s)}x{s[0]}")
def test_files_of_several_parts(store: Store, sizes: list[int]) -> None:
    pieces = [BLOCK[i : i + size] if size < 1 << 23 else BLOCK[:size] for i, size in enumerate(sizes)]
    with store.transaction() as tx, tx.open("big") as file:
        for piece in pieces:
            reused = bytearray(piece)
            assert file.write(reused if len(pieces) % 2 else memoryview(reused)) == len(piece)
            if reused:
                reused[:] = bytes(len(reused))  # the caller's memory is the caller's again
    whole = b"".join(pieces)
    found = store.checkpoint()
    assert found.files == {"big": len(whole)}
    with found.open("big") as read:
        assert read.read() == whole
    assert found.verify() == []


def test_many_files(store: Store) -> None:
    files = {f"d{i % 7}/f{i}": b"%d" % i * (i % 50) for i in range(300)}
    assert contents(store, write(store, files=files)) == files


def test_many_files_are_not_gone_through_for_each_of_them(store: Store) -> None:
    class Counted(dict[str, Any]):
        looks = 0

        def values(self) -> Any:
            self.looks += 1
            return super().values()

    class CountedFiles(tuple[Any, ...]):
        looks = 0

        def __iter__(self) -> Iterator[Any]:
            CountedFiles.looks += 1
            return super().__iter__()

    with store.transaction() as tx:
        known = tx._files._files = Counted()
        for i in range(200):
            with tx.open(f"f{i}") as file:
                file.write(b"%d" % i)
    assert known.looks < 5
    manifest = replace(tx.checkpoint.manifest, files=CountedFiles(tx.checkpoint.manifest.files))
    CountedFiles.looks = 0
    assert [manifest.file(f"f{i}").path for i in range(200)] == [*tx.checkpoint.files]  # type: ignore[union-attr]
    assert CountedFiles.looks == 1


def test_writes_take_any_buffer(store: Store) -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3)
    with store.transaction() as tx, tx.open("x") as file:
        assert file.write(memoryview(array)) == 24  # bytes, not elements
        assert file.write(b"") == 0
    assert contents(store, tx.id) == {"x": array.tobytes()}


# --- adding files


def test_add_file_and_tree(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "model"
    files = {"config.json": b"{}", "tok/vocab.txt": b"a\nb", "tok/deep/empty": b"", "weird name\udcff": b"x", "big": BLOCK}
    for path, data in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    (source / "hollow").mkdir()
    (source / "link").symlink_to("config.json")
    with store.transaction() as tx:
        tx.add_tree(source)
        tx.add_tree(str(source), into="copy/of")
        tx.add_file("one.json", source / "config.json")
        tx.add_file("two.json", str(source / "link"))
    expected = {**files, "link": b"{}"}
    expected |= {f"copy/of/{path}": data for path, data in expected.items()}
    expected |= {"one.json": b"{}", "two.json": b"{}"}
    assert contents(store, tx.id) == expected


def test_what_is_no_file_cannot_be_added(store: Store, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with store.transaction() as tx:
        for source in ("fifo", "folder"):
            with pytest.raises((UsageError, ckptstore.errors.BackendError), match=source):
                tx.add_file("x", tmp_path / source)
        for source in ("missing", "dangling"):
            with pytest.raises(NotFound, match=source):
                tx.add_file("x", tmp_path / source)
        with pytest.raises(UsageError, match="regular"):
            tx.add_file("x", "/dev/zero")
        with pytest.raises(UsageError, match="not a folder"):
            tx.add_tree(tmp_path / "missing")
        with tx.open("x") as file:
            file.write(b"taken only now")
    assert contents(store, tx.id) == {"x": b"taken only now"}


@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_a_store_is_not_added_to_itself(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "train.py").write_text("pass")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.py").write_text("pass")
    with Store(f"{scheme}{tmp_path}/runs?single_writer=1") as store:
        write(store)
        for folder in (tmp_path, tmp_path / "runs" / "data"):
            with pytest.raises(UsageError, match="beside it"), store.transaction() as tx:
                tx.add_file("first.py", tmp_path / "train.py")
                tx.add_tree(folder)
        with store.transaction() as tx:
            tx.add_tree(tmp_path / "src")
        assert [*tx.checkpoint.files] == ["model.py"]


def test_nothing_of_a_store_is_copied_before_it_is_known_for_one_s_own(tmp_path: Path) -> None:
    with Store(tmp_path / "runs") as store:
        write(store)
        os.mkfifo(tmp_path / "runs" / "a pipe")
        with pytest.raises(UsageError, match="beside it"), store.transaction() as tx:
            tx.add_tree(tmp_path)


def test_a_tree_is_added_to_a_store_that_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "model.py").write_text("pass")
    with Store(tmp_path / "runs", acquire=False) as store, store.transaction() as tx:
        assert not (tmp_path / "runs").exists()
        tx.add_tree(tmp_path / "src")
    assert [*tx.checkpoint.files] == ["model.py"]


@pytest.mark.parametrize(
    "make",
    [lambda p: p.symlink_to("real"), os.mkfifo, lambda p: p.symlink_to("/dev/zero")],
    ids=["link to folder", "fifo", "device"],
)
def test_what_is_neither_file_nor_folder_cannot_be_in_a_tree(store: Store, tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "t" / "real").mkdir(parents=True)
    make(tmp_path / "t" / "odd")
    with pytest.raises(UsageError, match="odd"), store.transaction() as tx:
        tx.add_tree(tmp_path / "t")
    assert store.checkpoints() == []


# --- reading


def test_open_and_load_say_what_files_there_are(store: Store) -> None:
    write(store, files={"a": b"", "b/c": b""})
    for read in (store.checkpoint().open, store.checkpoint().load):
        with pytest.raises(NotFound, match=r"no file 'b'; it has: a, b/c"):
            read("b")
    with pytest.raises(NotFound, match=r"state\.pt"):
        store.load()


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(-1, 60)),
        st.tuples(st.just("readinto"), st.integers(0, 60)),
        st.tuples(st.just("seek"), st.integers(0, 120)),
        st.tuples(st.just("seek"), st.integers(-60, 60), st.just(io.SEEK_CUR)),
        st.tuples(st.just("seek"), st.integers(-120, 20), st.just(io.SEEK_END)),
        st.tuples(st.just("tell")),
        st.tuples(st.just("readline")),
        st.tuples(st.just("peek_all")),
    ),
    max_size=15,
)


def same_behaviour(ours: Any, theirs: Any, operations: list[tuple[Any, ...]]) -> None:
    def outcome(file: Any, name: str, *arguments: Any) -> Any:
        try:
            if name == "readinto":
                buffer = bytearray(arguments[0])
                return file.readinto(buffer), bytes(buffer)
            return getattr(file, name)(*arguments)
        except (ValueError, OSError):
            return "refused"

    for name, *arguments in operations:
        if name == "peek_all":
            place = theirs.tell()
            assert ours.read() == theirs.read()
            assert ours.seek(place) == theirs.seek(place)
        elif name == "seek" and (arguments[0] < 0 or len(arguments) > 1):
            where = [0, theirs.tell(), len(theirs.getvalue())][arguments[1] if len(arguments) > 1 else 0] + arguments[0]
            if where >= 0:  # below 0, BytesIO stops at 0 and raw files refuse
                assert ours.seek(*arguments) == theirs.seek(*arguments)
            else:
                with pytest.raises((ValueError, OSError)):
                    ours.seek(*arguments)
        else:
            assert outcome(ours, name, *arguments) == outcome(theirs, name, *arguments)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.binary(max_size=100), part=st.integers(1, 40), operations=OPERATIONS)
def test_open_reads_like_a_file_in_memory(data: bytes, part: int, operations: list[tuple[Any, ...]]) -> None:
    backend = new_memory()
    backend.capabilities = replace(backend.capabilities, part_size=part)  # type: ignore[misc]
    with store_on(backend) as store:
        made = write(store, files={"x": data})
        found = store.checkpoint(made)
        entry = found.manifest.files[0]
        assert len(entry.chunks) >= len(data) / part
        raw = VerifiedFile(backend, f"data/{made}/x", entry)
        for ours in (found.open("x"), io.BufferedReader(raw, 5)):  # type: ignore[type-var]
            with ours:
                same_behaviour(ours, io.BytesIO(data), operations)
            with pytest.raises(ValueError, match="closed"):
                ours.read()


def test_only_the_good_part_of_a_damaged_file_comes_out() -> None:
    backend = new_memory()
    backend.capabilities = replace(backend.capabilities, part_size=1 << 20)  # type: ignore[misc]
    with store_on(backend) as store:
        made = write(store, files={"x": BLOCK})
        key = f"data/{made}/x"
        bad = bytearray(BLOCK)
        bad[(3 << 20) + 5] ^= 1
        objects(backend)[key] = bytes(bad)
        with store.checkpoint(made).open("x") as file:
            assert file.read(3 << 20) == BLOCK[: 3 << 20]
            with pytest.raises(DamagedFile, match=r"3145728–4194303"):
                file.read(1)
            file.seek(4 << 20)
            assert file.read() == BLOCK[4 << 20 :]
        (damage,) = store.verify()
        assert (damage.id, damage.path, damage.ranges) == (made, "x", ((3 << 20, 4 << 20),))


def test_verify_tells_progress(store: Store) -> None:
    write(store, files={"a": BLOCK, "b": b"x", "c": b""})
    write(store, files={"d": bytes(1000)})
    done: list[int] = []
    assert store.verify(progress=done.append) == []
    assert sum(done) == len(BLOCK) + 1 + 1000


def damage_key(backend: Backend, key: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change a stored object behind the store's back; None removes it."""
    data = change(backend.get(key, 1 << 30))
    backend.delete([key])
    if data is not None:
        backend.put_if_absent(key, data)


@pytest.mark.parametrize(
    ("change", "ranges"),
    [
        (lambda d: bytes([d[0] ^ 128]) + d[1:], ((0, 1000),)),
        (lambda d: None, ((0, 1000),)),
        (lambda d: d[:-1], ((0, 1000),)),
        (lambda d: b"", ((0, 1000),)),
        (lambda d: d + b"more", ((1000, 1004),)),
    ],
    ids=["flipped", "missing", "shorter", "empty", "longer"],
)
def test_verify_says_which_bytes_of_which_file(
    store: Store, backend: Backend, change: Callable[[bytes], bytes | None], ranges: Any
) -> None:
    whole = write(store, "a")
    made = write(store, "b", files={"good": b"x", "bad": bytes(range(250)) * 4})
    damage_key(backend, f"data/{made}/bad", change)
    (damage,) = store.verify()
    assert (damage.id, damage.path, damage.ranges) == (made, "bad", ranges)
    assert store.verify("b") == store.verify(made) == store.checkpoint("b").verify() == [damage]
    assert store.verify(whole) == []
    with pytest.raises(DamagedFile), store.checkpoint("b").open("bad") as file:
        file.read()
    with store.checkpoint("b").open("good") as file:
        assert file.read() == b"x"


def test_verify_says_that_a_manifest_is_damaged(store: Store, backend: Backend) -> None:
    made = write(store)
    damage_key(backend, f"data/{made}/manifest.json", lambda d: d[:-1] + b" ")
    (damage,) = store.verify()
    assert (damage.id, damage.path) == (made, "")
    assert "manifest" in damage.reason


# --- downloading


def test_download(store: Store, tmp_path: Path) -> None:
    files = {"a": b"abc", "b/c/d": BLOCK, "b/e": b""}
    write(store, files=files)
    target = tmp_path / "new" / "folder"
    assert store.checkpoint().download(str(target)) == target
    assert tree(target) == files


def test_download_never_replaces(store: Store, tmp_path: Path) -> None:
    write(store, files={"a": b"new", "b/c": b"new"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c").symlink_to("dangling")
    (tmp_path / "other").write_bytes(b"old")
    with pytest.raises(AlreadyExists, match="b/c"):
        store.checkpoint().download(tmp_path)
    assert sorted(os.listdir(tmp_path / "b")) == ["c"]
    assert not (tmp_path / "a").exists()
    (tmp_path / "b" / "c").unlink()
    store.checkpoint().download(tmp_path)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b" / "c").read_bytes() == b"new"
    assert (tmp_path / "other").read_bytes() == b"old"


def test_download_stops_at_damage(store: Store, backend: Backend, tmp_path: Path) -> None:
    made = write(store, files={"a": b"good", "b": BLOCK})
    damage_key(backend, f"data/{made}/b", lambda d: d[:-1] + b"?")
    with pytest.raises(DamagedFile, match="checksum"):
        store.checkpoint().download(tmp_path / "out")
    assert tree(tmp_path / "out") == {"a": b"good"}


def test_download_is_durable(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, files={"a": b"x", "b/c": b"y"})
    flushed: set[tuple[str, int]] = set()
    fsync = os.fsync

    def spy(fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        flushed.add((path, len(os.listdir(path)) if os.path.isdir(path) else os.fstat(fd).st_size))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", spy)
    store.checkpoint().download(tmp_path / "new" / "out")
    out = tmp_path / "new" / "out"
    for folder in (tmp_path, tmp_path / "new", out, out / "b"):
        assert any(path == str(folder) for path, _ in flushed), f"{folder} was not flushed"
    assert {(str(out), 2), (str(out / "b"), 1)} <= flushed, "flushed with their files in place"
    assert sum(path.startswith(f"{out}/") and size == 1 and not os.path.isdir(path) for path, size in flushed) == 2


# --- keeping house


def test_retired_data_is_deleted(backend: Backend) -> None:
    with store_on(backend, keep_last=1) as store:
        made = [write(store, step=i) for i in range(4)]
    assert folders(backend) == {made[-1]}
    assert [c.id for c in store] == [made[-1]]


def test_a_deletion_that_failed_is_tried_again(backend: Backend) -> None:
    faulty = FaultyBackend(backend, [Fault("delete", 0, before=ckptstore.errors.BackendError("not now"))])
    with store_on(faulty, keep_last=1) as store:
        first = [write(store) for _ in range(3)]
        store.close()
        assert folders(backend) == set(first)
        assert set(state_of(backend).retired) == set(first[:2])
        faulty.plan.clear()
        last = write(store)
    assert folders(backend) == {last}


def test_what_fails_in_the_background_does_not_fail_the_next_save(backend: Backend) -> None:
    faulty = FaultyBackend(backend, [Fault("delete", 0, before=MemoryError())])
    with store_on(faulty, keep_last=1) as store:
        made = [write(store) for _ in range(4)]
        faulty.plan.clear()
        made.append(write(store))
    assert folders(backend) == {made[-1]}


def test_prune(store: Store, backend: Backend) -> None:
    made = [write(store, step=i) for i in range(5)]
    assert store.prune() == []
    store.tag("best", made[1])
    with store_on(backend, keep_last=1, acquire=False) as strict:
        assert strict.prune() == sorted([made[0], made[2], made[3]])
        assert strict.prune() == []
    assert [c.id for c in store] == [made[1], made[4]]
    assert folders(backend) == {made[1], made[4]}


def test_prune_sees_what_others_committed(store: Store, backend: Backend) -> None:
    with store_on(backend, keep_last=1, acquire=False) as strict:
        write(strict)
        made = [write(store) for _ in range(3)]
        assert len(strict.prune()) == 3
    assert folders(backend) == {made[-1]}


def test_delete_by_name(store: Store, backend: Backend) -> None:
    old, new = write(store), write(store)
    store.tag("best", new)
    assert store.delete("latest") is None, "another name still points to it"
    assert store.names() == {"best": new}
    assert [c.id for c in store] == [old, new]
    assert store.delete("best") == new
    assert store.names() == {}
    assert [c.id for c in store] == [old]
    assert folders(backend) == {old}


def test_delete_by_id_takes_all_names_along(store: Store, backend: Backend) -> None:
    old, new = write(store), write(store)
    store.tag("best", new)
    assert store.delete(store.checkpoint("best")) == new
    assert store.names() == {}
    assert store.delete(old) == old
    assert folders(backend) == set()
    assert store.checkpoints() == []
    assert write(store) == store.checkpoint().id


def test_delete_what_is_not_there(store: Store) -> None:
    made = write(store)
    gone = store.checkpoint()
    store.delete(made)
    for target in ("latest", made, gone):
        with pytest.raises(CheckpointNotFound):
            store.delete(target)
    for wrong in (7, None, b"latest"):
        with pytest.raises(UsageError):
            store.delete(wrong)  # type: ignore[arg-type]


def test_delete_and_tag_see_what_others_saved(store: Store, backend: Backend) -> None:
    write(store)
    with store_on(backend, acquire=False, keep_last="all") as evaluation:
        scored = write(evaluation, "eval")
        assert store.tag("best", "eval").id == scored
        more = write(evaluation, "more")
        assert store.delete("more") == more
        assert evaluation.delete("best") is None


def test_a_pruned_checkpoint_says_so(store: Store) -> None:
    made = write(store)
    found, unread = store.checkpoint(), store.checkpoint()
    assert found.files
    store.delete(made)
    for read in (lambda: found.open("a.bin"), lambda: unread.files, found.load, found.verify, unread.verify):
        with pytest.raises(NotFound):
            read()


def test_tag(store: Store) -> None:
    first, second = write(store), write(store)
    assert store.tag("best", first).id == first
    assert store.tag("prod", "best").id == first
    assert store.tag("best", store.checkpoint(second)).id == second
    assert store.names() == {"best": second, "latest": second, "prod": first}
    assert store.checkpoint("best").name == "latest", "the name it was saved under"
    with pytest.raises(CheckpointNotFound):
        store.tag("best", "nothing")
    with pytest.raises(UsageError):
        store.tag("best", 7)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="to point to"):
        store.tag("best", None)  # type: ignore[arg-type]
    assert store.names()["best"] == second


def die_before_the_commit(backend: Backend, newer: Store) -> str:
    """Let a job die when its data is written but not committed, after `newer` has acquired the store; return the id."""
    with pytest.raises(Killed), store_on(dying := Mortal(backend), keep_last="all") as old, old.transaction() as tx:
        newer.acquire()
        for path, size in {"a": 1000, "b": 234}.items():
            with tx.open(path) as file:
                file.write(bytes(size))
        dying.plan.append(Fault("writer.finish", 3, after=dying.die))
    return tx.id


def test_gc_reports_what_it_collected(backend: Backend) -> None:
    with store_on(backend, keep_last="all") as job:
        kept = write(job)
        with store_on(backend) as newer:
            litter = die_before_the_commit(backend, newer)
            backend.put_if_absent("data/notes/readme.txt", b"mine")
            size = sum(info.size for info in backend.list(f"data/{litter}/"))
            with store_on(backend, acquire=False) as anybody:
                found = anybody.gc()
            assert (found.ids, found.nbytes, found.foreign, found.spared) == ((litter,), size, ("notes",), ())
            assert len(found.keys) == 3
            assert size > 1234
            assert folders(backend) == {kept, "notes"}
            assert newer.gc().keys == ()


def test_acquiring_collects_what_the_dead_left(backend: Backend) -> None:
    with store_on(backend) as newer, store_on(backend, keep_last="all") as newest:
        litter = die_before_the_commit(backend, newer)
        assert litter in folders(backend)
        newest.acquire()
        assert folders(backend) == set()


def test_gc_leaves_alone_what_may_be_about_to_be_committed(store: Store, backend: Backend) -> None:
    kept = write(store)
    with store.transaction() as tx:
        for i in range(70):  # more than are held back, so that some are on disk
            tx.open(f"{i}").close()
        assert tx.id in folders(backend)
        with store_on(backend, acquire=False) as tool:
            assert store.gc().keys == tool.gc().keys == ()
    assert folders(backend) == {kept, tx.id}
    assert store.verify() == []


def test_jobs_that_save_once_leave_no_growing_list_of_what_is_gone(backend: Backend) -> None:
    """Each collects what the one before has retired, and says so in its own record."""
    for step in range(6):
        with store_on(backend, keep_last=1) as job:
            kept = write(job, step=step)
        assert len(state_of(backend).retired) <= 1
        assert folders(backend) == {kept}


def test_gc_collects_the_unfinished_names_of_finished_files(tmp_path: Path) -> None:
    """A file that has its name, and the disk then refused to remove the one it was written under: that would keep its data for ever."""
    with store_on(LocalBackend(str(tmp_path)), keep_last="all") as store:
        files = {f"{kept}/a.bin" for kept in (write(store, files={"a.bin": b"a" * 100}), write(store, files={"a.bin": b"b"}))}
        for file in files:
            os.link(tmp_path / "data" / file, tmp_path / "data" / f"{file}.0123456789abcdef.partial")
        with store_on(LocalBackend(str(tmp_path)), acquire=False) as tool:
            found = tool.gc()
        assert set(found.keys) == {f"data/{file}.0123456789abcdef.partial" for file in files}
        assert (found.ids, found.nbytes) == ((), 101)
        assert store.verify() == [] and litter(store) == []
        assert len(store.checkpoints()) == 2


def test_gc_leaves_alone_the_unfinished_file_of_a_save_that_is_not_over(tmp_path: Path) -> None:
    with store_on(LocalBackend(str(tmp_path))) as store, store_on(LocalBackend(str(tmp_path)), acquire=False) as tool:
        write(store)
        with store.transaction() as tx, tx.open("big") as file:
            file.write(bytes(9 << 20))
            unfinished = [i.key for i in tool._engine.backend.list(f"data/{tx.id}/") if i.key.endswith(".partial")]
            assert len(unfinished) == 1
            assert store.gc().keys == tool.gc().keys == ()
            assert [i.key for i in tool._engine.backend.list(f"data/{tx.id}/")] == unfinished
        assert store.verify() == []


def test_gc_collects_what_was_retired_and_could_not_be_deleted_then(backend: Backend) -> None:
    faulty = FaultyBackend(backend, [Fault("delete", 0, before=BackendError("not now"))])
    with store_on(faulty, keep_last=1) as store:
        old, new = write(store), write(store)
        store._engine.settle()
        assert folders(backend) == {old, new}
        with store_on(backend, acquire=False) as anybody:
            assert anybody.gc().ids == (old,)
        assert folders(backend) == {new}


def test_a_save_begins_when_what_was_retired_before_is_gone(backend: Backend) -> None:
    slow = FaultyBackend(backend, [Fault("delete", 0, before=lambda: threading.Event().wait(0.2))])
    with store_on(slow, keep_last=1) as store:
        write(store)
        new = write(store)
        with store.transaction() as tx:
            assert folders(backend) - {tx.id} == {new}


class Part:
    """What says of itself that each rank has a part of it, as a DTensor does."""

    full_tensor = None
    device_mesh = SimpleNamespace(size=lambda: 2)
    placements = (SimpleNamespace(is_replicate=lambda: False),)


def test_a_part_is_refused_before_anything_of_it_is_written(store: Store) -> None:
    """Whoever catches the error, and goes on, commits what was complete."""
    import torch.distributed.tensor

    assert torch.distributed.tensor
    with store.transaction() as tx:
        with pytest.raises(NotSerializable, match=r"obj\['w'\] is a DTensor of which each rank has a part"):
            tx.save({"w": Part()})
        tx.save({"w": 1})
    assert store.load() == {"w": 1}


def test_what_will_not_be_loaded_is_warned_about_when_it_is_saved(store: Store) -> None:
    with store.transaction() as tx, pytest.warns(WeightsOnlyWarning, match=r"state.pt holds fractions\.Fraction, which only"):
        tx.save({"a third": Fraction(1, 3)})
    assert store.load(weights_only=False) == {"a third": Fraction(1, 3)}


def test_weights_only_none_means_true(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for torch.load, but for an environment variable that lets that run anything."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.warns(WeightsOnlyWarning):
        store.save({"a third": Fraction(1, 3)})
    for load in (store.load, store.checkpoint().load):
        with pytest.raises(UnsafeContent, match=r"fractions\.Fraction"):
            load(weights_only=None)  # type: ignore[arg-type]


def test_random_generators_go_on_where_they_were(store: Store) -> None:
    with store.transaction() as tx:
        tx.save({"w": 1})
        tx.save_rng()
    first, numbers = random.random(), np.random.rand(3)
    assert store.resume({"w": 0}) is not None
    assert random.random() == first
    assert (np.random.rand(3) == numbers).all()


# --- who may write


def test_the_older_job_is_fenced(store: Store, backend: Backend) -> None:
    made = write(store)
    with store_on(backend, keep_last="all") as newer:
        newer.acquire()
        before = state_of(backend)
        with pytest.raises(Fenced), store.transaction():
            pass
        for change in (
            store.prune,
            store.acquire,
            lambda: store.tag("best", made),
            lambda: store.tag("best", "nothing"),
            lambda: store.delete(made),
            lambda: store.delete("nothing"),
            lambda: write(store),
        ):
            with pytest.raises(Fenced):
                change()
        assert state_of(backend) == before
        assert folders(backend) == {made}
        assert store.checkpoint().id == made, "reading goes on"
        assert write(newer) == store.checkpoint().id


@pytest.mark.parametrize("change", ["prune", "delete", "tag", "save", "acquire"])
def test_the_first_thing_a_fenced_job_does_tells_it(store: Store, backend: Backend, change: str) -> None:
    write(store)
    with store_on(backend) as newer:
        newer.acquire()
    with pytest.raises(Fenced, match="stop this job"):
        {
            "prune": store.prune,
            "delete": lambda: store.delete("nothing"),
            "tag": lambda: store.tag("x", "nothing"),
            "save": lambda: write(store),
            "acquire": store.acquire,
        }[change]()


def test_acquired_in_the_middle_of_a_transaction(store: Store, backend: Backend) -> None:
    with pytest.raises(Fenced), store.transaction() as tx:
        with tx.open("a") as file:
            file.write(b"x")
        with store_on(backend) as newer:
            newer.acquire()
    assert store.checkpoints() == []
    assert folders(backend) == set()


def test_one_owner_may_have_many_stores(backend: Backend) -> None:
    ranks = [store_on(backend, owner="launch-1", keep_last="all") for _ in range(3)]
    made = [write(rank, f"rank{i}") for i, rank in enumerate(ranks)]
    assert [c.id for c in ranks[0]] == made
    assert {i.split("-")[0] for i in made} == {"e1"}
    with store_on(backend, owner="launch-2") as newer:
        newer.acquire()
    with store_on(backend, owner="launch-1") as late, pytest.raises(Fenced, match="owned the store before"):
        late.acquire()
    for rank in ranks:
        with pytest.raises(Fenced):
            write(rank)


def test_a_cooperating_writer_fences_nobody(store: Store, backend: Backend) -> None:
    write(store)
    with store_on(backend, acquire=False, keep_last="all") as evaluation:
        scored = write(evaluation, "eval")
        evaluation.tag("best", scored)
        assert state_of(backend).epoch == 1
        with pytest.raises(UsageError, match="acquire=False"):
            evaluation.acquire()
        with pytest.raises(UsageError, match="acquire=False"):
            evaluation.resume({})
        assert write(store) in evaluation
        with store_on(backend, keep_last="all") as newer:
            newer.acquire()
            evaluation.tag("best", "latest")
            assert write(evaluation, "eval").startswith("e2-")
            with pytest.raises(Fenced, match="save again"), evaluation.transaction("eval") as tx:
                with tx.open("x") as file:
                    file.write(b"x")
                with store_on(backend) as third:
                    third.acquire()
            assert write(evaluation, "eval").startswith("e3-"), "fenced for this save only"


def test_a_cooperating_writer_may_come_first(backend: Backend) -> None:
    with store_on(backend, acquire=False) as tool, store_on(backend) as job:
        first = write(tool, "imported")
        assert first.startswith("e0-")
        assert write(job).startswith("e1-")
        assert set(job.names()) == {"imported", "latest"}
        assert folders(backend) == {c.id for c in job}


# --- the object itself


def test_closing(backend: Backend) -> None:
    store = store_on(backend)
    write(store, files={"a": BLOCK})
    before = threading.active_count()
    store.close()
    store.close()
    assert threading.active_count() < before or before == 1
    assert store.checkpoint().verify() == [], "a closed store opens again by itself"
    store.close()


def test_leaving_the_block_closes_and_passes_errors_on(backend: Backend) -> None:
    faulty = FaultyBackend(backend)
    with pytest.raises(ZeroDivisionError), store_on(faulty) as store:
        write(store)
        raise ZeroDivisionError
    assert faulty.calls["close"] == 1


def test_a_store_travels_to_another_process(tmp_path: Path) -> None:
    with Store(f"{tmp_path}/run?keep_last=5", keep_every=2) as store:
        write(store)
        copy = pickle.loads(pickle.dumps(store))
        write(copy, "copy")
        code = "import pickle, sys\nwith pickle.load(sys.stdin.buffer).transaction('there') as tx: tx.open('x').close()\nprint(tx.id)"
        here = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, env=here, cwd=tmp_path
        )
        assert store.checkpoint("there").id == done.stdout.decode().strip()
        write(store)
        assert {c.id.split("-")[0] for c in store} == {"e1"}, "one job, one epoch"
        assert (copy.url, copy._retention, copy._writer.owner) == (store.url, store._retention, store._writer.owner)


def test_a_store_that_has_not_acquired_travels_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "a?b")
    copies = [pickle.loads(pickle.dumps(store)) for _ in range(3)]
    for copy in [*copies, store]:
        write(copy)
    assert state_of(LocalBackend.open(str(tmp_path / "a?b"), {})).epoch == 1
    assert pickle.loads(pickle.dumps(Store("memory://x", acquire=False)))._acquires is False


def test_eight_threads_save_at_once(backend: Backend) -> None:
    done: list[str] = []
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    with store_on(backend, keep_last="all") as store:

        def work(k: int) -> None:
            try:
                start.wait()
                for i in range(5):
                    done.append(write(store, f"thread{k}", {"x": b"%d %d" % (k, i)}, step=i))
                    store.tag("any", f"thread{k}")
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert sorted(done) == sorted(c.id for c in store)
        assert state_of(backend).epoch == 1
        for k in range(8):
            mine = [c for c in store if c.name == f"thread{k}"]
            assert [c.step for c in mine] == list(range(5))
            assert [contents(store, c.id)["x"] for c in mine] == [b"%d %d" % (k, i) for i in range(5)]
        assert store.verify() == []


def test_eight_threads_prune_each_other(backend: Backend) -> None:
    errors: list[BaseException] = []
    with store_on(backend, keep_last=1) as store:

        def work() -> None:
            try:
                for _ in range(6):
                    write(store)
            except BaseException as exc:
                errors.append(exc)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        last = write(store)
    assert folders(backend) == {last}


def test_repr_and_url_name_the_place(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        assert store.url == str(tmp_path / "run")
        assert repr(store) == f"<Store {tmp_path / 'run'}>"


# --- verdicts: what was read back whole, or damaged


def test_the_newer_verdict_counts(store: Store, backend: Backend) -> None:
    whole, rotten, _ = [write(store) for _ in range(3)]
    store.checkpoint(whole).verify()
    store.checkpoint(rotten).verify()
    store.tag("any", whole)
    assert [e.verified for e in state_of(backend).checkpoints] == [True, True, None]
    damage_key(backend, f"data/{rotten}/a.bin", lambda data: data[:-1] + b"?")
    with store_on(backend, acquire=False) as evaluation:
        assert evaluation.verify(rotten)
        evaluation.tag("any", "latest")
    assert [e.verified for e in state_of(backend).checkpoints] == [True, False, None]
    write(store)  # which once found it whole, and said so then
    assert [e.verified for e in state_of(backend).checkpoints] == [True, False, None, None]
    with store_on(backend, acquire=False, keep_last=1) as strict:
        strict.prune()
    assert whole in store, "the only one known to be whole"


def test_an_acquisition_that_cannot_collect_is_one(backend: Backend) -> None:
    with store_on(backend) as last, store_on(backend) as newer:
        litter = die_before_the_commit(backend, newer)
        for method in ("list", "delete"):
            faulty = FaultyBackend(backend, [Fault(method, 0, before=ckptstore.errors.BackendError("not now"))])
            with store_on(faulty) as job:
                job.acquire()
                faulty.plan.clear()
                assert litter in folders(backend)
                made = write(job)
        assert made in folders(backend)
        with pytest.raises(Fenced):
            write(newer)
        write(last)
        assert litter not in folders(backend)


@pytest.mark.parametrize("text", ["", "nonsense", "-", "4-", "-mine", "４-mine", "9" * 13 + "-x", 7])
def test_resolve_takes_only_what_an_error_carried(text: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save({"x": 1})
    with pytest.raises(UsageError, match="op_id"):
        store.resolve(text)
