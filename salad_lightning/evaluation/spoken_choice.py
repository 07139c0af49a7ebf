"""Multiple choice: the option whose text has the highest mean log-probability per token wins."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from salad_lightning.batch import DocumentInfo
from salad_lightning.errors import UserError

__all__ = ["SpokenChoice", "right_option"]


def right_option(fields: dict[str, Any]) -> int:
    """Index of an item's right option; its field ``answer`` is that, or the option itself."""
    answer = fields["answer"]
    return int(fields["choices"].index(answer)) if isinstance(answer, str) else int(answer)


class SpokenChoice:
    """Collects the scores of all options of all items and says how often the right one wins.

    Length-normalised as in arXiv 2510.13632, section 5: sum of the option's token log-probabilities ÷ its tokens.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[int, float]] = defaultdict(dict)
        self._items: dict[str, DocumentInfo] = {}

    def update(self, log_probs_M: Tensor, document_M: Tensor, documents: list[DocumentInfo]) -> None:
        """Add the options of one batch; documents that are no option of an item are passed over.

        Args:
            log_probs_M: Log-probability of each predicted token.
            document_M: Index into ``documents`` of each predicted token.
            documents: The batch's documents.

        Raises:
            UserError: If an option has no token, or two items have one key.
        """
        zeros = torch.zeros(len(documents), dtype=torch.float64, device=log_probs_M.device)
        total = zeros.scatter_add(0, document_M, log_probs_M.double())
        count = zeros.scatter_add(0, document_M, torch.ones_like(log_probs_M, dtype=torch.float64))
        means = (total / count.clamp(min=1)).tolist()
        for info, mean, tokens in zip(documents, means, count.tolist(), strict=True):
            if info.choice is not None and not tokens:
                raise UserError(f"option {info.choice} has no token", where=info.key, cure="give it a text")
            if info.choice is not None:
                known = self._items.setdefault(info.key, info)
                if info.choice in self._scores[info.key] or known.fields != info.fields:
                    raise _one_key(info)
                self._scores[info.key][info.choice] = mean

    def gather(self) -> None:
        """Join what all ranks collected (a no-op in one process).

        Raises:
            UserError: If items of two ranks have one key.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (dict(self._scores), self._items))
        self._scores.clear()
        self._items = {}
        for scores, items in everyone:
            # An item is of one rank, with all its options.
            if twice := self._items.keys() & items.keys():
                raise _one_key(items[min(twice)])
            self._scores.update(scores)
            self._items |= items

    def accuracy(self, group_field: str | None = None) -> dict[str, float]:
        """Share of items whose right option scores highest, 0 to 1.

        Args:
            group_field: JSON field of the items to break the result down by.

        Returns:
            ``{"all": …}``, or one entry for every value of the field.
        """
        right: dict[str, list[bool]] = defaultdict(list)
        for key, flag in self.right().items():
            right["all" if group_field is None else str(self._items[key].fields.get(group_field, "none"))].append(flag)
        return {group: sum(flags) / len(flags) for group, flags in sorted(right.items())}

    def right(self) -> dict[str, bool]:
        """Item key → whether its right option scores highest; of equal scores the first counts.

        Items of which options are missing, since a run read a part of the set (``limit_test_batches``), are left out.
        """
        return {
            key: max(sorted(options), key=options.__getitem__) == right_option(self._items[key].fields)
            for key, options in sorted(self._scores.items())
            if self._is_whole(key)
        }

    @property
    def incomplete(self) -> int:
        """Items of which options are missing."""
        return sum(not self._is_whole(key) for key in self._scores)

    def _is_whole(self, key: str) -> bool:
        return len(self._scores[key]) == len(self._items[key].fields.get("choices", self._scores[key]))

    @property
    def most_options(self) -> int:
        """Options of the item that has most; 1 where only right answers were given, which no one can get wrong."""
        return max((len(options) for options in self._scores.values()), default=0)

    def __len__(self) -> int:
        """Items collected."""
        return len(self._scores)


def _one_key(info: DocumentInfo) -> UserError:
    return UserError(
        "two items have this key",
        where=f"{info.source}: {info.key}",
        cure="keys must be unique in a source: make each folder of shards a source of its own",
    )
