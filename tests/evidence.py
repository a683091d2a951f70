"""What the fault experiments found, as one table: ``python evidence.py FILE`` prints it.

An experiment strikes at each of its points once, with each of the subjects that it can be done with, and looks whether what was
acknowledged is there afterwards, and whole. It says how that went with `experiment` or `record`; ``tox -e soak`` sets where.

The file also has which tests have begun, and how they ended: a test that is run again replaces what it said before, one that failed,
was skipped or cut short is listed below the table, and ``pytest --resume`` leaves out those that have passed.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["FILE", "OURS", "SUBJECTS", "Tally", "begin", "end", "experiment", "passed", "record", "remark", "table"]

OURS = "ckptstore"
SUBJECTS = (OURS, "torch.save", "tmp + os.replace", "DCP")

FILE = "CKPTSTORE_EVIDENCE"
"""The environment variable with the file that is added to; without it, nothing is."""


@dataclass
class Tally:
    """An experiment under way."""

    points: int = 0
    """Enumerated; if less than `fired` at the end, then as many as that."""
    fired: int = 0
    violations: int = 0

    def strike(self) -> None:
        """Say that at the next point the fault is about to happen."""
        self.fired += 1


@contextmanager
def experiment(name: str, *, subject: str = OURS) -> Iterator[Tally]:
    """Record what the block counts, also when it is left by an error: which is one violation more, of the point under way."""
    tally = Tally()
    try:
        yield tally
    except (Exception, pytest.fail.Exception):
        tally.violations += 1
        tally.fired = max(tally.fired, tally.violations)
        raise
    finally:
        if points := max(tally.points, tally.fired):
            record(name, points=points, fired=tally.fired, violations=tally.violations, subject=subject)


def record(experiment: str, *, points: int, fired: int, violations: int, subject: str = OURS) -> None:
    """Add a result; several of one experiment and subject are added up.

    `points` were enumerated, at `fired` of them the fault really happened, and after `violations` of those something acknowledged was
    missing or damaged, or a broken promise showed in another way.
    """
    assert subject in SUBJECTS
    assert 0 <= violations <= fired <= points
    _add(_test(), row=[experiment, subject, points, fired, violations])


def remark(text: str) -> None:
    """Add a line for below the table."""
    _add(_test(), remark=text)


def begin(test: str) -> None:
    """Say that a test begins, by its node id: what it said in an earlier run is void."""
    _add(test, begins=True)


def end(test: str, outcome: str) -> None:
    """Say how a test ended: "passed", "failed" or "skipped"."""
    _add(test, ended=outcome)


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]


def _add(test: str, **found: object) -> None:
    if file := os.environ.get(FILE):
        line = json.dumps({"test": test, **found}) + "\n"
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, line.encode())  # at once: other processes add theirs
        finally:
            os.close(fd)


def _last_runs(lines: str) -> dict[str, list[dict[str, Any]]]:
    """Return what each test said when it was run last."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines.splitlines():
        entry = json.loads(line)
        if "begins" in entry:
            found[entry["test"]].clear()
        found[entry["test"]].append(entry)
    return found


def passed(lines: str) -> set[str]:
    """Return the tests that have passed when they were run last."""
    return {test for test, said in _last_runs(lines).items() if said[-1].get("ended") == "passed"}


def table(lines: str) -> Iterator[str]:
    """Yield the lines of the table, in Markdown, and what else there is to say."""
    runs = _last_runs(lines)
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    remarks = []
    for test, said in runs.items():
        for entry in said:
            if row := entry.get("row"):
                experiment, subject, *numbers = row
                named = zip(("points", "fired", "violations"), numbers, strict=True)
                found[experiment].update({(subject, what): n for what, n in named})
            elif text := entry.get("remark"):
                remarks.append(text)
        outcome = said[-1].get("ended", "cut short" if "begins" in said[0] else "passed")
        if outcome != "passed":
            remarks.append(f"{outcome}: {test}")
    yield f"| experiment | points | fired | {' | '.join(f'{s}: violations' for s in SUBJECTS)} |"
    yield "|---|" + "---:|" * (2 + len(SUBJECTS))
    for experiment in sorted(found):
        counts = found[experiment]
        cells = [f"{counts[OURS, 'points']}", f"{counts[OURS, 'fired']}"]
        for subject in SUBJECTS:
            fired = counts[subject, "fired"]
            of = "" if subject == OURS else f" of {fired}"
            cells.append(f"{counts[subject, 'violations']}{of}" if fired else "–")
        yield f"| {experiment} | {' | '.join(cells)} |"
    if remarks:
        yield ""
        yield from remarks


if __name__ == "__main__":
    print(*table(Path(sys.argv[1]).read_text()), sep="\n")
