"""The mathematics of a chunk: from raw logits of student and teacher to losses, and to the gradient in place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from salad_lightning.batch import Head

__all__ = ["LossTerms", "Settings", "row_losses", "settings", "shape", "vocab_size"]

# Uncompiled, a chunk is worked through in blocks of rows, so that what lies between two operations stays in the cache
# of a CPU and is little memory on a GPU.
_BLOCK_ELEMENTS = {"cuda": 2**24, "cpu": 2**19}
_COMPILED_DEVICES = {"cuda"}
# Settings of Inductor. A value that is used twice is computed twice: kept, it would be a [C, V] tensor in fp32. A row
# stays whole: the first chunk, whose size is what the compiler goes by, may be a small one. The GPU's own exponential,
# right to 2 in 10⁷ times its argument, takes a quarter of the kernel's instructions away; logits are bf16.
_COMPILER_OPTIONS: dict[str, Any] = {
    "realize_opcount_threshold": 10_000,
    "realize_reads_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
    "split_reductions": False,
    "use_fast_math": True,
}
_MAX_KERNELS = 64
# The logit of what is no token. Finite, so that 0 times a difference of two is 0.
_NEVER = -1e30


class LossTerms(NamedTuple):
    """What is minimised: a weighted sum of terms, all from one projection of the student and one of the teacher.

    P is the teacher, Q the student. A weight of 0 leaves its term out, with its cost and any infinity in it.

    At temperature T both distributions of a divergence are softened by T and the divergence is multiplied by T², which
    keeps the size of its gradient about the same (Hinton et al., arXiv 1503.02531, section 2). The NLL is at T = 1
    always.

    Attributes:
        nll: Weight of the negative log-likelihood of the label.
        kl: Weight of the forward divergence KL(P ‖ Q).
        reverse_kl: Weight of KL(Q ‖ P).
        jsd: Weight of the generalised Jensen–Shannon divergence ``β KL(P ‖ M) + (1 - β) KL(Q ‖ M)`` with
            ``M = β P + (1 - β) Q`` (Agarwal et al., arXiv 2306.13649, section 2).
        beta: The β of ``jsd``, strictly between 0 and 1.
        temperature: T.
    """

    nll: float = 0.0
    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    beta: float = 0.5
    temperature: float = 1.0


class Settings(NamedTuple):
    """What a head does to its raw logits; fields as in `salad_lightning.batch.Head`."""

    scale: float = 1.0
    soft_cap: float | None = None
    has_bias: bool = False


def settings(head: Head) -> Settings:
    """Those of a head."""
    return Settings(head.scale, head.soft_cap, head.bias is not None)


def vocab_size(head: Head) -> int:
    """Number of real tokens."""
    return head.weight.shape[0] if head.vocab_size is None else head.vocab_size


def shape(raw: Tensor, head: Head | Settings) -> Tensor:
    """Raw products to logits, in fp32 or wider."""
    result = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if head.scale != 1.0:
        result = result * head.scale
    if head.soft_cap is not None:
        result = head.soft_cap * torch.tanh(result / head.soft_cap)
    return result


def row_losses(raw_CV: Tensor, teacher_raw_CV: Tensor | None, labels_C: Tensor, mask_C: Tensor | None, real: int,
               head: Settings, teacher_head: Settings, terms: LossTerms, with_gradient: bool,
               losses_C: Tensor) -> Tensor | None:  # fmt: skip
    """Losses of a chunk, and the gradient of its raw logits.

    Args:
        raw_CV: The student's products ``hidden @ weight.T + bias``, contiguous; may be overwritten.
        teacher_raw_CV: The teacher's, of its own width, or None: then there is only ``nll``.
        labels_C: Token ids.
        mask_C: False for rows that count nothing.
        real: Columns that are tokens. Those behind them are padding of the vocabulary and count nothing.
        head: The student's.
        teacher_head: The teacher's.
        terms: Weights.
        with_gradient: Whether it is wanted.
        losses_C: ``[terms, C]``, written: nll, kl, reverse_kl, jsd, the last two only where they have a weight. It is
            the caller's because, allocated between temporary tensors, it would keep the heap from shrinking.

    Returns:
        The gradient of the summed terms ``[C, V]``, 0 in padding, or None if it is not wanted.
    """
    fixed = head, teacher_head, terms, with_gradient
    if raw_CV.device.type in _COMPILED_DEVICES and not _compiler.failed:
        result = _compiler.run(raw_CV, teacher_raw_CV, labels_C, mask_C, real, *fixed)
        if result is not None:
            losses_C.copy_(result[0])
            return result[1]
    size = max(1, _BLOCK_ELEMENTS.get(raw_CV.device.type, _BLOCK_ELEMENTS["cpu"]) // raw_CV.shape[1])
    for start in range(0, raw_CV.shape[0], size):
        rows = slice(start, start + size)
        teacher = None if teacher_raw_CV is None else teacher_raw_CV[rows, :real]
        mask = None if mask_C is None else mask_C[rows]
        losses_C[:, rows], gradient = _block(raw_CV[rows, :real], teacher, labels_C[rows], mask, real, *fixed)
        if gradient is not None:
            raw_CV[rows, :real] = gradient
    if not with_gradient:
        return None
    raw_CV[:, real:] = 0
    return raw_CV


def _block(raw_CV: Tensor, teacher_raw_CV: Tensor | None, labels_C: Tensor, mask_C: Tensor | None, real: int,
           head: Settings, teacher_head: Settings, terms: LossTerms,
           with_gradient: bool) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`row_losses` in one go: losses and gradient.

    Uncompiled, it works in place wherever a tensor is not needed again, since memory is what takes the time. Compiled,
    it is one kernel that reads each row twice, or three times where a slope depends on the row's loss, and writes the
    gradient once: into a tensor of its own, as a write in place of the logits would cost a copy of them.
    """
    logits_CV = shape(raw_CV, head)
    log_q_CV = _log_softmax(logits_CV, real, 1.0, head)
    losses = [-_at_label(log_q_CV, labels_C)]
    slopes = []
    if with_gradient and terms.nll:
        slopes.append(_nll_slope(log_q_CV, labels_C, terms.nll))
    if teacher_raw_CV is not None:
        temperature = terms.temperature
        if temperature != 1.0:
            log_q_CV = _log_softmax(logits_CV, real, temperature, head)
        teacher_raw_CV = teacher_raw_CV[:, : raw_CV.shape[1]]
        if missing := raw_CV.shape[1] - teacher_raw_CV.shape[1]:
            padding = teacher_raw_CV.new_zeros(teacher_raw_CV.shape[0], missing)
            teacher_raw_CV = torch.cat([teacher_raw_CV, padding], -1)
        teacher_logits_CV = shape(teacher_raw_CV, teacher_head).to(log_q_CV.dtype)
        log_p_CV = _log_softmax(teacher_logits_CV, real, temperature, teacher_head)
        pairs = _divergences(log_p_CV, log_q_CV, terms, with_gradient)
        losses += [loss_C if temperature == 1.0 else loss_C * temperature**2 for loss_C, _ in pairs]
        slopes += [slope_CV for _, slope_CV in pairs if slope_CV is not None]
    losses_C = torch.stack(losses)
    losses_C = losses_C if mask_C is None else losses_C * mask_C
    if not with_gradient:
        return losses_C, None
    gradient_CV = slopes[0]
    for slope_CV in slopes[1:]:
        gradient_CV += slope_CV
    if head.soft_cap is not None:
        gradient_CV *= 1 - (logits_CV / head.soft_cap) ** 2
    if head.scale != 1.0:
        gradient_CV *= head.scale
    if mask_C is not None:
        gradient_CV *= mask_C[:, None]
    return losses_C, gradient_CV.to(raw_CV.dtype)


