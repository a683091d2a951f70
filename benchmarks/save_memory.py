"""Peak extra memory of a synchronous save of 1 GiB in 32 tensors, by the kernel's own high-water mark (VmHWM)."""

import json
import re
import sys
from pathlib import Path

import torch

import ckptstore

GIB = 1 << 30


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


state = {f"layer{i}": torch.ones(GIB // 32 // 4) for i in range(32)}
store = ckptstore.Store(f"{sys.argv[1]}/memory?keep_last=1")
store.save({"warm": torch.ones(1 << 20)}, "warm")  # imports and threads are not part of the figure
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to now: proc_pid_clear_refs(5)
store.save(state, step=1)
saved = memory("VmHWM") - before
del state
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
loaded = store.load()
peak = memory("VmHWM") - before
print(
    json.dumps(
        {
            "save: extra (MiB)": round(saved / 2**20, 1),
            "load: peak beyond the loaded object (MiB)": round((peak - GIB) / 2**20, 1),
        }
    )
)
