"""Stores on whatever fsspec has a protocol for: their whole life, who may write, what is refused, what goes wrong on the way."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import races
import torch
from faulty_http import Fault, FaultyProxy, lost, unanswered
from fsspec.registry import known_implementations
from procs import Nursery
from sftp_rig import PASSWORD, USER, sftp_server
from stores import contents, write

from ckptstore import Store, cli
from ckptstore.backends._fsspec_errors import typed_error
from ckptstore.errors import (
    BackendError,
    CkptStoreError,
    FallbackWarning,
    InvalidOption,
    InvalidURL,
    NoAtomicCreate,
    PermissionDenied,
    UnknownScheme,
)

pytest_plugins = ("services",)
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # aiohttp's advice to azure-core

_numbers = itertools.count(1)


def new_url(kind: str, request: pytest.FixtureRequest) -> str:
    """Return the URL of a place that nobody has used, and see to the credentials."""
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    path = f"runs/{next(_numbers)}"
    if kind in ("abfs", "s3fs"):
        server = request.getfixturevalue("azurite" if kind == "abfs" else "seaweedfs")
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        url = f"{kind}://{server.new_bucket()}/{path}"
        return url if kind == "abfs" else f"{url}?endpoint_url={server.endpoint_url}"
    if kind == "sftp":
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": PASSWORD})
        return f"sftp://127.0.0.1:{request.getfixturevalue('sftp_port')}/{path}?username={USER}"
    return f"fsspec+file://{request.getfixturevalue('tmp_path')}/{path}?single_writer=1"


@pytest.fixture
def sftp_port(tmp_path: Path) -> Iterator[int]:
    with sftp_server(tmp_path) as port:
        yield port


def _state(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((100_000,), float(step))}


def _damage(store: Store, key: str) -> None:
    """Flip a bit in the middle of a stored file."""
    backend = store._engine.backend
    data = bytearray(backend.get(key, 1 << 30))
    data[len(data) // 2] ^= 1
    backend.replace(key, bytes(data))


@pytest.mark.parametrize("kind", ["abfs", "s3fs", "sftp", "fsspec+file"])
def test_a_life_of_a_store(request: pytest.FixtureRequest, kind: str) -> None:
    url = new_url(kind, request)
    single = {"single_writer": "1"} if kind == "sftp" else {}
    with Store(url, owner="a", keep_last=2, **single) as store:
        for step in range(4):
            store.save(_state(step), "latest", step=step)
        assert torch.equal(store.load("latest")["w"], _state(3)["w"])
    with Store(url, owner="b", keep_last=2, **single) as store:
        state = _state(9)
        resumed = store.resume(state, "latest")
        assert resumed is not None and resumed.step == 3
        assert torch.equal(state["w"], _state(3)["w"])
        with pytest.raises(ZeroDivisionError), store.transaction("latest", step=4) as tx, tx.open("big") as file:
            file.write(bytes(1 << 20))
            file.write(b"x" * (1 // 0))
        newest = store.save(_state(5), "latest", step=5).id
        _damage(store, f"data/{newest}/state.pt")
        assert [d.id for d in store.verify()] == [newest]
    with Store(url, owner="c", keep_last=1, **single) as store:
        with pytest.warns(FallbackWarning):
            assert torch.equal(store.load("latest")["w"], _state(3)["w"])
        write(store, step=6)
        store.prune()
        store.gc()
        kept = {c.id for c in store}
        listed = {info.key.split("/")[1] for info in store._engine.backend.list("data/")}
        assert listed == kept


@pytest.mark.parametrize("name", ["a" * 255, "d" * 255 + "/" + "é" * 42], ids=["file", "folder"])
def test_a_name_may_be_as_long_as_a_file_systems_names(tmp_path: Path, name: str) -> None:
    with Store(f"fsspec+file://{tmp_path}/runs?single_writer=1") as store:
        checkpoint = write(store, files={name: b"data"})
        assert store.checkpoint(checkpoint).open(name).read() == b"data"


@pytest.mark.parametrize("kind", ["abfs", "s3fs"])
def test_eight_save_at_once_and_none_loses(request: pytest.FixtureRequest, kind: str) -> None:
    url = new_url(kind, request)
    with Store(url, owner="a", keep_last="all") as first:
        first.acquire()

    def save(n: int) -> str:
        with Store(url, owner="a", keep_last="all", acquire=False) as store:
            return write(store, f"n{n}", {"a.bin": b"%d" % n})

    with ThreadPoolExecutor(8) as pool:
        saved = list(pool.map(save, range(8)))
    with Store(url, acquire=False) as store:
        assert store.names() == {f"n{n}": saved[n] for n in range(8)}
        assert [contents(store, saved[n]) for n in range(8)] == [{"a.bin": b"%d" % n} for n in range(8)]


def _environment(kind: str, request: pytest.FixtureRequest) -> dict[str, str]:
    env: dict[str, str] = request.getfixturevalue("azurite" if kind == "abfs" else "seaweedfs").env
    return env


@pytest.mark.parametrize("kind", ["abfs", "s3fs"])
def test_four_processes_create_and_one_wins_each_time(request: pytest.FixtureRequest, racers: Nursery, kind: str) -> None:
    races.check_creations(racers, new_url(kind, request), _environment(kind, request))


@pytest.mark.parametrize("owners", ["one launch", pytest.param("four jobs", marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["abfs", "s3fs"])
def test_four_processes_save_under_one_name_and_none_loses(
    request: pytest.FixtureRequest, racers: Nursery, kind: str, owners: str
) -> None:
    url = new_url(kind, request)
    url += ("&" if "?" in url else "?") + "keep_last=all"
    races.check_saves(racers, url, races.OWNERS[owners], _environment(kind, request))


@pytest.mark.parametrize("kind", ["sftp", "fsspec+file"])
def test_without_a_proven_create_writers_are_refused(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    url = new_url(kind, request).replace("?single_writer=1", "")
    with Store(url) as store, pytest.raises(NoAtomicCreate, match="single_writer=1"):
        write(store)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


# --- what cannot be opened


@pytest.mark.parametrize(
    ("url", "kind", "told"),
    [
        ("sfpt://host/x", UnknownScheme, "did you mean sftp://"),
        ("abfsss://container/x", UnknownScheme, "did you mean abfss://"),
        ("simplecache://x", InvalidURL, "only wraps other protocols"),
        ("sftp://me:hidden@host/x", InvalidURL, "never in a URL"),
        ("sftp://host/x?password=hidden", InvalidOption, "unknown option 'password'"),
        ("sftp://host/x?user=me", InvalidOption, "did you mean 'username'"),
        ("abfs://container/../x", InvalidURL, "no place"),
        ("s3fs://bucket/x::file:///x", InvalidURL, "no place"),
        ("s3fs://bucket/x?anon=yes", InvalidOption, "anon must be 0 or 1"),
        ("s3fs://bucket/x?endpoint_url=http://me:hidden@host", InvalidOption, "endpoint_url"),
    ],
)
def test_what_is_refused(url: str, kind: type[CkptStoreError], told: str) -> None:
    with pytest.raises(kind, match=told) as caught:
        Store(url)
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)


_NEEDED = ("ckptstore", "fsspec", "awscrt", "_awscrt", "tenacity", "tqdm", "zlib_ng")
_ASK_EVERY_PROTOCOL = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import ckptstore
from fsspec.registry import known_implementations
told = {}
for scheme in [*known_implementations, "s3", "gs", "s3fs", "abfss"]:
    try:
        store = ckptstore.Store(f"{scheme}://somewhere/x", single_writer="1")
        if scheme == "hdfs":  # which is opened before its package is imported
            store.names()
        told[scheme] = "opened"
    except ckptstore.errors.CkptStoreError as exc:
        told[scheme] = f"{type(exc).__name__}: {exc}"
print(json.dumps(told))
"""


