"""Plain next-token training."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.interfaces import Objective
from salad_lightning.projection import LossTerms, projected_loss

__all__ = ["NLLObjective"]


class NLLObjective(Objective):
    """Negative log-likelihood of the text tokens: L_NLL of arXiv 2510.13632, section 3.

    Needs no teacher. Where one is given, its KL is measured for the log and has no part in the gradient.
    """

    needs_teacher = False

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed NLL in nats."""
        return projected_loss(student, labels_M, teacher, LossTerms(nll=1.0))
