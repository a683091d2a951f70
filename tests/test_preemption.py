"""Signals that ask to stop: noted, agreed on by all ranks, and met by the scripts of docs/preemption.md, which really run."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from procs import Channel, Nursery
from stores import new_memory, store_on

import ckptstore
from ckptstore import Store, UsageError, preemption
from ckptstore.testing import Fault, FaultyBackend

ROOT = Path(ckptstore.__file__).parent.parent
PAGE = (Path(__file__).parent.parent / "docs/preemption.md").read_text(encoding="utf-8")
PATIENCE = 120
"""Seconds that a script may take."""


def test_a_signal_leaves_a_note() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with preemption(grace=50) as guard:
            assert not guard.requested()
            assert guard.seconds_left == threading.TIMEOUT_MAX
            signal.raise_signal(number)
            assert 0 < guard.seconds_left <= 50
            assert guard.requested()
            assert guard.requested()
            assert 0 < guard.seconds_left <= 50
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_block_within_a_block() -> None:
    """Both are asked to stop; a second signal does what it would have done outside of both."""
    code = """
        import signal, time
        from ckptstore import preemption
        with preemption() as outer:
            with preemption([signal.SIGTERM]) as inner:
                assert not inner.requested() and not outer.requested()
                signal.raise_signal(signal.SIGTERM)
                assert inner.requested()
            assert outer.requested()
            with preemption([signal.SIGTERM]) as another:
                assert not another.requested()
                for guard in (outer, another):
                    guard._first = time.monotonic() - 10
                signal.raise_signal(signal.SIGTERM)
        raise AssertionError("still alive")
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60).returncode == -signal.SIGTERM


def test_other_signals_do_as_they_did() -> None:
    with preemption([signal.SIGUSR2]) as guard:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not guard.requested()
        signal.raise_signal(signal.SIGUSR2)
        assert guard.requested()


def test_the_time_left_is_a_timeout() -> None:
    done: Future[int] = Future()
    done.set_result(7)
    never: Future[int] = Future()
    with preemption(grace=0) as guard:
        assert done.result(timeout=guard.seconds_left) == 7
        signal.raise_signal(signal.SIGTERM)
        assert guard.requested()
        assert guard.seconds_left == 0
        with pytest.raises(FutureTimeout):
            never.result(timeout=guard.seconds_left)


def test_a_save_in_the_background_meets_the_deadline_or_is_given_up() -> None:
    backend = FaultyBackend(new_memory())
    gate = threading.Event()
    with store_on(backend) as store:
        for grace, in_time in ((0, False), (100, True)):
            backend.plan[:] = [] if in_time else [Fault("writer.write", 0, before=lambda: gate.wait(60))]
            with preemption(grace=grace) as guard:
                signal.raise_signal(signal.SIGTERM)
                assert guard.requested()
                pending = store.save_async({"x": 1}, step=grace)
                if in_time:
                    assert pending.result(timeout=guard.seconds_left).step == grace
                else:
                    with pytest.raises(FutureTimeout):
                        pending.result(timeout=guard.seconds_left)
                    assert pending.cancel()
                    gate.set()
        assert [c.step for c in store.checkpoints()] == [100]


