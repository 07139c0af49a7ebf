"""How many rows of a corpus may be unusable before a command stops."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

from salad_lightning.corpus.workspace import Workspace
from salad_lightning.errors import UserError

__all__ = ["FEW_ROWS", "Budget", "gather"]

FEW_ROWS = 1000
"""While fewer were read, the budget is as if there were so many: a share of few says little."""

_SHOWN = 5


class Budget(NamedTuple):
    """What may be bad.

    Attributes:
        max_bad_fraction: Share of the rows that may be.
        what: The bad ones, for the message.
        cure: What to do about them.
        all_may_be: Whether every row may be, at a share of 1.
    """

    max_bad_fraction: float
    what: str
    cure: str
    all_may_be: bool = True

    def check(self, bad: Sequence[dict[str, Any]], num_rows: int) -> None:
        """Stop where too many rows are unusable.

        Args:
            bad: Rejections as dictionaries.
            num_rows: Rows read.

        Raises:
            UserError: With the first of them, if they are more.
        """
        if len(bad) <= self.max_bad_fraction * num_rows and (self.all_may_be or len(bad) < max(num_rows, 1)):
            return
        shown = [
            f"{row['where']}: {row['reason']}: {row['detail']}" + (f" ({row['cure']})" if row["cure"] else "")
            for row in bad[:_SHOWN]
        ]
        more = [f"… and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
        head = f"{len(bad)} {self.what}, more than --max-bad-fraction {self.max_bad_fraction:g} allows:"
        raise UserError("\n  ".join([head, *shown, *more]), cure=self.cure)


def gather(
    space: Workspace,
    made: Generator[dict[str, Any], None, None],
    budget: Budget,
    bad_rows: Callable[[dict[str, Any]], list[dict[str, Any]]],
    *,
    progress: str,
    unit: str,
) -> list[dict[str, Any]]:
    """Reports of shards as they are made, with a progress bar.

    Where the user is told to put something right, no shard with a bad row is kept: whether it has been put right (a
    file, the rights to read it, a plugin) shows only when the shard is made again.

    Args:
        space: Where the shards are.
        made: The reports, each with ``num_rows``.
        budget: Checked after every shard, and at the end.
        bad_rows: Those of a report.
        progress: The bar's name.
        unit: Of its counts, with a space before it.

    Raises:
        UserError: If the budget is spent.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]  # not for `--help`

    reports, bad, num_rows = list[dict[str, Any]](), list[dict[str, Any]](), 0
    try:
        with tqdm(desc=progress, unit=unit) as bar:
            for report in made:
                reports.append(report)
                num_rows += report["num_rows"]
                bad += bad_rows(report)
                bar.update(report["num_rows"])
                budget.check(bad, max(num_rows, FEW_ROWS))
        budget.check(bad, num_rows)
    except UserError:
        made.close()  # workers may be ahead
        space.forget(bad_rows)
        raise
    return reports
