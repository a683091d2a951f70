"""Test the tests: each mistake of `mutants` must be noticed by some test.

``python mutant_runs.py`` tries all of them, and lists those that no test notices; ``python mutant_runs.py log.py gc.py`` those of some
modules. First the tests are run as they are, to see which of them comes by which line. A mutant is a copy of the package in which one
module has one mistake; the tests that come by it are run, the shortest first, until one fails: in a process that has collected them
already (see `mutant_server`), or, where that cannot be, in one that imports the mutant from the start.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from mutant_server import UNTRIED, end, forked, import_anew, run_pytest, served, short, take_down
from mutants import MODULES, PACKAGE, Mutant, mutants_of

__all__ = ["EQUIVALENT", "Survey", "Verdict", "survey", "try_out"]

TESTS = Path(__file__).parent
EQUIVALENT = TESTS / "mutants_equivalent.json"
"""Mutants that do what the original does as far as anybody can tell, each with the reason."""
LIMIT = 60.0
"""Seconds after which a test that usually ends at once counts as failed: many mistakes make something wait for ever."""
SHORT = 10.0
"""Seconds of tests that a mutant gets which is said to be equivalent."""
_OTHER_PROCESSES = ("test_local_flushes.py", "test_hostile.py", "test_crash_states.py", "test_fencing.py", "test_every_call.py")
"""Test files that have other processes do the work."""


@dataclass(frozen=True)
class Verdict:
    """What the tests said of a mutant."""

    key: str
    by: str
    """What noticed it; empty if nothing did."""
    seconds: float


@dataclass(frozen=True)
class Survey:
    """Which test comes by which line."""

    seconds: Mapping[str, float]
    """How long each test takes."""
    lines: Mapping[str, Mapping[int, Sequence[str]]]
    """By module and line."""

    @classmethod
    def from_json(cls, text: str) -> Survey:
        seconds, found = json.loads(text)
        return cls(seconds, {module: {int(n): tests for n, tests in by.items()} for module, by in found.items()})

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that come by a mutant, and those that may do so where nobody sees it; the shortest first."""
        first, last = mutant.lines
        found = {test for line in range(first, last + 1) for test in self.lines.get(mutant.module, {}).get(line, ())}
        elsewhere = {*_OTHER_PROCESSES} & {*MODULES[mutant.module]}
        unseen = {test for test in self.seconds if test.partition("::")[0] in elsewhere}
        return sorted(found | unseen, key=lambda test: (self.seconds[test], test))


def survey(files: Iterable[str]) -> Survey:
    """Run test files as they are."""
    with tempfile.TemporaryDirectory(prefix="survey-") as folder:
        place = Path(folder)
        status, lines = _forked(place, 3600, lambda: _watch(place, sorted(set(files))))
        assert status in (0, 1) and (place / "found").exists(), "\n".join(lines[-200:])  # 1, too, after faulthandler's time-out
        print(
            *(line for line in lines if line.startswith(("FAILED", "ERROR"))), sep="\n", file=sys.stderr, end=""
        )  # tell nothing
        return Survey.from_json((place / "found").read_text())


def try_out(mutants: Sequence[Mutant], known: Survey, equivalent: Container[str] = ()) -> Iterator[Verdict]:
    """Run each mutant's tests until one fails; only the short ones if it is said to be `equivalent`."""
    plan = []
    for mutant in mutants:
        tests = known.tests_of(mutant)
        if mutant.key in equivalent:
            tests = [t for t, so_far in zip(tests, accumulate(known.seconds[t] for t in tests), strict=True) if so_far < SHORT]
        plan.append((mutant, [(test, LIMIT + 30 * known.seconds[test]) for test in tests]))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-", ignore_cleanup_errors=True) as folder:
        for (mutant, by), (_, tests) in zip(served(plan, Path(folder)), plan, strict=True):
            if by == UNTRIED:
                with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as alone:
                    by = _try(mutant, Path(alone), tests)
            yield Verdict(mutant.key, by, time.monotonic() - begun)
            begun = time.monotonic()


def _try(mutant: Mutant, place: Path, tests: Sequence[tuple[str, float]]) -> str:
    if not tests:
        return ""
    shutil.copytree(PACKAGE, place / "ckptstore")
    (place / "ckptstore" / mutant.module).write_text(mutant.source)
    names = [test for test, _ in tests]
    status, lines = _forked(place, LIMIT + sum(seconds for _, seconds in tests) / 10, lambda: _run(place, names))
    if status is None:
        return "the time limit"
    if status == 0:
        return ""
    assert status != 5, f"there are no such tests: {names}"
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), f"status {status}: {lines[-1:]}")[:200]


