"""Finds where code asks a device for a value and so waits for it: on any device, a CPU included."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["DeviceReads"]

# Operations whose result, or the size of it, the host must know before it goes on.
_READS = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero", "unique_dim"}
_INDEXING = {"index", "index_put", "index_put_"}  # by a mask, unless it is to set one value, which torch does in place


class DeviceReads(TorchDispatchMode):
    """Notes every read while it is entered.

    On a GPU each of them (``.item()``, ``int(tensor)``, ``if tensor:``, indexing by a mask) lets the host wait until
    all that was asked before is done, and then the GPU wait for the host.

    Attributes:
        found: Operation and the innermost calls outside of torch, one entry a read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the read, if it is one, and go on."""
        name = func.overloadpacket.__name__
        one_value = name != "index" and name in _INDEXING and args[2].numel() == 1
        masks = args[1] if name in _INDEXING and not one_value else ()
        if name in _READS or any(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks):
            calls = [call for call in traceback.extract_stack()[:-1] if "/torch/" not in call.filename]
            places = [f"{call.filename}:{call.lineno} {call.name}" for call in reversed(calls[-4:])]
            self.found.append(f"{name} in " + " < ".join(places))
        return func(*args, **(kwargs or {}))
