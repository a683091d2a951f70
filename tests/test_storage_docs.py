"""docs/storage.md names every backend, and every option of each, in one table, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckptstore.options import STORE_OPTIONS
from ckptstore.registry import backend_class, schemes

TEXT = (Path(__file__).parents[1] / "docs" / "storage.md").read_text(encoding="utf-8")
BY_FSSPEC = ("abfs", "az", "ftp", "fsspec+gs", "s3fs", "sftp")


@pytest.mark.parametrize("scheme", schemes())
def test_every_scheme_is_there(scheme: str) -> None:
    assert f"`{scheme}://" in TEXT


@pytest.mark.parametrize("scheme", [*schemes(), *BY_FSSPEC])
def test_every_option_is_in_the_table(scheme: str) -> None:
    assert options_of(f"`{scheme}://`") == set(backend_class(scheme).options)


def test_the_options_of_any_store_are_in_the_table() -> None:
    assert options_of("any store") == set(STORE_OPTIONS)


def options_of(where: str) -> set[str]:
    """Return the options in the rows whose second column names it."""
    table = TEXT.partition("## Options\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| `")]
    return {option for row in rows if where in row[1].split(", ") for option in re.findall(r"`(\w+)`", row[0])}
