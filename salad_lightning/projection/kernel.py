"""The walk over chunks: matrix products, gradients in one pass, and what autograd sees of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from salad_lightning.batch import Head, Prediction
from salad_lightning.projection.rows import LossTerms, Settings, row_losses, settings, vocab_size

__all__ = ["Job", "Projection", "measured", "operands", "project"]

# Logits in a chunk, at most. Every chunk reads the whole head and adds to all of its gradient, so fewer and larger
# chunks are faster, and take more memory. With a vocabulary of 152,000 these are 192 tokens on a CPU, from where matrix
# products gain no more, and 1,024 on a GPU, where logits of student and teacher and the gradient in bf16 are 0.9 GiB.
_CHUNK_ELEMENTS = {"cuda": 5 * 2**25, "cpu": 7 * 2**22}
_CHUNK_STEP = {"cuda": 128, "cpu": 32}  # matrix products work in tiles
# Elements of a trained head whose gradient is computed at a time where a CPU widens the factors of the product.
_HEAD_ELEMENTS = 2**23


class Job(NamedTuple):
    """All of a projection but the student's hidden states.

    Attributes:
        head: The student's.
        teacher: Its prediction, or None.
        labels_M: ``[M]`` token ids.
        mask_M: True for tokens that count, or None for all.
        terms: What to sum.
        chunk_size: Tokens in a chunk, or None to choose.
    """

    head: Head
    teacher: Prediction | None
    labels_M: Tensor
    mask_M: Tensor | None
    terms: LossTerms
    chunk_size: int | None


class _Gradients(NamedTuple):
    """Where a chunk's gradients go; None where none is needed."""

    hidden_MD: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


class Projection(torch.autograd.Function):
    """Gradients are computed in ``forward``, beside the loss; ``backward`` scales them."""

    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight: Tensor, bias: Tensor | None, job: Job) -> tuple[Tensor, Tensor]:
        """The weighted sum, and without gradient each token's losses ``[terms, M]``."""
        job = job._replace(head=job.head._replace(weight=weight, bias=bias))
        total, losses_M, gradients = project(hidden_MD, job, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden_MD, weight, bias)]
        ctx.mark_non_differentiable(losses_M)
        return total, losses_M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients, times that of the sum."""
        # In place, a second fp32 copy of the head's gradient is spared; not where the graph is kept to come here again.
        multiply = Tensor.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        return *(
            None if gradient is None else multiply(gradient, scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ), None


@torch.no_grad()
def project(
    hidden_MD: Tensor, job: Job, needs: tuple[bool, bool, bool] = (False, False, False)
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """One walk over the chunks.

    Args:
        hidden_MD: The student's hidden states.
        job: The rest.
        needs: Whether hidden states, weight and bias need a gradient.

    Returns:
        The weighted sum, each token's losses ``[terms, M]`` in the order of `measured`, and the three gradients.
    """
    student = operands(job.head)
    teacher = None if job.teacher is None else operands(job.teacher.head)
    wide = torch.promote_types(student[0].dtype, torch.float32)
    gradients = _Gradients(
        torch.empty_like(hidden_MD) if needs[0] else None,
        torch.zeros_like(job.head.weight, dtype=wide) if needs[1] else None,
        torch.zeros_like(job.head.bias, dtype=wide) if needs[2] and job.head.bias is not None else None,
    )
    names = measured(job)
    losses_M = hidden_MD.new_empty(len(names), hidden_MD.shape[0], dtype=wide)
    size = job.chunk_size or _chunk_size(student[0], hidden_MD.shape[0])
    with torch.autocast(hidden_MD.device.type, enabled=False):
        for start in range(0, hidden_MD.shape[0], size):
            # A function of its own, so that a chunk's logits are gone before the next one's are made.
            rows = slice(start, start + size)
            _project_chunk(hidden_MD, rows, job, student, teacher, gradients, losses_M[:, rows])
    weights = [getattr(job.terms, name) for name in names]
    sums = [weight * losses.sum() for weight, losses in zip(weights, losses_M, strict=True) if weight]
    return torch.stack(sums or [losses_M.new_zeros(())]).sum(), losses_M, gradients


def _project_chunk(
    hidden_MD: Tensor,
    rows: slice,
    job: Job,
    student: tuple[Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None] | None,
    gradients: _Gradients,
    losses_C: Tensor,
) -> None:
    """Losses and gradients of one chunk, written or added to their places."""
    hidden_CD = hidden_MD[rows].to(student[0].dtype)
    # Padding of the vocabulary is projected too, and left out of what comes after: a matrix whose rows begin at odd
    # places would keep a GPU off its fast paths.
    raw_CV = F.linear(hidden_CD, *student)
    teacher_raw_CV, teacher_settings = None, Settings()
    if job.teacher is not None and teacher is not None:
        teacher_raw_CV = F.linear(job.teacher.hidden[rows].to(teacher[0].dtype), *teacher)
        teacher_settings = settings(job.teacher.head)
    gradient_CV = row_losses(
        raw_CV,
        teacher_raw_CV,
        job.labels_M[rows],
        None if job.mask_M is None else job.mask_M[rows],
        vocab_size(job.head),
        settings(job.head),
        teacher_settings,
        job.terms,
        any(gradient is not None for gradient in gradients),
        losses_C,
    )
    del raw_CV, teacher_raw_CV
    if gradient_CV is not None:
        _spread(gradient_CV, hidden_CD, rows, student[0], gradients)


def _spread(gradient_CV: Tensor, hidden_CD: Tensor, rows: slice, weight_VD: Tensor, gradients: _Gradients) -> None:
    """From the gradient of a chunk's raw logits to those of hidden states, weight and bias."""
    if gradients.hidden_MD is not None:
        gradients.hidden_MD[rows] = gradient_CV @ weight_VD
    if gradients.weight_VD is not None:
        _add_product(gradients.weight_VD, gradient_CV, hidden_CD)
    if gradients.bias_V is not None:
        gradients.bias_V.add_(gradient_CV.sum(0, dtype=gradients.bias_V.dtype))


