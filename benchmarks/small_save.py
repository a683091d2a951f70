"""A 4 KiB save, durable, beside the same state written by hand: temp file, fsync, replace, fsync directory."""

import json
import os
import sys
import time
from statistics import median

import torch

import ckptstore

ROUNDS = 200
folder = sys.argv[1]
state = {"weight": torch.zeros(1024)}


def by_hand(path: str) -> None:
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


def timed(call: object, *args: object) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call(*args)  # type: ignore[operator]
    return time.perf_counter() - start


os.makedirs(f"{folder}/hand")
store = ckptstore.Store(f"{folder}/small")
hand, ours = [], []
for step in range(ROUNDS):
    hand.append(timed(by_hand, f"{folder}/hand/latest.pt"))
    ours.append(timed(lambda: store.save(state, step=step)))  # noqa: B023  # called at once
    while len(os.listdir(f"{folder}/small/data")) > 2:  # pruning goes on in the background; it must not slow the other side down
        pass
pairs = sorted(b / a for a, b in zip(hand, ours, strict=True))
print(
    json.dumps(
        {
            "by hand (ms)": round(1e3 * median(hand), 2),
            "store.save (ms)": round(1e3 * median(ours), 2),
            "ratio of medians": round(median(ours) / median(hand), 2),
            "ratio, pair by pair (quartiles)": f"{pairs[ROUNDS // 4]:.2f} – {pairs[3 * ROUNDS // 4]:.2f}",
        }
    )
)
