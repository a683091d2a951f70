"""The shared backend on real shared file systems, each through two mounts that cache for themselves.

JuiceFS in every run; the others in the soak. ``CKPTSTORE_TEST_MOUNTS=FOLDER`` runs all this on any file system that is mounted twice, on
FOLDER/a and FOLDER/b: on Lustre, say. So does the soak with NFS, in a machine that has it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence
import pytest
from juicefs_rig import SharedFolder
from procs import Channel, Nursery, litter
from stores import RawFolder, state_of, write

from ckptstore import Store
from ckptstore.backends.shared import SharedBackend, _SharedWriter
from ckptstore.errors import AlreadyExists, CkptStoreError
from ckptstore.log import slot_key
from ckptstore.mounts import file_system
from ckptstore.protocol import Backend
from ckptstore.record import Record, decode
from ckptstore.sampler import InterruptableSampler
from ckptstore.testing import BackendConformance

pytest_plugins = ("rig_fixtures",)


class TestShared(RawFolder, BackendConformance):
    """What one mount is told, the other one shows."""

    rounds = 2
    many = 200

    @pytest.fixture(autouse=True)
    def _folder(self, two: SharedFolder) -> None:
        self.two = two
        self.opened = 0

    def make_backend(self, place: Path) -> Backend:
        self.opened += 1
        return SharedBackend.open(str((self.two.a, self.two.b)[self.opened % 2] / "run"), {"create": "1"})

    @property
    def root(self) -> Path:
        return self.two.b / "run"

    def raw_keys(self) -> Sequence[str]:
        # NFS keeps a removed file that somebody has open, here a forgotten writer, under such a name.
        found = (p for p in self.root.rglob("*") if not p.is_dir() and not SharedBackend.hidden.fullmatch(p.name))
        return [str(p.relative_to(self.root)) for p in found]

    def test_replace_creates_and_overwrites(self) -> None:
        """What was replaced on one host may be seen on another one for as long as that one caches: 1 s on GlusterFS, up to 60 s on NFS."""
        written: list[bytes | None] = [None]
        for data in (b"first", b"2", b"", b"third and longer"):
            self.backend.replace("hint", data)
            written.append(data)
            assert self.backend.get("hint", 100) == data
            deadline = time.monotonic() + 90
            while (found := self.raw_get("hint")) != data:
                assert found in written
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert [*self.raw_keys()] == ["hint"]


# -- two hosts


def training_job(channel: Channel, url: str) -> None:
    """Draw two batches of samples, save, and draw one more before it is killed."""
    import torch

    sampler = InterruptableSampler(range(20), seed=3)
    samples = iter(sampler)
    drawn = [next(samples) for _ in range(7)]
    sampler.advance(7)
    Store(url).save({"w": torch.arange(3.0)}, step=7, sampler=sampler, rng=True)
    channel.send("saved", drawn)
    next(samples)
    signal.pause()


def test_a_job_resumes_on_another_host_at_the_very_next_sample(two: SharedFolder, warm: Nursery) -> None:
    import torch

    on_a, on_b = two.urls()
    old = warm.start(training_job, on_a)
    [drawn] = old.expect("saved")
    old.kill()
    sampler = InterruptableSampler(range(20), seed=3)
    state = {"w": torch.zeros(3)}
    with Store(on_b) as new:
        checkpoint = new.resume(state, sampler=sampler)
    assert checkpoint is not None
    assert checkpoint.step == 7
    assert torch.equal(state["w"], torch.arange(3.0))
    assert drawn + list(sampler) == list(InterruptableSampler(range(20), seed=3))


def racing_creator(channel: Channel, location: str, rounds: int) -> None:
    """Create one key after another at the same moments as somebody else, and tell which ones were created."""
    backend = SharedBackend.open(location, {})
    won = []
    for n in range(rounds):
        channel.send("ready")
        channel.recv()
        try:
            backend.put_if_absent(f"log/{n}", f"{os.getpid()}".encode())
            won.append(n)
        except AlreadyExists:
            assert backend.get(f"log/{n}", 100) != f"{os.getpid()}".encode()
    channel.send("won", os.getpid(), won)


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_of_two_hosts_exactly_one_creates(two: SharedFolder, warm: Nursery, rounds: int) -> None:
    (two.a / "run" / "log").mkdir(parents=True)
    hosts = [warm.start(racing_creator, str(place / "run"), rounds) for place in (two.a, two.b)]
    for _ in range(rounds):
        for host in hosts:
            host.expect("ready")
        for host in hosts:
            host.send("go")
    won = dict(host.expect("won") for host in hosts)
    assert sorted(n for mine in won.values() for n in mine) == list(range(rounds))
    assert min(len(mine) for mine in won.values()) > rounds // 20, "they did race"
    for pid, mine in won.items():
        assert all((two.b / "run" / "log" / str(n)).read_text() == str(pid) for n in mine)


def racing_saver(channel: Channel, url: str, saves: int) -> None:
    """Save beside others, and tell what was acknowledged."""
    with Store(url, acquire=False) as store:
        channel.recv()
        for step in range(saves):
            channel.send("saved", write(store, f"name-{os.getpid()}", step=step))


@pytest.mark.parametrize("saves", [50, pytest.param(500, marks=pytest.mark.soak)])
def test_two_hosts_race_for_commits(two: SharedFolder, warm: Nursery, saves: int) -> None:
    on_a, on_b = two.urls(keep_last="all")
    with Store(on_a) as owner:
        first = write(owner)
        hosts = [warm.start(racing_saver, url, saves) for url in (on_a, on_b)]
        for host in hosts:
            host.send("go")
        begun = time.monotonic()
        acknowledged = [host.expect("saved")[0] for _ in range(saves) for host in hosts]
        seconds = time.monotonic() - begun
        assert len(set(acknowledged)) == 2 * saves
    lost, dangling = set[str](), set[str]()
    for url in (on_b, on_a):
        with Store(url) as reader:
            lost |= {first, *acknowledged} - {c.id for c in reader}
            dangling |= {damage.id for damage in reader.verify()}
    kind = file_system(str(two.a))
    print(f"{2 * saves} commits by two hosts in {seconds:.1f} s on {kind}: {len(lost)} lost, {len(dangling)} dangling")
    evidence.record(f"two hosts race, {kind}", points=2 * saves, fired=2 * saves, violations=len(lost | dangling))
    assert not lost
    assert not dangling
    backend = SharedBackend.open(str(two.b / "run"), {})
    records = [decode(backend.get(slot_key(n), 1 << 24), n) for n in range(1, 2 * saves + 3)]
    assert len({record.op for record in records}) == len(records)
    assert isinstance(records[-1], Record)
    assert len(state_of(backend).checkpoints) == 2 * saves + 1


def stop_at(point: str) -> None:
    """Have this process stop itself, once, when it gets to `point` of a save."""
    owner, method, after = {
        "before the first file": (SharedBackend, "open_writer", False),
        "in the middle of a file": (_SharedWriter, "write", True),
        "before a file is durable": (_SharedWriter, "finish", False),
        "before the record": (SharedBackend, "put_if_absent", False),
        "before the link": (SharedBackend, "_link", False),
        "after the link": (SharedBackend, "_link", True),
    }[point]
    inner = getattr(owner, method)
    stops = [signal.SIGSTOP]

    def outer(self: Any, *args: Any) -> Any:
        is_record = method != "_link" or args[1].startswith("log/")
        if is_record and not after and stops:
            os.kill(os.getpid(), stops.pop())
        result = inner(self, *args)
        if is_record and after and stops:
            os.kill(os.getpid(), stops.pop())
        return result

    setattr(owner, method, outer)


def old_job(channel: Channel, url: str, point: str) -> None:
    """Save, save again with a stop in the middle, and when continued try everything."""

    def outcome(call: Callable[[], object]) -> str:
        try:
            call()
        except CkptStoreError as exc:
            return type(exc).__name__
        return "done"

    store = Store(url)
    first = write(store, step=1)
    channel.send("saved", first)
    stop_at(point)
    result = outcome(lambda: write(store, step=2))
    tries = [lambda: write(store), lambda: store.tag("best", first), store.prune, store.acquire]
    channel.send("result", result, [outcome(call) for call in tries])


@pytest.mark.parametrize(
    "point",
    [
        "before the first file",
        "in the middle of a file",
        "before a file is durable",
        "before the record",
        "before the link",
        "after the link",
    ],
)
def test_a_host_that_was_stopped_changes_nothing_when_continued(two: SharedFolder, warm: Nursery, point: str) -> None:
    on_a, on_b = two.urls(keep_last="all")
    old = warm.start(old_job, on_a, point)
    old.expect("saved")
    old.wait_stopped()
    new = Store(on_b)
    new.acquire()
    committed = point == "after the link"
    assert new.checkpoint().step == (2 if committed else 1)
    write(new, step=10)
    before = new.names()
    old.proceed()
    result, again = old.expect("result")
    assert result == ("done" if committed else "Fenced")
    assert set(again) == {"Fenced"}
    with Store(on_a) as reader:
        assert reader.checkpoint().step == 10
        assert reader.names() == before
    new.gc()
    assert new.verify() == []
    assert litter(new) == []
    new.close()
