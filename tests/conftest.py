"""What several test files need."""

from __future__ import annotations

import os

import pytest


def require(condition: object, why: str) -> None:
    """Skip the test where `condition` does not hold, for instance on a laptop; in CI (``CI`` set) fail instead: a hole must show."""
    if condition:
        return
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"CI must be able to run this: {why}")
    pytest.skip(why)
