"""A Hugging Face causal language model that keeps packed documents apart and opens the vocabulary only on request."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils.hub import cached_file

from salad_lightning.batch import Head, Prediction
from salad_lightning.errors import UserError

__all__ = ["ADAPTERS", "LanguageModel", "build_language_model", "load_config", "load_language_model", "load_tokenizer"]

ADAPTERS = "adapter_config.json"
"""In a folder of LoRA alone: peft's own name for the file that says what they belong to."""

# Vocabularies are padded to round sizes (Qwen2.5-7B has 399 rows too many, DeepSeek 2,398 of 102,400).
# Far more unused rows than that means that the tokenizer belongs to another model.
_MAX_UNUSED_ROWS = 0.05

# Left to choose, Inductor takes its decoding kernel for rows of fewer than 128 positions, and fails where positions ×
# query heads a key head are more than 128.
_FLEX: dict[str, Any] = {"kernel_options": {"BACKEND": "TRITON"}}


class LanguageModel(nn.Module):
    """A causal LM seen as: embeddings in, hidden states at chosen positions out, beside the head that reads them.

    Args:
        hf: Any Hugging Face causal LM that takes ``inputs_embeds`` and a 4-d attention mask.
        vocab_size: Number of real tokens (``len(tokenizer)``); rows of the head beyond it are padding.

    Attributes:
        hf: The Hugging Face model, unchanged.
    """

    def __init__(self, hf: PreTrainedModel, vocab_size: int) -> None:
        super().__init__()
        self.hf = hf
        self.vocab_size = vocab_size

    @property
    def dim(self) -> int:
        """Width D of embeddings and hidden states."""
        return int(self.hf.config.get_text_config().hidden_size)

    @property
    def blocks(self) -> nn.ModuleList:
        """The Transformer blocks: the units for sharding and checkpointing."""
        layers = self.hf.base_model.layers
        assert isinstance(layers, nn.ModuleList)
        return layers

    def head(self) -> Head:
        """The head as it stands now. Under sharding, read it only inside a sharded module's forward."""
        config = self.hf.config.get_text_config()
        linear = self.hf.get_output_embeddings()  # type: ignore[no-untyped-call]
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        soft_cap = getattr(config, "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), scale, soft_cap, self.vocab_size)

    @property
    def attention_options(self) -> dict[str, Any]:
        """What any forward pass of ``hf`` is to be given for its attention."""
        return _FLEX if self.hf.config._attn_implementation == "flex_attention" else {}

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[…, D]`` of ids ``[…]``."""
        return self.hf.get_input_embeddings()(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        position_ids_BS: Tensor,
        document_ids_BS: Tensor,
        at_M: Tensor,
        *,
        input_ids_BS: Tensor | None = None,
        embeddings_BSD: Tensor | None = None,
    ) -> Prediction:
        """Hidden states at M flat positions of packed rows; documents never see each other.

        Args:
            position_ids_BS: Restart at 0 with every document.
            document_ids_BS: Equal within a document; -1 for padding.
            at_M: Flat positions in ``[B * S]``.
            input_ids_BS: Token ids, or
            embeddings_BSD: what stands in their place.
        """
        if embeddings_BSD is None:
            assert input_ids_BS is not None, "give input_ids_BS or embeddings_BSD"
            embeddings_BSD = self.embed(input_ids_BS)
        hidden_BSD = self.hf.base_model(
            inputs_embeds=embeddings_BSD,
            position_ids=position_ids_BS,
            attention_mask=self._mask(document_ids_BS, position_ids_BS),
            use_cache=False,
            **self.attention_options,
        ).last_hidden_state
        return Prediction(hidden_BSD.flatten(0, 1)[at_M], self.head())

    def _mask(self, document_ids_BS: Tensor, position_ids_BS: Tensor) -> Any:
        """The mask, or one for each type of layer, in the form that the attention code takes."""
        config = self.hf.config.get_text_config()
        layer_types, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
        build = self._block_mask if self.hf.config._attn_implementation == "flex_attention" else self._dense_mask
        if not window or "sliding_attention" not in (layer_types or ("sliding_attention",)):
            return build(document_ids_BS, position_ids_BS, None)
        # Models without a list of layer types (Mistral, Phi-3) use the window in every layer.
        if not layer_types:
            return build(document_ids_BS, position_ids_BS, window)
        masks = {"full_attention": None, "sliding_attention": window}
        return {name: build(document_ids_BS, position_ids_BS, reach) for name, reach in masks.items()}

    def _dense_mask(self, document_ids_BS: Tensor, position_ids_BS: Tensor, window: int | None) -> Tensor:
        """0 where a position may look: its own document, not ahead. Padding sees padding, so no row is empty."""
        same = document_ids_BS[:, None, :, None] == document_ids_BS[:, None, None, :]
        allowed = same.tril()
        if window is not None:
            allowed = allowed & (position_ids_BS[:, None, :, None] - position_ids_BS[:, None, None, :] < window)
        # Of booleans, torch would make this in every block, and keep it for the backward pass of each.
        dtype, kind = self.hf.dtype, allowed.device.type
        cast = kind != "meta" and dtype != torch.float64 and torch.is_autocast_enabled(kind)
        if cast and self.hf.config._attn_implementation != "eager":
            dtype = torch.get_autocast_dtype(kind)
        return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)

    def _block_mask(self, document_ids_BS: Tensor, position_ids_BS: Tensor, window: int | None) -> BlockMask:
        """The same for FlexAttention, which leaves out every block that no position may see."""

        def allowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (query >= key) & (document_ids_BS[row, query] == document_ids_BS[row, key])
            if window is None:
                return seen
            return seen & (position_ids_BS[row, query] - position_ids_BS[row, key] < window)

        rows, length = document_ids_BS.shape
        return create_block_mask(allowed, rows, None, length, length, device=document_ids_BS.device)

    @torch.no_grad()
    def check_against_hugging_face(self) -> None:
        """Compare our logits on two packed documents with the model's own on each, so that nothing is lost in silence.

        Raises:
            UserError: If they differ: the architecture does something with its logits that `Head` does not describe,
                or lets one document of a row see another (recurrent layers, position embeddings by index).
        """
        device = next(self.hf.parameters()).device
        every = torch.arange(8, device=device)
        ids, second = every[None] % self.vocab_size, (every >= 5)[None]
        # Compiled blocks would be compiled for these lengths, and then for any, instead of for those of training.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            hidden, head = self(every[None] - 5 * second, second.long(), every, input_ids_BS=ids)
            alone = [self.hf(input_ids=part, use_cache=False).logits[0] for part in (ids[:, :5], ids[:, 5:])]
        logits = nn.functional.linear(hidden, head.weight, head.bias).float() * head.scale
        if head.soft_cap:
            logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
        expected = torch.cat(alone).float()
        tolerance = 0.1 if self.hf.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not torch.allclose(logits, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            raise UserError(
                f"{type(self.hf).__name__} computes its logits in a way that is not supported: on packed documents "
                f"they differ from ours by up to {float((logits - expected).abs().max()):.2g}",
                cure="use another language model, or report the architecture",
            )


def load_config(path: str) -> PreTrainedConfig:
    """The configuration of the model at a folder or hub name; of its base model, where that holds adapters alone.

    Raises:
        UserError: If there is none.
    """
    adapters = Path(path) / ADAPTERS
    if adapters.is_file() and not (Path(path) / "config.json").is_file():
        path = json.loads(adapters.read_text(encoding="utf-8")).get("base_model_name_or_path") or path
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_found(path, "a language model (no readable config.json)") from error
    assert isinstance(config, PreTrainedConfig)
    return config


def load_tokenizer(path: str, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """The fast tokenizer beside a model, checked against the model's vocabulary.

    Read from ``tokenizer.json`` as it stands: ``AutoTokenizer`` of transformers 5 goes by the model's type and puts,
    say, Qwen2's own pre-tokenizer in place of the one in the file, without a word.

    Raises:
        UserError: If there is none, it is not a fast one, or it belongs to another model.
    """
    try:
        has_file = cached_file(path, "tokenizer.json", _raise_exceptions_for_missing_entries=False) is not None
        tokenizer = (PreTrainedTokenizerFast if has_file else AutoTokenizer).from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_found(path, "a tokenizer") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            "the tokenizer has no fast (Rust) version, whose character offsets are needed to cut at word boundaries",
            where=path,
            cure="use a model with a tokenizer.json",
        )
    rows = int(config.get_text_config().vocab_size)
    if not rows * (1 - _MAX_UNUSED_ROWS) - 64 <= len(tokenizer) <= rows:
        raise UserError(
            f"tokenizer and LLM have different vocabularies: {len(tokenizer)} tokens, {rows} embedding rows",
            where=path,
            cure="put the tokenizer that the LLM was trained with into its folder",
        )
    return tokenizer


def build_language_model(config: PreTrainedConfig, vocab_size: int, attention: str = "sdpa") -> LanguageModel:
    """A freshly initialised model, on the default device (so ``with torch.device("meta")`` costs no memory).

    Args:
        config: Of the model.
        vocab_size: Real tokens.
        attention: ``sdpa``, or ``flex`` for FlexAttention.
    """
    chosen = _attention(config, attention)
    hf = AutoModelForCausalLM.from_config(config, attn_implementation=chosen)  # type: ignore[no-untyped-call]
    return LanguageModel(hf, vocab_size)


def load_language_model(
    path: str, vocab_size: int, dtype: torch.dtype = torch.float32, attention: str = "sdpa", quantization: Any = None
) -> LanguageModel:
    """A trained model from a folder or hub name.

    Args:
        path: Folder or hub name.
        vocab_size: Real tokens.
        dtype: Of the weights.
        attention: See `build_language_model`.
        quantization: A Hugging Face quantisation config for the matrices of the blocks, or None.

    Raises:
        UserError: If the weights are missing or the architecture is not supported.
    """
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    config = load_config(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=_attention(config, "sdpa"),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError) as error:
        raise _not_found(path, "weights of a language model") from error
    except ImportError as error:
        cure = "pip install 'salad-lightning[lora]'"
        raise UserError("peft is needed to read LoRA, and not installed", where=path, cure=cure) from error
    except SafetensorError as error:  # cut short, or a Git LFS pointer in place of the file
        cure = "copy or download the model's folder again"
        raise UserError(f"the weights cannot be read ({error})", where=path, cure=cure) from error
    hf, info = loaded
    if info["mismatched_keys"]:
        name, theirs, ours = sorted(info["mismatched_keys"])[0]
        raise UserError(
            f"{name} has the shape {tuple(theirs)} in the weights and {tuple(ours)} by config.json",
            where=path,
            cure="copy the model's folder again: weights and config.json are of different models",
        )
    if info["missing_keys"]:
        raise UserError(
            f"the weights lack {len(info['missing_keys'])} tensors, {sorted(info['missing_keys'])[0]} among them",
            where=path,
            cure="copy the model's folder again",
        )
    if quantization is not None:
        for module in hf.modules():
            # bitsandbytes would pack 4-bit weights for inference, on a CPU, as soon as they are used in eval mode;
            # there is no gradient through them after that.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    model = LanguageModel(hf, vocab_size)
    model.check_against_hugging_face()
    if attention != "sdpa":  # only now: FlexAttention does not run where weights are loaded to
        hf.set_attn_implementation(_attention(hf.config, attention))
    return model


def _attention(config: PreTrainedConfig, wanted: str) -> str:
    """Hugging Face's name of the attention; the plain one for architectures that cap their scores (Gemma 2)."""
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if wanted == "flex":
        if architecture is not None and not architecture._supports_flex_attn:
            raise UserError(
                f"{architecture.__name__} does not run with FlexAttention",
                where="model.execution.attention",
                cure="set it to sdpa",
            )
        return "flex_attention"
    return "eager" if architecture is not None and not architecture._supports_sdpa else "sdpa"


def _not_found(path: str, what: str) -> UserError:
    if Path(path).is_dir():
        held = ", ".join(sorted(entry.name for entry in Path(path).iterdir())[:8]) or "nothing"
        return UserError(f"the folder does not hold {what}", where=path, cure=f"it holds: {held}; name another folder")
    offline = " (HF_HUB_OFFLINE is set, so names on the hub are not looked up)" if os.getenv("HF_HUB_OFFLINE") else ""
    return UserError(f"no such folder, nor a hub name that holds {what}{offline}", where=path, cure="check model.llm")
