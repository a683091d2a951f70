"""Bits that flip and files that lose their end, with the store and with the other ways to save; then files removed, swapped, replayed.

A violation is a load that says nothing and returns what was not saved last. An error counts as found, whatever it says; of the store
it must be one of ours.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import evidence
import pytest
import rivals
from stores import contents, tree, write

from ckptstore import Store
from ckptstore.errors import CkptStoreError, FallbackWarning
from ckptstore.log import slot_key

FLIPS, CUTS = "rot: a flipped bit", "rot: a file of another length"
SECRET = b"correct horse battery staple"


def ours(root: Path) -> int | None:
    """Return the step of what a job finds that knows nothing; None when it was told of damage."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            step = rivals.step_of_state(Store(root).load())
        except CkptStoreError:
            return None
    assert all(issubclass(w.category, FallbackWarning) for w in told)
    return None if told else step


def theirs(rival: rivals.Rival, folder: Path) -> int | None:
    try:
        return rival.load(folder)
    except rivals.Mixture:
        raise
    except rivals.REFUSALS:
        return None


def is_silent(look: Callable[[], int | None]) -> bool:
    """Say whether something other than step 2 was returned without a word."""
    try:
        return look() not in (2, None)
    except rivals.Mixture:
        return True


def struck(paths: list[Path], count: int) -> Iterator[tuple[str, Path, bytes]]:
    """Yield damaged versions of files, as an experiment, a path and bytes: flips anywhere in them, and shorter lengths."""
    rng = random.Random(20261124)
    whole = {path: path.read_bytes() for path in paths}
    weights = [len(data) for data in whole.values()]
    for path in rng.choices(paths, weights, k=count):
        bit = rng.randrange(8 * len(whole[path]))
        changed = bytearray(whole[path])
        changed[bit // 8] ^= 1 << bit % 8
        yield FLIPS, path, bytes(changed)
    for i in range(count // 4):
        path = paths[i % len(paths)]
        yield CUTS, path, whole[path][: rng.randrange(len(whole[path]))]


def try_all(subject: str, paths: list[Path], look: Callable[[], int | None], count: int) -> dict[str, int]:
    """Strike, look, and mend, one after the other; record and return the violations of each experiment."""
    assert look() == 2
    points = {FLIPS: 0, CUTS: 0}
    wrong = {FLIPS: 0, CUTS: 0}
    for experiment, path, data in struck(paths, count):
        before = path.read_bytes()
        path.write_bytes(data)
        points[experiment] += 1
        wrong[experiment] += is_silent(look)
        path.write_bytes(before)
    assert look() == 2
    for experiment, number in points.items():
        evidence.record(experiment, subject=subject, points=number, fired=number, violations=wrong[experiment])
    return wrong


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.soak)])
def test_rot_of_a_store(tmp_path: Path, count: int) -> None:
    with Store(tmp_path) as store:
        for step in (1, 2):
            checkpoint = store.save(rivals.state_of_step(step), step=step)
    folder = tmp_path / "data" / checkpoint.id
    wrong = try_all(
        evidence.OURS,
        [folder / "state.pt", folder / "manifest.json", tmp_path / slot_key(3)],
        lambda: ours(tmp_path),
        count,
    )
    assert wrong == {FLIPS: 0, CUTS: 0}


@pytest.mark.parametrize("count", [60, pytest.param(4000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", rivals.RIVALS)
def test_rot_of_the_others(tmp_path: Path, name: str, count: int) -> None:
    """Counted for the table: what they hand out as if nothing had happened."""
    rival = rivals.RIVALS[name]
    for step in (1, 2):
        rival.save(tmp_path, step)
    paths = sorted(p for p in (tmp_path / "step-2" if name == "DCP" else tmp_path).iterdir() if p.is_file())
    wrong = try_all(name, paths, lambda: theirs(rival, tmp_path), count)
    assert wrong[FLIPS] > count // 2  # else the experiment cannot fail


def exchanges(files: dict[str, bytes]) -> Iterator[dict[str, bytes | None]]:
    """Yield what to put where: each file gone, each in the place of each other, each two swapped."""
    names = sorted(files)
    for name in names:
        yield {name: None}
    for a in names:
        for b in names:
            if files[a] != files[b]:
                yield {a: files[b]}
                if a < b:
                    yield {a: files[b], b: files[a]}


def put(root: Path, files: dict[str, bytes | None]) -> None:
    for name, data in files.items():
        if data is None:
            (root / name).unlink()
        else:
            (root / name).write_bytes(data)


@pytest.mark.parametrize("key", [None, SECRET], ids=["no key", "key"])
def test_files_removed_swapped_and_replayed(tmp_path: Path, key: bytes | None) -> None:
    """Found by who loads, if it matters to them, and by `verify` always; but that the newest record is gone, nobody can tell."""
    with Store(tmp_path, hmac_key=key) as store:
        for step in (1, 2):
            write(store, step=step, files={"a.bin": b"of step %d" % step})

    def look() -> Any:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            reader = Store(tmp_path, hmac_key=key)
            try:
                found = contents(reader, "latest")
            except CkptStoreError:
                return None
        return None if told else found

    def verified() -> bool:
        try:
            return not Store(tmp_path, hmac_key=key).verify()
        except CkptStoreError:
            return False

    whole: dict[str, Any] = tree(tmp_path)
    assert len(whole) == 7
    right = {"a.bin": b"of step 2"}
    assert look() == right
    assert verified()
    points = wrong = 0
    for change in exchanges(whole):
        put(tmp_path, change)
        if change == {slot_key(3): None}:
            assert look() == {"a.bin": b"of step 1"}  # in README under "Not promised"
            assert verified()
        else:
            points += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                wrong += look() not in (None, right) or verified()
        put(tmp_path, {name: whole[name] for name in change})
    assert tree(tmp_path) == whole
    assert points == 6 + 42 + 21
    experiment = "files removed, swapped, replayed"
    evidence.record(
        f"tampering with a key: {experiment}" if key else f"rot: {experiment}", points=points, fired=points, violations=wrong
    )
    assert wrong == 0
