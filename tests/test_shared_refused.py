"""A shared file system on which two hosts can both create one name: writers are refused before anything is written, unless there is one."""

from __future__ import annotations

import os
import threading
from itertools import count
from pathlib import Path

import pytest
from juicefs_rig import SharedFolder
from stores import write

from ckptstore import Store
from ckptstore.cli import main
from ckptstore.errors import NoAtomicCreate

pytest_plugins = ("rig_fixtures",)

_numbers = count(1)


@pytest.fixture
def folder(weed_mounts: Path) -> SharedFolder:
    """A folder that is not there yet."""
    name = str(next(_numbers))
    return SharedFolder(weed_mounts / "a" / name, weed_mounts / "b" / name)


def test_a_writer_is_refused_and_nothing_is_left(folder: SharedFolder) -> None:
    for change in (write, lambda s: s.acquire(), lambda s: s.resume({})):
        with (
            Store(folder.urls()[0]) as store,
            pytest.raises(NoAtomicCreate, match=r"fuse\.seaweedfs.*two hosts.*single_writer=1"),
        ):
            change(store)
    assert not folder.a.exists()


def test_a_single_writer_is_served_and_read_elsewhere(folder: SharedFolder, capsys: pytest.CaptureFixture[str]) -> None:
    on_a, on_b = folder.urls(single_writer=1, keep_last=2)
    for launch in ("x", "y"):
        with Store(on_a, owner=launch) as store:
            for step in range(4):
                write(store, step=step)
            store.tag("best", "latest")
    plain = f"shared://{folder.b}/run"
    with Store(plain) as reader:
        assert reader.checkpoint().step == 3
        assert reader.verify() == []
    assert main(["tag", plain, "worst", "latest"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "single_writer=1" in line
    assert main(["tag", on_b, "worst", "latest"]) == 0


@pytest.mark.soak
def test_two_clients_do_both_win_and_one_alone_does_not_show_it(folder: SharedFolder) -> None:
    """Why it is refused by its name. Should this fail with a newer SeaweedFS, then `mounts` can let it go."""

    def winners(places: tuple[Path, Path], n: int) -> int:
        together = threading.Barrier(2)
        won = []

        def race(me: int) -> None:
            mine = places[me] / f"{n}.{me}"
            mine.write_text(str(me))
            together.wait()
            try:
                os.link(mine, places[me] / str(n))
            except FileExistsError:
                return
            won.append(me)

        threads = [threading.Thread(target=race, args=(me,)) for me in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(won)

    folder.a.mkdir()
    assert [winners((folder.a, folder.a), n) for n in range(100)] == [1] * 100
    both = [winners((folder.a, folder.b), n) for n in range(100, 200)]
    assert both.count(2) > 10
