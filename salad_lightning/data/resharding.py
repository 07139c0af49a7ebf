"""Going on with another number of readers than the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from salad_lightning.data.reader import PastReaders

__all__ = ["past_readers"]


def past_readers(state: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """What has been read, of a data module's state, as the ``past`` of `TrainingStream`.

    Cursors stand at the start of a block, so the samples taken of each reader's block are read once more.

    Args:
        state: Of `SpeechDataModule.state_dict`.
        names: Of the training sources.

    Returns:
        Plain data, the latest change last: for every source the cursors of all readers, the positions they produced
        together, and how many samples will be read again.
    """
    workers = {
        rank * state["num_workers"] + worker: position
        for rank, mine in state["ranks"].items()
        for worker, position in mine["workers"].items()
    }
    earlier, now = state["past"], {}
    for name in names:
        start = PastReaders(earlier[-1][name]["cursors"]).first_epoch if earlier else 0
        unread = {"epoch": start, "shard": 0, "sample": 0, "taken": 0, "positions": 0}  # nothing of it was trained on
        parts = range(state["world_size"] * state["num_workers"])
        cursors = [workers[part]["sources"][name] if part in workers else unread for part in parts]
        now[name] = {
            "cursors": [(cursor["epoch"], cursor["shard"], cursor["sample"]) for cursor in cursors],
            "positions": sum(cursor["positions"] for cursor in cursors),
            "again": sum(cursor["taken"] for cursor in cursors),
        }
    still = [layout for layout in earlier if any(_reaches(layout[name], now[name]) for name in names)]
    return [*still, now]


def _reaches(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether the old readers read some of an epoch that is not over."""
    return PastReaders(old["cursors"]).last_epoch >= PastReaders(new["cursors"]).first_epoch
