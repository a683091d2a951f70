"""The table of the soak adds up what the experiments say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import evidence
import pytest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(evidence.FILE, str(tmp_path / "found"))
    return tmp_path / "found"


def rows(file: Path) -> list[str]:
    return list(evidence.table(file.read_text()))[2:]


def test_results_of_one_experiment_are_added_up(file: Path) -> None:
    evidence.record("b", points=10, fired=8, violations=0)
    evidence.record("b", points=5, fired=5, violations=1)
    evidence.record("b", subject="DCP", points=4, fired=3, violations=2)
    evidence.record("a", points=1, fired=1, violations=0)
    evidence.remark("b is odd")
    assert rows(file) == [
        "| a | 1 | 1 | 0 | – | – | – |",
        "| b | 15 | 13 | 1 | – | – | 2 of 3 |",
        "",
        "b is odd",
    ]


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(evidence.FILE, raising=False)
    monkeypatch.chdir(tmp_path)
    evidence.record("a", points=1, fired=1, violations=0)
    assert not list(tmp_path.iterdir())


def test_more_violations_than_points_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        evidence.record("a", points=2, fired=1, violations=2)


def test_an_experiment_that_ends_with_an_error_is_a_violation(file: Path) -> None:
    with pytest.raises(OSError), evidence.experiment("a") as tally:
        tally.points = 100
        for _ in range(7):
            tally.strike()
        raise OSError
    with pytest.raises(pytest.fail.Exception), evidence.experiment("b"):
        pytest.fail("before the first point")
    with pytest.raises(pytest.skip.Exception), evidence.experiment("c"):
        pytest.skip("cannot be done here")
    with evidence.experiment("d") as tally:
        tally.strike()
    assert rows(file) == [
        "| a | 100 | 7 | 1 | – | – | – |",
        "| b | 1 | 1 | 1 | – | – | – |",
        "| d | 1 | 1 | 0 | – | – | – |",
    ]


def test_a_test_that_is_run_again_replaces_what_it_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for passed in (False, True):
        for test in ("one", "two"):
            monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{test} (call)")
            evidence.begin(test)
            evidence.record("a", points=1, fired=1, violations=not passed)
            evidence.remark(f"{test} {passed}")
            evidence.end(test, "passed" if passed else "failed")
    evidence.begin("three")
    evidence.begin("four")
    evidence.end("four", "skipped")
    assert rows(file) == ["| a | 2 | 2 | 0 | – | – | – |", "", "one True", "two True", "cut short: three", "skipped: four"]
    assert evidence.passed(file.read_text()) == {"one", "two"}


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text("""
import os, evidence, pytest

def test_good():
    evidence.record("good", points=1, fired=1, violations=0)

def test_bad():
    with evidence.experiment("bad") as tally:
        tally.strike()
        assert "MENDED" in os.environ

def test_left_out():
    pytest.skip("no such thing here")

@pytest.fixture
def late():
    yield
    assert "MENDED" in os.environ

def test_bad_at_the_end(late):
    pass
""")
    env = {**os.environ, evidence.FILE: str(tmp_path / "found"), "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}

    def run(workers: int, **more: str) -> str:
        command = [sys.executable, "-m", "pytest", "--resume", f"-n{workers}", "-p", "no:cacheprovider"]
        return subprocess.run(command, cwd=tmp_path, env={**env, **more}, capture_output=True, text=True).stdout

    said = run(0)
    assert "1 failed, 2 passed, 1 skipped, 1 error" in said, said
    good, bad = "| good | 1 | 1 | 0 | – | – | – |", "| bad | 1 | 1 | {} | – | – | – |"
    found = rows(tmp_path / "found")
    assert found[:2] == [bad.format(1), good]
    bad_ones = ["failed: test_it.py::test_bad", "failed: test_it.py::test_bad_at_the_end"]
    assert sorted(found[3:]) == [*bad_ones, "skipped: test_it.py::test_left_out"]
    said = run(2, MENDED="1")
    assert "2 passed, 1 skipped" in said, said
    assert rows(tmp_path / "found")[:2] == [bad.format(0), good]
    begun = [entry["test"] for line in (tmp_path / "found").read_text().splitlines() if "begins" in (entry := json.loads(line))]
    assert begun.count("test_it.py::test_good") == 1
