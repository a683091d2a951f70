"""For authors of storage backends: `BackendConformance`, a suite to subclass, and `FaultyBackend`, which fails on request.

Needs pytest (``pip install ckptstore[testing]``).
"""

from __future__ import annotations

from .conformance import BackendConformance
from .faults import Fault, FaultyBackend

__all__ = ["BackendConformance", "Fault", "FaultyBackend"]
