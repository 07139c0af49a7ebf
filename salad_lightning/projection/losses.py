"""What objectives and metrics call: losses over the vocabulary, with gradient and without."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.projection.kernel import Job, Projection, measured, operands, project
from salad_lightning.projection.rows import LossTerms, shape, vocab_size

__all__ = ["TokenLosses", "logits", "projected_loss", "token_kl", "token_log_probs", "token_losses"]


class TokenLosses(NamedTuple):
    """Losses of M tokens, each by itself.

    Attributes:
        nll: ``[M]`` fp32, negative log-likelihood of the label in nats, at temperature 1.
        kl: ``[M]`` fp32, KL(teacher ‖ student) in nats, or None where there was no teacher.
    """

    nll: Tensor
    kl: Tensor | None


def projected_loss(
    student: Prediction,
    labels_M: Tensor,
    teacher: Prediction | None,
    terms: LossTerms,
    *,
    mask_M: Tensor | None = None,
    chunk_size: int | None = None,
) -> ObjectiveOutput:
    """Summed loss over the full real vocabulary, with gradients for the student's hidden states and trained head.

    A head that needs no gradient gets none: nothing is computed or allocated for it. The gradient of a trained head is
    added up in fp32. The teacher never gets one. Beside the gradients, memory holds one chunk's logits of student and
    teacher. With M = 0 the sum is 0, still part of the graph, with zero gradient.

    Args:
        student: Prediction of the model in training.
        labels_M: ``[M]`` token ids.
        teacher: Prediction of the same tokens; width and padding of the vocabulary may differ from the student's.
            Where no term needs it, its KL is measured all the same.
        terms: What to sum.
        mask_M: True for tokens that count; by default all. The others are projected all the same, so where they are
            many, leave them out of the predictions instead.
        chunk_size: Tokens whose logits exist at a time; by default chosen from V and M, for logits of at most 112 MiB
            in fp32 on a CPU and 320 MiB in bf16 on a GPU.

    Returns:
        The sum in fp32 (float64 for a float64 model), the number of tokens that count, and as ``parts`` the unweighted
        sums of ``nll``, with a teacher of ``kl``, and of every other term that has a weight.

    Raises:
        ValueError: If student, teacher, labels and mask disagree in M or student and teacher in the real vocabulary,
            if a term lacks its teacher, or if β or the temperature is out of range.
    """
    _check(student, labels_M, teacher, terms, mask_M)
    job = Job(student.head, teacher, labels_M, mask_M, terms, chunk_size)
    inputs = student.hidden, student.head.weight, student.head.bias
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        total, losses_M = Projection.apply(*inputs, job)  # type: ignore[no-untyped-call]
    else:
        total, losses_M, _ = project(student.hidden, job)
    parts = dict(zip(measured(job), losses_M.sum(-1), strict=True))
    count = torch.full((), float(labels_M.shape[0]), device=labels_M.device) if mask_M is None else mask_M.sum()
    return ObjectiveOutput(total, count, parts)


@torch.no_grad()
def token_losses(
    student: Prediction,
    labels_M: Tensor,
    teacher: Prediction | None = None,
    *,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> TokenLosses:
    """NLL of the labels and forward KL from the teacher, token by token, without gradient.

    Arguments, the convention of the temperature, and errors are those of `projected_loss`, the one with gradient.
    """
    terms = LossTerms(nll=1.0, temperature=temperature)
    _check(student, labels_M, teacher, terms, None)
    _, losses_M, _ = project(student.hidden, Job(student.head, teacher, labels_M, None, terms, chunk_size))
    return TokenLosses(losses_M[0], losses_M[1] if teacher is not None else None)


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
    """Log-probability in nats of each of M labels, without gradient.

    Returns:
        ``[M]`` fp32.

    Raises:
        ValueError: If prediction and labels disagree in M.
    """
    return -token_losses(prediction, labels_M, chunk_size=chunk_size).nll


def logits(prediction: Prediction) -> Tensor:
    """Logits of the real vocabulary, for small M: the result is a whole ``[M, V]`` tensor.

    Args:
        prediction: ``hidden`` ``[M, D]`` (any leading shape will do) and the head.

    Returns:
        ``[M, V]`` fp32 with the head's bias, scale and soft-cap applied; V is the number of *real* tokens.
    """
    hidden, head = prediction
    weight, bias = operands(head)
    with torch.autocast(hidden.device.type, enabled=False):
        return shape(F.linear(hidden.to(weight.dtype), weight, bias)[..., : vocab_size(head)], head).float()


def _check(
    student: Prediction, labels_M: Tensor, teacher: Prediction | None, terms: LossTerms, mask_M: Tensor | None
) -> None:
    tensors = {"student": student.hidden, "labels": labels_M, "mask": mask_M}
    if teacher is not None:
        tensors["teacher"] = teacher.hidden
        sizes = vocab_size(student.head), vocab_size(teacher.head)
        if sizes[0] != sizes[1]:
            raise ValueError(f"The student has {sizes[0]} real tokens, the teacher {sizes[1]}: no KL between them.")
    elif terms.kl or terms.reverse_kl or terms.jsd:
        raise ValueError(f"{terms} needs the teacher's prediction.")
    counts = {name: tensor.shape[0] for name, tensor in tensors.items() if tensor is not None}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Numbers of predicted tokens differ: {counts}.")
    if not (terms.nll or terms.kl or terms.reverse_kl or terms.jsd):
        raise ValueError(f"Every weight of {terms} is 0: there is nothing to minimise.")
    if not terms.temperature > 0:
        raise ValueError(f"temperature must be positive, not {terms.temperature}.")
    if terms.jsd and not 0 < terms.beta < 1:
        raise ValueError(f"beta must be between 0 and 1, not {terms.beta}.")
