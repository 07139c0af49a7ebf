"""Log-mel features: an encoder without parameters."""

from __future__ import annotations

from torch import Tensor

from salad_lightning.encoders._audio import causal_log_mel, ceil_div, fit_samples, samples_per_frame, zero_beyond
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["LogMelEncoder"]


class LogMelEncoder(Encoder):
    """Causal log-mel features, one layer of ``num_mels`` values a frame.

    Each frame is a 25 ms window that ends at the frame's end, so that speech spans can be cut out of a whole
    utterance. Scaling is fixed, so that a frame does not depend on the rest of the clip. A clip's last, partial frame
    is completed with silence.

    Args:
        sample_rate_hz: Rate of the audio.
        num_mels: Mel bands from 0 Hz to half the sample rate.
        frame_rate_hz: Frames a second; must divide the sample rate.

    Raises:
        UserError: If a frame is not a whole number of samples, or there is no mel.
    """

    causal = True

    def __init__(self, sample_rate_hz: int = 16_000, num_mels: int = 80, frame_rate_hz: float = 100.0) -> None:
        super().__init__()
        if num_mels < 1:
            raise UserError(f"num_mels is {num_mels}", where="LogMelEncoder", cure="give 1 or more, such as 80")
        self.sample_rate_hz, self.frame_rate_hz = sample_rate_hz, float(frame_rate_hz)
        self.output_dim, self.num_layers = num_mels, 1
        try:
            self._hop = samples_per_frame(sample_rate_hz, frame_rate_hz)
        except ValueError as error:
            raise UserError(
                str(error), where="LogMelEncoder.frame_rate_hz", cure="choose a rate that divides it, such as 100"
            ) from error
        self.eval()

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """``num_samples / hop``, rounded up."""
        return ceil_div(num_samples, self._hop)

    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Log-mel frames ``[N, T, num_mels]``."""
        num_frames_N = self.output_lengths(lengths_N)
        audio_NL = fit_samples(audio_NL, lengths_N, self.output_lengths(audio_NL.shape[1]) * self._hop)
        frames_NTD = causal_log_mel(
            audio_NL, sample_rate_hz=self.sample_rate_hz, num_mels=self.output_dim, hop=self._hop
        )
        return Stored(zero_beyond(frames_NTD, num_frames_N), num_frames_N)

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames as one layer, ``[N, T, 1, num_mels]``."""
        return EncoderOutput(stored.data.unsqueeze(2), stored.lengths)
