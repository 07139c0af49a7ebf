"""A small causal convolutional encoder that can be trained on a laptop."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from salad_lightning.encoders._audio import causal_log_mel, ceil_div, fit_samples, samples_per_frame, zero_beyond
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["CausalConvEncoder"]

_MODEL_TYPE = "salad_causal_conv"
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True)
class _Config:
    sample_rate_hz: int = 16_000
    num_mels: int = 80
    mel_rate_hz: float = 100.0
    strides: tuple[int, ...] = (2, 2, 2)
    width: int = 128
    kernel_size: int = 5
    num_blocks: int = 2

    def __post_init__(self) -> None:
        samples_per_frame(self.sample_rate_hz, self.mel_rate_hz)  # raises where the rates do not fit
        if self.kernel_size < max(self.strides, default=1):
            raise ValueError(f"kernel_size {self.kernel_size} is below the largest of the strides {self.strides}")


class _CausalConv(nn.Conv1d):
    """Convolution whose output ``u`` sees inputs before ``(u + 1) * stride`` only."""

    def forward(self, input: Tensor) -> Tensor:
        reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        return super().forward(nn.functional.pad(input, (reach - self.stride[0], 0)))


class _Block(nn.Module):
    """Causal convolution, normalisation of each frame by itself, GELU; a residual where the shape stays."""

    def __init__(self, in_dim: int, dim: int, *, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = _CausalConv(in_dim, dim, kernel_size, stride=stride, dilation=dilation)
        self.norm = nn.LayerNorm(dim)
        self.residual = stride == 1 and in_dim == dim

    def forward(self, frames_NTD: Tensor) -> Tensor:
        hidden = self.conv(frames_NTD.transpose(1, 2)).transpose(1, 2)
        hidden = nn.functional.gelu(self.norm(hidden))
        return frames_NTD + hidden if self.residual else hidden


class CausalConvEncoder(Encoder):
    """Strided causal convolutions over causal log-mel features; the last hidden layer is the output.

    By default 16 kHz audio, 80 mel bands at 100 Hz, three convolutions of stride 2 and two residual convolutions with
    growing dilation: 12.5 frames a second of width 128 that reach 1.3 s back. Clips are completed with silence to
    whole frames; causality then makes padding harmless.

    Train one with `from_config`, `features` and `save_pretrained`; load it, frozen, by its folder.

    Args:
        path: Folder with ``config.json`` and ``model.safetensors``, as `save_pretrained` writes it.

    Raises:
        UserError: If the folder or one of its files is missing or does not hold such an encoder.
    """

    causal = True

    def __init__(self, path: str) -> None:
        super().__init__()
        folder = Path(path).expanduser()
        self._build(_read_config(folder))
        self._load(folder / _WEIGHTS_FILE)
        self.requires_grad_(False)

    @classmethod
    def from_config(
        cls,
        *,
        sample_rate_hz: int = 16_000,
        num_mels: int = 80,
        mel_rate_hz: float = 100.0,
        strides: Sequence[int] = (2, 2, 2),
        width: int = 128,
        kernel_size: int = 5,
        num_blocks: int = 2,
    ) -> CausalConvEncoder:
        """A new encoder with random, trainable weights.

        Args:
            sample_rate_hz: Rate of the audio.
            num_mels: Mel bands.
            mel_rate_hz: Mel frames a second; must divide the sample rate.
            strides: One strided convolution each; ``frame_rate_hz`` is ``mel_rate_hz`` over their product.
            width: Width of every layer and of the output.
            kernel_size: Taps of every convolution, at least the largest stride.
            num_blocks: Residual convolutions at the final rate, dilated by 1, 2, 4 …

        Raises:
            ValueError: If sizes do not fit together.
        """
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._build(
            _Config(sample_rate_hz, num_mels, float(mel_rate_hz), tuple(strides), width, kernel_size, num_blocks)
        )
        return encoder

    def _build(self, config: _Config) -> None:
        total_stride = math.prod(config.strides)
        self._config = config
        self._hop = samples_per_frame(config.sample_rate_hz, config.mel_rate_hz)
        self._samples_per_frame = self._hop * total_stride
        self.sample_rate_hz, self.frame_rate_hz = config.sample_rate_hz, config.mel_rate_hz / total_stride
        self.output_dim, self.num_layers = config.width, 1
        dims = [config.num_mels] + [config.width] * (len(config.strides) + config.num_blocks)
        steps = [(stride, 1) for stride in config.strides] + [(1, 2**index) for index in range(config.num_blocks)]
        blocks = [
            _Block(in_dim, config.width, kernel_size=config.kernel_size, stride=stride, dilation=dilation)
            for in_dim, (stride, dilation) in zip(dims[:-1], steps, strict=True)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.eval()

    def _load(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(
                "the encoder's folder holds no weights", where=str(file), cure="save the trained encoder there again"
            )
        try:
            self.load_state_dict(load_file(file))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(
                f"the weights do not fit the encoder's {_CONFIG_FILE} ({error})",
                where=str(file),
                cure="save the trained encoder there again",
            ) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, which the constructor reads.

        Args:
            folder: Made where missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model_type": _MODEL_TYPE, **asdict(self._config)}, indent=2)
        (folder / _CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS_FILE)

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Whole frames that cover ``num_samples``."""
        return ceil_div(num_samples, self._samples_per_frame)

    def log_mel(self, audio_NL: Tensor, lengths_N: Tensor) -> Tensor:
        """What the convolutions (``blocks``) see, which no training changes.

        Args:
            audio_NL: float audio in [-1, 1].
            lengths_N: Samples.

        Returns:
            ``[N, T, num_mels]``, completed with silence to whole frames.
        """
        num_samples = self.output_lengths(audio_NL.shape[1]) * self._samples_per_frame
        audio_NL = fit_samples(audio_NL, lengths_N, num_samples)
        return causal_log_mel(
            audio_NL, sample_rate_hz=self.sample_rate_hz, num_mels=self._config.num_mels, hop=self._hop
        )

    def features(self, audio_NL: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
        """Frames with gradient, for training the encoder itself.

        Args:
            audio_NL: float audio in [-1, 1].
            lengths_N: Samples.

        Returns:
            ``[N, T, width]`` frames, zero beyond each length, and ``[N]`` their lengths.
        """
        num_frames_N = self.output_lengths(lengths_N)
        frames_NTD = self.blocks(self.log_mel(audio_NL, lengths_N).to(next(self.parameters()).dtype))
        return zero_beyond(frames_NTD, num_frames_N), num_frames_N

    @torch.no_grad()
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """`features` without gradient."""
        return Stored(*self.features(audio_NL, lengths_N))

    def embed(self, stored: Stored) -> EncoderOutput:
        """The same frames as one layer, ``[N, T, 1, width]``."""
        return EncoderOutput(stored.data.unsqueeze(2), stored.lengths)


def _read_config(folder: Path) -> _Config:
    file = folder / _CONFIG_FILE
    cure = "give the folder that CausalConvEncoder.save_pretrained wrote"
    if not file.is_file():
        what = "the encoder's folder is not there" if not folder.is_dir() else f"the folder holds no {_CONFIG_FILE}"
        raise UserError(what, where=str(folder), cure=cure)
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        model_type = values.pop("model_type", None)
        if model_type != _MODEL_TYPE:
            raise UserError(f"model_type is {model_type!r}, not {_MODEL_TYPE!r}", where=str(file), cure=cure)
        return _Config(**{**values, "strides": tuple(values["strides"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"not a configuration of this encoder ({error})", where=str(file), cure=cure) from error
