"""From hidden states to the vocabulary, in chunks: every objective, metric and score stands on these four functions.

M tokens times a vocabulary of 150,000 would fill gigabytes, so no ``[M, V]`` tensor is ever held: the M tokens are
taken in chunks, and where a gradient is needed a chunk's logits are thrown away and computed again on the way back.
Softmax and its logarithm run in fp32 whatever the dtype of the model. Shapes use the legend of `salad_lightning.batch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from salad_lightning.batch import Head, Prediction

__all__ = ["TokenLosses", "logits", "token_kl", "token_log_probs", "token_losses"]

# Logits in a chunk: 256 MiB in fp32, 440 tokens of a vocabulary of 152,000. Smaller chunks spend their time on reading
# the head's weights and adding up its gradient; larger ones only cost memory.
_CHUNK_ELEMENTS = 2**26


class TokenLosses(NamedTuple):
    """Losses of M tokens, each by itself.

    Attributes:
        nll: ``[M]`` fp32, negative log-likelihood of the label in nats, at temperature 1.
        kl: ``[M]`` fp32, KL(teacher ‖ student) in nats, or None where there was no teacher.
    """

    nll: Tensor
    kl: Tensor | None

    def sums(self) -> dict[str, Tensor]:
        """Detached sums over M by name, as `salad_lightning.batch.ObjectiveOutput.parts` wants them."""
        sums = {"nll": self.nll.detach().sum()}
        if self.kl is not None:
            sums["kl"] = self.kl.detach().sum()
        return sums


def logits(prediction: Prediction) -> Tensor:
    """Logits of the real vocabulary, for small M: the result is a whole ``[M, V]`` tensor.

    Args:
        prediction: ``hidden`` ``[M, D]`` (any leading shape will do) and the head.

    Returns:
        ``[M, V]`` fp32 with the head's bias, scale and soft-cap applied; V is the number of *real* tokens.
    """
    hidden, head = prediction
    # The logits are cut, not the weights: a slice of the weights would be a new tensor, which autocast casts to bf16
    # again for every chunk instead of once.
    raw = F.linear(hidden.to(head.weight.dtype), head.weight, head.bias)[..., : head.vocab_size].float()
    if head.scale != 1.0:
        raw = raw * head.scale
    if head.soft_cap is not None:
        raw = head.soft_cap * torch.tanh(raw / head.soft_cap)
    return raw


def token_losses(
    student: Prediction,
    labels_M: Tensor,
    teacher: Prediction | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenLosses:
    """NLL of the labels and forward KL from the teacher, token by token, over the full real vocabulary.

    Gradients reach the student's hidden states and head, never the teacher. With M = 0 the results are empty and still
    part of the graph: their sum is 0 with zero gradient.

    At temperature T both distributions are softened by T and their KL is multiplied by T², which keeps the size of its
    gradient about the same (Hinton et al., arXiv 1503.02531, section 2). The NLL always has temperature 1.

    Args:
        student: Prediction of the model in training.
        labels_M: ``[M]`` token ids.
        teacher: Prediction of the same tokens; width and padding of the vocabulary may differ from the student's.
        temperature: Softens both distributions of the KL.
        chunk_size: Tokens whose logits exist at a time; by default about 256 MiB of them.

    Raises:
        ValueError: If student, teacher and labels disagree in M, or student and teacher in the real vocabulary.
    """
    _check(student, labels_M, teacher)
    size = chunk_size or max(1, _CHUNK_ELEMENTS // _vocab_size(student.head))
    hidden_chunks = torch.split(student.hidden, size)
    label_chunks = torch.split(labels_M, size)
    teacher_chunks = [None] * len(hidden_chunks) if teacher is None else torch.split(teacher.hidden, size)
    # With a single chunk the peak is the same either way: its logits are alive when the backward pass starts.
    recompute = len(hidden_chunks) > 1 and torch.is_grad_enabled() and _needs_grad(student)
    nll, kl = [], []
    for hidden, labels, teacher_hidden in zip(hidden_chunks, label_chunks, teacher_chunks, strict=True):
        arguments = (
            Prediction(hidden, student.head),
            labels,
            None if teacher is None or teacher_hidden is None else Prediction(teacher_hidden, teacher.head),
            temperature,
        )
        if recompute:
            chunk = checkpoint(_chunk_losses, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            chunk = _chunk_losses(*arguments)
        nll.append(chunk[0])
        kl.append(chunk[1])
    return TokenLosses(torch.cat(nll), None if teacher is None else torch.cat([k for k in kl if k is not None]))


@torch.no_grad()
def token_kl(p: Prediction, q: Prediction, *, chunk_size: int | None = None) -> Tensor:
    """KL(p ‖ q) in nats at each of M tokens, without gradient.

    For misalignment p reads text and q speech; for forgetting p is the original LLM and q the adapted one
    (arXiv 2510.13632, section 3).

    Returns:
        ``[M]`` fp32.

    Raises:
        ValueError: If p and q disagree in M or in the real vocabulary.
    """
    labels_M = torch.zeros(q.hidden.shape[0], dtype=torch.long, device=q.hidden.device)
    kl = token_losses(q, labels_M, p, chunk_size=chunk_size).kl
    assert kl is not None  # there is a teacher
    return kl


def token_log_probs(prediction: Prediction, labels_M: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Log-probability in nats of each of M labels.

    Returns:
        ``[M]`` fp32.

    Raises:
        ValueError: If prediction and labels disagree in M.
    """
    return -token_losses(prediction, labels_M, chunk_size=chunk_size).nll


def _chunk_losses(
    student: Prediction, labels: Tensor, teacher: Prediction | None, temperature: float
) -> tuple[Tensor, Tensor | None]:
    student_logits = logits(student)
    log_probs = student_logits.log_softmax(-1)
    nll = -log_probs.gather(-1, labels[:, None]).squeeze(-1)
    if teacher is None:
        return nll, None
    with torch.no_grad():
        target = (logits(teacher) / temperature).log_softmax(-1)
    if temperature != 1.0:
        log_probs = (student_logits / temperature).log_softmax(-1)
    kl = F.kl_div(log_probs, target, reduction="none", log_target=True).sum(-1)
    return nll, kl * temperature**2


def _check(student: Prediction, labels_M: Tensor, teacher: Prediction | None) -> None:
    counts = {"student": student.hidden.shape[0], "labels": labels_M.shape[0]}
    if teacher is not None:
        counts["teacher"] = teacher.hidden.shape[0]
        sizes = _vocab_size(student.head), _vocab_size(teacher.head)
        if sizes[0] != sizes[1]:
            raise ValueError(f"The student has {sizes[0]} real tokens, the teacher {sizes[1]}: no KL between them.")
    if len(set(counts.values())) > 1:
        raise ValueError(f"Numbers of predicted tokens differ: {counts}.")


def _vocab_size(head: Head) -> int:
    return head.weight.shape[0] if head.vocab_size is None else head.vocab_size


def _needs_grad(prediction: Prediction) -> bool:
    tensors = (prediction.hidden, prediction.head.weight, prediction.head.bias)
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
