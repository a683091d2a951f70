"""The shared backend on NFS as Linux has it, two mounts that share no cache: `test_two_hosts`, in a machine of its own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import evidence
import nfs_rig
import pytest
import shared_rigs
import test_two_hosts
from conftest import require


@pytest.mark.soak
@pytest.mark.parametrize("version", ["4.2", "3"])
def test_two_hosts_on_nfs(tmp_path: Path, version: str) -> None:
    missing = nfs_rig.missing()
    require(not missing, f"NFS in user-mode Linux needs {', '.join(missing)}")
    tests = Path(test_two_hosts.__file__)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vs",
        "--color=no",
        "-p",
        "no:cacheprovider",
        "-m",
        "soak or not soak",
        "--durations=10",
        str(tests),
    ]
    disk = f"{tmp_path}/tmp"
    here = {
        "TMPDIR": disk,
        "HYPOTHESIS_STORAGE_DIRECTORY": disk,
        shared_rigs.MOUNTS: str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment = {name: value for name, value in os.environ.items() if name != evidence.FILE} | here
    status, said = nfs_rig.boot(tmp_path, version, command, environment, 3600)
    print(said)
    # The root of that machine is read-only, so what it found is told here.
    races = re.findall(r"(\d+) commits by two hosts in .* on (.*): (\d+) lost, (\d+) dangling", said)
    assert len(races) == 2
    for commits, kind, lost, dangling in races:
        wrong = min(int(commits), int(lost) + int(dangling))
        evidence.record(f"two hosts race, {kind}", points=int(commits), fired=int(commits), violations=wrong)
    assert status == 0
    assert re.search(r"^=+ \d\d passed.*in .* =+$", said, re.MULTILINE), "all were run"
    assert "skipped" not in said
