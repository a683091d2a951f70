"""A store that keeps 10 000 checkpoints after 1 000 000 commits, beside one that keeps 10 after 10: what a save, a load and a look cost.

The commits that came before are written as they stand in a store that has lived so long: a tombstone in each old slot, and the newest
records whole. The checkpoints are small (4 KiB), so that little else is in the figures, and two files each, which pruning deletes in the
background: that belongs to no save, and least of all to the other store's, which is next. BENCH_KEPT and BENCH_SLOTS make it smaller.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from paired import Target, Way, paired, places, report

from ckptstore import Store
from ckptstore.checksum import sha256
from ckptstore.entry import Entry
from ckptstore.log import slot_key
from ckptstore.naming import data_key, new_id
from ckptstore.record import Record, encode, encode_tombstone

KEPT = int(os.environ.get("BENCH_KEPT", "10000"))
SLOTS = int(os.environ.get("BENCH_SLOTS", "1000000"))
STATE = {"weight": torch.zeros(1024)}
WHOLE = 8


def build(root: Path, kept: int, slots: int) -> None:
    """Make the log of a store, unless it is there already: a million files take a while."""
    if root.exists():
        return
    (root / "log").mkdir(parents=True)
    log = os.open(root / "log", os.O_RDONLY)

    def write(n: int, data: bytes) -> None:
        fd = os.open(slot_key(n)[4:], os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=log)
        os.write(fd, data)
        os.close(fd)

    for n in range(1, slots - WHOLE + 1):
        write(n, encode_tombstone(n, f"{n:032x}"))
    entries = tuple(
        Entry(new_id(1, step), step, "latest", 1.7e9 + step / 7, 4500, secrets.token_hex(32), {"loss": 1 / (step + 1)})
        for step in range(kept)
    )
    prev = secrets.token_hex(32) if slots > WHOLE else None
    for n in range(max(1, slots - WHOLE + 1), slots + 1):
        now = entries[: max(1, kept - (slots - n))]
        data = encode(Record(n, 1, "the job before", f"{n:032x}", prev, {"latest": now[-1].id}, now))  # type: ignore[arg-type]
        write(n, data)
        prev = sha256(data)
    if slots >= 16:
        (root / "log" / "hint").write_text(f"{slots // 16 * 16} {'0' * 64}")
    os.close(log)
    for entry in entries:
        folder = root / data_key(entry.id)
        folder.mkdir(parents=True)
        for name in ("state.pt", "manifest.json"):
            (folder / name).write_bytes(bytes(4096))
    os.sync()


def ways(root: Path, kept: int) -> dict[str, Callable[[], object] | Way]:
    """Return what is measured, on a store that keeps so many; a save lets the oldest go."""
    store = Store(root, keep_last=kept, owner="this job")
    for step in range(40):
        store.save(STATE, step=kept + step)

    def first_load() -> None:
        with Store(root) as reader:
            reader.load()

    def ls(*arguments: str) -> Callable[[], object]:
        command = [sys.executable, "-m", "ckptstore", "ls", str(root), *arguments]
        return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def look() -> None:
        with Store(root) as reader:
            assert len(reader.checkpoints()) == kept

    def save() -> None:
        store.save(STATE, step=kept)

    return {
        "save": Way(save, after=store._engine.settle),
        "load": store.load,
        "load, by a Store just opened": first_load,
        "checkpoints(), by a Store just opened": look,
        "ls": ls(),
    }


def main(folder: Path) -> None:
    """Report the figures."""
    results = []
    with places(folder) as found:
        build(found["disk"] / "few", 10, 10)
        build(found["disk"] / "many", KEPT, SLOTS)
        few, many = ways(found["disk"] / "few", 10), ways(found["disk"] / "many", KEPT)
        for name, way in few.items():
            both = {f"{name}, of 10": way, f"{name}, of {KEPT}": many[name]}
            rounds = 100 if name in ("save", "load", "load, by a Store just opened") else 10
            title = f"{name}: {KEPT} kept and {SLOTS} slots, beside 10 and 10"
            # An object for each checkpoint takes as long as there are checkpoints.
            goals = [] if name.startswith("checkpoints()") else [Target(f"{name}, of {KEPT}", f"{name}, of 10", 1.5)]
            results.append(paired(title, both, rounds, goals, warm=3))
    report(*results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
