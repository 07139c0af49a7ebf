"""Distillation that seeks the teacher's modes instead of covering all of them."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Objective
from salad_lightning.projection import LossTerms, projected_loss

__all__ = ["ReverseKLObjective"]


class ReverseKLObjective(Objective):
    """KL(student ‖ teacher) at the text tokens, full vocabulary (MiniLLM, arXiv 2306.08543, section 2.1).

    It punishes what the student believes and the teacher does not, and is the usual choice for on-policy distillation.
    The forward KL is measured beside it, as the logged part ``kl``.

    Args:
        temperature: Softens both distributions; the KL is multiplied by its square (arXiv 1503.02531, section 2), also
            in the logged parts.

    Raises:
        UserError: If ``temperature`` is not positive.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(
                f"temperature must be positive, not {temperature}", where="ReverseKLObjective", cure="use 1.0"
            )
        self.terms = LossTerms(reverse_kl=1.0, temperature=temperature)

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed reverse KL in nats.

        Raises:
            ValueError: If there is no teacher, or M differs.
        """
        return projected_loss(student, labels_M, teacher, self.terms)
