"""From one stage to the next: which parts a checkpoint was trained with, and whether its learning rate had fallen."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.configuration_utils import PreTrainedConfig

from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import is_checkpoint_folder, load_into, stored_shapes
from salad_lightning.model.parallel import load_full
from salad_lightning.training.checkpoints import load_checkpoint

__all__ = ["check_handover", "check_not_decayed", "describe_parts", "take_weights"]

_LLM_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)


def describe_parts(
    *,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    encoder: str,
    connector: object,
    switch: bool,
    llm_weights: str,
) -> dict[str, str]:
    """What two stages must have in common, as plain text to be kept in a checkpoint.

    Args:
        config: Of the LLM.
        tokenizer: Of the LLM.
        encoder: `Encoder.identity`.
        connector: The connector.
        switch: Whether there are switch embeddings.
        llm_weights: `weights_mark` of the LLM.
    """
    text = config.get_text_config()
    llm = {key: getattr(text, key, None) for key in _LLM_KEYS}
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False).encode()
    return {
        "llm": json.dumps(llm),
        "llm_weights": llm_weights,
        "tokenizer": f"{len(tokenizer)} tokens, {hashlib.sha256(vocabulary).hexdigest()[:16]}",
        "encoder": encoder,
        "connector": type(connector).__name__,
        "switch_embeddings": str(switch),
    }


def check_handover(checkpoint: Mapping[str, Any], ours: Mapping[str, str], where: str) -> None:
    """Refuse weights that were trained with other parts: shapes may agree by chance, what they mean does not.

    Args:
        checkpoint: One that carries the parts it was trained with; others pass.
        ours: `describe_parts` of this run.
        where: Path of the checkpoint.

    Raises:
        UserError: With every difference.
    """
    notes = checkpoint.get("salad_lightning", {})
    theirs = dict(notes.get("parts", {}))
    # A checkpoint that has all of the LLM does not care which one it began with.
    builds_on_llm = any(name.startswith("model.llm.") for name in notes.get("frozen", ()))
    if not (builds_on_llm and theirs.get("llm_weights") and ours["llm_weights"]):
        theirs.pop("llm_weights", None)
    different = [
        f"{name}: {theirs[name]} there, {ours[name]} here"
        for name in ours
        if theirs.get(name, ours[name]) != ours[name]
    ]
    if different:
        raise UserError(
            "the checkpoint was trained with other parts:\n  " + "\n  ".join(different),
            where=where,
            cure="use the same llm, encoder and connector as the run that wrote it",
        )


def check_not_decayed(checkpoint: Mapping[str, Any], where: str) -> None:
    """Stage II goes on from the weights as they were before the learning rate fell (arXiv 2510.13632, section 4).

    Args:
        checkpoint: With the state of its optimizers.
        where: Its path, for the message.

    Raises:
        UserError: If a rate is below its peak after the warm-up.
    """
    settings = checkpoint.get("hyper_parameters", {}).get("schedule") or {}
    if checkpoint.get("global_step", 0) < int(settings.get("warmup_steps", 500)):
        return
    for optimizer in checkpoint.get("optimizer_states", []):
        for group in optimizer["param_groups"]:
            if group["lr"] < 0.999 * group.get("initial_lr", group["lr"]):
                raise UserError(
                    f"the learning rate has decayed to {group['lr']:.2g} of {group['initial_lr']:.2g}",
                    where=where,
                    cure="use the run's pre_decay.ckpt; to take this one all the same, set require_pre_decay: false "
                    "(a model) or allow_decayed: true (a selection)",
                )


def take_weights(module: nn.Module, path: str, *, sharded: bool) -> set[str]:
    """Give a module the weights of a checkpoint, and say which.

    Of a folder, a sharded module reads its parts alone; a file is mapped into memory, not read into it.

    Args:
        module: With the names that the checkpoint has; what may be missing has been checked.
        path: Of the checkpoint.
        sharded: Whether the module's weights are spread over processes.

    Returns:
        Names of the weights taken.
    """
    if sharded and is_checkpoint_folder(path):
        taken = set(stored_shapes(path))
        checkpoint = load_into(path, module, [], frozen=set(module.state_dict()))
    else:
        checkpoint = load_checkpoint(path, weights_only=True, outline=not is_checkpoint_folder(path))
        taken = set(checkpoint["state_dict"])
        if sharded:
            load_full(module, checkpoint["state_dict"])
        else:
            module.load_state_dict(checkpoint["state_dict"], strict=False)
    parts = Counter(name.removeprefix("model.").partition(".")[0] for name in taken)
    what = ", ".join(f"{number} of {part}" for part, number in sorted(parts.items()))
    step = checkpoint.get("global_step", 0)
    rank_zero_info(f"weights taken from {path} (step {step}): {what}; the optimizer starts afresh")
    return taken
