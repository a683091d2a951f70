"""Peak extra memory of a synchronous save, and of a load beyond the loaded object."""

import sys
from functools import partial

import torch
from paired import MIB, SIZE, extra_memory, figure, large, report

import ckptstore

state = large()
store = ckptstore.Store(f"{sys.argv[1]}/memory?keep_last=1")
store.save({"warm": torch.ones(1 << 20)}, "warm")  # imports and threads are not part of the figure
saved = extra_memory(partial(store.save, state, step=1))
del state
loaded: list[object] = []
peak = extra_memory(lambda: loaded.append(store.load())) - SIZE
report(
    figure("save: extra memory", round(saved / MIB, 1), "MiB", 64, f"of a state of {SIZE // MIB} MiB"),
    figure("load: beyond the loaded object", round(peak / MIB, 1), "MiB"),
)