def test_where_no_other_package_is_installed_each_protocol_says_what_it_needs(tmp_path: Path) -> None:
    for name in _NEEDED:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None
        found = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)
        (tmp_path / found.name).symlink_to(found)
    command = [sys.executable, "-S", "-B", "-c", _ASK_EVERY_PROTOCOL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told: dict[str, str] = json.loads(done.stdout)
    assert not [text for text in told.values() if "\n" in text]
    for schemes, named in {
        "hf": "Install huggingface_hub",
        "smb": "smbprotocol",
        "webdav": "Install webdav4",
        "oss": "Install ossfs",
        "libarchive": "No module named 'libarchive'",
        "abfs abfss az": r"pip install 'ckptstore\[azure\]'",
        "gs gcs": r"pip install 'ckptstore\[gcs\]'",
        "s3": r"pip install 'ckptstore\[s3\]'",
        "s3fs s3a": r"pip install 'ckptstore\[s3fs\]'",
        "sftp ssh": r"pip install 'ckptstore\[sftp\]'",
        "hdfs": "pyarrow",
    }.items():
        for scheme in schemes.split():
            assert re.match(f"(UnknownScheme|BackendError): .*{named}", told[scheme]), told[scheme]
    assert "only wraps other protocols" in told["simplecache"]


@pytest.mark.parametrize(
    ("class_", "told"),
    [
        ("no_such_package.FileSystem", "install no_such_package, .*No module named 'no_such_package'"),
        ("json.FileSystem", "install json, .*no attribute 'FileSystem'"),  # it is there, but of another version
    ],
)
def test_a_protocol_that_another_package_has_registered_names_it(monkeypatch: pytest.MonkeyPatch, class_: str, told: str) -> None:
    """fsspec's own hint is no more than the entry point then."""
    known = {"class": class_, "err": f"Unable to load filesystem from EntryPoint(name='other', value={class_!r})"}
    monkeypatch.setitem(known_implementations, "other", known)
    with pytest.raises(UnknownScheme, match=told) as caught:
        Store("other://place/x")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "wrong", "doing", "error", "told"),
    [
        ("abfs", "container", "ls", BackendError, "there is no store at"),
        ("abfs", "container", "save", BackendError, "is there such a bucket, container or folder"),
        ("abfs", "key", "ls", PermissionDenied, "check the credentials"),
        ("abfs", "key", "save", PermissionDenied, "check the credentials"),
        ("s3fs", "container", "ls", BackendError, "there is no store at"),
        ("s3fs", "key", "ls", PermissionDenied, "check the credentials"),
        ("s3fs", "key", "save", PermissionDenied, "check the credentials"),
        ("sftp", "key", "ls", PermissionDenied, "check the credentials"),
        ("sftp", "key", "save", PermissionDenied, "check the credentials"),
        ("sftp", "address", "ls", BackendError, "nobody answers there"),
        ("sftp", "address", "save", BackendError, "nobody answers there"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    wrong: str,
    doing: str,
    error: type[CkptStoreError],
    told: str,
) -> None:
    url = new_url(kind, request)
    url += f"{'&' if '?' in url else '?'}retry_seconds=0" + ("&single_writer=1" if kind == "sftp" else "")
    secret = "c2VjcmV0"  # base64, as Azure's are
    if wrong == "container":
        url = url.replace("://bucket-", "://no-such-bucket-")
    elif wrong == "address":
        url = url.replace(f":{request.getfixturevalue('sftp_port')}", ":9")
    elif kind == "abfs":
        (connection,) = request.getfixturevalue("azurite").env.values()
        key = connection.partition("AccountKey=")[2].partition(";")[0]
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection.replace(key, secret))
    elif kind == "s3fs":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    else:
        monkeypatch.setitem(fsspec.config.conf, "sftp", {"password": secret})
    if doing == "ls":
        assert cli.main(["ls", url]) == 3
        said = capsys.readouterr().err.strip()
    else:
        with Store(url) as store, pytest.raises(error) as caught:
            write(store)
        said = str(caught.value)
    assert told in said
    assert "\n" not in said
    assert secret not in said


