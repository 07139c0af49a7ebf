"""What objectives share that compare the student with the teacher over the whole vocabulary."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Objective
from salad_lightning.projection import LossTerms, projected_loss

__all__ = ["Divergence"]


class Divergence(Objective):
    """A fixed weighting of `LossTerms` that needs the teacher.

    Args:
        terms: What is summed.

    Raises:
        UserError: If the temperature is not positive.
    """

    needs_teacher = True

    def __init__(self, terms: LossTerms) -> None:
        super().__init__()
        if not terms.temperature > 0:
            raise UserError(
                f"temperature must be positive, not {terms.temperature}", where=type(self).__name__, cure="use 1.0"
            )
        self.terms = terms

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed divergence in nats.

        Raises:
            ValueError: If there is no teacher, or M differs.
        """
        return projected_loss(student, labels_M, teacher, self.terms)
