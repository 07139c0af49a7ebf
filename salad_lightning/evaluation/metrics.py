"""Misalignment and forgetting: the two causes of the text–speech gap, measurable per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from salad_lightning.batch import Prediction, SpeechBatch
from salad_lightning.projection import token_kl

__all__ = ["MeanPerToken", "after_speech", "forgetting", "misalignment"]


class MeanPerToken(Metric):
    """A mean over tokens, exact over batches of any size and over ranks; NaN before the first token.

    Args:
        kwargs: Passed to torchmetrics' ``Metric``.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values_M: Tensor, mask_M: Tensor | None = None) -> None:
        """Add one value a token, those outside ``mask_M`` left out."""
        mask = torch.ones_like(values_M, dtype=torch.bool) if mask_M is None else mask_M
        self.total += torch.where(mask, values_M, 0).sum(dtype=torch.float64)
        self.count += mask.sum()

    def compute(self) -> Tensor:
        """Total over count."""
        return (self.total / self.count).float()


def misalignment(text: Prediction, speech: Prediction) -> Tensor:
    """M per token, ``[M]`` nats: KL( P(·|w) ‖ P(·|c) ), the adapted model with text against speech context.

    arXiv 2510.13632, section 2; full vocabulary, without gradient.
    """
    return token_kl(text, speech)


def forgetting(teacher: Prediction, text: Prediction) -> Tensor:
    """F per token, ``[M]`` nats: KL( Q(·|w) ‖ P(·|w) ), the original against the adapted model, both on text.

    arXiv 2510.13632, section 2; full vocabulary, without gradient.
    """
    return token_kl(teacher, text)


def after_speech(batch: SpeechBatch) -> Tensor:
    """``[M]`` True where some speech of the same document comes before the token; elsewhere M is 0 by construction."""
    flat_documents = batch.document_ids_BS.flatten()
    far = flat_documents.numel()
    first_speech = torch.full((len(batch.documents) + 1,), far, device=flat_documents.device)
    documents_K = flat_documents[batch.span_at_K]
    first_speech.scatter_reduce_(0, documents_K, batch.span_at_K, "amin")
    return batch.predict_at_M >= first_speech[batch.predict_document_M]
