"""How many rows of a corpus may be unusable before a command stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from salad_lightning.errors import UserError

__all__ = ["FEW_ROWS", "check_budget"]

FEW_ROWS = 1000
"""While fewer were read, the budget is as if there were so many: a share of few says little."""

_SHOWN = 5


def check_budget(bad: Sequence[dict[str, Any]], num_rows: int, max_bad_fraction: float, what: str, cure: str) -> None:
    """Stop where too many rows are unusable.

    Args:
        bad: Rejections as dictionaries.
        num_rows: Rows read.
        max_bad_fraction: Share of them that may be bad.
        what: What they are, for the message.
        cure: What to do about it.

    Raises:
        UserError: With the first of them, if they are more.
    """
    if len(bad) <= max_bad_fraction * num_rows:
        return
    shown = [
        f"{row['where']}: {row['reason']}: {row['detail']}" + (f" ({row['cure']})" if row["cure"] else "")
        for row in bad[:_SHOWN]
    ]
    more = [f"… and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    head = f"{len(bad)} {what}, more than --max-bad-fraction {max_bad_fraction:g} allows:"
    raise UserError("\n  ".join([head, *shown, *more]), cure=cure)
