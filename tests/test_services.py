"""The servers that the other tests start end with them, and say why they do not start. What they answer, the other tests show."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import pytest
from conftest import require

pytest_plugins = ("services",)  # and so imported only in functions: pytest rewrites its asserts first


def test_servers_do_not_outlive_tests_that_are_killed(tmp_path: Path) -> None:
    code = f"""
        import os, pathlib, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import services
        with services.snailmail_server(pathlib.Path({str(tmp_path)!r}), "enforce") as server:
            print(server.endpoint_url, flush=True)
            os.kill(os.getpid(), 9)
    """
    require(sys.platform == "linux", "needs Linux")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(OSError, match=r"refused|reset"):  # reset: it is dying
        urllib.request.urlopen(done.stdout.strip())


def test_what_a_server_said_is_told_when_it_does_not_start(tmp_path: Path) -> None:
    from services import _running

    command = [sys.executable, "-c", "raise SystemExit('no luck today')"]
    with pytest.raises(AssertionError, match="no luck today"), _running(command, 1, tmp_path):
        pass
