"""LoRA on the language model, on plain or 4-bit weights: what is trained is small, and the teacher is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BitsAndBytesConfig

from salad_lightning.batch import Prediction
from salad_lightning.errors import UserError
from salad_lightning.model.llm import LanguageModel
from salad_lightning.projection import token_kl

__all__ = [
    "LoRA",
    "adapters_off",
    "add_adapters",
    "has_adapters",
    "merge_adapters",
    "nf4",
    "quantization_kl",
    "save_adapters",
]


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates beside frozen matrices (arXiv 2106.09685), by peft.

    Args:
        rank: Of each update.
        alpha: Updates are scaled by alpha / rank.
        dropout: On their input.
        targets: Name endings of the matrices, such as ``[q_proj, v_proj]``; by default all in the blocks.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: If a value is out of range.
        """
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank must be ≥ 1, alpha > 0 and dropout in [0, 1), not {self}")


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Blocks' matrices in 4-bit NormalFloat, their scales quantised too (QLoRA, arXiv 2305.14314).

    Args:
        dtype: Of matrix products, and of all other weights.

    Raises:
        UserError: If bitsandbytes is not installed.
    """
    _require("bitsandbytes", "model.quantize", "quantization")
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def add_adapters(llm: LanguageModel, settings: LoRA) -> None:
    """Freeze the model and put trainable fp32 updates beside its matrices, which are zero at first.

    Args:
        llm: Changed in place.
        settings: Of the updates.

    Raises:
        UserError: If peft is not installed, or the targets match nothing.
    """
    _require("peft", "model.lora", "lora")
    # Imported here: an optional dependency.
    from peft import LoraConfig, inject_adapter_in_model

    llm.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # an int by annotation, divided all the same
        lora_dropout=settings.dropout,
        target_modules=settings.targets or "all-linear",
    )
    try:
        inject_adapter_in_model(config, llm.hf)
    except ValueError as error:
        cure = "give endings of names of linear layers, or leave targets out"
        raise UserError(str(error).partition("\n")[0], where="model.lora.targets", cure=cure) from error
    for name, parameter in llm.named_parameters():
        if "lora_" in name:  # peft gives them the dtype of the frozen matrix
            parameter.data = parameter.data.float()


@contextmanager
def adapters_off(llm: LanguageModel) -> Iterator[None]:
    """In here the model is the one without adapters, bit for bit."""
    layers = _adapted(llm)
    trained = {name: parameter.requires_grad for name, parameter in llm.named_parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, parameter in llm.named_parameters():  # peft sets it for all adapters
            parameter.requires_grad_(trained[name])


def merge_adapters(llm: LanguageModel) -> None:
    """Add the updates to the matrices, so that a plain Hugging Face model is left."""
    for parent in list(llm.hf.modules()):
        for name, child in list(parent.named_children()):
            if _is_adapted(child):
                layer: Any = child
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
    del llm.hf.peft_config


def has_adapters(llm: LanguageModel) -> bool:
    """Whether there are updates beside the matrices."""
    return hasattr(llm.hf, "peft_config")


def save_adapters(llm: LanguageModel, folder: str | Path) -> None:
    """Write the updates alone, in peft's format: with peft installed, `AutoModelForCausalLM` reads the folder.

    The model they were trained on is named in ``adapter_config.json`` and not copied.

    Args:
        llm: With adapters.
        folder: Made if missing.
    """
    # Imported here: an optional dependency.
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy(llm.hf.peft_config["default"])
    base = config.base_model_name_or_path or llm.hf.config._name_or_path
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.inference_mode = True
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(llm.hf).items()}
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def quantization_kl(exact: LanguageModel, quantized: LanguageModel, token_ids: list[int]) -> float:
    """What quantisation changes: KL(exact ‖ quantised), nats per token, on one document.

    Args:
        exact: The model as it is.
        quantized: The same in fewer bits, on any device.
        token_ids: The document.
    """
    sides = []
    for llm in (exact, quantized):
        every = torch.arange(len(token_ids), device=llm.hf.device)
        ids = torch.tensor([token_ids], device=llm.hf.device)
        hidden, head = llm(every[None], torch.zeros_like(ids), every, input_ids_BS=ids)
        bias = None if head.bias is None else head.bias.cpu()
        sides.append(Prediction(hidden.cpu(), head._replace(weight=head.weight.cpu(), bias=bias)))
    return float(token_kl(*sides).mean())


def _adapted(llm: LanguageModel) -> list[Any]:
    return [module for module in llm.modules() if _is_adapted(module)]


def _is_adapted(module: nn.Module) -> bool:
    # Imported here: an optional dependency.
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _require(package: str, key: str, extra: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise UserError(
            f"{package} is needed and not installed", where=key, cure=f"pip install 'salad-lightning[{extra}]'"
        ) from error
