"""All studies on the miniature, one after the other, within one budget: ``python -m benchmarks.run``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

STUDIES = ("objectives", "connectors", "stage2", "trap", "scaling")


def main() -> int:
    """Give each study what is left of the budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget-minutes", type=float, default=60, help="wall-clock minutes of this sitting")
    parser.add_argument("--studies", nargs="*", default=STUDIES, choices=STUDIES)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.budget_minutes
    for study in args.studies:
        left = max((deadline - time.monotonic()) / 60, 0)
        command = [sys.executable, "-m", f"benchmarks.{study}", "--budget-minutes", f"{left:.1f}"]
        if code := subprocess.call(command):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
