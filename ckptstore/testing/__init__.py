"""For authors of storage backends: `BackendConformance`, a suite to subclass, and `FaultyBackend`, which fails on request.

Needs pytest (``pip install ckptstore[testing]``).
"""

from __future__ import annotations

import pytest

# So that its failures show values, as those of test files do.
pytest.register_assert_rewrite("ckptstore.testing.conformance", "ckptstore.testing._writers")

from .conformance import BackendConformance  # noqa: E402
from .faults import Fault, FaultyBackend  # noqa: E402

__all__ = ["BackendConformance", "Fault", "FaultyBackend"]
