"""Print the figures that the README quotes: ``python benchmarks/run.py [--dir FOLDER] [--json FILE] [NAME ...]``.

Times are medians of paired, alternating runs in one process; only their ratio means something on another machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BENCHMARKS = {
    "import_time": "import ckptstore, without torch (ms beyond a bare interpreter; target <= 150)",
    "save_memory": "peak extra memory of a synchronous save of 1 GiB (MiB; target <= 64)",
    "small_save": "a 4 KiB save beside temp file, fsync, replace, fsync directory (ratio; target <= 2)",
    "s3_requests": "requests to S3 (targets: save <= 6, newest <= 3), memory of a save of 1 GiB",
    "shared_folder": "JuiceFS mounted twice: racing commits; 1 GiB beside plain write and fsync, and read (ratio; target <= 1.15)",
    "object_store": "save and load of 1 GiB on S3 beside other clients (target: 1.3 times the fastest other)",
}


def main() -> int:
    """Run the named benchmarks, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--dir", help="where to write; the default is a temporary folder here, because /tmp may be memory")
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="bench-", dir=arguments.dir or os.getcwd())
    results: dict[str, object] = {
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "file system": subprocess.run(
                ["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True
            ).stdout.strip(),
        }
    }
    try:
        for name in arguments.names or BENCHMARKS:
            place = Path(folder) / name
            place.mkdir()
            done = subprocess.run(
                [sys.executable, str(HERE / f"{name}.py"), str(place)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name} failed:\n{done.stderr}", file=sys.stderr)
                return 1
            results[name] = figures = json.loads(done.stdout)
            shutil.rmtree(place, ignore_errors=True)
            print(f"{name}: {BENCHMARKS[name]}")
            for key, value in figures.items():
                print(f"    {key:<60}{value}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("machine:", ", ".join(f"{k} {v}" for k, v in results["machine"].items()))  # type: ignore[attr-defined]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
