"""Saves arrays with Orbax, in a Python of its own, each time that a line with their sizes comes; prints wall and CPU seconds.

They are random, as the others' tensors are: it compresses what it writes.
"""

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

folder = Path(sys.argv[1])
saver = ocp.StandardCheckpointer()
sizes: list[int] = []
for line in sys.stdin:
    if (wanted := [int(n) for n in line.split()]) != sizes:
        sizes = wanted
        numbers = np.random.default_rng(0)
        state = {str(i): jax.block_until_ready(jnp.asarray(numbers.random(n, np.float32))) for i, n in enumerate(sizes)}
    start, cpu = time.perf_counter(), time.process_time()
    saver.save(folder / "orbax", state)
    saver.wait_until_finished()
    for path in (folder / "orbax").rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    print(time.perf_counter() - start, time.process_time() - cpu, flush=True)