def _add_product(total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """``total += gradient.T @ hidden``, with products as wide as the sum."""
    wide = total_VD.dtype
    if gradient_CV.dtype == wide:
        total_VD.addmm_(gradient_CV.T, hidden_CD)
        return
    if total_VD.is_cuda:
        torch.addmm(total_VD, gradient_CV.T, hidden_CD, out_dtype=wide, out=total_VD)  # bf16 factors, fp32 sum
        return
    size = max(1, _HEAD_ELEMENTS // total_VD.shape[1])
    for total, gradient in zip(torch.split(total_VD, size), torch.split(gradient_CV, size, dim=1), strict=True):
        total.addmm_(gradient.T.to(wide), hidden_CD.to(wide))


def measured(job: Job) -> list[str]:
    """Names of the losses that are computed, in the order of `row_losses`."""
    if job.teacher is None:
        return ["nll"]
    return ["nll", "kl", *(name for name in ("reverse_kl", "jsd") if getattr(job.terms, name))]


def operands(head: Head) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in the dtype of matrix products: cast once here, and not by autocast for every chunk."""
    device, dtype = head.weight.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
    return head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)


def _chunk_size(weight_VD: Tensor, tokens: int) -> int:
    """Tokens in a chunk, for as few chunks as may be, of about the same size."""
    device = weight_VD.device.type if weight_VD.device.type in _CHUNK_ELEMENTS else "cpu"
    step = _CHUNK_STEP[device]
    most = max(1, _CHUNK_ELEMENTS[device] // weight_VD.shape[0])
    if most < step:
        return most
    most = most // step * step
    chunks = max(1, -(-tokens // most))
    return -(-tokens // (chunks * step)) * step or step
