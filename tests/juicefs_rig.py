"""A real shared file system on one machine: JuiceFS, mounted twice by FUSE, each mount with caches of its own.

``python juicefs_rig.py FOLDER`` mounts it on FOLDER/a and FOLDER/b, says "ready", and takes it down when its standard input ends, which
it also does when whoever started it is killed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SharedFolder:
    """One new folder, seen through two mounts."""

    a: Path
    b: Path

    def urls(self, **options: object) -> tuple[str, str]:
        """Return the URLs of one store, through each of them."""
        more = "&".join(f"{k}={v}" for k, v in {"create": 1, **options}.items())
        return f"shared://{self.a}/run?{more}", f"shared://{self.b}/run?{more}"


def _mounted(volume: str) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [place for what, place, *_ in (line.split(" ") for line in lines) if re.fullmatch(f"JuiceFS:{volume}", what)]


def _unmount(volume: str) -> None:
    tool = shutil.which("fusermount3") or "fusermount"
    for place in _mounted(volume):
        subprocess.run([tool, "-u", "-z", place], check=False)  # its process ends by itself


def _unmount_stale() -> None:
    """Take down what rigs left that were killed themselves."""
    for what in re.findall(r"^JuiceFS:ckptstore-(\d+) ", Path("/proc/self/mounts").read_text(), re.MULTILINE):
        if not os.path.exists(f"/proc/{what}"):
            _unmount(f"ckptstore-{what}")


def _main(folder: Path) -> None:
    _unmount_stale()
    volume = f"ckptstore-{os.getpid()}"
    meta = f"sqlite3://{folder}/meta.db"

    def juicefs(*arguments: str) -> None:
        subprocess.run(["juicefs", *arguments], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)

    juicefs("format", "--storage", "file", "--bucket", f"{folder}/objects/", "--trash-days", "0", meta, volume)
    try:
        for name in ("a", "b"):
            (folder / name).mkdir()
            cache = ["--cache-dir", f"{folder}/cache-{name}", "--cache-size", "256"]
            juicefs("mount", "-d", "--no-usage-report", *cache, "--log", f"{folder}/{name}.log", meta, f"{folder}/{name}")
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        _unmount(volume)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