def ended_by(code: str, *signals: int) -> tuple[int, str]:
    """Run `code` until it says "ready", send it signals, each when it has answered the one before; return its end, and what it said."""
    command = [sys.executable, "-W", "error", "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout is not None
        said = ""
        for number in signals:
            said += child.stdout.readline()
            child.send_signal(number)
        rest, _ = child.communicate(timeout=PATIENCE)
        return child.returncode, said + rest


_LOOP = """
import os, signal, sys, time
from ckptstore import preempt
{before}
with preempt.preemption() as guard:
    print("ready", flush=True)
    while not guard.requested():
        signal.sigtimedwait([], 0.01)
    print("noted", flush=True)
    {then}
print("over", flush=True)
"""


def test_a_second_signal_does_as_usual() -> None:
    wait = "sys.stdin.read(); print('survived', flush=True)"
    code = _LOOP.format(before="preempt._ECHO = 0", then=wait)
    assert ended_by(code, signal.SIGUSR1, signal.SIGTERM) == (-signal.SIGTERM, "ready\nnoted\n")
    handler = "preempt._ECHO = 0; signal.signal(signal.SIGTERM, lambda n, f: os.write(1, b'the old handler\\n'))"
    code = _LOOP.format(before=handler, then=wait)
    assert ended_by(code, signal.SIGTERM, signal.SIGTERM) == (0, "ready\nnoted\nthe old handler\nsurvived\nover\n")


def test_an_echo_of_the_first_is_the_first() -> None:
    code = _LOOP.format(before="preempt._ECHO = 3600", then="sys.stdin.read()")
    assert ended_by(code, signal.SIGTERM, signal.SIGTERM) == (0, "ready\nnoted\nover\n")


def test_after_the_block_a_signal_kills() -> None:
    code = _LOOP.format(before="", then="pass").replace(
        'print("over", flush=True)', 'print("over", flush=True); sys.stdin.read()'
    )
    assert ended_by(code, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR1)[0] == -signal.SIGUSR1


def test_forked_workers() -> None:
    import torch

    with preemption() as guard:
        loader: Any = torch.utils.data.DataLoader(
            cast(Any, list(range(64))), batch_size=1, num_workers=1, multiprocessing_context="fork"
        )
        batches = iter(loader)
        next(batches)
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGUSR1)
        assert len(list(batches)) == 63
        assert not guard.requested()

        pid = os.fork()
        if not pid:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert not guard.requested()


def test_a_child_is_ended_however_soon_after_its_fork() -> None:
    """Before Python is done with the fork, for one; and a handler of the child's own is its own, and its children's."""
    code = """
        import os, signal, time
        from ckptstore import preemption
        with preemption(), preemption() as guard:
            children = []
            for _ in range(20):
                pid = os.fork()
                if not pid:
                    time.sleep(5)
                    os._exit(0)
                os.kill(pid, signal.SIGTERM)
                children.append(pid)
            assert {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children} == {-signal.SIGTERM}
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            pid = os.fork()
            if not pid:
                signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
                if os.fork():
                    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
                signal.raise_signal(signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
            assert not guard.requested()
        print("over")
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("over\n", "")


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for signals in ([signal.SIGKILL], [signal.SIGSTOP], ["SIGTERM"], [4711], signal.SIGTERM):
        with pytest.raises(UsageError):
            preemption(cast(Any, signals))
    for grace in (-1, math.inf, math.nan, "30", True, None):
        with pytest.raises(UsageError, match="grace"):
            preemption(grace=cast(Any, grace))
    with preemption() as guard, pytest.raises(UsageError, match="in use"), guard:
        pass

    with monkeypatch.context() as patch:
        patch.setattr(signal, "getsignal", lambda _: None)  # as for a handler that was there before Python
        with pytest.raises(UsageError, match="SIGTERM is handled"), preemption():
            pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    said: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with preemption():
                pass
        except BaseException as exc:
            said.append(exc)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert isinstance(said[0], UsageError)
    assert "main thread" in str(said[0])


def test_the_readme(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python preemption\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    example = example.replace("...  # step on the batch", "step(batch)")
    steps: list[int] = []

    def step(batch: int) -> None:
        steps.append(batch)
        if batch == 3:
            signal.raise_signal(signal.SIGUSR1)

    class Sampler:
        @staticmethod
        def track(loader: Any) -> Any:
            return loader

        def state_dict(self) -> dict[str, int]:
            return {"seen": steps[-1]}

    with Store(tmp_path) as store:
        names = {
            "ckptstore": ckptstore,
            "store": store,
            "sampler": Sampler(),
            "loader": range(9),
            "step": step,
            "progress": {"x": 1},
        }
        exec(compile(example.replace("step=step", "step=len(steps)"), "README.md", "exec"), {**names, "steps": steps})
        assert steps == [0, 1, 2, 3]
        assert store.checkpoint().sampler_state == {"seen": 3}


# --- several ranks


def warm_up() -> None:
    import torch.distributed
    import torch.nn.parallel  # noqa: F401


def rank(channel: Channel, folder: str, url: str, rank: int, world: int) -> None:
    """Step until told to stop; then the first rank saves."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_default_device("meta")  # whatever it is, the ranks decide on the CPU
    with preemption(grace=60) as guard:
        for step in range(1_000_000):
            if guard.requested():
                if rank == 0:
                    Store(url).save({"step": step}, step=step)
                channel.send("stopped", step, guard.seconds_left)
                break
            if step == 3:
                channel.send("running")
    dist.destroy_process_group()
    channel.send("over")


