"""The ckptstore command: what it prints, where, and with which exit status."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import new_memory, store_on

import ckptstore
from ckptstore import CheckpointNotFound, Store, UsageError, envelope
from ckptstore.backends.local import LocalBackend
from ckptstore.backends.memory import MemoryBackend
from ckptstore.checkpoint import Checkpoint
from ckptstore.cli import _errors, _format, _main, main
from ckptstore.errors import FallbackWarning, PermissionDenied
from ckptstore.store import Store as StoreType

CHUNK = 8 << 20
"""Files are cut into chunks of this many bytes on a local disk."""

SAMPLER = {"epoch": 3, "consumed": 12800, "length": 50000, "seed": 0}


class Sampler:
    """Something with a state, as torch's samplers have it."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state


def save(store: StoreType, step: int | None, name: str = "latest", size: int = 1000, **more: Any) -> Checkpoint:
    """Save a checkpoint of plain files."""
    with store.transaction(name, step=step, **more) as tx:
        with tx.open("model.bin") as f:
            f.write(bytes(range(250)) * (size // 250))
        with tx.open("tokenizer/vocab.txt") as f:
            f.write(b"a b c")
    return tx.checkpoint


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store with three checkpoints, steps 10, 20 and 30; "best" is 20."""
    place = str(tmp_path / "runs" / "42")
    with Store(place, keep_last="all") as store:
        for step in (10, 20, 30):
            save(
                store, step, metrics={"loss": 10 / step}, metadata={"lr": 0.1}, sampler=Sampler({**SAMPLER, "epoch": step // 10})
            )
        store.tag("best", store.checkpoint(step=20))
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process: exit status, standard output, standard error."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(words)
        return (status, *capsys.readouterr())

    return call


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "ckptstore", *words]


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONUNBUFFERED", "PYTHONIOENCODING")}
    return {**env, "PYTHONPATH": str(Path(ckptstore.__file__).parent.parent), **more}


def spawn(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    return subprocess.run(command(*words), capture_output=True, text=True, encoding="utf-8", env=environment(**more), check=False)


def id_of(url: str, **target: Any) -> str:
    return Store(url).checkpoint(**target).id


def flip(path: Path, offset: int) -> None:
    """Flip one bit on disk."""
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


def data(url: str, step: int) -> Path:
    return Path(url, "data", id_of(url, step=step))


def flip_newest_record(url: str) -> None:
    flip(max(p for p in Path(url, "log").iterdir() if p.name.isdigit()), 200)


class TestLs:
    def test_a_table_with_the_newest_last(self, url: str, run: Any) -> None:
        status, out, err = run("ls", url)
        assert (status, err) == (0, "")
        head, *rows = out.splitlines()
        assert head.split() == ["ID", "STEP", "AGE", "SIZE", "SAVED", "AS", "NAMES", "METRICS"]
        ids = [id_of(url, step=step) for step in (10, 20, 30)]
        assert [row.split()[:2] for row in rows] == [[i, s] for i, s in zip(ids, ("10", "20", "30"), strict=True)]
        assert [row.split()[4:] for row in rows] == [  # after an age such as "0 s", and the size
            ["1.00", "kB", "latest", "loss=1"],
            ["1.00", "kB", "latest", "best", "loss=0.5"],
            ["1.00", "kB", "latest", "latest", "loss=0.333333"],
        ]

    def test_columns_with_nothing_in_them_are_left_out(self, tmp_path: Path, run: Any) -> None:
        save(Store(tmp_path), None)
        assert run("ls", str(tmp_path))[1].splitlines()[0].split() == ["ID", "AGE", "SIZE", "SAVED", "AS", "NAMES"]

    def test_metrics_of_other_names_each(self, tmp_path: Path, run: Any) -> None:
        kinds = [{"loss": 1.0}, {}, {"100%": 0.5, "a\nb": float("nan")}, {"loss": 2.5}]
        for step, metrics in enumerate(kinds):
            save(Store(tmp_path, keep_last="all"), step, metrics=metrics)
        rows = run("ls", str(tmp_path))[1].splitlines()[1:]
        assert [row.partition(" latest")[2].replace("latest", "").strip() for row in rows] == [
            *["loss=1", "", "100%=0.5  a\\nb=nan", "loss=2.5"]
        ]

    def test_what_is_known_of_a_checkpoint_is_noted(self, url: str, run: Any) -> None:
        flip(data(url, 30) / "model.bin", 5)
        with Store(url) as store:
            assert store.verify()  # the next commit writes down what it found
            store.tag("seen", "best")
        note = run("ls", url)[1].splitlines()[-1]
        assert note.endswith("found damaged")

    def test_as_json(self, url: str, run: Any) -> None:
        status, out, err = run("ls", url, "--json")
        assert (status, err) == (0, "")
        document = json.loads(out)
        assert set(document) == {"store", "checkpoints", "names", "spared", "damage", "warnings"}
        assert document["store"] == url
        assert document["names"] == {"best": id_of(url, step=20), "latest": id_of(url, step=30)}
        newest = document["checkpoints"][-1]
        created = Store(url).checkpoint(step=30).created
        assert newest.pop("created") == f"{created:%Y-%m-%dT%H:%M:%SZ}"
        assert newest == {
            "id": id_of(url, step=30),
            "name": "latest",
            "names": ["latest"],
            "step": 30,
            "nbytes": 1005,
            "metrics": {"loss": 10 / 30},
            "verified": None,
            "resumed": False,
        }

    def test_an_empty_store_says_so(self, tmp_path: Path, run: Any) -> None:
        with Store(tmp_path) as store:
            store.delete(save(store, 1))
        assert run("ls", str(tmp_path)) == (0, f"{tmp_path} holds no checkpoints\n", "")

    def test_a_damaged_record_is_damage_though_an_older_one_serves(self, url: str, run: Any) -> None:
        newest = id_of(url, step=30)
        flip_newest_record(url)
        status, out, err = run("ls", url)
        assert status == 1
        assert newest in out
        assert err.count("\n") == 1 and err.startswith("ckptstore: warning: ") and "commit record 5 is damaged" in err
        document = json.loads(run("ls", url, "--json")[1])
        assert "commit record 5" in document["damage"][0]["reason"]
        assert "using commit record 4" in document["warnings"][0]


class TestShow:
    def test_everything_about_one(self, url: str, run: Any) -> None:
        status, out, err = run("show", url, "best")
        assert (status, err) == (0, "")
        shown = dict(line.split(maxsplit=1) for line in out.splitlines() if line[0] != " ")
        assert shown["checkpoint"] == id_of(url, step=20)
        assert shown["names"] == "best"
        assert shown["step"] == "20"
        assert shown["size"] == "1.00 kB (1 005 bytes)"
        assert shown["metrics"] == "loss=0.5"
        assert shown["metadata"] == '{"lr": 0.1}'
        assert shown["sampler"] == "epoch 2, 12 800 of 50 000 samples consumed"
        assert f"ckptstore {ckptstore.__version__}" in shown["written"]
        assert "UTC" in shown["age"]
        assert [line.split() for line in out.splitlines()[-2:]] == [
            ["files", "1.00", "kB", "model.bin"],
            ["5", "B", "tokenizer/vocab.txt"],
        ]

    def test_by_name_id_or_step(self, url: str, run: Any) -> None:
        best = id_of(url, step=20)
        for words in (["best"], [best], ["--step", "20"], ["--step=20"]):
            assert best in run("show", url, *words)[1].splitlines()[0]
        assert id_of(url, step=30) in run("show", url)[1]  # latest

    def test_what_is_not_there_is_wrong_usage_and_the_nearest_is_named(self, url: str, run: Any) -> None:
        status, out, err = run("show", url, "lates")
        assert (status, out) == (2, "")
        assert "did you mean 'latest'?" in err
        assert run("show", url, "--step", "21")[0] == 2
        status, _, err = run("show", url, "best", "--step", "20")
        assert (status, err) == (2, "ckptstore: give a name, an id or --step, only one of them\n")

    def test_as_json(self, url: str, run: Any) -> None:
        document = json.loads(run("--json", "show", url, "best")[1])
        assert document["files"] == [{"path": "model.bin", "size": 1000}, {"path": "tokenizer/vocab.txt", "size": 5}]
        assert document["metadata"] == {"lr": 0.1}
        assert document["sampler_state"] == {**SAMPLER, "epoch": 2}
        assert document["writer"]["ckptstore"] == ckptstore.__version__
        assert (document["id"], document["damage"], document["unsafe"]) == (id_of(url, step=20), [], {})

    def test_a_damaged_manifest_is_told_after_what_the_record_knows(self, url: str, run: Any) -> None:
        flip(data(url, 20) / "manifest.json", 100)
        status, out, err = run("show", url, "best")
        assert status == 1
        assert "loss=0.5" in out and "files" not in out
        assert err == f"ckptstore: the manifest of {id_of(url, step=20)} is not the one that was committed\n"
        document = json.loads(run("show", url, "best", "--json")[1])
        assert (document["step"], document["damage"][0]["path"]) == (20, "")
        assert document["error"]["type"] == "DamagedManifest"

    def test_what_a_damaged_record_may_have_named_is_not_just_missing(self, url: str, run: Any) -> None:
        flip_newest_record(url)  # it tagged "best"
        status, _, err = run("show", url, "best")
        assert status == 1
        assert "commit record 5 is damaged" in err.splitlines()[-1]
        status, out, err = run("show", url)  # may have moved on, too
        assert (status, "files" in out, err.count("\n")) == (1, True, 1)


class TestWhichStore:
    def test_the_demo_takes_it_from_the_environment_too(
        self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("CKPTSTORE_URL", raising=False)
        assert "CKPTSTORE_URL, which is not set" in run("demo", "-")[2]
        monkeypatch.setenv("CKPTSTORE_URL", url)
        status, out, err = run("demo", "-")
        assert (status, out, f"{url} is in use" in err) == (2, "", True)
        assert not Path("-").exists()

    def test_the_environment_may_say(self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for words in (["ls"], ["verify"], ["show"], ["ls", "-"], ["show", "-", "latest"], ["gc"]):
            monkeypatch.delenv("CKPTSTORE_URL", raising=False)
            status, _, err = run(*words)
            assert status == 2
            assert "CKPTSTORE_URL" in err
            monkeypatch.setenv("CKPTSTORE_URL", url)
            assert run(*words)[0] == 0
        assert run("tag", "-", "mine", "latest")[0] == 0
        assert "mine" in Store(acquire=False).names()


class TestVerify:
    def test_all_good(self, url: str, run: Any) -> None:
        status, out, err = run("verify", url)
        assert (status, err) == (0, "")
        assert [line.split()[0] for line in out.splitlines()] == ["RESULT", "whole", "whole", "whole", "3"]

    def test_the_file_and_the_byte_range_are_named(self, tmp_path: Path, run: Any) -> None:
        place = str(tmp_path)
        size = 3 * CHUNK - (3 * CHUNK) % 250
        big = save(Store(place), 1, size=size).id
        save(Store(place), 2)
        flip(tmp_path / "data" / big / "model.bin", CHUNK + 17)
        (tmp_path / "data" / big / "tokenizer" / "vocab.txt").unlink()
        status, out, err = run("verify", place)
        assert (status, err) == (1, "")
        lines = out.splitlines()
        assert lines[1].split()[:3] == ["damaged", big, "1"]
        assert lines[2].strip() == f"model.bin: bytes {CHUNK}-{2 * CHUNK - 1} are missing or wrong (8.39 MB)"
        assert lines[3].strip() == "tokenizer/vocab.txt: bytes 0-4 are missing or wrong (5 B)"
        assert lines[4].split()[0] == "whole"
        assert lines[5] == "1 checkpoint damaged, 1 checkpoint whole"

        status, out, _ = run("verify", place, "--json")
        document = json.loads(out)
        assert (status, document["good"]) == (1, False)
        assert [c["result"] for c in document["checkpoints"]] == ["damaged", "whole"]
        assert [(d["id"], d["path"], d["ranges"]) for d in document["damage"]] == [
            (big, "model.bin", [[CHUNK, 2 * CHUNK]]),
            (big, "tokenizer/vocab.txt", [[0, 5]]),
        ]

    def test_remote_says_what_cannot_be_compared(self, url: str, run: Any) -> None:
        status, out, err = run("verify", url, "--remote")
        assert (status, err) == (0, "")
        assert [line.split()[0] for line in out.splitlines()] == ["RESULT", "sizes", "sizes", "sizes", "3"]
        assert "no checksum to compare" in out.splitlines()[-1]
        (data(url, 10) / "model.bin").write_bytes(b"short")
        (data(url, 20) / "model.bin").unlink()
        status, out, _ = run("verify", url, "--remote", "--json")
        document = json.loads(out)
        assert status == 1
        assert [c["result"] for c in document["checkpoints"]] == ["damaged", "damaged", "sizes"]
        assert "instead of" in document["damage"][0]["reason"] and "missing" in document["damage"][1]["reason"]

    def test_remote_compares_the_checksums_that_the_service_recorded(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = new_memory()
        good = save(store_on(backend), 1)
        bad = save(store_on(backend), 2)
        crcs = {f"data/{c.id}/{f.key}": f"crc64nvme:{f.crc:016x}" for c in (good, bad) for f in c.manifest.files}
        crcs[f"data/{bad.id}/model.bin"] = "crc64nvme:0123456789abcdef"
        real = MemoryBackend.stat
        monkeypatch.setattr(MemoryBackend, "stat", lambda self, key: replace(real(self, key), checksum=crcs.get(key)))
        status, out, _ = run("verify", backend.url, "--remote")
        assert status == 1
        assert [line.split()[0] for line in out.splitlines()[1:3]] == ["whole", "damaged"]
        assert out.splitlines()[-1] == "1 checkpoint damaged, 1 checkpoint whole"

    def test_only_what_was_asked_for(self, url: str, run: Any) -> None:
        flip(data(url, 10) / "model.bin", 0)
        assert run("verify", url, "latest")[0] == 0
        assert run("verify", url, "latest", "best", "latest")[1].count("whole") == 2 + 1
        assert run("verify", url, "latest", "--step", "10")[0] == 1
        assert run("verify", url, "--step", "10", "latest")[0] == 1
        assert run("verify", url, id_of(url, step=10))[0] == 1
        status, out, err = run("verify", url, "latest", "nope")
        assert (status, out) == (2, "")  # nothing was read
        assert "nope" in err

    def test_truncated_grown_and_manifest(self, url: str, run: Any) -> None:
        os.truncate(data(url, 10) / "model.bin", 999)
        with open(data(url, 20) / "model.bin", "ab") as f:
            f.write(b"more")
        (data(url, 30) / "manifest.json").unlink()
        status, out, _ = run("verify", url, "--json")
        damage = {d["id"]: (d["path"], d["ranges"]) for d in json.loads(out)["damage"]}
        assert status == 1
        assert damage == {
            id_of(url, step=10): ("model.bin", [[0, 1000]]),
            id_of(url, step=20): ("model.bin", [[1000, 1004]]),
            id_of(url, step=30): ("", []),
        }
        assert f"the manifest of {id_of(url, step=30)} is missing" in run("verify", url)[1]

    def test_a_damaged_newest_record_is_damage_whatever_was_asked_for(self, url: str, run: Any) -> None:
        flip_newest_record(url)
        for words in ([], ["latest"]):
            status, out, _ = run("verify", url, *words)
            assert status == 1
            assert out.splitlines()[0].startswith("damaged  commit record 5")
            assert out.splitlines()[-1] == "a commit record is damaged, " + (
                "1 checkpoint whole" if words else "3 checkpoints whole"
            )
        document = json.loads(run("verify", url, "--json")[1])
        assert [(d["id"], d["path"]) for d in document["damage"]] == [("", "")]
        assert not document["good"]

    def test_an_older_record_that_is_damaged(self, url: str, run: Any) -> None:
        """It is what a damaged newest one would fall back to."""
        flip(Path(url, "log", f"{4:012d}"), 200)
        status, out, err = run("verify", url)
        assert (status, err) == (1, "")
        assert out.splitlines()[0].startswith("damaged  commit record 4 is damaged")
        assert run("ls", url)[0] == 0

    def test_no_record_that_can_be_read(self, url: str, run: Any) -> None:
        with Store(url) as store:
            for i in range(9):
                store.tag(f"t{i}", "best")
        for record in Path(url, "log").iterdir():
            flip(record, 200)
        status, out, _ = run("verify", url, "--json")
        document = json.loads(out)
        assert (status, document["good"], document["checkpoints"]) == (1, False, [])
        assert "none of the newest commit records can be read" in document["damage"][0]["reason"]

    def test_pruned_meanwhile_is_no_damage(self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = Checkpoint.verify

        def prune_first(self: Checkpoint, progress: Any = None) -> Any:
            assert self.files  # the manifest has been read
            if self.step == 10:
                Store(url, acquire=False).delete(self)
            return whole(self, progress)

        gone = id_of(url, step=10)
        monkeypatch.setattr(Checkpoint, "verify", prune_first)
        status, out, err = run("verify", url)
        assert (status, err) == (0, "")
        assert out.splitlines()[1].split()[:2] == ["pruned", gone]
        assert out.splitlines()[-1] == "2 checkpoints whole, 1 checkpoint pruned"

    def test_pruned_meanwhile_in_the_library(self, url: str) -> None:
        store = Store(url)
        doomed = store.checkpoint(step=10)
        assert doomed.files
        assert store.verify(progress=lambda _: store.delete(doomed) if doomed in store else None) == []
        with pytest.raises(CheckpointNotFound, match="pruned or deleted"):
            doomed.verify()

    def test_what_was_found_before_the_storage_failed_is_told(
        self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        ten = id_of(url, step=10)
        away = tmp_path / "away"
        whole = Checkpoint.verify

        def unmount_first(self: Checkpoint, progress: Any = None) -> Any:
            if self.step == 20:  # the empty folder that a disk leaves behind when it is unmounted
                os.rename(url, away)
                os.mkdir(url)
            return whole(self, progress)

        def verify(*words: str) -> tuple[int, str, str]:
            answer: tuple[int, str, str] = run("verify", url, *words)
            os.rmdir(url)
            os.rename(away, url)
            return answer

        monkeypatch.setattr(Checkpoint, "verify", unmount_first)
        status, out, err = verify()
        assert status == 3
        assert [line.split()[0] for line in out.splitlines()] == ["RESULT", "whole"]
        assert err.startswith(f"ckptstore: {url}: this is not the folder it was before") and err.count("\n") == 1

        flip(Path(url, "data", ten, "model.bin"), 0)
        status, out, err = verify()
        assert (status, "bytes 0-999" in out, "not the folder it was before" in err) == (1, True, True)
        status, out, _ = verify("--json")
        document = json.loads(out)
        assert (status, document["good"], document["error"]["type"]) == (1, False, "BackendError")
        assert [d["id"] for d in document["damage"]] == [ten]

    def test_nothing_to_verify(self, tmp_path: Path, run: Any) -> None:
        with Store(tmp_path) as store:
            store.delete(save(store, 1))
        assert run("verify", str(tmp_path)) == (0, f"{tmp_path} holds no checkpoints: nothing to verify\n", "")


def on_terminal(*words: str, columns: int = 100) -> tuple[int, str]:
    """Run the real command on a terminal; return its exit status and what appeared."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", columns and 24, columns, 0, 0))
    with subprocess.Popen(command(*words), stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm")) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                block = os.read(ours, 1 << 16)
            except OSError:  # EIO: the other end is closed
                break
            if not block:
                break
            seen += block
        os.close(ours)
        return process.wait(), seen.decode()


def test_a_progress_bar_on_a_terminal_and_none_when_piped(url: str) -> None:
    flip(data(url, 20) / "model.bin", 0)
    status, seen = on_terminal("verify", url)
    assert status == 1
    assert "verify:   0%" in seen and "/3.0" in seen
    # The lines of the report stand alone, not behind what is left of the bar.
    visible = [line.rpartition("\r")[2] for line in seen.replace("\r\n", "\n").rstrip("\n").split("\n")]
    assert [line.split()[0] for line in visible] == ["RESULT", "whole", "damaged", "model.bin:", "whole", "1"]
    assert "verify:   0%" in on_terminal("verify", url, columns=0)[1]  # some terminals claim to have no size
    piped = spawn("verify", url)
    assert (piped.returncode, piped.stderr) == (1, "")
    assert "%" not in piped.stdout


class TestChanges:
    def test_tag(self, url: str, run: Any) -> None:
        newest = id_of(url, step=30)
        assert run("tag", url, "best", "latest") == (0, f"best now points to {newest} (step 30)\n", "")
        assert id_of(url, target="best") == newest
        document = json.loads(run("tag", url, "paper", newest, "--json")[1])
        assert document == {"store": url, "name": "paper", "id": newest, "step": 30, "warnings": []}
        assert run("tag", url, "not/a/name", "latest")[0] == 2
        assert run("tag", url, "x", "nope")[0] == 2
        assert set(Store(url).names()) == {"best", "latest", "paper"}

    def test_rm_by_name_and_by_id(self, url: str, run: Any) -> None:
        ten, twenty = id_of(url, step=10), id_of(url, step=20)
        run("tag", url, "paper", "best")
        assert run("rm", url, "paper") == (0, f"removed the name paper; its checkpoint {twenty} stays, as best\n", "")
        status, out, err = run("rm", url, "best", ten, twenty)
        assert (status, err) == (0, "")
        assert out.splitlines() == [f"deleted {twenty} (step 20, 1.00 kB)", f"deleted {ten} (step 10, 1.00 kB)"]
        assert os.listdir(Path(url, "data")) == [id_of(url, step=30)]

    def test_rm_says_what_is_still_there(self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        gone = id_of(url, step=10)

        def refuse(self: object, keys: object) -> None:
            raise PermissionDenied(13, "could not delete", gone)

        with monkeypatch.context() as patch:
            patch.setattr(LocalBackend, "delete", refuse)
            status, out, err = run("rm", url, gone)
            assert (status, out.startswith(f"deleted {gone}")) == (0, True)
            assert f"warning: what {gone} is made of could not be deleted yet" in err
            assert run("gc", url)[0] == 3
        assert run("gc", url)[1].startswith("deleted ")
        assert run("rm", url, "best")[2] == ""

    def test_rm_all_names_of_one(self, url: str, run: Any) -> None:
        run("tag", url, "paper", "best")
        twenty = id_of(url, step=20)
        document = json.loads(run("rm", url, "paper", "best", "--json")[1])
        assert (document["unnamed"], document["deleted"]) == (["paper"], [twenty])

    def test_rm_deletes_nothing_when_one_is_not_there(self, url: str, run: Any) -> None:
        status, out, err = run("rm", url, "best", "latset")
        assert (status, out) == (2, "")
        assert "did you mean 'latest'?" in err
        assert len(Store(url).checkpoints()) == 3

    def test_a_name_that_looks_like_an_option(self, url: str, run: Any) -> None:
        Store(url).tag("-x", "best")
        assert run("rm", url, "--", "-x")[0] == 0
        assert "-x" not in Store(url)

    def test_they_do_not_fence_the_job_that_is_training(self, url: str, run: Any) -> None:
        trainer = Store(url)
        save(trainer, 40)
        dead = Path(url, "data", "e1-s35-0123456789ab")
        dead.mkdir()
        (dead / "model.bin").write_bytes(b"x" * 500)
        assert run("tag", url, "mine", "latest")[0] == 0
        assert run("rm", url, "best")[0] == 0
        assert run("gc", url)[0] == 0
        assert not dead.exists()
        assert save(trainer, 50).id.startswith("e2-")  # still in the epoch it acquired
        assert {"mine", "latest"} == set(trainer.names())

    def test_gc_says_what_went_and_what_was_left_alone(self, url: str, run: Any) -> None:
        Store(url).acquire()
        dead, foreign = Path(url, "data", "e1-s35-0123456789ab"), Path(url, "data", "\x1bfoo")
        for folder in (dead, foreign):
            folder.mkdir()
            (folder / "model.bin").write_bytes(b"x" * 1500)
        status, out, err = run("gc", url)
        assert (status, err) == (0, "")
        assert out.splitlines() == [
            "deleted 1.50 kB: 1 file of 1 unfinished or pruned checkpoint",
            "left alone: data/\\x1bfoo, which ckptstore did not make",
        ]
        assert foreign.exists() and not dead.exists()
        assert run("gc", url)[1].splitlines()[0] == "nothing to delete"
        document = json.loads(run("gc", url, "--json")[1])
        assert document["deleted"] == {"ids": [], "files": 0, "nbytes": 0}
        assert (document["spared"], document["foreign"]) == ([], ["\x1bfoo"])

    def test_data_that_a_damaged_record_may_have_named(self, url: str, run: Any) -> None:
        with Store(url) as store:
            lost = save(store, 40).id
            also_lost = save(store, 50).id
        for n in (7, 8):
            flip(Path(url, "log", f"{n:012d}"), 200)
        assert run("gc", url)[0] == 1  # nobody has passed it over yet
        with pytest.warns(FallbackWarning, match=lost):
            Store(url).acquire()
        assert lost in run("ls", url)[1].splitlines()[-2]
        assert json.loads(run("ls", url, "--json")[1])["spared"] == [lost, also_lost]
        out = run("gc", f"{url}?keep_last=3")[1]
        assert f"ckptstore tag '{url}?keep_last=3' NAME {lost}" in out
        assert run("tag", url, "found", lost)[0] == 0
        flip(Path(url, "data", also_lost, "model.bin"), 0)
        status, _, err = run("tag", url, "found-too", also_lost)
        assert (status, "cannot be brought back: bytes 0" in err) == (1, True)
        assert run("rm", url, also_lost)[1] == f"deleted {also_lost}\n"
        assert [c.id for c in Store(url).checkpoints()][-1] == lost
        assert json.loads(run("gc", url, "--json")[1])["spared"] == []

    def test_nothing_changes_while_the_newest_record_is_damaged(self, url: str, run: Any) -> None:
        flip_newest_record(url)
        for words in (["tag", url, "x", "latest"], ["rm", url, "latest"], ["gc", url]):
            status, out, err = run(*words)
            assert (status, out) == (1, "")
            assert "the next job that resumes or acquires the store passes it over" in err


class TestStatusAndStreams:
    """The real command: exit status, one line on standard error, never a traceback."""

    @pytest.mark.parametrize(
        ("words", "status", "says"),
        [
            ([], 2, "no command given"),
            (["verfy", "{url}"], 2, "did you mean 'verify'?"),
            (["{url}", "ls"], 2, "the command comes first: ckptstore ls {url}"),
            (["{url}"], 2, "the commands are: ls, show, verify, tag, rm, gc, demo"),
            (["ls"], 2, "or set CKPTSTORE_URL"),
            (["ls", "{url}", "extra"], 2, "unrecognized arguments: extra"),
            (["verify", "{url}", "--step", "ten"], 2, "--step"),
            (["show", "{url}", "--step", "-1"], 2, "step must be a whole number"),
            (["rm", "{url}"], 2, "TARGET"),
            (["ls", "{url}?keep=3"], 2, "did you mean 'keep_last'?"),
            (["ls", "fil:///tmp/x"], 2, "did you mean file://?"),
            (["show", "{url}", "nope"], 2, "it has: best, latest"),
            (["ls", "{url}/nowhere"], 3, "there is no store at {url}/nowhere yet"),
            (["verify", "{url}/.."], 3, "it holds no store"),
            (["tag", "{url}/nowhere", "a", "b"], 3, "there is no store"),
            (["rm", "{url}/nowhere", "a"], 3, "there is no store"),
            (["gc", "{url}/nowhere"], 3, "there is no store"),
            (["ls", "{url}/log/000000000001"], 3, "this is a file, not a folder"),
        ],
    )
    def test_one_line_that_says_what_to_do(self, url: str, run: Any, words: list[str], status: int, says: str) -> None:
        words = [w.format(url=url) for w in words]
        done = spawn(*words)
        assert (done.returncode, done.stdout) == (status, "")
        assert done.stderr.startswith("ckptstore: ") and done.stderr.count("\n") == 1
        assert says.format(url=url) in done.stderr
        assert not Path(url, "nowhere").exists()

        got, out, err = run(*words, "--json")
        document = json.loads(out)
        assert (got, err) == (status, "")
        assert says.format(url=url) in document["error"]["message"]
        assert document["error"]["type"] in ckptstore.errors.__all__

    def test_help_and_version(self, run: Any) -> None:
        assert spawn("--version").stdout == f"ckptstore {ckptstore.__version__}\n"
        top = spawn("--help")
        assert top.returncode == 0
        assert all(f"\n  {name} " in top.stdout for name in ("ls", "show", "verify", "tag", "rm", "gc", "demo"))
        for name in ("ls", "show", "verify", "tag", "rm", "gc"):
            status, out, err = run(name, "--help")
            assert (status, err) == (0, "")
            assert f"\n  ckptstore {name} runs/42" in out and "exit status" in out

    def test_a_newer_format(self, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as newer:
            newer.setattr(envelope, "_OLDEST", envelope.FORMAT + 1)
            save(Store(tmp_path), 1)
        status, _, err = run("ls", str(tmp_path))
        assert status == 3
        assert "upgrade ckptstore" in err

    def test_who_reads_the_output_may_stop(self, tmp_path: Path) -> None:
        save(Store(tmp_path), 1, metadata=["x" * 90] * 5000)
        for words in (["show", str(tmp_path)], ["show", str(tmp_path), "--json"]):
            with subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
                assert process.stdout is not None and process.stderr is not None
                assert process.stdout.readline()
                process.stdout.close()
                assert (process.stderr.read(), process.wait()) == (b"", 141)

    def test_interrupted(self, tmp_path: Path) -> None:
        save(Store(tmp_path), 1, metadata=["x" * 90] * 5000)
        with subprocess.Popen(
            command("show", str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1)  # it is printing more than a pipe holds, so it cannot end before we read on
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
            assert (process.returncode, err) == (130, b"ckptstore: interrupted\n")

    @pytest.mark.parametrize("more", [{}, {"PYTHONUNBUFFERED": "1"}])
    @pytest.mark.parametrize("words", [["ls"], ["verify", "--json"]])
    def test_output_that_cannot_be_written(self, url: str, words: list[str], more: dict[str, str]) -> None:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command(words[0], url, *words[1:]),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(**more),
                check=False,
            )
        assert done.returncode == 3
        assert set(done.stderr.splitlines()) == {"ckptstore: the output: could not write this: No space left on device"}

    @pytest.mark.parametrize("target", ["/dev/full", "pipe"])
    def test_errors_that_cannot_be_written(self, url: str, target: str) -> None:
        """The exit status is still what the docs say."""
        reader, writer = os.pipe() if target == "pipe" else (os.open(os.devnull, os.O_RDONLY), os.open(target, os.O_WRONLY))
        os.close(reader)
        for words, out, status in ((["ls", url + "x"], subprocess.DEVNULL, 3), (["ls", url + "?x=1"], writer, 2)):
            done = subprocess.run(command(*words), stdout=out, stderr=writer, env=environment(), check=False)
            assert done.returncode == status
        os.close(writer)

    def test_interrupted_while_importing(self) -> None:
        code = """
import sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "ckptstore.store":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
from ckptstore.cli import main
sys.exit(main(["ls"]))
"""
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "ckptstore: interrupted\n")

    @pytest.mark.parametrize("closed", [[1], [2], [1, 2]])
    def test_closed_streams(self, url: str, closed: list[int]) -> None:
        code = f"import os, sys; [os.close(n) for n in {closed}]; os.execv(sys.executable, {command('ls', url + 'x')})"
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.count("\n") == (2 not in closed)

    def test_a_terminal_that_lacks_characters(self, tmp_path: Path) -> None:
        save(Store(tmp_path), 1, metrics={"größe": 1})
        done = spawn("show", str(tmp_path), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert (done.returncode, done.stderr) == (0, "")
        assert "gr\\xf6\\xdfe=1" in done.stdout

    def test_torch_is_not_imported(self, url: str) -> None:
        """Nor anything else that takes long, where it is not needed."""
        code = f"""
import sys
from ckptstore.cli import main
url = {url!r}
for words in (["ls", url], ["show", url], ["tag", url, "x", "latest"], ["gc", url], ["verify", url], ["rm", url, "best"], ["--help"]):
    assert main(words) == 0, words
    assert not {{"torch", "numpy", "tqdm", "botocore"}} & set(sys.modules), words
    assert words[0] not in ("ls", "show") or "awscrt" not in sys.modules, words
"""
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def interrupted_in_an_import() -> RuntimeError:
    error = RuntimeError("Error calling __set_name__ on 'cached_property' instance 'x' in 'Y'")
    error.__cause__ = KeyboardInterrupt()
    return error


class TestTrouble:
    """What nobody foresaw still ends in one line."""

    @pytest.mark.parametrize(
        ("error", "status", "says"),
        [
            (RuntimeError("the key is hunter2"), 70, "this is a bug in ckptstore (RuntimeError in test_cli.py:"),
            (MemoryError(), 3, "out of memory"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (interrupted_in_an_import(), 130, "interrupted"),
            (OSError(5, "Input/output error", "/dev/sda"), 3, "/dev/sda: Input/output error"),
            (UsageError("no such thing as s3://me:hunter2@host/x"), 2, "no such thing as s3://…@host/x"),
        ],
    )
    def test_every_error(
        self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, says: str
    ) -> None:
        def fail(*_: Any) -> int:
            raise error

        monkeypatch.setitem(_main._COMMANDS, "ls", fail)
        got, out, err = run("ls", url)
        assert (got, out) == (status, "")
        assert err.startswith(f"ckptstore: {says}") and err.count("\n") == 1
        got, out, err = run("ls", url, "--json")
        assert (got, err) == (status, "")
        assert json.loads(out)["error"]["type"] == type(error).__name__
        assert "hunter2" not in out

    def test_secrets_typed_in_the_wrong_place_are_not_repeated(self, url: str) -> None:
        for words in (["ls", url, "s3://me:hunter2@host/x"], ["s3://me:hunter2@host/x"], ["ls", "s3://me:hunter2@host/x"]):
            done = spawn(*words)
            assert done.returncode == 2
            assert "hunter2" not in done.stderr + done.stdout

    def test_a_document_that_is_nested_too_deeply(self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def dig(args: argparse.Namespace, store: StoreType, out: Any) -> int:
            deep: list[Any] = []
            for _ in range(100_000):
                deep = [deep]
            out.document["deep"] = deep
            return 0

        monkeypatch.setitem(_main._COMMANDS, "ls", dig)
        status, out, _ = run("ls", url, "--json")
        assert status == 3
        assert "nested too deeply" in json.loads(out)["error"]["message"]

    def test_metadata_that_could_not_be_read_back_is_refused_when_saved(self, tmp_path: Path) -> None:
        deep: Any = "bottom"
        for _ in range(49):
            deep = {"d": [deep]}
        save(Store(tmp_path), 1, metadata=deep)
        assert Store(tmp_path).checkpoint().metadata == deep
        with pytest.raises(UsageError, match="nested more than 100 levels"):
            save(Store(tmp_path), 2, metadata={"d": [deep, [[[deep]]]]})

    def test_warnings_of_others_stay_out_of_it(self, url: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def warn(*_: Any) -> int:
            warnings.warn("use the new one", DeprecationWarning, stacklevel=1)
            warnings.warn("\x1b[31mlook", ckptstore.StoreWarning, stacklevel=1)
            return 0

        monkeypatch.setitem(_main._COMMANDS, "ls", warn)
        assert run("ls", url) == (0, "", "ckptstore: warning: \\x1b[31mlook\n")
        assert json.loads(run("ls", url, "--json")[1])["warnings"] == ["\x1b[31mlook"]

    def test_what_libraries_log_stays_out_of_it(self, url: str) -> None:
        code = f"""
import logging, sys
from ckptstore.cli import _main
_main._COMMANDS["ls"] = lambda *_: logging.getLogger("azure.identity").warning("several\\nlines") or 0
sys.exit(_main.main(["ls", {url!r}]))
"""
        done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_nothing_unprintable_reaches_the_terminal(self, tmp_path: Path) -> None:
        evil = "\x1b]0;owned\x07\u202e\x9b31m"
        source = tmp_path.parent / "source"
        source.write_bytes(b"x")
        with Store(tmp_path).transaction("latest", metrics={evil: 1.0}, metadata={evil: evil}, sampler=Sampler([evil])) as tx:
            tx.add_file("\u202egnp.\udc80", source)
        flip(tmp_path / "data" / tx.id / next(iter(tx.checkpoint.manifest.files)).key, 0)
        for words in (["ls"], ["show"], ["verify"], ["show", "--json"], ["verify", "--json"], ["show", evil], ["rm", evil]):
            done = subprocess.run(
                command(words[0], str(tmp_path), *words[1:]), capture_output=True, env=environment(), check=False
            )
            for line in (done.stdout + done.stderr).decode("utf-8").split("\n"):
                assert line.isprintable(), words


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (SAMPLER, "epoch 3, 12 800 of 50 000 samples consumed"),
        ({"epoch": 0, "consumed": 7, "length": 1234567, "unit": "batches"}, "epoch 0, 7 of 1 234 567 batches consumed"),
        ({"progress": 3, "epoch": 1}, '{"epoch": 1, "progress": 3}'),
        ({**SAMPLER, "consumed": True}, '{"consumed": true, "epoch": 3, "length": 50000, "seed": 0}'),
        ({**SAMPLER, "length": -1}, '{"consumed": 12800, "epoch": 3, "length": -1, "seed": 0}'),
        ({**SAMPLER, "unit": ["x"]}, '{"consumed": 12800, "epoch": 3, "length": 50000, "seed": 0, "unit": ["x"]}'),
        ([1, 2], "[1, 2]"),
    ],
)
def test_sampler_states(tmp_path: Path, run: Any, state: Any, text: str) -> None:
    save(Store(tmp_path), 1, sampler=Sampler(state))
    assert f"sampler     {text}\n" in run("show", str(tmp_path))[1]


def test_sizes() -> None:
    sizes = {0: "0 B", 999: "999 B", 1000: "1.00 kB", 9994: "9.99 kB", 9996: "10.0 kB", 99_960: "100 kB", 999_499: "999 kB"}
    sizes |= {999_500: "1.00 MB", 12_345_678: "12.3 MB", 2 * 10**9: "2.00 GB", 10**22: "10000 EB"}
    assert {n: _format.size(n) for n in sizes} == sizes


def test_ages() -> None:
    ages = {0: "0 s", 59.9: "59 s", 60: "1 min", 3599: "59 min", 3600: "1 h", 48 * 3600 - 1: "47 h", 48 * 3600: "2 days"}
    ages |= {730 * 86400 - 1: "729 days", 730 * 86400: "2 years", -5: "0 s", -61: "in the future"}
    assert {s: _format.age(s) for s in ages} == ages


def test_every_error_of_ours_has_its_status() -> None:
    """Damage, wrong usage, and all others are about storage or the store."""
    statuses: dict[int, set[str]] = {}
    for name in ckptstore.errors.__all__:
        kind = getattr(ckptstore.errors, name)
        if not issubclass(kind, Warning):
            statuses.setdefault(_errors.explain(kind("why"))[0], set()).add(name)
    assert statuses.pop(1) == {"Damaged", "DamagedFile", "DamagedManifest", "DamagedRecord", "Forged"}
    assert statuses.pop(2) == {"CheckpointNotFound", "InvalidName", "InvalidOption", "InvalidURL", "UnknownScheme", "UsageError"}
    assert set(statuses) == {3}


def test_the_document_s_keys_are_those_in_the_docs(url: str, run: Any) -> None:
    docs = Path(__file__).parent.parent / "docs" / "cli.md"
    text = docs.read_text(encoding="utf-8").partition("## The documents")[2]
    for words in (["ls"], ["show"], ["verify"], ["gc"]):
        for key in json.loads(run(*words, url, "--json")[1]):
            assert f"`{key}`" in text or key in ("id", "name", "names", "step", "created"), key