@pytest.mark.parametrize("before", range(250, 310, 6))
def test_a_secret_is_not_shown_by_halves(before: int) -> None:
    """Long messages of the libraries are cut."""
    for secret in ("sftp://me:hunter2hunter2@host/x", "https://host/x?sig=hunter2hunter2"):
        told = str(typed_error(OSError(f"{'x' * before} {secret}"), "could not read", "read", creating=False))
        assert "hunter" not in told
        assert len(told) < 400


# --- lost answers


@pytest.fixture
def proxy(moto: Any) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto.endpoint_url) as running:
        yield running


@pytest.mark.parametrize("fault", [lost, unanswered])
def test_the_creation_of_a_record_goes_wrong(
    moto: Any, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """s3fs repeats requests on its own: a repeated creation meets its own record, and that is no conflict."""
    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    url = f"s3fs://{moto.new_bucket()}/run?endpoint_url={proxy.url}"
    with Store(url, owner="a") as store:
        first = write(store, step=1)
        proxy.inject(fault, lambda r: r.method == "PUT" and "/log/0" in r.path)
        second = write(store, step=2)
        assert not proxy.pending
        assert store.names() == {"latest": second}
        assert [c.id for c in store] == [first, second]
    with Store(url, acquire=False) as store:
        assert [c.id for c in store] == [first, second]
        assert store.verify() == []
