"""docs/storage.md names every backend, and every option of each, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ckptstore.registry import backend_class, schemes

TEXT = (Path(__file__).parents[1] / "docs" / "storage.md").read_text(encoding="utf-8")
SECTIONS = {"gs": "Google Cloud Storage", "s3": "S3", "shared": "Shared file systems"}
"""Scheme -> the heading of its options."""


@pytest.mark.parametrize("scheme", schemes())
def test_every_scheme_is_there_and_its_options_are_complete(scheme: str) -> None:
    assert f"`{scheme}://" in TEXT
    assert (documented(SECTIONS[scheme]) if scheme in SECTIONS else set()) == set(backend_class(scheme).options)


def test_the_options_of_fsspec_are_complete() -> None:
    schemes = ("abfs", "s3fs", "sftp", "fsspec+gs")
    assert documented("Any fsspec protocol") == {option for scheme in schemes for option in backend_class(scheme).options}


def documented(heading: str) -> set[str]:
    """Return the options in the table of a section."""
    section = TEXT.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    table = section.partition("| option | meaning |\n")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
