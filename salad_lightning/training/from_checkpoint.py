"""A speech LLM from its checkpoint alone."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jsonargparse import ArgumentError
from lightning.pytorch.cli import instantiate_module

from salad_lightning.errors import UserError
from salad_lightning.model.adapters import merge_adapters
from salad_lightning.registry import MODEL_KINDS, load_all
from salad_lightning.training.checkpoints import load_checkpoint
from salad_lightning.training.handover import check_not_decayed
from salad_lightning.training.speech_llm_module import SpeechLLMModule

__all__ = ["Trained", "from_checkpoint", "module_of", "trained_module"]


class Trained(NamedTuple):
    """A trained module.

    Attributes:
        module: With its weights, in eval mode, on the CPU.
        settings: The hyperparameters it was built from.
        step: Optimizer steps it was trained for.
    """

    module: SpeechLLMModule
    settings: dict[str, Any]
    step: int


def module_of(path: str, *, allow_decayed: bool = False) -> SpeechLLMModule:
    """The module that wrote a checkpoint, as its saved hyperparameters say; weights come with `Trainer.predict`.

    Args:
        path: Of the checkpoint.
        allow_decayed: Take one whose learning rate has decayed.

    Raises:
        UserError: If it is no checkpoint of a speech LLM, or has decayed.
    """
    checkpoint = load_checkpoint(path, weights_only=True)
    if not allow_decayed:
        check_not_decayed(checkpoint, path)
    return _build(checkpoint, path)


def from_checkpoint(checkpoint: str, report_by: str = "category") -> SpeechLLMModule:
    """A trained model for a recipe: ``class_path`` of a model that is described by its checkpoint alone.

    Args:
        checkpoint: That `fit` wrote; its LLM and encoder must be where it was trained from.
        report_by: JSON field of the samples by which test results are broken down.

    Raises:
        UserError: If it is no checkpoint of a speech LLM.
    """
    return _build(load_checkpoint(checkpoint, weights_only=True), checkpoint, init_from=checkpoint, report_by=report_by)


def trained_module(path: str, *, keep_adapters: bool = False) -> Trained:
    """The module that wrote a checkpoint, with its weights.

    Args:
        path: Of the checkpoint; its LLM must be where it was trained from.
        keep_adapters: Leave LoRA beside the matrices instead of adding it to them.

    Raises:
        UserError: If it is no checkpoint of a speech LLM, the weights do not fit, or there are no adapters to keep.
    """
    checkpoint = load_checkpoint(path, weights_only=True)
    module = _build(checkpoint, path)
    adapted = bool(checkpoint["hyper_parameters"].get("lora"))
    if keep_adapters and not adapted:
        raise UserError("trained without LoRA: there is nothing to keep apart", where=path, cure="leave the option out")
    module.configure_model()
    module.check_weights(checkpoint, path)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    if adapted and not keep_adapters:
        merge_adapters(module.model.llm)  # a plain model, for whatever comes next
    module.eval()
    return Trained(module, checkpoint["hyper_parameters"], int(checkpoint.get("global_step", 0)))


def _build(checkpoint: dict[str, Any], path: str, **changes: Any) -> SpeechLLMModule:
    settings = dict(checkpoint.get("hyper_parameters", {}))
    if "encoder" not in settings or "objective" not in settings:
        cure = "give one that `fit` of a SpeechLLMModule wrote, such as the pre_decay.ckpt of a Stage-I run"
        raise UserError("not a checkpoint of a speech LLM", where=path, cure=cure)
    settings.pop("_instantiator", None)
    settings.pop("execution", None)  # what was fast in training may not run on this device, and changes no result
    # What it began from matters no more.
    settings |= {"init_from": None, "require_pre_decay": False, **changes}
    load_all(MODEL_KINDS)  # its parts may be plugins
    try:
        module: SpeechLLMModule = instantiate_module(SpeechLLMModule, settings)
    except (ArgumentError, ImportError, TypeError, ValueError) as error:
        raise _explained(error, path) from error
    return module


def _explained(error: BaseException, path: str) -> UserError:
    """What is not where it was, out of all that was tried in reading the settings."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, UserError):
        first = first.__cause__ or first.__context__
    if first is not None:
        return UserError(first.what, where=f"{path}: {first.where}", cure=first.cure)
    found = re.search(r"No module named '[^']+'|Expected a dot import path string: \S+", str(error))
    what = found[0].replace("Expected a dot import path string:", "unknown:") if found else str(error).split("\n")[0]
    return UserError(
        f"the model cannot be built from the checkpoint's settings: {what}",
        where=path,
        cure="install the plugins it was trained with; modules of one's own must be importable (PYTHONPATH)",
    )