def _forked(place: Path, limit: float, call: Callable[[], int]) -> tuple[int | None, list[str]]:
    """Make a call in a fork; return its exit status, None after `limit` seconds, and what it printed."""
    pid, log = forked(place, call)
    pidfd = os.pidfd_open(pid)
    ended = select.select([pidfd], [], [], limit)[0]
    os.close(pidfd)
    status = end(pid)
    take_down(place)
    return status if ended else None, log.read_text(errors="replace").splitlines()


def _run(place: Path, tests: Sequence[str]) -> int:
    """Run tests with the package that is in `place`."""
    import_anew(place)
    return run_pytest(place, ["-x", *sorted({test.partition("::")[0] for test in tests})], _Chosen(tests))


class _Chosen:
    """Has pytest run some tests, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {short(test): n for n, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if short(i.nodeid) in self._order), key=lambda i: self._order[short(i.nodeid)])


class _Watch:
    """Tells a coverage measurement which test runs, and notes how long it takes."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_setup(self, item: Any) -> None:
        self._coverage.switch_context(short(item.nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = short(report.nodeid)
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.failed:
            self.failed.add(test)


def _watch(place: Path, files: Sequence[str]) -> int:
    import coverage

    sources = [f"{PACKAGE}/*", f"{(PACKAGE / 'backends').resolve()}/*"]  # in a checkout, a link
    measured = coverage.Coverage(data_file=None, config_file=False, include=sources, messages=False)
    measured.start()
    watch = _Watch(measured)
    import_anew(PACKAGE.parent)
    status = run_pytest(place, files, watch)
    measured.stop()
    for test in watch.failed:  # it would seem to notice everything
        watch.seconds.pop(test, None)
    data = measured.get_data()
    found: dict[str, dict[int, list[str]]] = {}
    for module in MODULES:
        by_line = data.contexts_by_lineno(str((PACKAGE / module).resolve())) or data.contexts_by_lineno(str(PACKAGE / module))
        found[module] = {line: [t for t in tests if t in watch.seconds] for line, tests in by_line.items()}
    (place / "found").write_text(json.dumps([watch.seconds, found]))
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description="Try out mutants.")
    parser.add_argument("modules", nargs="*", default=list(MODULES), help="log.py, …; all if none is given")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    parser.add_argument("--like", default="", help="only those whose description has this in it")
    parser.add_argument("--share", default="0/1", help="I/N: every Nth, from number I on")
    parser.add_argument(
        "--plan", type=json.loads, help="which mutants, and which tests they get instead of those that come by, in JSON"
    )
    parser.add_argument("--survey", type=Path, help="file that keeps which test comes by which line, from one run to the next")
    parser.add_argument("--json", action="store_true", help="for other programs")
    arguments = parser.parse_args()
    first, step = map(int, arguments.share.split("/"))
    mutants = [m for module in arguments.modules for m in mutants_of(module) if arguments.like in m.key][first::step]
    if arguments.list:
        print(*(m.key for m in mutants), len(mutants), sep="\n")
        return
    if arguments.plan:
        mutants = [m for m in mutants if m.key in arguments.plan]
        lines: dict[str, dict[int, list[str]]] = {}
        for mutant in mutants:
            lines.setdefault(mutant.module, {})[mutant.lines[0]] = arguments.plan[mutant.key]
        known = Survey({test: 0.0 for tests in arguments.plan.values() for test in tests}, lines)
    elif arguments.survey and arguments.survey.exists():
        known = Survey.from_json(arguments.survey.read_text())
    else:
        known = survey(file for module in (MODULES if arguments.survey else arguments.modules) for file in MODULES[module])
        if arguments.survey:
            arguments.survey.write_text(json.dumps([known.seconds, known.lines]))
    survivors = 0
    equivalent = json.loads(EQUIVALENT.read_text())
    for verdict in try_out(mutants, known, equivalent):
        survivors += not verdict.by and verdict.key not in equivalent
        if arguments.json:
            print(json.dumps([verdict.key, verdict.by]), flush=True)
        else:
            said = verdict.by or ("equivalent" if verdict.key in equivalent else "SURVIVED")
            print(f"{verdict.seconds:6.1f} {verdict.key}: {said}", flush=True)
    if not arguments.json:
        print(f"{survivors} of {len(mutants)} survived")


if __name__ == "__main__":
    main()
