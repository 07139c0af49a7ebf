"""The Stage-I model's distillation loss on every probe text."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Trainer

from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.selection.settings import ScoreSettings
from salad_lightning.training.from_checkpoint import module_of

__all__ = ["TextLoss", "distillation_losses"]


class TextLoss(NamedTuple):
    """Distillation loss of one text.

    Attributes:
        kl_sum: KL(Q(·|w) ‖ P(·|c)) in nats, summed over the predicted tokens after some speech.
        num_tokens: How many these are.
    """

    kl_sum: float
    num_tokens: int


def distillation_losses(settings: ScoreSettings, shards: Path, folder: Path) -> dict[str, TextLoss]:
    """Loss of every text that was spoken, by key.

    Tokens before the first speech of a document are left out: there the loss is forgetting, not misalignment.

    Args:
        settings: Checkpoint, spans, device.
        shards: Folder of the probes.
        folder: An existing folder for ``predictions.jsonl``.
    """
    module = module_of(settings.checkpoint, allow_decayed=settings.allow_decayed)
    documents = InterleaveDocuments(text_words=settings.text_words, speech_words=settings.speech_words)
    data = SpeechDataModule(
        test=[Source(str(shards), documents, name="probe")],
        eval_rows_per_batch=settings.rows_per_batch,
        seed=settings.seed,
    )
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=1,
        precision=settings.precision,  # type: ignore[arg-type]  # checked by the Trainer
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    # Lightning misses the callbacks of training, which have nothing to do here.
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    trainer.predict(module, data, return_predictions=False, ckpt_path=settings.checkpoint, weights_only=True)
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with (folder / "predictions.jsonl").open(encoding="utf-8") as file:
        for row in map(json.loads, file):
            heard = [kl for kl, after in zip(row["kl"], row["after_speech"], strict=True) if after]
            total = sums[row["key"]]
            total[0] += sum(heard)
            total[1] += len(heard)
    return {key: TextLoss(total, int(count)) for key, (total, count) in sums.items()}
