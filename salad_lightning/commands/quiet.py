"""Which warnings of the libraries below a reader need not see."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quieten"]


def quieten() -> None:
    """Drop warnings about what is meant to be so, that a reader may take for trouble."""
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen encoder
        r".*is an instance of `nn.Module` and is already saved",  # parts, saved as configuration
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning on newer torch
        r"The .* does not have many workers",
        r"You are using a CUDA device",
        r"You have overridden `on_before_batch_transfer` in `LightningModule`",  # which counts, and changes nothing
        r"predict returned None",  # a predict loop that writes its results itself
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
