"""Between distillation and plain next-token training."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Objective
from salad_lightning.projection import LossTerms, projected_loss

__all__ = ["MixtureObjective"]


class MixtureObjective(Objective):
    """``alpha * KL(teacher ‖ student) + (1 - alpha) * NLL`` at the text tokens (arXiv 2510.13632, section 3).

    Both come from one projection of the student.

    Args:
        alpha: Weight of the KL, 0 to 1. 1 is SALAD; 0 is plain next-token training and needs no teacher.
        temperature: Softens both distributions of the KL, which is multiplied by its square (arXiv 1503.02531,
            section 2), also in the logged part ``kl``; the NLL is not softened.

    Raises:
        UserError: If ``alpha`` is outside [0, 1] or ``temperature`` is not positive.
    """

    def __init__(self, alpha: float = 0.5, temperature: float = 1.0) -> None:
        super().__init__()
        where = "MixtureObjective"
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha must be between 0 and 1, not {alpha}", where=where, cure="1 is SALAD, 0 plain NLL")
        if not temperature > 0:
            raise UserError(f"temperature must be positive, not {temperature}", where=where, cure="use 1.0")
        self.terms = LossTerms(nll=1 - alpha, kl=alpha, temperature=temperature)
        self.needs_teacher = alpha > 0

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed mixture in nats.

        Raises:
            ValueError: If there is no teacher although ``alpha`` is above 0, or M differs.
        """
        return projected_loss(student, labels_M, teacher, self.terms)
