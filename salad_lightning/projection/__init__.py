"""From hidden states to the vocabulary, in chunks: every objective, metric and score stands on this kernel.

M tokens times a vocabulary of 150,000 would fill gigabytes, so no ``[M, V]`` tensor is ever held. The M tokens are
taken in chunks; a chunk's logits become its loss and then, in place, the gradient of that loss, which is multiplied
into the gradients of the hidden states and of a trained head at once. Forward and backward pass are one, every logit
is computed once, and ``backward()`` only scales what is there. Matrix products run in the dtype of the model (bf16
under autocast), softmax and logarithms in fp32 (float64 for a float64 model).
"""

from __future__ import annotations

from salad_lightning.projection.losses import (
    TokenLosses,
    logits,
    projected_loss,
    token_kl,
    token_log_probs,
    token_losses,
)
from salad_lightning.projection.rows import LossTerms

__all__ = ["LossTerms", "TokenLosses", "logits", "projected_loss", "token_kl", "token_log_probs", "token_losses"]
