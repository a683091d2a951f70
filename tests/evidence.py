"""What the fault experiments found, as one table: ``python evidence.py FILE`` prints it.

An experiment strikes at each of its points once, with each of the subjects that it can be done with, and looks whether what was
acknowledged is there afterwards, and whole. It says how that went with `record`; ``tox -e soak`` sets where.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

__all__ = ["FILE", "OURS", "SUBJECTS", "record", "remark", "table"]

OURS = "ckptstore"
SUBJECTS = (OURS, "torch.save", "tmp + os.replace", "DCP")

FILE = "CKPTSTORE_EVIDENCE"
"""The environment variable with the file that is added to; without it, nothing is."""


def record(experiment: str, *, points: int, fired: int, violations: int, subject: str = OURS) -> None:
    """Add a result; several of one experiment and subject are added up.

    `points` were enumerated, at `fired` of them the fault really happened, and after `violations` of those something acknowledged was
    missing or damaged, or a broken promise showed in another way.
    """
    assert subject in SUBJECTS
    assert 0 <= violations <= fired <= points
    _add([experiment, subject, points, fired, violations])


def remark(text: str) -> None:
    """Add a line for below the table."""
    _add([text])


def _add(found: list[object]) -> None:
    if file := os.environ.get(FILE):
        line = json.dumps(found) + "\n"
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(fd, line.encode())  # at once: other processes add theirs
        finally:
            os.close(fd)


def table(lines: str) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    remarks = []
    for line in lines.splitlines():
        experiment, *of = json.loads(line)
        if not of:
            remarks.append(experiment)
            continue
        subject, *numbers = of
        found[experiment].update({(subject, what): n for what, n in zip(("points", "fired", "violations"), numbers, strict=True)})
    yield f"| experiment | points | fired | {' | '.join(f'{s}: violations' for s in SUBJECTS)} |"
    yield "|---|" + "---:|" * (2 + len(SUBJECTS))
    for experiment in sorted(found):
        counts = found[experiment]
        cells = [f"{counts[OURS, 'points']}", f"{counts[OURS, 'fired']}"]
        for subject in SUBJECTS:
            fired = counts[subject, "fired"]
            of = "" if subject == OURS else f" of {fired}"
            cells.append(f"{counts[subject, 'violations']}{of}" if fired else "–")
        yield f"| {experiment} | {' | '.join(cells)} |"
    if remarks:
        yield ""
        yield from remarks


if __name__ == "__main__":
    print(*table(Path(sys.argv[1]).read_text()), sep="\n")
