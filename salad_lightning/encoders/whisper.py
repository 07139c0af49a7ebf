"""Whisper's encoder, without its forced 30 seconds."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import WhisperModel

from salad_lightning.encoders._audio import ceil_div, fit_samples, valid_mask, window_and_filters, zero_beyond
from salad_lightning.encoders._loading import load_config, load_frozen
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["WhisperEncoder"]

_SAMPLE_RATE_HZ, _HOP, _WINDOW = 16_000, 160, 400
_SAMPLES_PER_FRAME = 2 * _HOP  # the second convolution has stride 2


class WhisperEncoder(Encoder):
    """The encoder of Whisper (arXiv 2212.04356): 16 kHz audio, 50 frames a second, hears the whole clip.

    Whisper pads every clip to 30 s. Here the log-mel features (those that Hugging Face computes) are cut to the clip,
    the positions with them, and attention is confined to the clip; at 30 s nothing is cut and the output is Hugging
    Face's.

    Args:
        path: Folder or Hugging Face name, such as ``openai/whisper-small``.
        layers: ``last``: the normalised output, one layer. ``all``: what Hugging Face calls hidden states, that is the
            input of each Transformer layer and the normalised output.
        dtype: Of weights and products. ``bfloat16`` takes a fraction of the time on a GPU; its frames differ from those
            of ``float32`` by one or two per cent, and shards encoded by the one are refused by the other.

    Raises:
        UserError: If the model cannot be loaded.
    """

    causal = False

    def __init__(
        self,
        path: str,
        layers: Literal["last", "all"] = "last",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        path, config = load_config(path, ["whisper"])
        self.sample_rate_hz, self.frame_rate_hz = _SAMPLE_RATE_HZ, _SAMPLE_RATE_HZ / _SAMPLES_PER_FRAME
        self.output_dim = config.d_model
        self.num_layers = config.encoder_layers + 1 if layers == "all" else 1
        self._num_mels, self._max_frames = config.num_mel_bins, config.max_source_positions
        model = load_frozen(WhisperModel, path, config, not_needed=r"^decoder\.|^proj_out\.", dtype=dtype)
        self.encoder: Any = model.encoder
        self.eval()

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """``num_samples / 320``, rounded up."""
        return ceil_div(num_samples, _SAMPLES_PER_FRAME)

    @torch.no_grad()
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Frames ``[N, T, K, D]``.

        Raises:
            UserError: If a clip is longer than the model's positions (30 s).
        """
        num_frames_N = self.output_lengths(lengths_N)
        num_frames = self.output_lengths(audio_NL.shape[1])
        if num_frames > self._max_frames:
            raise UserError(
                f"a clip of {num_frames / self.frame_rate_hz:.1f} s is longer than the "
                f"{self._max_frames / self.frame_rate_hz:g} s that Whisper has positions for",
                where="WhisperEncoder",
                cure="cut the audio into shorter clips or spans, or choose another encoder",
            )
        mel_NDT = zero_beyond(self.log_mel(audio_NL, lengths_N), 2 * num_frames_N).transpose(1, 2)
        hidden_NTD = self._embed_mel(mel_NDT.to(self.encoder.conv1.weight.dtype))
        mask = _attention_mask(num_frames_N, hidden_NTD)
        hidden_states = [hidden_NTD]
        for layer in self.encoder.layers:
            hidden_states.append(layer(hidden_states[-1], mask))
        hidden_states[-1] = self.encoder.layer_norm(hidden_states[-1])
        frames_NTKD = torch.stack(hidden_states[-self.num_layers :], dim=2)
        return Stored(zero_beyond(frames_NTKD, num_frames_N), num_frames_N)

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames."""
        return EncoderOutput(stored.data, stored.lengths)

    def log_mel(self, audio_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """Hugging Face's ``WhisperFeatureExtractor`` on the part of the 30 s that a clip fills.

        Args:
            audio_NL: float audio in [-1, 1].
            lengths_N: Samples.

        Returns:
            ``[N, 2 * T, num_mel_bins]`` at 100 Hz for the T frames of the longest clip. Beyond a clip's own frames:
            the values of silence.
        """
        num_frames = 2 * self.output_lengths(audio_NL.shape[1])
        # Two frames past the end still overlap the clip and can hold its maximum.
        num_heard = min(num_frames + 2, 2 * self._max_frames)
        audio_NL = fit_samples(audio_NL, lengths_N, min(num_heard + 2, 2 * self._max_frames) * _HOP)
        # Every frame is centred on its start. Hugging Face reflects the ends of the 30 s, not of the clip.
        window, filters = window_and_filters(self.sample_rate_hz, self._num_mels, audio_NL.device)
        padded = nn.functional.pad(audio_NL, (_WINDOW // 2, _WINDOW // 2), mode="reflect")
        with torch.autocast(audio_NL.device.type, enabled=False):
            spectrum = torch.fft.rfft(padded.unfold(1, _WINDOW, _HOP)[:, :num_heard] * window)
            log_mel_NTD = (spectrum.abs().square() @ filters).clamp(min=1e-10).log10()
        # Beyond a clip is silence, the least value, so the maximum over the padded row is the clip's own.
        loudest_N = log_mel_NTD.amax((1, 2), keepdim=True)
        return torch.maximum(log_mel_NTD, loudest_N - 8.0)[:, :num_frames] / 4 + 1

    def _embed_mel(self, mel_NDT: Tensor) -> Tensor:
        """The two convolutions and the positions, as far as the clips reach."""
        hidden_NDT = nn.functional.gelu(self.encoder.conv1(mel_NDT))
        hidden_NTD = nn.functional.gelu(self.encoder.conv2(hidden_NDT)).transpose(1, 2)
        positions: Tensor = self.encoder.embed_positions.weight
        return hidden_NTD + positions[: hidden_NTD.shape[1]]


def _attention_mask(num_frames_N: Tensor, hidden_NTD: Tensor) -> Tensor:
    """What Hugging Face's attention adds to the scores, ``[N, 1, T, T]``."""
    mask_NT = valid_mask(num_frames_N, hidden_NTD.shape[1])
    scores = torch.zeros_like(mask_NT, dtype=hidden_NTD.dtype)
    scores = scores.masked_fill(~mask_NT, torch.finfo(hidden_NTD.dtype).min)
    return scores[:, None, None, :].expand(-1, 1, hidden_NTD.shape[1], -1)
