"""Distillation between the two directions of the KL."""

from __future__ import annotations

from salad_lightning.errors import UserError
from salad_lightning.objectives._divergence import Divergence
from salad_lightning.projection import LossTerms

__all__ = ["JSDObjective"]


class JSDObjective(Divergence):
    """Generalised Jensen–Shannon divergence at the text tokens, full vocabulary (GKD, arXiv 2306.13649, section 2).

    ``β KL(teacher ‖ M) + (1 - β) KL(student ‖ M)`` with ``M = β teacher + (1 - β) student``. It is bounded. Divided by
    β it tends to the forward KL as β → 0, divided by 1 - β to the reverse KL as β → 1; the gradient shrinks alike, so
    the learning rate may have to grow. The forward KL is measured beside it, as the logged part ``kl``.

    Args:
        beta: β, strictly between 0 and 1.
        temperature: Softens both distributions; the divergence is multiplied by its square (arXiv 1503.02531,
            section 2), also in the logged parts.

    Raises:
        UserError: If ``beta`` is outside (0, 1) or ``temperature`` is not positive.
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0) -> None:
        if not 0 < beta < 1:
            cure = "use ForwardKLObjective for 0 and ReverseKLObjective for 1"
            raise UserError(f"beta must be strictly between 0 and 1, not {beta}", where="JSDObjective", cure=cure)
        super().__init__(LossTerms(jsd=1.0, beta=beta, temperature=temperature))
