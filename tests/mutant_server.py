"""Try out mutants in forks of a process that has imported and collected the tests once: each costs little more than the tests it gets.

The process runs the tests with a copy of the package. In a fork, the one function that a mutant changes gets the mutant's code in place
of its own; processes that the tests start import the copy, in which the module's file is the mutant's meanwhile.
"""

from __future__ import annotations

import inspect
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutants import PACKAGE, Mutant

__all__ = ["UNTRIED", "Plan", "end", "forked", "import_anew", "run_pytest", "served", "short", "take_down"]

TESTS = Path(__file__).parent
UNTRIED = "its function cannot be exchanged in a running process"
Plan = Sequence[tuple[Mutant, Sequence[tuple[str, float]]]]
"""Mutants, each with the tests that it gets and the seconds after which each of these is taken to wait for ever."""
_FAILED = "FAILED "
_OURS = frozenset(p.stem for p in TESTS.glob("*.py"))


def served(plan: Plan, place: Path) -> Iterator[tuple[Mutant, str]]:
    """Yield what noticed each mutant: a test, nothing, or `UNTRIED`. `place` is an empty folder of ours."""
    import torch  # noqa: F401  # forks share what has been imported

    shutil.copytree(PACKAGE, place / "ckptstore")
    answers, ours = os.pipe()
    pid, log = forked(place, lambda: _serve(place, plan, ours))
    os.close(ours)
    done = 0
    try:
        with os.fdopen(answers) as lines:
            for (mutant, _), line in zip(plan, lines, strict=False):
                yield mutant, json.loads(line)
                done += 1
    finally:
        end(pid)
        take_down(place)
    assert done == len(plan), f"the server has ended before {plan[done][0].key}:\n{log.read_text(errors='replace')[-3000:]}"


def forked(place: Path, call: Callable[[], int]) -> tuple[int, Path]:
    """Make a call in a fork and a session of its own, which ends with it; return its process id, and the file that has what it prints."""
    log = place / "log"
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
    return pid, log


