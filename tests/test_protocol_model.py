"""The commit protocol as a model: nothing wrong in any state that can be reached, and every mistake on purpose is found.

What is modelled, and how, is said in protocol_model.py; docs/format.md says what it proves. A process that saves once commits twice:
it acquires the store first.
"""

from __future__ import annotations

import json
import random
from collections import Counter

import evidence
import pytest
from protocol_model import BUGS, Config, Process
from protocol_replay import walk
from protocol_search import FAULTS, explore

SMALL = {
    "two jobs, one collects": Config((Process(1, 1, 1, ("gc",)), Process(2, 2, 1, ()))),
    "two jobs, one saves twice and retires": Config((Process(1, 1, 2, ()), Process(2, 2, 1, ())), keep_all=False),
    "two jobs, one prunes": Config((Process(1, 1, 1, ("prune",)), Process(2, 2, 1, ()))),
    "two jobs, one resolves": Config((Process(1, 1, 1, ("resolve",)), Process(2, 2, 1, ()))),
    "a job that collects, and a tool": Config((Process(1, 1, 1, ("gc",)), Process(2, 0, 1, ("prune",)))),
    "a tool that resolves, and a job": Config((Process(1, 1, 1, ()), Process(2, 0, 1, ("resolve",)))),
    "two ranks of one job": Config((Process(1, 1, 1, ("gc",)), Process(2, 1, 1, ()))),
    "a job that is replaced": Config((Process(1, 1, 1, ()),), restarts=2),
}
LARGE = {
    "two jobs save twice": Config((Process(1, 1, 2, ()), Process(2, 2, 2, ()))),
    "two jobs collect": Config((Process(1, 1, 1, ("gc",)), Process(2, 2, 1, ("gc",))), lag=2),
    "two jobs prune": Config((Process(1, 1, 1, ("prune",)), Process(2, 2, 1, ("prune",)))),
    "two jobs resolve": Config((Process(1, 1, 1, ("resolve",)), Process(2, 2, 1, ("resolve",))), lag=2),
    "two jobs, each may be replaced": Config((Process(1, 1, 1, ()), Process(2, 2, 1, ())), restarts=1),
    "three attempts": Config((Process(1, 1, 1, ("gc",)), Process(2, 2, 1, ())), attempts=3, lag=3),
    "a job and a tool, two saves each": Config((Process(1, 1, 2, ("gc",)), Process(2, 0, 2, ()))),
}
FINDERS = {
    "log slots deleted": Config((Process(1, 1, 1, ()), Process(2, 2, 1, ())), attempts=1),
    "pruned before the commit": Config((Process(1, 1, 2, ()),), keep_all=False),
    "resolved while the slot is free": Config((Process(1, 1, 1, ("resolve",)),)),
}
"""Configurations that show a mistake which `FINDER` does not."""
FINDER = SMALL["two jobs, one collects"]
ALL = ("gc", "prune", "resolve")
LED = [
    Config((Process(1, 1, 2, ALL), Process(2, 2, 2, ALL)), restarts=1, lag=2),
    Config((Process(1, 1, 2, ALL), Process(2, 2, 2, ALL)), restarts=1, keep_all=False, attempts=3),
    Config((Process(1, 1, 2, ALL), Process(2, 0, 2, ALL)), restarts=1, lag=3),
    Config((Process(1, 0, 2, ALL), Process(2, 0, 2, ALL)), keep_all=False),
    Config((Process(1, 1, 2, ALL), Process(2, 1, 2, ALL)), keep_all=False),
]
"""What real stores are led through: more than could be searched."""


def run(configs: dict[str, Config]) -> None:
    """Visit all states of each, and print the row of the table."""
    kinds: Counter[tuple[str, str]] = Counter()
    outcomes: Counter[tuple[str, str]] = Counter()
    states = steps = 0
    with evidence.experiment("protocol model: states") as tally:
        for name, config in configs.items():
            found = explore(config)
            tally.fired += found.states
            assert not found.violation, f"{name}:\n{found.told()}"
            states, steps = states + found.states, steps + found.steps
            kinds += found.kinds
            outcomes += found.outcomes
    faults = {kind: n for kind, n in kinds.items() if kind[1] in FAULTS or kind[0] == "restarts"}
    row = {"experiment": "protocol model", "states": states, "steps": steps, "kinds of fault": len(faults)}
    print(json.dumps({**row, "faults fired": sum(faults.values()), "violations": 0}))
    for outcome in ("done", "failed", "unknown", "fenced"):
        assert outcomes["save", outcome], "the search was too small to show anything"


def test_nothing_is_wrong_in_any_state() -> None:
    run(SMALL)


@pytest.mark.soak
def test_nothing_is_wrong_in_any_of_many_states() -> None:
    run(LARGE)


@pytest.mark.parametrize("bug", BUGS)
def test_a_mistake_is_found(bug: str) -> None:
    found = explore(FINDERS.get(bug, FINDER)._replace(bug=bug))
    print(f"{bug}: after {found.states} states\n{found.told()}")
    assert found.violation
    assert found.trace


@pytest.mark.soak
def test_every_mistake_is_found() -> None:
    """The same, for the table."""
    with evidence.experiment("mistakes planted in the protocol's model: not found") as tally:
        tally.points = len(BUGS)
        for bug in BUGS:
            tally.strike()
            tally.violations += not explore(FINDERS.get(bug, FINDER)._replace(bug=bug)).violation
    assert tally.violations == 0


@pytest.mark.parametrize("rounds", [20, pytest.param(400, marks=pytest.mark.soak)])
def test_the_code_does_what_the_model_says(rounds: int) -> None:
    rng = random.Random(5)
    seen: Counter[tuple[str, str]] = Counter()
    steps = 0
    with evidence.experiment("the code beside the model: steps with a fault") as tally:
        for _ in range(rounds):
            for config in LED:
                steps += walk(config, rng, seen)
        faults = {kind: n for kind, n in seen.items() if kind[1] in FAULTS or kind[0] == "restarts"}
        tally.points, tally.fired = steps, sum(faults.values())
    row = {"experiment": "code beside the model", "walks": rounds * len(LED), "steps": steps, "kinds of fault": len(faults)}
    print(json.dumps({**row, "faults fired": tally.fired, "violations": 0}))
    assert {kind[0] for kind in seen} >= {
        "look take",
        "put",
        "read",
        "peek",
        "get",
        "list",
        "write",
        "delete",
        "arrives",
        "restarts",
    }
    assert {"lost", "stale", "refused", "unanswered", "twice"} <= {kind[1] for kind in faults}
