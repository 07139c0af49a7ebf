"""On-policy distillation: the student goes on from what it heard, the text teacher scores every token of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from salad_lightning.batch import SpeechBatch
from salad_lightning.errors import UserError
from salad_lightning.training.speech_llm_module import SpeechLLMModule
from salad_lightning.training.speed_monitor import Work
from salad_on_policy.rollout import Prompts, sample

__all__ = ["OnPolicyModule"]


class OnPolicyModule(SpeechLLMModule):
    """Distils on the student's own continuations of speech (X-OPD, arXiv 2603.24596; GKD, arXiv 2306.13649, section 3).

    From every batch a few documents with speech are cut where their last speech span has been heard and the next token
    would be predicted (a prompt; before the answer where there is one). The student draws tokens there; the teacher,
    which reads the transcript, says how probable it finds every next token on the student's way; and the objective,
    best ReverseKLObjective, compares the two. Validation and test stay those of SpeechLLMModule.

    Every rank draws exactly ``rollout_tokens`` tokens for exactly ``rollouts_per_batch`` rows, dummies where it has no
    speech, so that sharded models stay in step. Tokens after an end-of-sequence token carry no loss.

    Args:
        rollout_tokens: Tokens drawn after a prompt.
        rollouts_per_batch: Prompts taken from a batch; the rest of it is left out.
        temperature: Of drawing; 1 is the student's own distribution, towards 0 its most probable token.
        **kwargs: All that SpeechLLMModule takes.

    Raises:
        UserError: If a value is out of range, or the objective does not ask the teacher.
    """

    def __init__(
        self, *, rollout_tokens: int = 32, rollouts_per_batch: int = 8, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for wrong, cure in (
            (rollout_tokens < 1 and f"rollout_tokens is {rollout_tokens}", "give 1 or more"),
            (rollouts_per_batch < 1 and f"rollouts_per_batch is {rollouts_per_batch}", "give 1 or more"),
            (temperature <= 0 and f"temperature is {temperature}", "give more than 0"),
            (
                not self.objective.needs_teacher and f"{type(self.objective).__name__} does not ask the teacher",
                "set model.objective to ReverseKLObjective",
            ),
            (
                rollout_tokens >= self.sequence_spec().context and f"{rollout_tokens} tokens leave no room for speech",
                "raise model.context",
            ),
        ):
            if wrong:
                raise UserError(wrong, where="OnPolicyModule", cure=cure)
        self._num_tokens, self._num_prompts, self._temperature = rollout_tokens, rollouts_per_batch, temperature

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        """A step on what the student says, in place of what the corpus says."""
        return super().training_step(self.rollout(batch), batch_idx)

    @torch.no_grad()
    def rollout(self, batch: SpeechBatch) -> SpeechBatch:
        """Prompts of the batch with the student's continuations, to be predicted by student and teacher."""
        prompts = Prompts.of(batch, self._num_prompts, self._num_tokens, self.sequence_spec().context)
        tokens_PN = self.model.run(sample, prompts.batch, self._num_tokens, self._temperature)
        return prompts.continued(tokens_PN, self.sequence_spec().tokenizer.eos_token_id)

    def flops(self, work: Work) -> float:
        """Not counted: drawing takes most of a step, and is bound by memory and not by operations."""
        return 0.0
