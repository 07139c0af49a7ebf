"""From audio of any kind to what the encoder takes, and from tokens to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoProcessor, PreTrainedTokenizerFast

from salad_lightning.data.audio import decode_audio, resample
from salad_lightning.data.format import Utterance
from salad_lightning.errors import UserError
from salad_lightning.export.config import SaladConfig
from salad_lightning.export.modeling import LLM_FOLDER, find_export
from salad_lightning.model.llm import load_config, load_tokenizer

__all__ = ["SaladProcessor"]

_FILE = "processor_config.json"


class SaladProcessor:
    """Makes utterances of audio and text.

    Args:
        tokenizer: Of the language model.
        sample_rate_hz: Of the encoder.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sample_rate_hz: int) -> None:
        self.tokenizer, self.sample_rate_hz = tokenizer, sample_rate_hz

    def __call__(
        self,
        audio: str | Path | NDArray[Any] | None = None,
        *,
        sampling_rate: int | None = None,
        text: str = "",
        fields: dict[str, Any] | None = None,
    ) -> Utterance:
        """One utterance.

        Args:
            audio: A file of any format soundfile reads, or samples ``[L]`` or ``[L, channels]``. Channels are averaged.
            sampling_rate: Hertz, for samples.
            text: What is read where there is no audio.
            fields: Values for further ``{names}`` of a prompt.

        Raises:
            UserError: If the audio cannot be read, is empty or is not finite.
            ValueError: If samples have another shape or come without a rate.
        """
        where = str(audio) if isinstance(audio, str | Path) else "audio"
        samples = None
        if isinstance(audio, str | Path):
            try:
                content = Path(audio).expanduser().read_bytes()
            except OSError as error:
                raise UserError(
                    f"the audio cannot be read ({error.strerror})", where=where, cure="check the path"
                ) from error
            samples, _ = decode_audio(content, self.sample_rate_hz, where)
        elif audio is not None:
            samples = self._samples(audio, sampling_rate)
        return Utterance(where, "", text, recording=samples, fields=fields or {})

    def _samples(self, audio: NDArray[Any], sampling_rate: int | None) -> NDArray[np.float32]:
        audio = np.asarray(audio)
        if sampling_rate is None or audio.ndim not in (1, 2) or audio.dtype.kind != "f":
            raise ValueError("give float samples of shape [L] or [L, channels] together with sampling_rate")
        mono = (audio if audio.ndim == 1 else audio.mean(axis=1)).astype(np.float32)
        if not mono.size or not np.isfinite(mono).all():
            raise UserError("the audio is empty, or holds NaN or infinite values", where="audio")
        return mono if sampling_rate == self.sample_rate_hz else resample(mono, sampling_rate, self.sample_rate_hz)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Tokens as text, special tokens left out."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer beside the language model, and ``processor_config.json``.

        Args:
            folder: The export.
        """
        self.tokenizer.save_pretrained(Path(folder) / LLM_FOLDER)
        content = {"processor_class": type(self).__name__, "sample_rate_hz": self.sample_rate_hz}
        (Path(folder) / _FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **_: Any) -> SaladProcessor:
        """The processor of an export.

        Raises:
            UserError: If a file is missing or damaged.
        """
        folder = find_export(pretrained_model_name_or_path)
        llm_folder = str(folder / LLM_FOLDER)
        try:
            rate = int(json.loads((folder / _FILE).read_text(encoding="utf-8"))["sample_rate_hz"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            cure = "write it again with `salad-lightning export`"
            raise UserError(f"the folder holds no usable {_FILE}", where=str(folder), cure=cure) from error
        return cls(load_tokenizer(llm_folder, load_config(llm_folder)), rate)


AutoProcessor.register(SaladConfig, SaladProcessor)  # type: ignore[no-untyped-call]
