"""Between distillation and plain next-token training."""

from __future__ import annotations

import torch
from torch import Tensor

from salad_lightning.batch import ObjectiveOutput, Prediction
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Objective
from salad_lightning.projection import token_losses

__all__ = ["MixtureObjective"]


class MixtureObjective(Objective):
    """``alpha * KL(teacher ‖ student) + (1 - alpha) * NLL`` at the text tokens (arXiv 2510.13632, section 3).

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
        self.alpha, self.temperature = alpha, temperature
        self.needs_teacher = alpha > 0

    def forward(self, student: Prediction, teacher: Prediction | None, labels_M: Tensor) -> ObjectiveOutput:
        """Summed mixture in nats.

        Raises:
            ValueError: If there is no teacher although ``alpha`` is above 0, or M differs.
        """
        losses = token_losses(student, labels_M, teacher, temperature=self.temperature)
        # A weight of 0 leaves its term out of the graph, so that neither its cost nor an infinity in it comes in.
        terms = [] if self.alpha == 1 else [(1 - self.alpha) * losses.nll]
        if self.alpha > 0:
            if losses.kl is None:
                raise ValueError(f"MixtureObjective with alpha = {self.alpha} needs the teacher's prediction.")
            terms.append(self.alpha * losses.kl)
        count = torch.full((), labels_M.shape[0], device=labels_M.device)
        return ObjectiveOutput(torch.stack(terms).sum(), count, losses.sums())
