"""An exported model ready for use: give it audio and a prompt, get text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

from salad_lightning.data.segments import Document
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.export.modeling import SaladForConditionalGeneration
from salad_lightning.export.processor import SaladProcessor
from salad_lightning.model.generation import Decoding, generate, prompt_document

__all__ = ["SpeechLanguageModel", "load_pretrained"]


class SpeechLanguageModel:
    """A model with its processor.

    Args:
        model: In eval mode.
        processor: Of the same export.

    Attributes:
        spec: What building prompts must know of the model.
    """

    def __init__(self, model: SaladForConditionalGeneration, processor: SaladProcessor) -> None:
        self.model, self.processor = model, processor
        config, parts = model.config, model.speech_llm
        self.spec = SequenceSpec.of_parts(
            processor.tokenizer,
            config.context,
            encoder=parts.encoder,
            connector=parts.connector,
            switch_embeddings=config.switch_embeddings,
            identity=config.encoder_identity,
        )

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> SpeechLanguageModel:
        """See `load_pretrained`."""
        model = SaladForConditionalGeneration.from_pretrained(path, dtype=dtype)
        torch.nn.Module.to(model, torch.device(device))  # transformers' own `to` has no usable type
        return cls(model, SaladProcessor.from_pretrained(path))

    def prepare(
        self,
        prompt: str = "{speech}",
        audio: str | Path | NDArray[Any] | None = None,
        *,
        sampling_rate: int | None = None,
        fields: dict[str, Any] | None = None,
        max_new_tokens: int = 64,
    ) -> Document:
        """A prompt with its audio, for `complete`.

        Args:
            prompt: Text with ``{speech}`` where the audio is heard.
            audio: As `SaladProcessor` takes it; None for a prompt of text alone.
            sampling_rate: Hertz, where ``audio`` is samples.
            fields: Values for further ``{names}``; ``text`` is read in the place of ``{speech}`` without audio.
            max_new_tokens: Positions to leave free.

        Raises:
            UserError: If the audio or the prompt cannot be used, or they are longer than the context.
        """
        rest = dict(fields or {})
        text = str(rest.pop("text", ""))
        utterance = self.processor(audio, sampling_rate=sampling_rate, text=text, fields=rest)
        return prompt_document(prompt, utterance, self.spec, max_new_tokens=max_new_tokens)

    def complete(
        self, documents: Sequence[Document], decoding: Decoding, *, streamer: BaseStreamer | None = None
    ) -> list[str]:
        """Continue a batch of what `prepare` gave.

        Args:
            documents: One batch.
            decoding: How tokens are chosen.
            streamer: Is given every token as it comes; for a single document.
        """
        tokens = generate(
            self.model.speech_llm, documents, decoding, tokenizer=self.processor.tokenizer, streamer=streamer
        )
        return [self.processor.decode(row) for row in tokens]

    def generate(
        self,
        audio: str | Path | NDArray[Any] | None = None,
        prompt: str = "{speech}",
        *,
        sampling_rate: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        streamer: BaseStreamer | None = None,
    ) -> str:
        """Text that follows the prompt; arguments as of `prepare` and `Decoding`.

        Raises:
            UserError: As `prepare`.
        """
        document = self.prepare(prompt, audio, sampling_rate=sampling_rate, max_new_tokens=max_new_tokens)
        (text,) = self.complete([document], Decoding(max_new_tokens, temperature, top_p), streamer=streamer)
        return text


def load_pretrained(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> SpeechLanguageModel:
    """Load what ``salad-lightning export`` wrote.

    Args:
        path: Folder or hub name.
        dtype: Of the language model; connector and encoder are fp32.
        device: Where to run.

    Raises:
        UserError: If a file is missing, damaged or of a newer version, or a part cannot be built.
    """
    return SpeechLanguageModel.from_pretrained(path, dtype=dtype, device=device)
