"""``python -m salad_lightning`` is ``salad-lightning``."""

from __future__ import annotations

import sys

from salad_lightning.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
