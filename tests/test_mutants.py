"""Every mistake that can be made in the protocol's code by leaving out or swapping something is noticed by some test."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import evidence
import pytest
from mutant_runs import EQUIVALENT
from mutants import MODULES, PACKAGE, Mutant, mutants_of

CERTAIN = {
    f"{module}: {what}": test
    for module, what, test in (
        (
            "backends/local.py",
            "LocalBackend.put_if_absent: without os.fsync(new.fd)",
            "test_local_flushes.py::test_put_flushes_file_then_name_and_every_folder_on_the_way",
        ),
        (
            "backends/local.py",
            "_LocalWriter.finish: without os.fsync(self._new.fd)",
            "test_local_flushes.py::test_finish_flushes_file_folder_and_the_folders_above",
        ),
        (
            "log.py",
            "Log.commit: without the check draft is None",
            "test_log.py::test_a_change_that_has_nothing_to_do_takes_no_slot",
        ),
        (
            "epoch.py",
            "Writer.acquire: without self._check(head, self.epoch)",
            "test_fencing.py::test_two_jobs_on_one_folder",
        ),
        ("gc.py", "find_garbage: without the check head.damaged", "test_damage.py::test_records_in_each_others_place"),
    )
}
"""What the plain run tries, each with the test that notices it."""


SHARES = 3
"""Parts that the mutants of a module are tried in, so that what was interrupted goes on with the next part."""


@pytest.fixture(scope="module")
def mutants() -> dict[str, Mutant]:
    found = [m for module in MODULES for m in mutants_of(module)]
    counts = Counter(m.key for m in found)
    assert counts.most_common(1)[0][1] == 1, "a name that two have"
    return {m.key: m for m in found}


def equivalent() -> dict[str, str]:
    reasons: dict[str, str] = json.loads(EQUIVALENT.read_text())
    return reasons


def test_there_are_mistakes_of_each_kind(mutants: dict[str, Mutant]) -> None:
    assert len(mutants) > 500
    for module in MODULES:
        assert any(m.module == module for m in mutants.values())
    source = (PACKAGE / "backends" / "local.py").read_text()
    flushes = [k for k in mutants if k.startswith("backends/local.py") and ": without os.fsync(" in k]
    assert len(flushes) == source.count("os.fsync(")
    swapped = mutants["backends/local.py: _LocalWriter.finish: self._new.close_file() before os.fsync(self._new.fd)"].source
    assert swapped.index("self._new.close_file()\n            os.fsync(self._new.fd)") > 0
    unchecked = mutants["gc.py: find_garbage: without the check head.damaged"].source
    assert "head.damaged" not in unchecked.partition("state = head.record")[2].partition("kept =")[0]


def test_equivalent_mutants_exist_and_have_a_reason(mutants: dict[str, Mutant]) -> None:
    reasons = equivalent()
    assert reasons.keys() <= mutants.keys(), reasons.keys() - mutants.keys()
    assert all(len(reason) > 20 for reason in reasons.values())


def tried_out(*arguments: str) -> dict[str, str]:
    """Return what noticed each mutant; in a process that has no threads to lose in a fork."""
    command = [sys.executable, "mutant_runs.py", "--json", *arguments]
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def test_some_mistakes_are_noticed() -> None:
    """And one is not, by a test that comes by it and has nothing to do with it."""
    other = {
        "log.py: Log.commit: without self._bases.drop(record)": CERTAIN["log.py: Log.commit: without the check draft is None"]
    }
    found = tried_out("--plan", json.dumps({key: [test] for key, test in {**CERTAIN, **other}.items()}))
    assert found.keys() == CERTAIN.keys() | other.keys()
    assert [found[key] for key in other] == [""]
    for key, test in CERTAIN.items():
        assert found[key].startswith(f"FAILED {test}"), found[key]


@pytest.fixture(scope="module")
def known_tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that has which test comes by which line, made once for all modules and for all workers of pytest-xdist."""
    place = tmp_path_factory.getbasetemp()
    file = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "survey.json"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            tried_out("--like", "none of them", "--survey", str(file))
    return file


@pytest.mark.soak
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("module", MODULES)
def test_every_mistake_is_noticed(mutants: dict[str, Mutant], module: str, share: int, known_tests: Path) -> None:
    mine = [m for m in mutants.values() if m.module == module][share::SHARES]
    known = equivalent()
    found = tried_out(module, "--share", f"{share}/{SHARES}", "--survey", str(known_tests))
    assert found.keys() == {m.key for m in mine}
    survivors = [key for key, by in found.items() if not by]
    unknown = [key for key in survivors if key not in known]
    for key in unknown:
        evidence.remark(f"not noticed: {key}")
    points = len(mine) - len(survivors) + len(unknown)
    evidence.record(
        "mistakes made in the code; violations: not noticed by any test", points=points, fired=points, violations=len(unknown)
    )
    assert unknown == []
    stale = [m.key for m in mine if m.key in known and m.key not in survivors]
    assert stale == [], "said to be equivalent, and noticed all the same"
