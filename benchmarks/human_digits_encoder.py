"""The benchmark's frozen encoder: convolutions over a log-mel picture of which each band's own mean is taken.

Taking the mean of every band over the clip takes away microphone and room, which a few hours of few speakers cannot
teach a network to ignore. It needs the whole clip, so the encoder is not causal, and every span is encoded alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
import torchaudio
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["NUM_BINS", "ClipConvEncoder", "filter_bank", "power_frames"]

_SAMPLE_RATE_HZ, _HOP, _WINDOW, _NUM_FFT = 16_000, 160, 400, 512
NUM_BINS = _NUM_FFT // 2 + 1
_NUM_MELS, _BAND_HZ = 40, (80.0, 3800.0)  # the recordings hold nothing above 4 kHz
_DYNAMIC_RANGE = 12.0  # nats below the loudest point: what is fainter is the room
_CHANNELS, _STRIDES = (16, 32, 48, 64, 96), ((1, 2), (2, 2), (1, 1), (2, 2), (2, 1))  # time, frequency
_DOWN = 8
_WIDTH = 128


def filter_bank(warp: float = 1.0) -> Tensor:
    """``[bins, mels]`` triangles; ``warp`` above 1 reads a spectrum as if all its frequencies were that much higher."""
    low, high = _BAND_HZ
    return torchaudio.functional.melscale_fbanks(
        NUM_BINS, low / warp, min(high / warp, _SAMPLE_RATE_HZ / 2), _NUM_MELS, _SAMPLE_RATE_HZ
    )


def power_frames(audio_NL: Tensor) -> Tensor:
    """``[N, L]`` → ``[N, ceil(L / hop), bins]`` power spectra at 100 Hz; frame ``t`` begins at its hop."""
    padded = F.pad(audio_NL, (0, -audio_NL.shape[1] % _HOP + _WINDOW - _HOP))
    frames = padded.unfold(1, _WINDOW, _HOP) * torch.hann_window(_WINDOW, device=audio_NL.device)
    return torch.fft.rfft(frames, _NUM_FFT).abs().square()


class ClipConvEncoder(Encoder):
    """12.5 frames a second of width 128.

    Args:
        path: Folder written by `save_pretrained`; None gives random, trainable weights.

    Raises:
        UserError: If the folder holds no weights.
    """

    causal = False
    sample_rate_hz = _SAMPLE_RATE_HZ
    frame_rate_hz = _SAMPLE_RATE_HZ / (_HOP * _DOWN)
    output_dim = _WIDTH
    num_layers = 1

    def __init__(self, path: str | None = None) -> None:
        super().__init__()
        widths = (1, *_CHANNELS)
        self.picture = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(i, o, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(o)])
            for i, o, stride in zip(widths[:-1], widths[1:], _STRIDES, strict=True)
        )
        self.project = nn.Linear(_CHANNELS[-1] * _NUM_MELS // 8, _WIDTH)
        self.context = nn.ModuleList(
            nn.ModuleList([nn.Conv1d(_WIDTH, _WIDTH, 5, padding=2, bias=False), nn.BatchNorm1d(_WIDTH)])
            for _ in range(2)
        )
        self.register_buffer("bank", filter_bank(), persistent=False)
        if path is not None:
            file = Path(path) / "model.safetensors"
            if not file.is_file():
                raise UserError("the folder holds no weights of this encoder", where=str(file))
            self.load_state_dict(load_file(file))
            self.requires_grad_(False).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and, for people, ``config.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"model_type": "human_digits_clip_conv"}))

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Whole frames that cover ``num_samples``."""
        return (num_samples + _HOP * _DOWN - 1) // (_HOP * _DOWN)

    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """As `Encoder.encode`."""
        with torch.no_grad():
            lengths = (lengths_N + _HOP - 1) // _HOP
            audio_NL = audio_NL * (torch.arange(audio_NL.shape[1], device=audio_NL.device) < lengths_N[:, None])
            mel = power_frames(audio_NL) @ self.bank
            return Stored(self.frames(self.normalise(mel, lengths), lengths), self.output_lengths(lengths_N))

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames as one layer."""
        return EncoderOutput(stored.data.unsqueeze(2), stored.lengths)

    @staticmethod
    def normalise(mel_NTB: Tensor, lengths_N: Tensor) -> Tensor:
        """Mel power to its logarithm, less each band's mean, at unit variance; zero beyond the lengths."""
        valid = (torch.arange(mel_NTB.shape[1], device=mel_NTB.device) < lengths_N[:, None]).unsqueeze(-1)
        count = lengths_N[:, None, None].clamp(min=1)
        log = torch.log(mel_NTB + 1e-9)
        loudest = log.masked_fill(~valid, -torch.inf).amax((1, 2), keepdim=True)
        log = torch.maximum(log, loudest - _DYNAMIC_RANGE)
        log = (log - (log * valid).sum(1, keepdim=True) / count) * valid
        spread = (log.square().sum((1, 2), keepdim=True) / (count * log.shape[2])).sqrt()
        return log / (spread + 1e-3)

    def frames(self, log_NTB: Tensor, lengths_N: Tensor) -> Tensor:
        """``[N, T', 128]``, with gradient, from `normalise`; padding changes nothing, for each layer's is zero."""
        hidden = log_NTB.unsqueeze(1)
        lengths = lengths_N
        for (convolution, norm), (stride, _) in zip(self.picture, _STRIDES, strict=True):
            lengths = (lengths + stride - 1) // stride
            hidden = F.relu(norm(convolution(hidden)))
            hidden = hidden * _mask(lengths, hidden.shape[2])[:, None, :, None]
        rows = F.relu(self.project(hidden.transpose(1, 2).flatten(2))).transpose(1, 2)
        mask = _mask(lengths, rows.shape[2])[:, None]
        for convolution, norm in self.context:
            rows = rows * mask + F.relu(norm(convolution(rows * mask)))
        return (rows * mask).transpose(1, 2)

    def train(self, mode: bool = True) -> ClipConvEncoder:
        """Frozen once loaded; trainable as long as its weights are."""
        nn.Module.train(self, mode and self.project.weight.requires_grad)
        return self


def _mask(lengths_N: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths_N.device) < lengths_N[:, None]
