"""Measure: ``python benchmarks/run.py [--dir FOLDER] [--json FILE] [--plots FOLDER] [NAME ...]``.

Times are medians of alternating runs in one process; only their ratios mean something on another machine. BENCH_MIB sets the size of the
states (1024).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from paired import machine, summary

HERE = Path(__file__).parent
BENCHMARKS = {
    "import_time": "import ckptstore, without torch",
    "save_memory": "memory that a save and a load take",
    "save": "a durable save beside the limit and beside others, on disk and in memory",
    "loading": "loads, resume and verify beside torch, which checks nothing",
    "first_resume": "a resume in a new process beside torch, which checks nothing",
    "gil": "what a thread that only counts keeps of its speed while others save and load",
    "small_save": "a 4 KiB save beside temp file, fsync, replace, fsync directory",
    "async_save": "how long the training thread is blocked by a save in the background, and its memory",
    "gpu": "saves and loads of what is on a GPU; nothing is measured where there is none",
    "s3_requests": "requests to S3, and the memory of a save",
    "scale": "10 000 checkpoints kept after a million commits, beside ten",
    "shared_folder": "JuiceFS mounted twice: racing commits; save and load beside plain files",
    "object_store": "save and load on S3 beside other clients",
}


def main() -> int:
    """Run the named benchmarks, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--dir", help="where to write; the default is a temporary folder here, because /tmp may be memory")
    parser.add_argument("--json", help="also write the results, with every single run, to this file")
    parser.add_argument("--plots", help="also draw them into this folder (needs matplotlib)")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="bench-", dir=arguments.dir or os.getcwd())
    results: dict[str, Any] = {"machine": machine(folder), "benchmarks": {}}
    failed = False
    try:
        for name in arguments.names or BENCHMARKS:
            place = Path(folder) / name
            place.mkdir()
            command = [sys.executable, str(HERE / f"{name}.py"), str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            shutil.rmtree(place, ignore_errors=True)
            print(f"{name}: {BENCHMARKS[name]}")
            if done.returncode:
                print(f"  FAILED:\n{done.stderr}")
                failed = True
                continue
            results["benchmarks"][name] = found = json.loads(done.stdout)
            for result in found:
                print(summary(result))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("machine:", ", ".join(f"{k} {v}" for k, v in results["machine"].items()))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    if arguments.plots:
        from plot import draw

        draw(results, Path(arguments.plots))
    return failed


if __name__ == "__main__":
    sys.exit(main())
