"""The README's examples run, in order, as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from s3_rig import Service

import ckptstore
from ckptstore.options import STORE_OPTIONS

pytest_plugins = ("s3_fixtures",)

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Return the fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first, which is a sketch, share one namespace and one folder; the shell examples look at what they left."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    sketch, *examples = blocks("python")
    assert "..." in sketch
    for example in examples:
        exec(compile(example, "README.md", "exec"), namespace)
    progress = namespace["progress"]
    assert isinstance(progress, dict)
    assert progress["step"] == 3 * 16
    assert (tmp_path / "exported/tokenizer/vocab.txt").read_text() == "a b c"

    # Started again, the loop has nothing left to do: it resumes after the last save, and ends with the same count.
    weights = progress["model"].weight.detach().clone()
    again: dict[str, object] = {}
    exec(compile(examples[0], "README.md", "exec"), again)
    repeated = again["progress"]
    assert isinstance(repeated, dict)
    assert repeated["step"] == 3 * 16
    assert repeated["model"].weight.equal(weights)

    environment = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parent.parent)}
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "ckptstore"
        call = [sys.executable, "-m", "ckptstore", *arguments]
        done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"


def test_the_example_on_s3_runs(server: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    server.client.create_bucket(Bucket="my-bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.server.endpoint_url)
    model = torch.nn.Linear(4, 1)
    sampler = ckptstore.InterruptableDistributedSampler([1, 2, 3], seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    namespace = {"ckptstore": ckptstore, "model": model, "optimizer": optimizer, "step": 7, "sampler": sampler}
    (example,) = blocks("python s3")
    exec(compile(example, "README.md", "exec"), namespace)
    state = namespace["state"]
    assert isinstance(state, dict)
    assert state["model"]["weight"].equal(model.weight)
    assert server.client.list_objects_v2(Bucket="my-bucket")["KeyCount"] > 3


def test_every_option_is_documented() -> None:
    table = README.partition("## Options")[2].partition("Keywords only")[0]
    first_column = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", first_column)) == set(STORE_OPTIONS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(__file__).parent.parent / target).exists(), target


def test_what_torch_load_is_told(tmp_path: Path) -> None:
    """A file of the store opens with plain torch.load, in a process that knows nothing of us."""
    checkpoint = ckptstore.Store(tmp_path).save({"x": [1, 2]}, step=1)
    code = "import sys, torch; assert torch.load(sys.argv[1]) == {'x': [1, 2]}; assert 'ckptstore' not in sys.modules"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "data" / checkpoint.id / "state.pt")], check=True)
