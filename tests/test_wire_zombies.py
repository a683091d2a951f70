"""An old job hangs at a request, a newer one takes over and saves, and the old one goes on: it is fenced, and changes nothing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import evidence
import pytest
from faulty_http import Answer, Exchange
from test_every_request import AGAIN, no_waiting, service, side  # noqa: F401  # fixtures
from wire_life import OPERATIONS, READING, Operation, Side, World, prepare, rehearse, requests_of

from ckptstore.errors import CommitUnknown, Fenced

pytest_plugins = ("gcs_fixtures", "s3_fixtures")

_PATIENCE = 60.0
"""Seconds after which a job that says nothing is taken to hang."""
CHANGING = [name for name in OPERATIONS if name not in (*READING, "acquire")]


def _let_through(x: Exchange, wait: Callable[[], object]) -> None:
    wait()
    x.reply(x.forward())


def _dropped(x: Exchange, wait: Callable[[], object]) -> None:
    wait()
    x.reset()


def _answered_late(x: Exchange, wait: Callable[[], object]) -> None:
    answer: Answer = x.forward()
    wait()
    x.reply(answer)


WAYS = {"let through": _let_through, "dropped": _dropped, "answered late": _answered_late}


@dataclass
class Outcome:
    """How it went with a job that hung."""

    fired: bool
    violations: list[str]


def hang(
    world: World, operation: Operation, nth: int, way: Callable[[Exchange, Callable[[], object]], None], earlier: int = 0
) -> Outcome:
    """Have the job hang at its request number `nth` while a newer one saves and collects, and judge what it is told then.

    `earlier`: how often the job has done it before.
    """
    rehearse(world, operation, earlier)
    prepare(world, operation)
    held, go_on = threading.Event(), threading.Event()
    told: list[BaseException | None] = []

    def hold(x: Exchange) -> None:
        held.set()
        way(x, lambda: go_on.wait(_PATIENCE))

    def work() -> None:
        try:
            operation.run(world)
            told.append(None)
        except BaseException as exc:
            told.append(exc)
        world.settle()
        held.set()  # if it has made fewer requests

    world.proxy.strike_number(nth, hold)
    old = threading.Thread(target=work)
    old.start()
    assert held.wait(_PATIENCE)
    fired = not told
    before = world.state
    try:
        world.overtake()
    finally:
        go_on.set()
        old.join(_PATIENCE)
    assert not old.is_alive()
    world.proxy.heal()
    newer, world.state = world.state, world.look()
    world.renew()
    return Outcome(fired, list(_judge(world, told[0], before, newer)))


def _judge(world: World, error: BaseException | None, before: object, newer: object) -> Iterator[str]:
    names, ids = world.state
    if world.state != newer:
        yield f"{newer} became {world.state}"
    if error is None and not (
        {*world.after[1]} - {*before[1]} <= ids and world.after[0].get("best") in (None, names.get("best"))
    ):  # type: ignore[index]
        yield f"acknowledged {world.after}, found {world.state}"
    if error is not None and not isinstance(error, (Fenced, CommitUnknown)):
        yield f"{type(error).__name__}: {error}"


def test_an_old_job_hangs_at_a_request(side: Side, service: str) -> None:  # noqa: F811
    """A sample: every twelfth request, in one of the ways, by turns."""
    ways = itertools.cycle(WAYS.values())
    fired = points = 0
    with closing(World(side)) as world:
        for name in CHANGING:
            n = len(requests_of(world, OPERATIONS[name]))
            for nth in range(1 + points % 7, n + 1, 12):
                outcome = hang(world, OPERATIONS[name], nth, next(ways))
                assert outcome.violations == [], (name, nth)
                fired += outcome.fired
                points += 1
        world.check_all()
    assert fired > 0.7 * points > 3


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHANGING)
def test_an_old_job_hangs_at_any_request(side: Side, service: str, name: str, way: str) -> None:  # noqa: F811
    found = []
    with evidence.experiment(f"{service}: an old job hangs at every request") as tally, closing(World(side)) as world:
        points = tally.points = len(requests_of(world, OPERATIONS[name]))
        for nth in range(1, points + 1):
            for earlier in range(AGAIN):
                outcome = hang(world, OPERATIONS[name], nth, WAYS[way], earlier)
                if outcome.fired or outcome.violations:
                    break
            tally.fired += outcome.fired
            if outcome.fired and outcome.violations:
                found.append((name, nth, outcome.violations))
                tally.violations += 1
        world.check_all()
    assert found == []
    assert tally.fired > points / 2
