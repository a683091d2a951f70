"""What several test files need."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evidence
import pytest
from procs import Nursery, nursery

import ckptstore

if TYPE_CHECKING:
    from ranks_rig import Ranks

# -- a run of the tests, and the soak's evidence: see evidence.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--resume", action="store_true", help=f"leave out what has passed before, by the file in ${evidence.FILE}")


_PASSED = pytest.StashKey[set[str]]()


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # We are a background job of a shell's; so would be the processes that tests start, and then interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    file = Path(os.environ.get(evidence.FILE, ""))
    found = evidence.passed(file.read_text()) if config.getoption("resume") and file.is_file() else set()
    config.stash[_PASSED] = set(getattr(config, "workerinput", {}).get("passed", found))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Let all workers of pytest-xdist leave out the same, also those that start later."""
    node.workerinput["passed"] = sorted(node.config.stash[_PASSED])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if before := [item for item in items if item.nodeid in config.stash[_PASSED]]:
        config.hook.pytest_deselected(items=before)
        items[:] = [item for item in items if item not in set(before)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    evidence.begin(item.nodeid)
    item.stash[_OUTCOMES] = set()
    done = yield
    outcomes = item.stash[_OUTCOMES]
    evidence.end(item.nodeid, next(o for o in ("failed", "skipped", "passed") if o in outcomes))
    return done


_OUTCOMES = pytest.StashKey[set[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_OUTCOMES].add(report.outcome)
    return report


# -- what tests share


@pytest.fixture(scope="module")
def warm(request: pytest.FixtureRequest) -> Iterator[Nursery]:
    """A process from which to fork children, which has imported the test module, or what that names in WARM, and `procs`."""
    yield from nursery("procs", *getattr(request.module, "WARM", (request.module.__name__,)))


@pytest.fixture
def ranks(warm: Nursery, tmp_path: Path) -> Ranks:
    """Runs functions of the test module on all ranks of new process groups."""
    from ranks_rig import Ranks  # imports torch

    return Ranks(warm, tmp_path)


# -- what tests call


def require(condition: object, why: str) -> None:
    """Skip the test where `condition` does not hold, for instance on a laptop; in CI (``CI`` set) fail instead: a hole must show."""
    if condition:
        return
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"CI must be able to run this: {why}")
    pytest.skip(why)


@contextmanager
def mounted(place: Path, kind: str, options: str, device: str = "none") -> Iterator[None]:
    """Mount a file system on `place` (made if need be) for the length of the block."""
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", kind, "-o", options, device, str(place)], capture_output=True, text=True)
    require(done.returncode == 0, f"cannot mount {kind}: {done.stderr}")
    try:
        yield
    finally:
        at_once = ["-l"] if kind == "tmpfs" else []  # though a deletion in the background may have something open
        subprocess.run(["umount", *at_once, str(place)], check=True)


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where a flush costs nothing."""
    with mounted(tmp_path / "ram", "tmpfs", "size=1g"):
        yield tmp_path / "ram"


@contextmanager
def rig_running(kind: str, command: Sequence[str], folder: Path) -> Iterator[None]:
    """Run a script that mounts file systems below `folder` for the length of the block; it says "ready", and ends with its input."""
    log = folder / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=out,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests; then we end it
        ) as rig,
    ):
        assert rig.stdin
        assert rig.stdout
        try:
            ready = rig.stdout.readline() == "ready\n"
            require(ready, f"{kind} cannot be mounted here: {log.read_text(errors='replace')[-2000:]}")
            yield
        finally:
            rig.stdin.close()
            rig.wait(30)


_CALLS = "fsync,fdatasync,link,linkat,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,close"


def traced(place: Path, code: str, *inject: str) -> tuple[list[str], Any]:
    """Run `code` under strace; return its durable steps, as "call path…" relative to `place`, and what it printed."""
    require(shutil.which("strace"), "needs strace")
    log = place.parent / f"{place.name}.strace"
    command = [
        "strace",
        "-f",
        "-y",
        "-s",
        "300",
        "-o",
        str(log),
        "-e",
        f"trace={_CALLS}",
        *[a for i in inject for a in ("-e", f"inject={i}")],
    ]
    env = {**os.environ, "PYTHONPATH": str(Path(ckptstore.__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, sys.executable, "-c", code], cwd=place, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    steps = [step for line in log.read_text().splitlines() if (step := _step(line, place))]
    return steps, json.loads(done.stdout)


def _step(line: str, place: Path) -> str | None:
    match = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)(.*)", line)
    if not match or match[1] == "close":
        return None
    call, arguments, result, _ = match.groups()
    paths = re.findall(r'<([^<>]*)>|"([^"]*)"', arguments)
    names = [os.path.relpath(name, place) if os.path.isabs(name) else name for name in (fd or text for fd, text in paths)]
    where = " ".join(re.sub(r"\.[0-9a-f]{16}\.partial", ".tmp", name) for name in names)
    return f"{call} {where}" + ("" if result == "0" else " FAILED")
