"""A 4 KiB save, durable, beside the same state written by hand: temp file, fsync, replace, fsync directory.

On the disk that holds the folder; and, as root on Linux, on ext4 and xfs as their mkfs makes them, on a loop device: what each flush costs
there is theirs.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from paired import Target, Way, paired, report

import ckptstore

HAND = "temp file, fsync, replace, fsync directory"
state = {"weight": torch.zeros(1024)}


def by_hand(path: Path) -> None:
    """Write `state` as careful people do it, without checksum, fencing or fallback."""
    temp = f"{path}.tmp"
    with open(temp, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
    fd = os.open(path.parent, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def measure(folder: Path, where: str) -> Any:
    """Compare the two in `folder`."""
    (folder / "hand").mkdir()
    with ckptstore.Store(folder / "small") as store:
        ways = {
            "save": Way(
                lambda: store.save(state), after=store._engine.settle
            ),  # pruning goes on in the background; not at the cost of the other
            HAND: Way(lambda: by_hand(folder / "hand/latest.pt")),
        }
        return paired(f"a 4 KiB save, durable, on {where}", ways, 200, [Target("save", HAND, 2)], warm=5)


@contextmanager
def disk(image: Path, kind: str) -> Iterator[Path]:
    """Lend a new file system of this kind, in a file."""
    with image.open("wb") as file:
        file.truncate(1 << 30)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
    place = image.with_suffix(".mnt")
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


folder = Path(sys.argv[1])
(folder / "here").mkdir()
found = [measure(folder / "here", "the disk of the folder")]
for kind in ("ext4", "xfs") if os.geteuid() == 0 else ():
    if shutil.which(f"mkfs.{kind}"):
        with disk(folder / kind, kind) as place:
            found.append(measure(place, f"{kind} as mkfs makes it"))
report(*found)
