"""The text–speech gap of a model on a set of documents, with its two causes, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from salad_lightning.batch import Prediction, SpeechBatch
from salad_lightning.corpus.workspace import write_aside
from salad_lightning.evaluation.bootstrap import Interval, bootstrap_interval
from salad_lightning.evaluation.metrics import MeanPerToken, after_speech, forgetting, misalignment
from salad_lightning.evaluation.spoken_choice import SpokenChoice, right_option
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.projection import token_log_probs, token_losses

__all__ = ["GapReport", "Measured", "measure"]


@dataclass(frozen=True)
class Measured:
    """What three forward passes say of the M tokens of a batch: P on speech, P on text, and the teacher Q on text.

    Attributes:
        speech_log_prob_M: log P(token | speech and text).
        text_log_prob_M: log P(token | text).
        base_log_prob_M: log Q(token | text).
        kl_M: KL(Q(·|w) ‖ P(·|c)), the distillation loss.
        misalignment_M: KL(P(·|w) ‖ P(·|c)).
        forgetting_M: KL(Q(·|w) ‖ P(·|w)).
        after_speech_M: True where some speech comes before the token: where misalignment means something.
    """

    speech_log_prob_M: Tensor
    text_log_prob_M: Tensor
    base_log_prob_M: Tensor
    kl_M: Tensor
    misalignment_M: Tensor
    forgetting_M: Tensor
    after_speech_M: Tensor

    def sums(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Misalignment and forgetting, each as a sum and the number of tokens that it is over."""
        heard, every = self.after_speech_M, torch.ones_like(self.after_speech_M)
        return {
            "misalignment": (torch.where(heard, self.misalignment_M, 0).sum(), heard.sum()),
            "forgetting": (self.forgetting_M.sum(), every.sum()),
        }


@torch.no_grad()
def measure(model: SpeechLLM, batch: SpeechBatch, teacher: Prediction) -> Measured:
    """Run P on speech and on text and compare both with the teacher's prediction."""
    speech, text = model.predict(batch), model.predict_text(batch)
    against_teacher = token_losses(speech, batch.labels_M, teacher)
    assert against_teacher.kl is not None
    return Measured(
        speech_log_prob_M=-against_teacher.nll,
        text_log_prob_M=token_log_probs(text, batch.labels_M),
        base_log_prob_M=token_log_probs(teacher, batch.labels_M),
        kl_M=against_teacher.kl,
        misalignment_M=misalignment(text, speech),
        forgetting_M=forgetting(teacher, text),
        after_speech_M=after_speech(batch),
    )


