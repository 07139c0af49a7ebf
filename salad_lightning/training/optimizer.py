"""The optimizer by default, and how it goes on from a state that another machine wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["default_optimizer", "restore_fused"]


def default_optimizer(parameters: Iterable[Any], *, fused: bool | None = None) -> torch.optim.Optimizer:
    """AdamW with weight decay 0.1 (arXiv 2510.13632, section 4) and betas (0.9, 0.95).

    Args:
        parameters: Or groups of them, which bring their rates along.
        fused: Whether one kernel does the step, which moves a third of the bytes; by default on a GPU.
    """
    groups = list(parameters)
    if fused is None:
        members = [p for group in groups for p in (group["params"] if isinstance(group, dict) else [group])]
        fused = bool(members) and all(p.is_cuda for p in members)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=fused or None)


def restore_fused(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer be fused as it was made: loading its state brings the setting of the machine that wrote it."""
    fused = optimizer.defaults.get("fused")
    for group in optimizer.param_groups:
        if group.get("fused") == fused or group.get("capturable"):
            continue
        group["fused"] = fused
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                # Elsewhere it would be read back from the device, for each parameter in each step.
                state["step"] = state["step"].to(parameter.device if fused else "cpu")
