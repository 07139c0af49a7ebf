"""Distillation from the text-only teacher: SALAD's own objective."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Objective
from salad_lightning.projection import LossTerms, projected_loss

__all__ = ["ForwardKLObjective"]


class ForwardKLObjective(Objective):
    """KL(teacher ‖ student) at the text tokens, full vocabulary: L_DIST of arXiv 2510.13632, section 3.

    The teacher reads the plain transcript, the student the interleaved text and speech.

    Args:
        temperature: Softens both distributions; the KL is multiplied by its square (arXiv 1503.02531, section 2), also
            in the logged part ``kl``. The paper names none; 1 compares the distributions as they are.

    Raises:
        UserError: If ``temperature`` is not positive.
    """

    needs_teacher = True

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(
                f"temperature must be positive, not {temperature}", where="ForwardKLObjective", cure="use 1.0"
            )
        self.terms = LossTerms(kl=1.0, temperature=temperature)

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed KL in nats.

        Raises:
            ValueError: If there is no teacher, or M differs.
        """
        return projected_loss(student, labels_M, teacher, self.terms)