def _divergences(
    log_p: Tensor, log_q: Tensor, terms: LossTerms, with_gradient: bool
) -> list[tuple[Tensor, Tensor | None]]:
    """Each divergence by row, and where it has a weight the slope of the weighted divergence in the student's logits.

    Overwrites both arguments. Slopes are in the logits before they are divided by T, for a divergence times T².
    """
    wanted = [
        (_reverse_kl, terms.reverse_kl, terms.reverse_kl != 0),
        (_jsd, terms.jsd, terms.jsd != 0),
        (_kl, terms.kl, True),  # the last: it overwrites
    ]
    pairs = []
    for divergence, weight, is_measured in wanted:
        if is_measured:
            loss, slope = divergence(log_p, log_q, terms.beta, with_gradient and weight != 0)
            factor = weight * terms.temperature
            pairs.append((loss, slope if slope is None or factor == 1.0 else slope.mul_(factor)))
    return pairs[-1:] + pairs[:-1]


def _kl(log_p: Tensor, log_q: Tensor, beta: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(P ‖ Q) and its slope q - p; overwrites both arguments."""
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1)
    return loss, log_q.exp_().sub_(p) if with_slope else None


def _reverse_kl(log_p: Tensor, log_q: Tensor, beta: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """KL(Q ‖ P) and its slope q (log q/p - KL)."""
    q, ratio = log_q.exp(), log_q - log_p
    loss = (q * ratio).sum(-1)
    return loss, ratio.sub_(loss[:, None]).mul_(q) if with_slope else None


def _jsd(log_p: Tensor, log_q: Tensor, beta: float, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """β KL(P ‖ M) + (1 - β) KL(Q ‖ M), M = β P + (1 - β) Q, and its slope (1 - β) q (log q/m - KL(Q ‖ M))."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    p_to_m, _ = _reverse_kl(log_m, log_p, beta, False)
    q_to_m, slope = _reverse_kl(log_m, log_q, beta, with_slope)
    return beta * p_to_m + (1 - beta) * q_to_m, None if slope is None else slope.mul_(1 - beta)


def _nll_slope(log_q: Tensor, labels: Tensor, weight: float) -> Tensor:
    """Weight times (q - the label's indicator)."""
    slope = log_q.exp()
    if torch.compiler.is_compiling():
        slope = slope - _is_label(log_q, labels).to(slope.dtype)
    else:
        slope.scatter_add_(-1, labels[:, None], torch.full_like(slope[:, :1], -1.0))
    return slope if weight == 1.0 else slope.mul_(weight)


def _at_label(log_q: Tensor, labels: Tensor) -> Tensor:
    """Each row at its label."""
    if torch.compiler.is_compiling():
        return torch.where(_is_label(log_q, labels), log_q, 0.0).sum(-1)
    return log_q.gather(-1, labels[:, None]).squeeze(-1)


def _is_label(log_q: Tensor, labels: Tensor) -> Tensor:
    """The label's indicator.

    Compared within a pass over the row, it takes no memory and no pass of its own, which reading and writing at the
    label's place do once compiled.
    """
    return torch.arange(log_q.shape[1], device=log_q.device) == labels[:, None]


def _log_softmax(logits: Tensor, real: int, temperature: float, head: Settings) -> Tensor:
    if logits.shape[1] > real:  # only when compiled: whole rows, which begin at even places, are faster to read
        column = torch.arange(logits.shape[1], device=logits.device)
        logits = torch.where(column < real, logits, _NEVER)
    result = (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)
    if head.has_bias:  # -inf there rules a token out; the lowest finite number does too, and 0 times it is 0
        result = result.clamp(min=torch.finfo(result.dtype).min)
    return result


class _Compiler:
    """`_block` through torch.compile, until that fails once (no Triton, no C compiler)."""

    def __init__(self) -> None:
        self.failed = False
        self._compiled: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def run(
        self, raw_CV: Tensor, teacher_raw_CV: Tensor | None, labels_C: Tensor, mask_C: Tensor | None, *fixed: Any
    ) -> tuple[Tensor, Tensor | None] | None:
        """What `_block` returns, or None where the compiler does not work."""
        # The imports take a second, which only those pay who compile.
        import torch._dynamo as dynamo

        if self._compiled is None:
            from torch._inductor import config

            known = {name: value for name, value in _COMPILER_OPTIONS.items() if hasattr(config, name)}
            self._compiled = torch.compile(_block, options=known)
        for tensor in (raw_CV, teacher_raw_CV, labels_C, mask_C):
            if tensor is not None:
                dynamo.maybe_mark_dynamic(tensor, 0)  # C differs from batch to batch,
            if tensor is not None and tensor.ndim > 1:
                dynamo.mark_static(tensor, 1)  # V does not, and a kernel that knows it reads faster
        try:
            # Weights and heads are constants of a kernel, so each combination of them is compiled for itself.
            with dynamo.config.patch(specialize_float=True, recompile_limit=_MAX_KERNELS):
                return self._compiled(raw_CV, teacher_raw_CV, labels_C, mask_C, *fixed)
        except dynamo.exc.TorchDynamoException as error:
            reason = str(error).partition("\n")[0]
            warnings.warn(f"torch.compile failed, so losses over the vocabulary take longer ({reason})", stacklevel=2)
            self.failed = True
            return None


_compiler = _Compiler()
