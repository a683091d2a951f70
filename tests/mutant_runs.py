"""Test the tests: each mistake of `mutants` must be noticed by some test.

``python mutant_runs.py`` tries all of them, and lists those that no test notices; ``python mutant_runs.py log.py gc.py`` those of some
modules. First the tests are run as they are, to see which of them comes by which line. A mutant is a copy of the package in which one
module has one mistake; the tests that come by it are run, the shortest first, in a fork of a process that has imported what takes long,
until one fails.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants import MODULES, PACKAGE, Mutant, mutants_of

__all__ = ["EQUIVALENT", "Survey", "Verdict", "survey", "try_out"]

TESTS = Path(__file__).parent
EQUIVALENT = TESTS / "mutants_equivalent.json"
"""Mutants that do what the original does as far as anybody can tell, each with the reason."""
LIMIT = 300.0
"""Seconds after which tests that have not ended count as failed: many mistakes make something wait for ever."""
_OTHER_PROCESSES = ("test_local_flushes.py", "test_hostile.py", "test_crash_states.py", "test_fencing.py", "test_every_call.py")
"""Test files that have other processes do the work."""
_OURS = frozenset(p.stem for p in TESTS.glob("*.py"))


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
        """Return the tests that come by a mutant, the shortest first; then those that may do so where nobody sees it."""
        first, last = mutant.lines
        found = {test for line in range(first, last + 1) for test in self.lines.get(mutant.module, {}).get(line, ())}
        elsewhere = {*_OTHER_PROCESSES} & {*MODULES[mutant.module]}
        unseen = {test for test in self.seconds if test.partition("::")[0] in elsewhere} - found
        return [*sorted(found, key=self.seconds.__getitem__), *sorted(unseen, key=self.seconds.__getitem__)]


def survey(files: Iterable[str]) -> Survey:
    """Run test files as they are."""
    with tempfile.TemporaryDirectory(prefix="survey-") as folder:
        place = Path(folder)
        status, lines = _forked(place, 3600, lambda: _watch(place, sorted(set(files))))
        assert status in (0, 1), "\n".join(lines[-30:])
        print(
            *(line for line in lines if line.startswith(("FAILED", "ERROR"))), sep="\n", file=sys.stderr, end=""
        )  # tell nothing
        return Survey.from_json((place / "found").read_text())


def try_out(mutants: Iterable[Mutant], known: Survey, limit: float = LIMIT) -> Iterator[Verdict]:
    """Run each mutant's tests until one fails."""
    import torch  # noqa: F401  # forks share what has been imported

    for mutant in mutants:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
            by = _try(mutant, Path(folder), known.tests_of(mutant), limit)
        yield Verdict(mutant.key, by, time.monotonic() - started)


def _try(mutant: Mutant, place: Path, tests: Sequence[str], limit: float) -> str:
    if not tests:
        return ""
    shutil.copytree(PACKAGE, place / "ckptstore")
    (place / "ckptstore" / mutant.module).write_text(mutant.source)
    status, lines = _forked(place, limit, lambda: _run(place, tests))
    if status is None:
        return "the time limit"
    if status == 0:
        return ""
    assert status != 5, f"there are no such tests: {tests}"
    return next((line for line in lines if line.startswith(("FAILED", "ERROR"))), f"status {status}: {lines[-1:]}")[:200]


def _forked(place: Path, limit: float, call: Callable[[], int]) -> tuple[int | None, list[str]]:
    """Make a call in a fork and a session of its own; return its exit status, None after `limit` seconds, and what it printed."""
    log = place / "log"
    out = os.open(log, os.O_WRONLY | os.O_CREAT)
    pid = os.fork()
    if not pid:
        status = 99
        try:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(out, 2)
            status = call()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    os.close(out)
    pidfd = os.pidfd_open(pid)
    try:
        ended = select.select([pidfd], [], [], limit)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGTERM)  # let it take down what it has mounted
        select.select([pidfd], [], [], 5)
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.close(pidfd)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if ended else None, log.read_text(errors="replace").splitlines()


def _run(place: Path, tests: Sequence[str]) -> int:
    """Run tests with the package that is in `place`."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "ckptstore" or n in _OURS]:
        del sys.modules[name]
    sys.path[:0] = [str(place), str(TESTS)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    files = sorted({test.partition("::")[0] for test in tests})
    return _pytest(place, ["-x", *files], _Chosen(tests))


def _pytest(place: Path, arguments: Sequence[str], plugin: object) -> int:
    import pytest

    os.chdir(TESTS)
    os.environ.pop("CKPTSTORE_EVIDENCE", None)
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-seed=1", f"--basetemp={place / 'tmp'}"]
    return int(pytest.main([*options, *arguments], [plugin]))


class _Chosen:
    """Has pytest run some tests, in their order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._order = {_short(test): n for n, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if _short(i.nodeid) in self._order), key=lambda i: self._order[_short(i.nodeid)])


class _Watch:
    """Tells a coverage measurement which test runs, and notes how long it takes."""

    def __init__(self, coverage: Any) -> None:
        self._coverage = coverage
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_setup(self, item: Any) -> None:
        self._coverage.switch_context(_short(item.nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = _short(report.nodeid)
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.failed:
            self.failed.add(test)


def _short(nodeid: str) -> str:
    return (
        nodeid.rpartition("/")[2]
        if "[" not in nodeid
        else nodeid.partition("[")[0].rpartition("/")[2] + "[" + nodeid.partition("[")[2]
    )


def _watch(place: Path, files: Sequence[str]) -> int:
    import coverage

    sources = [f"{PACKAGE}/*", f"{(PACKAGE / 'backends').resolve()}/*"]  # in a checkout, a link
    measured = coverage.Coverage(data_file=None, config_file=False, include=sources, messages=False)
    measured.start()
    watch = _Watch(measured)
    for name in [n for n in sys.modules if n.partition(".")[0] == "ckptstore" or n in _OURS]:
        del sys.modules[name]
    status = _pytest(place, files, watch)
    measured.stop()
    for test in watch.failed:  # it would seem to notice everything
        watch.seconds.pop(test, None)
    data = measured.get_data()
    found: dict[str, dict[int, list[str]]] = {}
    for module in MODULES:
        by_line = data.contexts_by_lineno(str((PACKAGE / module).resolve())) or data.contexts_by_lineno(str(PACKAGE / module))
        assert by_line, f"no test comes by {module}"
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
    for verdict in try_out(mutants, known):
        survivors += not verdict.by
        if arguments.json:
            print(json.dumps([verdict.key, verdict.by]), flush=True)
        else:
            print(f"{verdict.seconds:6.1f} {verdict.key}: {verdict.by or 'SURVIVED'}", flush=True)
    if not arguments.json:
        print(f"{survivors} of {len(mutants)} survived")


if __name__ == "__main__":
    main()
