"""The demo, run for real, and that what it compares can differ."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from s3_rig import Service

import ckptstore
from ckptstore.cli._demo import Story, run
from ckptstore.cli._demo_compare import Log, Step, differences, order_problems
from ckptstore.cli._demo_job import EPOCHS, STEPS, TRAINING

pytest_plugins = ("s3_fixtures",)

COMMAND = [sys.executable, "-u", "-m", "ckptstore", "demo"]


def environment(temp: Path) -> dict[str, str]:
    """Import the same ckptstore as here; keep temporary files in `temp`; and be inside a Slurm job, which must make no difference."""
    return {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1]), "TMPDIR": str(temp), "SLURM_JOB_ID": "7"}


@dataclass
class Told:
    store: Path
    text: str
    litter: list[str]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Run the demo; return the store it kept, what it said, and what it left in the folder for temporary files."""
    place = tmp_path_factory.mktemp("demo")
    (place / "temp").mkdir()
    command = [*COMMAND, str(place / "store")]
    done = subprocess.run(command, env=environment(place / "temp"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return Told(place / "store", done.stdout, os.listdir(place / "temp"))


def test_it_tells_the_story_and_both_runs_end_the_same(told: Told) -> None:
    text = told.text
    assert text.count("   | the store is empty") == 2
    torn = re.search(r"Killed while it saved step (\d+): ([\d,]+) of ([\d,]+) kB .*\n.*is that of step (\d+)\.", text)
    assert torn, text
    assert int(torn[4]) < int(torn[1])
    assert f"   | resumed from step {torn[4]}:" in text
    fallback = re.search(r"state\.pt of step (\d+)\.\n(?:.*\n)*?   \| FallbackWarning: (?:.*\n)*?.*\(step (\d+)\)\n", text)
    assert fallback, text
    assert int(fallback[2]) < int(fallback[1])
    assert f"   | resumed from step {fallback[2]}:" in text
    assert len(re.findall(r"^   (?:✓|ok) ", text, re.MULTILINE)) == 5
    (hashes,) = re.findall(r"SHA-256 (\w{16}), and (\w{16})", text)
    assert hashes[0] == hashes[1]
    assert "ckptstore.Store(" in text and f"ckptstore ls {told.store}" in text
    assert len(text.splitlines()) < 50


def test_it_tells_the_same_story_on_s3(server: Service, tmp_path: Path) -> None:
    url = server.url()
    done = subprocess.run([*COMMAND, url], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^   (?:✓|ok) ", done.stdout, re.MULTILINE)) == 5
    assert os.listdir(tmp_path) == []
    with ckptstore.Store(url, acquire=False) as store:
        assert store.checkpoint("latest").step == STEPS
        assert store.verify() == []


def test_it_keeps_the_store_it_was_given_and_nothing_else(told: Told) -> None:
    assert told.litter == []
    with ckptstore.Store(told.store, acquire=False) as store:
        assert store.checkpoint("latest").step == STEPS
        assert store.checkpoint("latest").id.startswith("e3-")  # of three launches, each fenced off the one before
        assert store.verify() == []


def test_a_folder_in_use_is_left_alone(told: Told) -> None:
    before = sorted(told.store.rglob("*"))
    for used, message in (
        (told.store, "in use"),
        (told.store / "data", "in use"),
        (told.store / "log" / "hint", "a file, not a"),
    ):
        with pytest.raises(ckptstore.CkptStoreError, match=message):
            run(Namespace(url=str(used)))
    assert sorted(told.store.rglob("*")) == before


@pytest.mark.parametrize("url", ["memory://demo", "some/where?keep_last=1"])
def test_where_the_story_cannot_be_told_is_refused(url: str) -> None:
    with pytest.raises(ckptstore.UsageError, match=r"a folder or a bucket|keep_last"):
        run(Namespace(url=url))


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ckptstore.UsageError, match=r'pip install "ckptstore\[demo\]"'):
        run(Namespace(url=None))


def test_ctrl_c_ends_its_processes_and_leaves_nothing(tmp_path: Path) -> None:
    demo = subprocess.Popen(COMMAND, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout and demo.stderr
    with demo.stdout, demo.stderr:
        while "| the store is empty" not in (line := demo.stdout.readline()):
            assert line, demo.stderr.read()
        assert processes_of(tmp_path)
        demo.send_signal(signal.SIGINT)
        assert demo.stderr.read() == "ckptstore: interrupted\n"
    assert demo.wait() == 130
    assert processes_of(tmp_path) == []
    assert os.listdir(tmp_path) == []


def processes_of(temp: Path) -> list[bytes]:
    """Return the command lines of all running processes that name `temp`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:  # it has just ended
            continue
    return [line for line in found if os.fsencode(temp) in line]


# --- the comparison can fail


def log(*steps: Step) -> Log:
    return Log([0], list(steps))


REFERENCE = log(Step(1, 0, [2, 0]), Step(2, 0, [1, 3]), Step(3, 1, [3, 1]), Step(4, 1, [0, 2]))


def test_steps_done_again_on_the_same_samples_are_fine() -> None:
    again = log(*REFERENCE.steps[:3], *REFERENCE.steps[1:])
    assert order_problems(again, REFERENCE, 4) == []
    assert again.done_again == 2


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ([*REFERENCE.steps[:2], Step(3, 1, [1, 3]), REFERENCE.steps[3]], "step 3 was trained on other samples"),
        ([*REFERENCE.steps[:2], Step(3, 0, [3, 1]), REFERENCE.steps[3]], "step 3 was trained on other samples"),
        # Right in the end, but other samples the first time.
        ([REFERENCE.steps[0], Step(2, 0, [3, 1]), *REFERENCE.steps[1:]], "step 2 was trained on other samples"),
        ([*REFERENCE.steps[:1], *REFERENCE.steps[2:]], "step 2 was never done"),
        ([*REFERENCE.steps, Step(5, 2, [0, 1])], "step 5 was trained on other samples"),
        ([*REFERENCE.steps[:3], Step(4, 1, [0, 0])], "epoch 2 did not have every sample exactly once"),
    ],
)
def test_another_order_is_found(steps: list[Step], problem: str) -> None:
    assert problem in order_problems(log(*steps), REFERENCE, 4)


def test_a_reference_that_repeats_samples_proves_nothing() -> None:
    bad = log(Step(1, 0, [2, 0]), Step(2, 0, [1, 0]))
    assert order_problems(bad, bad, 4) == ["epoch 1 did not have every sample exactly once"]


def test_every_kind_of_difference_is_found() -> None:
    zeros = torch.zeros(3)
    for a, b, place in [
        ({"w": zeros}, {"w": torch.tensor([0.0, -0.0, 0.0])}, "['w']"),
        ({"w": zeros}, {"w": zeros.int()}, "['w']"),
        ({"w": zeros}, {"w": zeros[None]}, "['w']"),
        ({"w": zeros}, {"w": [0.0, 0.0, 0.0]}, "['w']"),
        ({"w": zeros}, {}, ""),
        ({"lr": [0.1, (0.2, 1)]}, {"lr": [0.1, (0.2, 2)]}, "['lr'][1][1]"),
        ([1], [1.0], "[0]"),
        ([0.0], [-0.0], "[0]"),
        ([1], [1, 2], ""),
    ]:
        assert differences(a, b) == [place], (a, b)
    nan = {"w": torch.tensor(float("nan")), "step": 3, "none": None}
    assert differences(nan, {"w": torch.tensor(float("nan")), "step": 3, "none": None}) == []


@pytest.fixture
def story(told: Told, tmp_path: Path) -> Story:
    """A demo just before its verdict: both runs ended in the state that the real one ended in."""
    story = Story(str(tmp_path / "run"), tmp_path)
    shutil.copytree(told.store, story.url)
    shutil.copytree(told.store, story.reference_url)
    per_epoch = STEPS // EPOCHS
    size = -(-TRAINING // per_epoch)
    lines = [{"resumed": 0}]
    lines += [Step(s + 1, s // per_epoch, list(range(TRAINING))[s % per_epoch * size :][:size])._asdict() for s in range(STEPS)]
    for path in (story.log, story.reference_log):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(story.log, "a") as file:
        file.write('{"resumed": 28}\n{"resumed": 35}\n{"step": 36, "epo')  # killed while writing
    return story


def test_the_verdict_on_equal_runs(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert story.compare([28, 35], collected=True)
    assert not re.search("✗|NO", capsys.readouterr().out)


def test_the_verdict_on_weights_that_differ_in_one_bit(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    with ckptstore.Store(story.url) as store:
        state = store.load("latest")
        weight = state["model"]["3.weight"]
        weight.view(torch.int32)[5, 7] ^= 1
        save_again(store, state)
    assert not story.compare([28, 35], collected=True)
    out = capsys.readouterr().out
    assert re.search(r"(✗|NO) final weights: SHA-256 .*\n     \['3\.weight'\]\n", out)
    assert len(re.findall("✗|NO", out)) == 1


def test_the_verdict_on_another_momentum(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    with ckptstore.Store(story.url) as store:
        state = store.load("latest")
        state["optimizer"]["state"][0]["momentum_buffer"][0, 0] += 1
        save_again(store, state)
    assert not story.compare([28, 35], collected=True)
    assert re.search(r"(✗|NO) momentum", capsys.readouterr().out)


def save_again(store: ckptstore.Store, state: object) -> None:
    """Save `state` in the place of the newest checkpoint, all else equal."""
    old = store.checkpoint("latest")
    rng = old.load("rng.pt")

    class Sampler:
        def state_dict(self) -> object:
            return old.sampler_state

    with store.transaction("latest", step=old.step, sampler=Sampler()) as tx:
        tx.save(state)
        tx.save(rng, "rng.pt")


def test_the_verdict_on_another_order_start_or_litter(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    assert not story.compare([28, 42], collected=True)
    assert not story.compare([28, 35], collected=False)
    story.log.write_text(story.log.read_text().replace("[0, 1, 2,", "[1, 0, 2,", 1))
    assert not story.compare([28, 35], collected=True)
    assert len(re.findall("✗|NO", capsys.readouterr().out)) == 3
