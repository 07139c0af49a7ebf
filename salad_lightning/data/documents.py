"""From utterances to documents: what all builders share; each builder has a file of its own.

The transcript is tokenised once. A student hears the stretches called spans and reads the rest; a teacher reads all of
it; so both predict the very same tokens (arXiv 2510.13632, section 3).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from salad_lightning.data.audio import Clip, decoded
from salad_lightning.data.format import Utterance
from salad_lightning.data.segments import Document
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.tokens import bos_id
from salad_lightning.errors import UserError

__all__ = ["Control", "DocumentBuilder", "bos_ids"]

Control = Literal["none", "muted", "shuffled"]


class DocumentBuilder(ABC):
    """Turns an utterance into documents; shared by training, evaluation and generation.

    Args:
        append_eos: Whether a document ends with the tokenizer's end-of-sequence token, which is predicted too.
        control: A control condition for evaluation: "muted" silences the audio, "shuffled" puts another utterance's
            audio in its place, "none" leaves it.
    """

    def __init__(self, append_eos: bool, control: Control) -> None:
        self.append_eos, self.control = append_eos, control

    @abstractmethod
    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """Documents of one utterance, each at most ``spec.context`` positions long for student and for teacher.

        Args:
            utterance: With its audio at ``spec.sample_rate_hz``.
            spec: Lengths and tokenizer of the model.
            seed: Together with source, key and epoch it decides every random choice.
            epoch: How often the source has been read before.

        Raises:
            UserError: If the utterance lacks what the builder needs, or the context is too short.
        """

    def fingerprint(self) -> str:
        """Class and settings, to tell whether a stream can be resumed."""
        return json.dumps([type(self).__name__, vars(self)], sort_keys=True)

    def _eos(self, spec: SequenceSpec) -> list[int]:
        if not self.append_eos:
            return []
        if spec.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token", where="append_eos", cure="set `append_eos: false`"
            )
        return [int(spec.tokenizer.eos_token_id)]

    def _clip(self, clip: Clip) -> Clip:
        return np.zeros_like(decoded(clip)) if self.control == "muted" else clip

    def _check_encoded(self, utterance: Utterance, spec: SequenceSpec) -> None:
        """Refuse pre-encoded speech that is not what this run's encoder would make of the audio."""
        encoded = utterance.encoded
        if encoded is None:
            return
        if encoded.by != spec.encoder:
            raise UserError(
                f"the speech was encoded by {encoded.by}, and this run's encoder is {spec.encoder}",
                where=utterance.where,
                cure="encode the shards again with this run's encoder, or train from their audio",
            )
        if len(encoded.data) != spec.num_frames(encoded.num_samples):
            raise UserError(
                f"{len(encoded.data)} frames are stored, {spec.num_frames(encoded.num_samples)} belong to the audio",
                where=utterance.where,
                cure="encode the shards again",
            )
        if self.control == "muted":
            raise UserError(
                "pre-encoded speech cannot be muted", where=utterance.where, cure="use shards of audio for controls"
            )


def bos_ids(spec: SequenceSpec) -> list[int]:
    """The token every document begins with, or nothing."""
    bos = bos_id(spec.tokenizer)
    return [] if bos is None else [bos]