class GapReport:
    """Accumulates `Measured` batches of one evaluation set.

    Per token: ``nll``, ``kl``, ``misalignment`` (after speech only) and ``forgetting``. Per multiple-choice item:
    accuracy of the adapted model on speech and on text, and of the original model on text. Wrong options count for
    the accuracies only.

    Args:
        group_field: JSON field of the samples to break the figures down by.
    """

    def __init__(self, group_field: str) -> None:
        self._field = group_field
        self._means: dict[tuple[str, str], MeanPerToken] = defaultdict(MeanPerToken)
        self._choices = {name: SpokenChoice() for name in ("speech_accuracy", "text_accuracy", "base_text_accuracy")}

    def update(self, measured: Measured, batch: SpeechBatch) -> None:
        """Add one batch."""
        document_M = batch.predict_document_M
        log_probs = (measured.speech_log_prob_M, measured.text_log_prob_M, measured.base_log_prob_M)
        for choice, values in zip(self._choices.values(), log_probs, strict=True):
            choice.update(values, document_M, batch.documents)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, info in enumerate(batch.documents):
            if info.choice is None or info.choice == right_option(info.fields):
                groups[str(info.fields.get(self._field, "none"))].append(index)
        for group, members in groups.items():
            mask_M = torch.isin(document_M, torch.tensor(members, device=document_M.device))
            self._add(group, measured, mask_M)

    def _add(self, group: str, measured: Measured, mask_M: Tensor) -> None:
        for name, values, mask in (
            ("nll", -measured.speech_log_prob_M, mask_M),
            ("kl", measured.kl_M, mask_M),
            ("misalignment", measured.misalignment_M, mask_M & measured.after_speech_M),
            ("forgetting", measured.forgetting_M, mask_M),
        ):
            for key in (group, "all"):
                self._means[name, key].update(values.cpu(), mask.cpu())

    def gather(self) -> None:
        """Join what all ranks collected (a no-op in one process)."""
        for choice in self._choices.values():
            choice.gather()
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        mine = {key: (float(mean.total), float(mean.count)) for key, mean in self._means.items()}
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._means.clear()
        for theirs in everyone:
            for key, (total, count) in theirs.items():
                self._means[key].total += total
                self._means[key].count += count

    def overall(self) -> dict[str, float]:
        """Every figure over the whole set; accuracies and the gap only where there were multiple-choice items."""
        figures = {name: _value(mean) for (name, group), mean in self._means.items() if group == "all"}
        if self._has_choices():
            figures |= {name: choice.accuracy()["all"] for name, choice in self._choices.items()}
            figures["gap"] = figures["base_text_accuracy"] - figures["speech_accuracy"]
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def by_group(self) -> dict[str, dict[str, float]]:
        """Figure name → group → value."""
        table: dict[str, dict[str, float]] = defaultdict(dict)
        for (name, group), mean in sorted(self._means.items()):
            if group != "all" and float(mean.count):
                table[name][group] = _value(mean)
        if self._has_choices():
            for name, choice in self._choices.items():
                table[name] = choice.accuracy(self._field)
        return dict(table)

    def intervals(self) -> dict[str, Interval]:
        """95 % bootstrap intervals of the accuracies, and of the gap over pairs of the same item."""
        if not self._has_choices():
            return {}
        right = self.right()
        values = {name: [float(flag) for flag in flags.values()] for name, flags in right.items()}
        values["gap"] = [b - s for b, s in zip(values["base_text_accuracy"], values["speech_accuracy"], strict=True)]
        return {name: bootstrap_interval(row) for name, row in values.items()}

    def right(self) -> dict[str, dict[str, bool]]:
        """Accuracy's name → item → whether its right option won; empty where nothing is to choose."""
        return {name: choice.right() for name, choice in self._choices.items()} if self._has_choices() else {}

    @property
    def incomplete(self) -> int:
        """Multiple-choice items that are not counted, as some of their options were not read."""
        speech = self._choices["speech_accuracy"]
        return speech.incomplete if speech.most_options > 1 else 0

    def _has_choices(self) -> bool:
        speech = self._choices["speech_accuracy"]
        return speech.most_options > 1 and speech.incomplete < len(speech)

    @staticmethod
    def write(reports: dict[str, GapReport], path: Path) -> None:
        """Print one table a set, write all figures to ``path`` as JSON, and who was right to ``items.json`` beside."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            name: {"all": r.overall(), "intervals": r.intervals(), "groups": r.by_group()}
            for name, r in reports.items()
        }
        items = {name: r.right() for name, r in reports.items()}
        for file, value in ((path, content), (path.with_name("items.json"), items)):
            write_aside(file, json.dumps(value, indent=1))
        for name, report in reports.items():
            report.print_table(name)

    def print_table(self, title: str) -> None:
        """One row a group: accuracies, gap, M and F."""
        columns = ["speech_accuracy", "text_accuracy", "base_text_accuracy", "misalignment", "forgetting", "kl", "nll"]
        rows, overall = self.by_group(), self.overall()
        shown = [column for column in columns if column in overall]
        table = Table(title=title)
        table.add_column(self._field)
        for column in shown:
            table.add_column(column.replace("_", " "), justify="right")
        for group in sorted({g for figure in rows.values() for g in figure}):
            table.add_row(group, *(f"{rows[c][group]:.3f}" if group in rows.get(c, {}) else "–" for c in shown))
        table.add_section()
        table.add_row("all", *(f"{overall[column]:.3f}" for column in shown))
        if intervals := self.intervals():
            ranges = (intervals.get(column) for column in shown)
            table.add_row("95 % interval", *(f"{r.low:.3f} – {r.high:.3f}" if r else "" for r in ranges))
            low, high = intervals["gap"]
            table.caption = f"gap {overall['gap']:.3f} ({low:.3f} – {high:.3f}), original on text − adapted on speech"
        Console().print(table)


def _value(mean: MeanPerToken) -> float:
    return float(mean.total / mean.count) if float(mean.count) else math.nan
