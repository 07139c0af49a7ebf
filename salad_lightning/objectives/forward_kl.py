"""Distillation from the text-only teacher: SALAD's own objective."""

from __future__ import annotations

from salad_lightning.objectives._divergence import Divergence
from salad_lightning.projection import LossTerms

__all__ = ["ForwardKLObjective"]


class ForwardKLObjective(Divergence):
    """KL(teacher ‖ student) at the text tokens, full vocabulary: L_DIST of arXiv 2510.13632, section 3.

    The teacher reads the plain transcript, the student the interleaved text and speech.

    Args:
        temperature: Softens both distributions; the KL is multiplied by its square (arXiv 1503.02531, section 2), also
            in the logged part ``kl``. The paper names none; 1 compares the distributions as they are.

    Raises:
        UserError: If ``temperature`` is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__(LossTerms(kl=1.0, temperature=temperature))
