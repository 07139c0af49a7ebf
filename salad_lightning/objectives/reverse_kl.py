"""Distillation that seeks the teacher's modes instead of covering all of them."""

from __future__ import annotations

from salad_lightning.objectives._divergence import Divergence
from salad_lightning.projection import LossTerms

__all__ = ["ReverseKLObjective"]


class ReverseKLObjective(Divergence):
    """KL(student ‖ teacher) at the text tokens, full vocabulary (MiniLLM, arXiv 2306.08543, section 2.1).

    It punishes what the student believes and the teacher does not, and is the usual choice for on-policy distillation.
    The forward KL is measured beside it, as the logged part ``kl``.

    Args:
        temperature: Softens both distributions; the KL is multiplied by its square (arXiv 1503.02531, section 2), also
            in the logged parts.

    Raises:
        UserError: If ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(LossTerms(reverse_kl=1.0, temperature=temperature))
