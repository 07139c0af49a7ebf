"""Two encoders hear the same audio, and their frames are joined."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["DualEncoder"]


class DualEncoder(Encoder):
    """Frames of two encoders, each normalised to zero mean and unit variance, side by side at one frame rate.

    SALMONN (arXiv 2310.13289, section 3.1) joins Whisper, which hears words, with BEATs, which hears everything else:
    both give 50 frames a second, each is layer-normalised, the shorter is padded. Here any two encoders will do whose
    frame rates are a whole multiple of each other: the common rate is the lower one, and the frames of the faster one
    that fall into a common frame stand side by side. An encoder for audio of a lower rate is given resampled audio.

    Args:
        first: Any encoder, such as WhisperEncoder.
        second: Any other.

    Raises:
        UserError: If the frame rates do not fit, or both offer several layers and not equally many. (An encoder that
            offers one layer joins every layer of the other.)
    """

    def __init__(self, first: Encoder, second: Encoder) -> None:
        super().__init__()
        self.first, self.second = first, second
        rates = [part.frame_rate_hz for part in (first, second)]
        self.frame_rate_hz = min(rates)
        self._stacks = [round(rate / self.frame_rate_hz) for rate in rates]
        if any(abs(rate - stack * self.frame_rate_hz) > 1e-6 for rate, stack in zip(rates, self._stacks, strict=True)):
            raise UserError(
                f"{rates[0]:g} and {rates[1]:g} frames a second do not fit each other",
                where="DualEncoder",
                cure="choose encoders of which one gives a whole multiple of the other's frames",
            )
        layers = {part.num_layers for part in (first, second)} - {1}
        if len(layers) > 1:
            raise UserError(
                f"the encoders offer {first.num_layers} and {second.num_layers} layers",
                where="DualEncoder",
                cure="set `layers: last` of one of them",
            )
        self.num_layers = max(layers, default=1)
        self.sample_rate_hz = max(first.sample_rate_hz, second.sample_rate_hz)
        # A resampling filter hears a little of what follows.
        self.causal = first.causal and second.causal and first.sample_rate_hz == second.sample_rate_hz
        self.output_dim = sum(
            stack * part.output_dim for stack, part in zip(self._stacks, (first, second), strict=True)
        )
        self.eval().requires_grad_(False)

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Those of the encoder that gives more; the other's missing frames are zero."""
        lengths = [
            (part.output_lengths(self._samples(part, num_samples)) + stack - 1) // stack
            for part, stack in zip((self.first, self.second), self._stacks, strict=True)
        ]
        if isinstance(lengths[0], Tensor):
            return torch.maximum(*lengths)
        return max(lengths)

    @torch.no_grad()
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Frames ``[N, T, K, D]`` of both.

        Raises:
            UserError: As the encoders do.
        """
        num_frames_N = self.output_lengths(lengths_N)
        num_frames = self.output_lengths(audio_NL.shape[1])
        joined = [
            self._frames(part, stack, audio_NL, lengths_N, num_frames)
            for part, stack in zip((self.first, self.second), self._stacks, strict=True)
        ]
        return Stored(torch.cat(joined, dim=-1), num_frames_N)

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames."""
        return EncoderOutput(stored.data, stored.lengths)

    def settings(self) -> dict[str, object]:
        """Those of both encoders decide too."""
        parts = {name: [type(part).__name__, sorted(part.settings().items())] for name, part in self.named_children()
                 if isinstance(part, Encoder)}  # fmt: skip
        return super().settings() | parts

    def _samples(self, part: Encoder, num_samples: LengthT) -> LengthT:
        """``num_samples`` at the part's rate, rounded up as torchaudio does."""
        return -(-num_samples * part.sample_rate_hz // self.sample_rate_hz)

    def _frames(self, part: Encoder, stack: int, audio_NL: Tensor, lengths_N: Tensor, num_frames: int) -> Tensor:
        """One encoder's frames at the common rate: ``[N, T, K, stack * D]``, zero where it has none."""
        if part.sample_rate_hz != self.sample_rate_hz:
            # Whatever stands beyond a clip's end would be heard by the filter at its last samples.
            valid_NL = torch.arange(audio_NL.shape[1], device=lengths_N.device) < lengths_N[:, None]
            audio_NL = resample(audio_NL * valid_NL, self.sample_rate_hz, part.sample_rate_hz)
        frames, lengths_P = part(audio_NL, self._samples(part, lengths_N))
        width = num_frames * stack
        frames = nn.functional.layer_norm(frames.float(), frames.shape[-1:]).to(frames.dtype)
        frames = nn.functional.pad(frames[:, :width], (0, 0, 0, 0, 0, max(width - frames.shape[1], 0)))
        frames = frames * (torch.arange(width, device=lengths_P.device) < lengths_P[:, None])[..., None, None]
        N, _, K, D = frames.shape
        stacked = frames.view(N, num_frames, stack, K, D).transpose(2, 3).reshape(N, num_frames, K, stack * D)
        joined: Tensor = stacked.expand(-1, -1, self.num_layers, -1)
        return joined
