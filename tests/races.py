"""Four processes at once on one store of a service: who wins, and that nobody loses what was acknowledged."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from procs import Channel, Child, Nursery
from stores import write

from ckptstore import Store
from ckptstore.errors import AlreadyExists, Fenced

__all__ = ["OWNERS", "check_creations", "check_saves"]

OWNERS = {"one launch": ["one"] * 4, "four jobs": ["a", "b", "c", "d"]}


def check_creations(processes: Nursery, url: str, env: Mapping[str, str] | None = None, count: int = 5) -> None:
    """Each of `count` records is created by exactly one of four processes. `processes` is a nursery of this module."""
    names = [f"log/{i:03}" for i in range(count)]
    said = _together([processes.start(_create, {**(env or {})}, url, names) for _ in range(4)])
    assert sorted(name for [[_, *won]] in said for name in won) == names


def check_saves(processes: Nursery, url: str, owners: Sequence[str], env: Mapping[str, str] | None = None) -> None:
    """Four processes save under one name: all that was acknowledged is there and whole, and of one launch nobody is fenced."""
    said = _together([processes.start(_save, {**(env or {})}, url, owner, 3) for owner in owners])
    saved = [message[1] for messages in said for message in messages if message[0] == "saved"]
    fenced = [messages[-1] == ["fenced"] for messages in said]
    assert len(saved) == 12 if len({*owners}) == 1 else not all(fenced)
    with Store(url, owner="later") as store:
        assert sorted(c.id for c in store.checkpoints()) == sorted(saved)
        assert store.verify() == []
        assert store.checkpoint("latest").id in saved


def warm_up() -> None:
    """Import once what each of the processes needs, and would take a second for."""
    for module in ("boto3", "gcsfs.core"):
        importlib.import_module(module)


def _create(channel: Channel, env: dict[str, str], url: str, names: list[str]) -> None:
    os.environ.update(env)
    persistent: Any = Store(url)._engine.backend
    won = []
    channel.send("ready")
    channel.recv()
    for name in names:
        try:
            persistent.inner.put_if_absent(name, b"x")
            won.append(name)
        except AlreadyExists:
            pass
    channel.send("created", *won)


def _save(channel: Channel, env: dict[str, str], url: str, owner: str, count: int) -> None:
    os.environ.update(env)
    with Store(url, owner=owner) as store:
        channel.send("ready")
        channel.recv()
        try:
            for step in range(count):
                channel.send("saved", write(store, "latest", {"a": owner.encode()}, step=step))
        except Fenced:
            channel.send("fenced")


def _together(children: list[Child]) -> list[list[list[Any]]]:
    for child in children:
        child.expect("ready")
    for child in children:
        child.send("go")
    return [child.rest() for child in children]
