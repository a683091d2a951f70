"""Time of ``import ckptstore`` and of what a command needs, beyond a bare interpreter."""

import json
import subprocess
import sys
import time
from statistics import median


def seconds(code: str) -> float:
    """Return the wall time of a fresh interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


cases = {"import ckptstore": "import ckptstore", "open a store": "import ckptstore; ckptstore.Store('runs/x')"}
times: dict[str, list[float]] = {name: [] for name in ("pass", *cases)}
for _ in range(15):
    times["pass"].append(seconds("pass"))
    for name, code in cases.items():
        times[name].append(seconds(f"{code}; import sys; assert 'torch' not in sys.modules"))
bare = median(times["pass"])
print(json.dumps({f"{name} (ms)": round(1e3 * (median(times[name]) - bare), 1) for name in cases}))
