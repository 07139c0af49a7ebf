"""What the encoders share: masks by length and causal log-mel features."""

from __future__ import annotations

import functools

import torch
import torchaudio
from torch import Tensor, nn

from salad_lightning.interfaces import LengthT

__all__ = [
    "causal_log_mel",
    "ceil_div",
    "fit_samples",
    "samples_per_frame",
    "valid_mask",
    "window_and_filters",
    "zero_beyond",
]

_WINDOW_S = 0.025
_FLOOR = 1e-8  # power below it is inaudible; log10 gives -8, which the affine map below turns into -1


def ceil_div(length: LengthT, divisor: int) -> LengthT:
    """``length / divisor`` rounded up, in integers (exact for any length, unlike a float division)."""
    quotient: LengthT = -(-length // divisor)
    return quotient


def samples_per_frame(sample_rate_hz: int, frame_rate_hz: float) -> int:
    """Samples between two frames.

    Raises:
        ValueError: If it is not a whole number: frames would drift against the clock.
    """
    hop = sample_rate_hz / frame_rate_hz
    if hop < 1 or abs(hop - round(hop)) > 1e-6:
        raise ValueError(
            f"frame_rate_hz {frame_rate_hz} does not divide sample_rate_hz {sample_rate_hz} into whole samples"
        )
    return round(hop)


def valid_mask(lengths_N: Tensor, size: int) -> Tensor:
    """``[N, size]``, True before each length."""
    return torch.arange(size, device=lengths_N.device) < lengths_N[:, None]


def zero_beyond(values_NT: Tensor, lengths_N: Tensor) -> Tensor:
    """``[N, T, …]`` with everything at and after each length set to zero, non-finite values included."""
    mask = valid_mask(lengths_N, values_NT.shape[1])
    return values_NT.masked_fill(~mask.view(*mask.shape, *[1] * (values_NT.dim() - 2)), 0)


def fit_samples(audio_NL: Tensor, lengths_N: Tensor, num_samples: int) -> Tensor:
    """Audio as float32 ``[N, num_samples]``, zero at and after each length, cut or zero-padded to ``num_samples``."""
    audio_NL = zero_beyond(audio_NL[:, :num_samples].float(), lengths_N)
    return nn.functional.pad(audio_NL, (0, num_samples - audio_NL.shape[1]))


@functools.lru_cache(maxsize=16)
def window_and_filters(sample_rate_hz: int, num_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A 25 ms Hann window and the mel filters ``[F, num_mels]`` of slaney's scale and norm, cached by device."""
    # Not buffers: a cast of the module to bfloat16 would round them, and a meta-device start would lose them.
    window_samples = round(_WINDOW_S * sample_rate_hz)
    with torch.inference_mode(False), torch.device("cpu"):
        window = torch.hann_window(window_samples)
        filters = torchaudio.functional.melscale_fbanks(
            window_samples // 2 + 1,
            0.0,
            sample_rate_hz / 2,
            num_mels,
            sample_rate_hz,
            norm="slaney",
            mel_scale="slaney",
        )
        return window.to(device), filters.to(device)


def causal_log_mel(audio_NL: Tensor, *, sample_rate_hz: int, num_mels: int, hop: int) -> Tensor:
    """Log-mel frames, each from a 25 ms window that ends where the frame ends.

    Frame ``t`` hears samples before ``(t + 1) * hop`` only. Scaled by a fixed affine map, ``log10(power) / 4 + 1``
    (Whisper's, arXiv 2212.04356, without its clip-wide maximum, which is not causal): silence is -1, loud speech
    about 1.

    Args:
        audio_NL: float32 ``[N, L]``, L a multiple of ``hop``.
        sample_rate_hz: Rate of the audio.
        num_mels: Mel bands up to half the sample rate.
        hop: Samples between frames.

    Returns:
        ``[N, L / hop, num_mels]``.
    """
    window, filters = window_and_filters(sample_rate_hz, num_mels, audio_NL.device)
    size = max(window.shape[0], hop)
    with torch.autocast(audio_NL.device.type, enabled=False):
        padded = nn.functional.pad(audio_NL, (size - hop, 0))
        frames = padded.unfold(1, size, hop)[..., size - window.shape[0] :]
        power = torch.fft.rfft(frames * window).abs().square()
        log_mel_NTD: Tensor = (power @ filters).clamp(min=_FLOOR).log10() / 4 + 1
        return log_mel_NTD
