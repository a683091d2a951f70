"""A 4 KiB save, durable, beside the same state written by hand: temp file, fsync, replace, fsync directory."""

import os
import sys

import torch
from paired import Target, Way, paired, report

import ckptstore

folder = sys.argv[1]
state = {"weight": torch.zeros(1024)}


def by_hand(path: str = f"{folder}/hand/latest.pt") -> None:
    """Write `state` as careful people do it, without checksum, fencing or fallback."""
    temp = path + ".tmp"
    with open(temp, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
    fd = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


os.makedirs(f"{folder}/hand")
store = ckptstore.Store(f"{folder}/small")
ways = {
    "save": Way(
        lambda: store.save(state), after=store._engine.settle
    ),  # pruning goes on in the background; not at the cost of the other
    "temp file, fsync, replace, fsync directory": Way(by_hand),
}
report(paired("a 4 KiB save, durable", ways, 200, [Target("save", list(ways)[1], 2)], warm=5))
