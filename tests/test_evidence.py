"""The table of the soak adds up what the experiments say."""

from __future__ import annotations

from pathlib import Path

import evidence
import pytest


def test_results_of_one_experiment_are_added_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTSTORE_EVIDENCE", str(tmp_path / "found"))
    evidence.record("b", points=10, fired=8, violations=0)
    evidence.record("b", points=5, fired=5, violations=1)
    evidence.record("b", subject="DCP", points=4, fired=3, violations=2)
    evidence.record("a", points=1, fired=1, violations=0)
    evidence.remark("b is odd")
    assert list(evidence.table((tmp_path / "found").read_text()))[2:] == [
        "| a | 1 | 1 | 0 | – | – | – |",
        "| b | 15 | 13 | 1 | – | – | 2 of 3 |",
        "",
        "b is odd",
    ]


def test_nothing_is_written_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPTSTORE_EVIDENCE", raising=False)
    monkeypatch.chdir(tmp_path)
    evidence.record("a", points=1, fired=1, violations=0)
    assert not list(tmp_path.iterdir())


def test_more_violations_than_points_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        evidence.record("a", points=2, fired=1, violations=2)