def rank_of_a_part(channel: Channel, folder: str, rank: int) -> None:
    """Ask in a group of two of three ranks, in one block after another."""
    import torch.distributed as dist

    limit = timedelta(seconds=10)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3, timeout=limit)
    part = dist.new_group([0, 2])
    said = []
    for block in range(3):
        if rank != 1:
            with preemption(process_group=part) as guard:
                if block == 1 and rank == 2:
                    signal.raise_signal(signal.SIGTERM)
                said.append(guard.requested())
    dist.barrier()
    dist.destroy_process_group()
    channel.send("said", *said)


def test_a_part_of_the_ranks_asks_in_several_blocks(tmp_path: Path, warm: Nursery) -> None:
    children = [warm.start(rank_of_a_part, str(tmp_path), rank) for rank in range(3)]
    assert [child.expect("said") for child in children] == [[False, True, False], [], [False, True, False]]


@pytest.mark.parametrize(("world", "signalled"), [(2, 1), (4, 1), (4, 4)])
def test_all_ranks_stop_at_the_same_step(tmp_path: Path, warm: Nursery, world: int, signalled: int) -> None:
    rng = random.Random(world * 10 + signalled)
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        url = str(folder / "store")
        ranks = [warm.start(rank, str(folder), url, i, world) for i in range(world)]
        for child in ranks:
            assert child.recv() == ["running"]
        for index in rng.sample(range(world), signalled):
            ranks[index].signal(rng.choice([signal.SIGTERM, signal.SIGUSR1]))
        answers = [child.expect("stopped") for child in ranks]
        assert len({step for step, _ in answers}) == 1
        assert all(0 < left <= 60 for _, left in answers)
        assert [child.rest() for child in ranks] == [[["over"]]] * world
        assert Store(url).load() == {"step": answers[0][0]}


# --- the scripts of the documentation


