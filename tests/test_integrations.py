"""What all integrations have in common: imported only when used, and only with a library of a version they know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import ckptstore

LIBRARIES = ["accelerate", "lightning", "torchdata", "transformers"]


def said(code: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_other_versions_are_refused() -> None:
    """By name, with what to install, before anything of the library is imported."""
    code = f"""
import importlib, sys
from importlib import metadata
import ckptstore
real = metadata.version
def missing(name):
    raise metadata.PackageNotFoundError(name)
for version in (lambda name: "0.1", lambda name: "99.0", missing):
    metadata.version = version
    for name in {LIBRARIES}:
        try:
            importlib.import_module("ckptstore.integrations." + name)
        except ckptstore.WrongVersion as exc:
            assert isinstance(exc, ImportError)
            print(exc)
        assert name not in sys.modules or name in ("torchdata",)
"""
    lines = said(code).splitlines()
    assert len(lines) == 3 * len(LIBRARIES)
    for line, name in zip(lines, LIBRARIES * 3, strict=True):
        assert f"needs {name} >= " in line
        assert f"pip install 'ckptstore[{name}]'" in line
    assert all(line.endswith("; 0.1 is installed") for line in lines[:4])
    assert all(line.endswith("; 99.0 is installed") for line in lines[4:8])
    assert all(line.endswith("; it is not installed") for line in lines[8:])


def test_nothing_is_imported_before_it_is_used() -> None:
    code = f"import sys, ckptstore, ckptstore.integrations, ckptstore.store; print(sorted(set({LIBRARIES}) & set(sys.modules)))"
    assert said(code) == "[]\n"


def test_each_is_in_the_readme_in_under_ten_lines_and_tested() -> None:
    """Every module that there is, by its name: an example, which a test runs, and an extra, if it needs a library."""
    here = Path(__file__).parent
    found = {p.stem for p in (Path(ckptstore.__file__).parent / "integrations").glob("[!_]*.py")}
    assert found == {*LIBRARIES, "dcp"}
    readme = (here.parent / "README.md").read_text(encoding="utf-8")
    examples = dict(re.findall(r"^```python (\w+)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL))
    for name in [*found, "preemption"]:
        assert 1 < len(examples[name].splitlines()) < 10, name
        assert f"docs/{'distributed' if name == 'dcp' else 'preemption' if name == 'preemption' else 'integrations'}.md" in readme
    extras = (here.parent / "tox.ini").read_text(encoding="utf-8").partition("[testenv:tests]")[2].partition("\ndeps")[0]
    assert all(name in extras for name in LIBRARIES), "the tests run with it"


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_versions_are_those_of_the_extra(name: str) -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    (wanted,) = re.findall(rf'^{name} = \["{name}>=([\d.]+),<(\d+)"', project, re.MULTILINE)
    module = Path(ckptstore.__file__).parent / "integrations" / f"{name}.py"
    ((least, below),) = re.findall(rf'require_version\(.*"{name}", \(([\d, ]+?),?\), (\d+)\)', module.read_text(encoding="utf-8"))
    assert (least.replace(", ", "."), below) == wanted
    least_numbers = tuple(map(int, least.split(", ")))
    assert least_numbers <= tuple(map(int, metadata.version(name).split(".")[:2])) < (int(below),)
