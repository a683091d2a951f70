"""``ckptstore demo``: training that is killed, started again and damaged, and ends as if nothing had happened."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import RNG_FILE, STATE_FILE
from ..errors import CkptStoreError, UsageError
from ..naming import DATA, data_key, id_of_key
from ..store import Store
from ..url import parse_url
from ._demo_compare import Log, differences, fingerprint, order_problems
from ._demo_job import EPOCHS, SAVE_EVERY, STEPS, TRAINING

__all__ = ["Story", "add_arguments", "run"]

_LOOK = 0.001
"""Seconds between two looks at what a process has done; a save takes some tens of times as long."""

_YOURS = """\
    store = ckptstore.Store("runs/42")
    store.resume({"model": model, "optimizer": optimizer}, sampler=sampler)
    store.save({"model": model, "optimizer": optimizer}, step=step, sampler=sampler, rng=True)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``ckptstore demo``."""
    parser.add_argument(
        "url",
        metavar="URL",
        nargs="?",
        help="a new store, which is kept, such as my-demo or s3://bucket/my-demo; '-' stands for $CKPTSTORE_URL; "
        "without it a temporary folder, removed at the end",
    )


def run(args: argparse.Namespace) -> int:
    """Show the whole story. Returns 0 if both runs ended the same in every bit, else 1.

    Raises:
        UsageError: something the demo needs is missing, or there is something at `args.url` already; nothing was touched.
        CkptStoreError: a training process ended by itself, or no kill landed inside a save.
    """
    if not all(importlib.util.find_spec(name) for name in ("numpy", "sklearn")):
        raise UsageError('the demo needs NumPy and scikit-learn: pip install "ckptstore[demo]"')
    url = os.environ.get("CKPTSTORE_URL") if args.url == "-" else args.url
    if args.url == "-" and not url:
        raise UsageError("'-' stands for $CKPTSTORE_URL, which is not set: give a new path or URL, or nothing")
    if url is not None:
        _check_unused(url)
    with tempfile.TemporaryDirectory(prefix="ckptstore-demo-") as scratch:
        return Story(url, Path(scratch)).tell()


def _check_unused(url: str) -> None:
    parsed = parse_url(url)
    if parsed.scheme == "memory":
        raise UsageError("memory:// ends with its process, and the demo's processes end often: give it a folder or a bucket")
    if rules := [name for name in parsed.options if name.startswith("keep_")]:
        raise UsageError(f"the story needs the default retention: leave out {', '.join(rules)}")
    with Store(url, acquire=False) as store:
        if next(store._engine.backend.list(""), None) is not None:
            raise UsageError(f"{url} is in use: give the demo a new or an empty place, so that it cannot harm what is yours")


class _Torn(NamedTuple):
    """A save that a kill cut short."""

    id: str
    step: int
    before: int
    """The step of the newest checkpoint that was complete."""


class Story:
    """What happens, and what is said about it. The store is at `url`, else in `scratch`, as all else is."""

    def __init__(self, url: str | None, scratch: Path) -> None:
        self.kept = url is not None
        self.url = url or str(scratch / "store")
        self.log = scratch / "run.log"
        self.reference_url = str(scratch / "reference")
        self.reference_log = scratch / "reference.log"
        self._digits = scratch / "digits.npz"
        self._backend = Store(self.url, acquire=False)._engine.backend

    def tell(self) -> int:
        """Let it happen. Returns 0 if both runs ended the same in every bit, else 1."""
        began = time.monotonic()
        _say(
            f"""\
            {_bold("Training that is killed and damaged, and ends as if nothing had happened")}

            A small neural network learns to read {TRAINING} handwritten digits, all of them {EPOCHS} times ({STEPS} steps), with
            shuffling, dropout, momentum and a falling learning rate. Every {SAVE_EVERY} steps it saves a checkpoint in
            {self.url}
            It takes half a minute. What stands behind a | is said by the training process itself."""
        )
        _save_digits(self._digits)
        _act("1  A run that nothing happens to, to compare with")
        with _Training(self.reference_url, self._digits, self.reference_log) as training:
            importlib.import_module("torch")  # takes seconds and is needed below: now is a good moment
            training.finish()
        _act("2  The same again, but killed in the middle of a save (by SIGKILL: a process cannot even notice it)")
        torn = self._kill_in_save()
        _act("3  Started again by the same command, and killed again some time later")
        with self._training() as training:
            training.kill_when(lambda: self._last_step() > torn.step + SAVE_EVERY + 2)
        print(f"   Killed after step {self._last_step()}.")
        collected = next(self._backend.list(data_key(torn.id)), None) is None
        _act("4  The newest checkpoint is damaged where it is stored")
        fallback = self._damage_newest()
        _act("5  Started again by the same command")
        with self._training() as training:
            training.finish()
        _act("Two kills and one damaged file later, compared with the run that nothing happened to")
        good = self.compare([torn.before, fallback], collected)
        self._goodbye(good, time.monotonic() - began)
        return 0 if good else 1

    def _training(self) -> _Training:
        return _Training(self.url, self._digits, self.log)

    def _kill_in_save(self) -> _Torn:
        """Kill a new process in the middle of a save. Whether it was the middle shows afterwards, in what the store lists."""
        for step in range(5 * SAVE_EVERY, STEPS - 2 * SAVE_EVERY, SAVE_EVERY):
            with self._training() as training:
                training.kill_when(partial(self._stored, step))
            cut = self._stored(step)
            with Store(self.url, acquire=False) as store:
                newest = store.checkpoint("latest")
            if cut and newest.id != cut[0] and newest.step is not None:
                print(f"   Killed while it saved step {step}: {cut[1] / 1e3:,.0f} of {newest.nbytes / 1e3:,.0f} kB were stored.")
                print(f"   Nobody will ever see this torn checkpoint: the newest in the store is that of step {newest.step}.")
                return _Torn(cut[0], step, newest.step)
            print("   The kill came just after the save. Once more:")
        raise CkptStoreError("no kill landed inside a save: is the machine very busy? Run the demo again")

    def _stored(self, step: int) -> tuple[str, int] | None:
        """Return the id of the checkpoint of `step`, complete or not, and how many of its bytes are stored; None if there are none."""
        sizes: dict[str, int] = {}
        for info in self._backend.list(DATA):
            if f"-s{step}-" in info.key:
                sizes[id_of_key(info.key)] = sizes.get(id_of_key(info.key), 0) + info.size
        return next(((i, size) for i, size in sizes.items() if size), None)

    def _last_step(self) -> int:
        """Return the last step that was done, 0 before the first."""
        steps = Log.read(self.log).steps
        return steps[-1].step if steps else 0

    def _damage_newest(self) -> int:
        """Flip one bit of the newest checkpoint; return the step of the one before."""
        import torch

        with Store(self.url, acquire=False) as store:
            older, newest = store.checkpoints()[-2:]
        key = data_key(newest.id, STATE_FILE)
        data = bytearray(self._backend.get(key, newest.files[STATE_FILE]))
        data[len(data) // 2] ^= 0x40
        self._backend.replace(key, bytes(data))
        print(f"   One bit is flipped in the middle of {STATE_FILE} of step {newest.step}.")
        with suppress(Exception):
            torch.load(io.BytesIO(data), weights_only=True)
            print("   (Plain torch.load takes that file as if it were good.)")
        assert older.step is not None  # the training job gives every checkpoint one
        return older.step

    def compare(self, resumed: list[int], collected: bool) -> bool:
        """Compare the two runs, say how they compare, and return whether all is as it should be.

        Args:
            resumed: the steps that the last processes should have begun with.
            collected: whether what the killed save left behind has been removed.
        """
        with Store(self.url, acquire=False) as store, Store(self.reference_url, acquire=False) as reference_store:
            run, reference = store.checkpoint(step=STEPS), reference_store.checkpoint(step=STEPS)
            ours, theirs = run.load(), reference.load()
            rng = [checkpoint.load(RNG_FILE)["torch"] for checkpoint in (run, reference)]
            samplers = [checkpoint.sampler_state for checkpoint in (run, reference)]
        log, reference_log = Log.read(self.log), Log.read(self.reference_log)
        weights, expected = ours.pop("model"), theirs.pop("model")
        order = f"sample order: every sample once per epoch; {log.done_again} steps were done again, none was left out"
        began = " and ".join(str(step) for step in resumed)
        return all(
            [
                _check(
                    f"final weights: SHA-256 {fingerprint(weights):.16}, and {fingerprint(expected):.16}",
                    differences(weights, expected),
                ),
                _check(
                    "momentum, learning rate, random generator",
                    differences([ours, rng[0], samplers[0]], [theirs, rng[1], samplers[1]]),
                ),
                _check(order, order_problems(log, reference_log, TRAINING)),
                _check(
                    f"resumed from the newest good checkpoint: steps {began}",
                    [] if log.resumed[-2:] == resumed else [f"{log.resumed}"],
                ),
                _check("what the killed save left behind is gone", [] if collected else ["it is there"]),
            ]
        )

    def _goodbye(self, good: bool, seconds: float) -> None:
        if not good:
            print("\nThis is not as it must be: please report it, with all of the above.")
            return
        print(f"\nThe same to the last bit, in {seconds:.0f} seconds. In your own training it is these lines:\n\n{_YOURS}\n")
        url = shlex.quote(self.url) if self.kept else "my-demo"
        look = f"ckptstore ls {url} && ckptstore show {url} latest && ckptstore verify {url}"
        print(f"Look at the store: {look}" if self.kept else f"To keep a store to look at: ckptstore demo {url} && {look}")


class _Training:
    """A process that trains. What it says is shown as it comes; it is gone when the block is left, however that is."""

    def __init__(self, url: str, digits: Path, log: Path) -> None:
        # Each start is a launch of its own, even inside a Slurm job, where all of them would count as one.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_"))}
        env |= {
            "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),  # it imports what this process imports,
            "PYTHONSAFEPATH": "1",  # and nothing else that happens to lie in the current folder
            "PYTHONWARNINGS": "",  # a warning is shown, and is no error
            "PYTHONIOENCODING": "utf-8",
            "TMPDIR": str(log.parent),
        }
        # In a session of its own: a Ctrl-C at the terminal is for the demo alone, which then ends this process.
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-m", "ckptstore.cli._demo_job", url, str(digits), str(log)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )
        self._shown = threading.Thread(target=self._show)
        self._shown.start()

    def _show(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                with suppress(BrokenPipeError):  # whoever watches has seen enough: the main thread will find out by itself
                    print(textwrap.fill(line, 116, initial_indent="   | ", subsequent_indent="   |     "), flush=True)

    def finish(self) -> None:
        """Wait until it has trained to the end."""
        if self._process.wait():
            raise CkptStoreError(f"the training process ended with status {self._process.returncode}; what it said is above")

    def kill_when(self, condition: Callable[[], object]) -> None:
        """Send SIGKILL as soon as `condition` holds."""
        while not condition() and self._process.poll() is None:
            time.sleep(_LOOK)
        self._process.kill()
        if self._process.wait() != -signal.SIGKILL:
            raise CkptStoreError(
                f"the training process ended by itself (status {self._process.returncode}) before it could be killed"
            )

    def __enter__(self) -> _Training:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()  # does nothing to one that has ended
        self._process.wait()
        self._shown.join()


def _save_digits(path: Path) -> None:
    """Write down the digits that scikit-learn ships: importing it in every training process would take longer than the training."""
    import numpy as np
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    np.savez(path, images=images, labels=labels)


def _check(what: str, problems: list[str]) -> bool:
    """Say whether `what` is as it should be, and if not, why not; return whether it is."""
    good, bad = "✓✗" if "utf" in (getattr(sys.stdout, "encoding", None) or "").lower() else ("ok", "NO")
    print(f"   {bad if problems else good} {what}")
    for problem in problems[:3]:
        print(f"     {problem}")
    return not problems


def _act(title: str) -> None:
    _say(f"\n{_bold(title)}")


def _say(text: str) -> None:
    print(textwrap.dedent(text).rstrip(), flush=True)


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if os.isatty(1) else text
