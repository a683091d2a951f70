"""Real shared file systems, each mounted twice, as fixtures; a test module takes them in with ``pytest_plugins``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import shared_rigs
from conftest import require, rig_running
from juicefs_rig import SharedFolder

pytest_plugins = ("juicefs_fixtures",)

_numbers = count(1)


@contextmanager
def started(kind: str, folder: Path) -> Iterator[Path]:
    """Have a rig of `shared_rigs` for the length of the block, mounted on ``a`` and ``b`` in `folder`."""
    missing = shared_rigs.missing(kind)
    require(not missing, f"{kind} needs {', '.join(missing)}")
    with rig_running(kind, shared_rigs.command(kind, folder), folder):
        yield folder


@pytest.fixture(scope="session")
def weed_mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with two mounts of SeaweedFS."""
    with started("seaweedfs", tmp_path_factory.mktemp("seaweedfs")) as folder:
        yield folder


_SOAK = [pytest.param(kind, marks=pytest.mark.soak) for kind in shared_rigs.KINDS if kind != "seaweedfs"]


@pytest.fixture(scope="session", params=[shared_rigs.MOUNTS] if os.environ.get(shared_rigs.MOUNTS) else ["juicefs", *_SOAK])
def each_mounts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with two mounts, of one kind after the other."""
    if request.param == shared_rigs.MOUNTS:
        yield Path(os.environ[shared_rigs.MOUNTS]).resolve()
    elif request.param == "juicefs":
        yield request.getfixturevalue("mounts")
    else:
        with started(request.param, tmp_path_factory.mktemp(request.param)) as folder:
            yield folder


@pytest.fixture
def two(each_mounts: Path) -> SharedFolder:
    """A new folder, as two hosts see it."""
    name = f"{os.getpid()}-{next(_numbers)}"
    (each_mounts / "a" / name).mkdir()
    return SharedFolder(each_mounts / "a" / name, each_mounts / "b" / name)
