"""``python -m ckptstore`` is the same as the ``ckptstore`` command."""

from __future__ import annotations

import sys

from .cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
