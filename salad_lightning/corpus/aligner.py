"""When each word of a transcript is spoken, by a CTC model of Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModelForCTC, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

from salad_lightning.corpus.ctc_vocabulary import CtcVocabulary
from salad_lightning.corpus.forced_alignment import align_words
from salad_lightning.corpus.length_batches import length_batches
from salad_lightning.corpus.sound import first_pause
from salad_lightning.encoders._loading import load_config, load_frozen
from salad_lightning.errors import UserError
from salad_lightning.interfaces import TimedWord

__all__ = ["Alignment", "CtcAligner"]

_LONGEST_TAIL_S = 0.5  # of a word after its last letter, where no pause shows its end


class Alignment(NamedTuple):
    """A transcript's words in time.

    Attributes:
        words: The original words; one of which nothing is spoken ("–") is part of the word before it. Empty where
            there is a problem.
        confidences: Mean posterior of each word, 0 to 1; None where the model cannot spell any of it.
        problem: Why there are none; empty where all is well.
    """

    words: list[TimedWord]
    confidences: list[float | None]
    problem: str = ""

    @property
    def confidence(self) -> float:
        """Mean over the words that have one; 0 where none has."""
        known = [confidence for confidence in self.confidences if confidence is not None]
        return float(np.mean(known)) if known else 0.0


class CtcAligner:
    """Aligns with any Hugging Face CTC model that takes audio.

    Models whose first convolution is normalised over time (wav2vec 2.0 base) hear their padding, and clips of models
    that tell no frame counts cannot be told apart in a batch: both take clips one by one. Others take batches.

    Args:
        path: Folder or Hugging Face name.
        device: Where it runs.
        batch_seconds: Padded audio at a time.

    Raises:
        UserError: If the folder holds no complete CTC model with tokenizer and feature extractor.

    Attributes:
        sample_rate_hz: Of the audio it takes.
    """

    def __init__(self, path: str, device: torch.device | str = "cpu", batch_seconds: float = 240.0) -> None:
        path, config = load_config(path, list(MODEL_FOR_CTC_MAPPING_NAMES))
        self._model: Any = load_frozen(AutoModelForCTC, path, config, not_needed=r"masked_spec_embed$").to(device)
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(path)  # type: ignore[no-untyped-call]
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"tokenizer or feature extractor cannot be loaded ({str(error).splitlines()[0]})",
                where=path,
                cure="give the whole model folder, with vocab.json and preprocessor_config.json",
            ) from error
        self.sample_rate_hz = int(self._extractor.sampling_rate)
        self._device, self._batch_samples = device, round(batch_seconds * self.sample_rate_hz)
        blank = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        self._vocabulary = CtcVocabulary(
            tokenizer.get_vocab(), int(blank), getattr(tokenizer, "word_delimiter_token", None)
        )
        self._convolutions: list[tuple[int, int]] = []
        if getattr(config, "feat_extract_norm", "") == "layer" and not getattr(config, "add_adapter", False):
            self._convolutions = list(zip(config.conv_kernel, config.conv_stride, strict=True))

    def align(self, clips: Sequence[NDArray[np.float32]], texts: Sequence[str]) -> list[Alignment]:
        """Align transcripts with their audio.

        Args:
            clips: ``[L]`` each, at ``sample_rate_hz``.
            texts: One for each.
        """
        result: list[Alignment] = [Alignment([], [], "too short for its text")] * len(clips)
        long_enough = [index for index, clip in enumerate(clips) if self._num_frames(len(clip)) >= 1]
        # Without `_convolutions` a clip's frames depend on its padding: one by one.
        most = self._batch_samples if self._convolutions else 0
        for rows in length_batches([len(clips[index]) for index in long_enough], most):
            batch = [long_enough[row] for row in rows]
            for index, emission in zip(batch, self._emissions([clips[index] for index in batch]), strict=True):
                result[index] = self._align(emission, texts[index], clips[index])
        return result

    def _align(self, log_probs_TV: Tensor, text: str, clip: NDArray[np.float32]) -> Alignment:
        words, spelled = self._vocabulary.units(text)
        if not words:
            return Alignment([], [], "nothing in the text is spoken")
        # The tokenizer may have fewer tokens than the model has outputs; the wildcard is the output after the last.
        spelled = [[log_probs_TV.shape[1] if i == self._vocabulary.star else i for i in ids] for ids in spelled]
        places = align_words(
            log_probs_TV, spelled, blank=self._vocabulary.blank, delimiter=self._vocabulary.delimiter
        )  # fmt: skip
        if places is None:
            return Alignment([], [], "too short for its text")
        frame_s = len(clip) / self.sample_rate_hz / len(log_probs_TV)
        starts = [place.first * frame_s for place in places]
        # CTC emits a letter once, where it is first sure, and blanks for the rest of its sound: a word lasts until
        # the next begins or a pause does.
        ends = [place.last * frame_s for place in places]
        latest = [*starts[1:], len(clip) / self.sample_rate_hz]
        spans = [(end, min(limit, end + _LONGEST_TAIL_S)) for end, limit in zip(ends, latest, strict=True)]
        ends = first_pause(clip, self.sample_rate_hz, spans)
        timed = [
            TimedWord(word, round(start, 3), round(end, 3))
            for word, start, end in zip(words, starts, ends, strict=True)
        ]
        return Alignment(timed, [place.confidence for place in places])

    def _num_frames(self, num_samples: int) -> int:
        for kernel, stride in self._convolutions or _front_end(self._model.config):
            num_samples = (num_samples - kernel) // stride + 1
        return num_samples

    @torch.inference_mode()
    def _emissions(self, clips: list[NDArray[np.float32]]) -> list[Tensor]:
        """``[T, V]`` log-probabilities of each clip."""
        # A mask only where there is padding: some models were trained without and must not be given one.
        inputs = self._extractor(
            clips,
            sampling_rate=self.sample_rate_hz,
            padding=True,
            return_tensors="pt",
            return_attention_mask=bool(self._convolutions) or None,
        )
        logits_NTV = self._model(**inputs.to(self._device)).logits
        frames = [self._num_frames(len(clip)) if self._convolutions else logits_NTV.shape[1] for clip in clips]
        return [
            logits_TV[:length].float().log_softmax(dim=-1) for logits_TV, length in zip(logits_NTV, frames, strict=True)
        ]


def _front_end(config: Any) -> list[tuple[int, int]]:
    """Convolutions of a model that takes clips one by one, or 25 ms at 16 kHz where it has others."""
    if hasattr(config, "conv_kernel") and hasattr(config, "conv_stride"):
        return list(zip(config.conv_kernel, config.conv_stride, strict=True))
    return [(400, 320)]
