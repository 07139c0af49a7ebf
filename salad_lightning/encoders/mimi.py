"""The Mimi codec's encoder."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiEuclideanCodebook

from salad_lightning.encoders._audio import ceil_div, fit_samples, samples_per_frame, zero_beyond
from salad_lightning.encoders._loading import load_config, load_frozen
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Encoder, EncoderOutput, LengthT, Stored

__all__ = ["MimiEncoder"]


class MimiEncoder(Encoder):
    """Mimi (arXiv 2410.00037): 24 kHz audio to residual codes at 12.5 frames a second, causal.

    `encode` gives the codes ``[N, T, num_quantizers]``; `embed` looks them up. A clip is completed with silence to
    whole frames, so that Hugging Face's right padding of partial frames never comes into play; causality then makes
    padding harmless.

    Args:
        path: Folder or Hugging Face name, such as ``kyutai/mimi``.
        input: What the connector reads. ``latents``: one layer, the dequantised sum of the codebooks, which is what
            Mimi's decoder reads. ``codes``: one layer for each codebook, its code's vector in the same latent space;
            the layers add up to the latents, and the model's trained layer mix weighs semantic against acoustic
            codebooks.
        num_quantizers: Codebooks used, the semantic one first.

    Raises:
        UserError: If the model cannot be loaded, is not causal, or has fewer codebooks.
    """

    causal = True

    def __init__(self, path: str, input: Literal["latents", "codes"] = "latents", num_quantizers: int = 8) -> None:
        super().__init__()
        path, config = load_config(path, ["mimi"])
        if not config.use_causal_conv:
            raise UserError("this Mimi is not causal (use_causal_conv is false)", where=path, cure="give a causal one")
        if not config.num_semantic_quantizers <= num_quantizers <= config.num_quantizers:
            raise UserError(
                f"the model has {config.num_quantizers} codebooks ({config.num_semantic_quantizers} semantic), "
                f"not {num_quantizers}",
                where="MimiEncoder.num_quantizers",
                cure=f"choose {config.num_semantic_quantizers} to {config.num_quantizers}",
            )
        self.sample_rate_hz, self.frame_rate_hz = config.sampling_rate, float(config.frame_rate)
        self.output_dim = config.hidden_size
        self.num_layers = num_quantizers if input == "codes" else 1
        self._input, self._num_quantizers = input, num_quantizers
        self._samples_per_frame = samples_per_frame(config.sampling_rate, config.frame_rate)
        self.model: Any = load_frozen(MimiModel, path, config, not_needed=r"^(decoder|decoder_transformer|upsample)\.")
        for name in {"decoder", "decoder_transformer", "upsample"} & set(self.model._modules):
            setattr(self.model, name, None)  # half of the weights, never used
        for module in self.model.modules():
            if type(module) is MimiConv1d:
                module.__class__ = _Conv1d  # in place: parameters keep their identity and names
        self.eval()

    def output_lengths(self, num_samples: LengthT) -> LengthT:
        """Whole frames that cover ``num_samples``."""
        return ceil_div(num_samples, self._samples_per_frame)

    @torch.no_grad()
    def encode(self, audio_NL: Tensor, lengths_N: Tensor) -> Stored:
        """Codes ``[N, T, num_quantizers]``, int64."""
        num_frames_N = self.output_lengths(lengths_N)
        audio_NL = fit_samples(audio_NL, lengths_N, self.output_lengths(audio_NL.shape[1]) * self._samples_per_frame)
        audio_NL = audio_NL.to(next(self.model.parameters()).dtype)
        codes_NQT = self.model.encode(
            audio_NL.unsqueeze(1), num_quantizers=self._num_quantizers, use_streaming=False, return_dict=True
        ).audio_codes
        return Stored(zero_beyond(codes_NQT.transpose(1, 2), num_frames_N), num_frames_N)

    def embed(self, stored: Stored) -> EncoderOutput:
        """Latents ``[N, T, 1, D]`` or one vector a codebook ``[N, T, num_quantizers, D]``."""
        codes_NTQ = stored.data.long()
        semantic, acoustic = (
            self.model.quantizer.semantic_residual_vector_quantizer,
            self.model.quantizer.acoustic_residual_vector_quantizer,
        )
        num_semantic = self.model.quantizer.num_semantic_quantizers
        parts = [self._vectors(semantic, codes_NTQ[..., :num_semantic])]
        if codes_NTQ.shape[-1] > num_semantic:
            parts.append(self._vectors(acoustic, codes_NTQ[..., num_semantic:]))
        frames_NTKD = torch.cat(parts, dim=2)
        if self._input == "latents":
            frames_NTKD = frames_NTKD.sum(2, keepdim=True)
        return EncoderOutput(zero_beyond(frames_NTKD, stored.lengths), stored.lengths)

    def settings(self) -> dict[str, object]:
        """See `Encoder.settings`; ``input`` changes only how stored codes are read."""
        return {"sample_rate_hz": self.sample_rate_hz, "num_quantizers": self._num_quantizers}

    def _vectors(self, quantizer: Any, codes_NTQ: Tensor) -> Tensor:
        """``[N, T, Q, D]``; for latents ``[N, T, 1, D]``, summed before the projection, which is linear."""
        codebooks = [layer.codebook for layer in quantizer.layers[: codes_NTQ.shape[-1]]]
        vectors = torch.stack([codebook.decode(codes_NTQ[..., q]) for q, codebook in enumerate(codebooks)], dim=2)
        if self._input == "latents":
            vectors = vectors.sum(2, keepdim=True)
        if quantizer.output_proj is None:
            return vectors
        return nn.functional.linear(vectors, quantizer.output_proj.weight[..., 0])

    def _apply(self, *args: Any, **kwargs: Any) -> MimiEncoder:
        # transformers caches each codebook in a plain attribute, which would stay behind on the old device.
        super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        for module in self.modules():
            if isinstance(module, MimiEuclideanCodebook):
                module._embed = None
        return self


class _Conv1d(MimiConv1d):
    """The same convolution, padded by numbers that the host knows.

    Those of transformers are tensors on the device, and each layer reads them back: 30 waits for a GPU in a step.
    """

    def forward(self, hidden_states: Tensor, padding_cache: Any = None) -> Any:
        if padding_cache is not None:
            return super().forward(hidden_states, padding_cache)  # type: ignore[no-untyped-call]
        (kernel,), (stride,), (dilation,) = self.conv.kernel_size, self.conv.stride, self.conv.dilation
        before, after = (kernel - 1) * dilation + 1 - stride, -hidden_states.shape[-1] % stride
        return self.conv(self._pad1d(hidden_states, (before, after), mode=self.pad_mode))