def block(language: str) -> str:
    """Return the one code block of the page with this language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return cast(str, text)


def run_script(channel: Channel, folder: str, rank: int, world: int) -> None:
    """Run the script uninterrupted, in this process."""
    os.chdir(folder)
    os.environ["CKPTSTORE_URL"] = "whole"
    if world > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({key: str(value) for key, value in meeting.items()})
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
        dist.init_process_group = lambda *_: None
    runpy.run_path("train.py")


class Job:
    """A command that trains, in a folder with the script."""

    def __init__(self, folder: Path, command: list[str], **env: str) -> None:
        path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        full = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CKPTSTORE_URL": "runs/42", "PATH": path, **env}
        self._process = subprocess.Popen(
            command, cwd=folder, env=full, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.pid = self._process.pid
        self.said: list[str] = []

    def wait_for(self, start: str) -> int:
        """Return the number at the end of the next line that begins with `start`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said.append(line)
            if line.startswith(start):
                return int(line.split()[-1])
        raise AssertionError(f"it ended without {start!r}: {''.join(self.said)}")

    def end(self) -> tuple[int, str]:
        """Return its exit status, and all it said."""
        rest, _ = self._process.communicate(timeout=PATIENCE)
        return self._process.returncode, "".join(self.said) + rest

    def trainers(self) -> list[int]:
        """Return the processes below it that run the script."""
        found, queue = [], [self.pid]
        while queue:
            below = [
                int(c) for task in Path(f"/proc/{queue.pop()}/task").iterdir() for c in (task / "children").read_text().split()
            ]
            found += [pid for pid in below if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2:] == [b"train.py", b""]]
            queue += below
        return sorted(found)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        """End it and all its processes, if they still are."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script, and with a Slurm that runs what it is given here, and notes what it is to queue again."""
    (tmp_path / "train.py").write_text(block("python script"))
    (tmp_path / "job.sh").write_text(block("bash"))
    (tmp_path / "bin").mkdir()
    for name, does in {"srun": 'SLURM_STEP_ID=0 exec "$@"', "scontrol": 'echo "$@" >> queued'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def torchrun() -> list[str]:
    """Return the page's command, whose process is torchrun itself."""
    return ["env", *shlex.split(block("sh").replace("\\\n", ""))]


def same_weights(folder: Path, steps: int) -> bool:
    """Whether the interrupted runs ended with the very numbers of the one that was not."""
    whole, stopped = (Store(folder / place).load("final") for place in ("whole", "runs/42"))
    assert whole["step"] == stopped["step"] == steps
    return all(stopped["model"][name].equal(value) for name, value in whole["model"].items())


def test_slurm_queues_the_job_again(folder: Path, warm: Nursery) -> None:
    assert warm.start(run_script, str(folder), 0, 1).rest() == []
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "run"}
    with Job(folder, ["bash", "job.sh"], **slurm) as job:
        job.wait_for("saved step")
        (trainer,) = job.trainers()
        os.kill(trainer, signal.SIGUSR1)
        code, said = job.end()
    assert code == 75, said
    assert (folder / "queued").read_text() == "requeue 77\n"
    last = int(said.split()[-1])
    assert said.endswith(f"saved step {last}\n")
    assert last < 1000
    with Job(folder, ["bash", "job.sh"], **slurm, SLURM_RESTART_COUNT="1") as job:
        assert job.wait_for("resumed from step") == last
        code, said = job.end()
    assert code == 0, said
    assert (folder / "queued").read_text() == "requeue 77\n"
    assert same_weights(folder, 1000)
    with Store(folder / "runs/42", acquire=False) as store:
        assert [c.id.split("-")[0] for c in store.checkpoints()][-1] == "e2"  # a job that starts again is a new owner


def test_slurm_queues_a_job_again_that_could_not_listen_yet(folder: Path) -> None:
    """Such as one that is still importing torch when its time is up."""
    (folder / "train.py").write_text("import signal\nprint('importing 0', flush=True)\nsignal.pause()\n")
    with Job(folder, ["bash", "job.sh"], SLURM_JOB_ID="77") as job:
        job.wait_for("importing")
        (trainer,) = job.trainers()
        os.kill(trainer, signal.SIGUSR1)
        code, said = job.end()
    assert code == 128 + signal.SIGUSR1, said
    assert (folder / "queued").read_text() == "requeue 77\n"


@pytest.mark.soak
def test_torchrun_passes_signals_on(folder: Path, warm: Nursery) -> None:
    ranks = [warm.start(run_script, str(folder), rank, 2) for rank in range(2)]
    command = torchrun()
    with Job(folder, command) as job:
        job.wait_for("saved step")
        os.kill(job.pid, signal.SIGUSR1)  # as Slurm or a spot machine does: the launcher gets it
        code, said = job.end()
    assert code == 1, said
    last = int(re.findall(r"^saved step (\d+)$", said, re.MULTILINE)[-1])
    assert last < 500
    with Job(folder, command) as job:
        assert job.wait_for("resumed from step") == last
        code, said = job.end()
    assert code == 0, said
    assert [rank.rest() for rank in ranks] == [[], []]
    assert same_weights(folder, 500)


def test_torchrun_starts_again(folder: Path, warm: Nursery) -> None:
    """Once is enough: no rank finds the addresses of the dead."""
    ranks = [warm.start(run_script, str(folder), rank, 2) for rank in range(2)]
    with Job(folder, torchrun()) as job:
        job.wait_for("saved step")
        trainers = job.trainers()
        assert len(trainers) == 2
        os.kill(random.Random(1).choice(trainers), signal.SIGKILL)
        assert job.wait_for("resumed from step") >= 50
        code, said = job.end()
    assert code == 0, said
    assert said.count("resumed from step") == 1, said
    assert [rank.rest() for rank in ranks] == [[], []]
    assert same_weights(folder, 500)