def end(pid: int) -> int:
    """End a fork, and all processes that it has started; return its exit status."""
    pidfd = os.pidfd_open(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)  # let it take down what it has mounted
    select.select([pidfd], [], [], 5)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    os.close(pidfd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def take_down(place: Path) -> None:
    """Unmount what a test that was killed has left mounted."""
    for line in Path("/proc/self/mounts").read_text().splitlines()[::-1]:
        if (mounted := line.split()[1]).startswith(f"{place}/"):
            subprocess.run(["umount", "-l", mounted], check=False)


def import_anew(place: Path) -> None:
    """Forget our modules, so that they are imported from `place` next, here and in processes to come."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "ckptstore" or n in _OURS]:
        del sys.modules[name]
    sys.path[:0] = [str(place), str(TESTS)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def run_pytest(place: Path, arguments: Sequence[str], plugin: object) -> int:
    import pytest

    os.chdir(TESTS)
    os.environ.pop("CKPTSTORE_EVIDENCE", None)
    options = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "--hypothesis-profile=ci", f"--basetemp={place / 'tmp'}"]
    return int(pytest.main([*options, *arguments], [plugin]))


def short(nodeid: str) -> str:
    """Return a test's node id without the folders."""
    file, bracket, parameters = nodeid.partition("[")
    return file.rpartition("/")[2] + bracket + parameters


def _serve(place: Path, plan: Plan, answers: int) -> int:
    import_anew(place)
    files = {test.partition("::")[0] for _, tests in plan for test, _ in tests}
    return run_pytest(place, ["-x", "-s", *sorted(files)], _Server(place, plan, answers))


class _Server:
    """In place of running the tests that pytest has collected, runs for each mutant those that it gets, in a fork."""

    def __init__(self, place: Path, plan: Plan, answers: int) -> None:
        self._place = place
        self._plan = plan
        self._answers = answers
        self._limits: dict[str, float] = {}
        self._say_to = -1

    def pytest_runtestloop(self, session: Any) -> bool | None:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
        items = {short(item.nodeid): item for item in session.items}
        for mutant, tests in self._plan:
            file = self._place / "ckptstore" / mutant.module
            original = file.read_text()
            file.write_text(mutant.source)
            self._limits = dict(tests)
            by = self._judge(session, mutant, [items[test] for test, _ in tests if test in items])
            if by is None:
                return None
            file.write_text(original)
            os.write(self._answers, json.dumps(by).encode() + b"\n")
        return True

    def _judge(self, session: Any, mutant: Mutant, tests: list[Any]) -> str | None:
        """Return what notices a mutant; None in a fork, where pytest is to go on."""
        while tests:
            by = self._run(session, mutant, tests)
            if by is None or not by.startswith(_FAILED):
                return by
            # It counts if it comes again: a test may fail by itself, on a machine that is too busy.
            at = [short(item.nodeid) for item in tests].index(by.removeprefix(_FAILED))
            again = self._run(session, mutant, tests[at : at + 1])
            if again != "":
                return again and by
            tests = tests[at + 1 :]
        return ""

    def _run(self, session: Any, mutant: Mutant, tests: list[Any]) -> str | None:
        """Run tests of a mutant in a fork, and return what noticed it; None in the fork, where pytest is to go on with them."""
        said, self._say_to = os.pipe()
        pid = os.fork()
        if pid:
            os.close(self._say_to)
            return self._listen(pid, said)
        os.setsid()
        os.close(self._answers)
        session.items[:] = tests
        if not exchanged(mutant):
            self._say(UNTRIED, 0.0)
            session.items.clear()
        return None

    def _say(self, what: str, limit: float) -> None:
        os.write(self._say_to, json.dumps([what, limit]).encode() + b"\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say(f"begins {nodeid}", self._limits[short(nodeid)])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._say(f"{_FAILED}{short(report.nodeid)}", 60.0)

    def _listen(self, pid: int, said: int) -> str:
        """Return what a fork says of its mutant, when it has ended, or waits for too long."""
        last, limit, begun = "begins", 60.0, time.monotonic()
        waits = False
        pidfd = os.pidfd_open(pid)
        with os.fdopen(said, "rb", buffering=0) as lines:
            while not waits:
                ready = select.select([lines, pidfd], [], [], max(0.0, begun + limit - time.monotonic()))[0]
                if lines in ready and (line := lines.readline()):
                    what, limit = json.loads(line)
                    begun = time.monotonic()
                    last = last if last.startswith(_FAILED) else what
                elif ready:  # it has closed the pipe, and so it ends
                    waits = not select.select([pidfd], [], [], 60.0)[0]
                    break
                else:
                    waits = True
        os.close(pidfd)
        status = end(pid)
        take_down(self._place)
        if last == UNTRIED or last.startswith(_FAILED):
            return last
        if waits:
            return f"the time limit, {last.removeprefix('begins ')}"
        return "" if status == 0 else f"status {status}, {last.removeprefix('begins ')}"


def exchanged(mutant: Mutant) -> bool:
    """Give the function that a mutant changes the mutant's code; return False, having done nothing, if that is not possible."""
    module = sys.modules.get("ckptstore." + mutant.module.removesuffix(".py").replace("/", "."))
    code: CodeType | None = compile(mutant.source, str(getattr(module, "__file__", "")), "exec")
    target: object = module
    for name in mutant.what.partition(": ")[0].split("."):
        found = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name] if code else []
        target = inspect.getattr_static(target, name, None)
        if len(found) != 1 or target is None:  # one of several of the same name, for instance a property's
            return False
        code = found[0]
        for wrapped in ("__func__", "fget", "func"):
            target = getattr(target, wrapped, target) if not inspect.isclass(target) else target
        function = inspect.unwrap(target) if callable(target) else target
        if isinstance(function, FunctionType):
            try:
                function.__code__ = code
            except ValueError:  # it needs other variables of what it stands in
                return False
            return True
    return False
