"""Time of ``import ckptstore`` and of what a command needs, beyond a bare interpreter."""

import subprocess
import sys
from collections.abc import Callable
from statistics import median

from paired import figure, paired, report


def python(code: str) -> Callable[[], object]:
    """Return what runs `code` in a fresh interpreter."""
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


LIGHT = "; import sys; assert 'torch' not in sys.modules"
ways = {
    "bare interpreter": python("pass"),
    "import ckptstore": python("import ckptstore" + LIGHT),
    "open a store": python("import ckptstore; ckptstore.Store('runs/x')" + LIGHT),
}
result = paired("a fresh interpreter", ways, rounds=15)
bare, ours, opened = (1e3 * median(run["wall"]) for run in result["runs"].values())
report(
    result,
    figure("import ckptstore, beyond the interpreter", round(ours - bare, 1), "ms", 150),
    figure("open a store, beyond the interpreter", round(opened - bare, 1), "ms"),
)
