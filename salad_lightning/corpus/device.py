"""The device of commands that run a model."""

from __future__ import annotations

from salad_lightning.errors import UserError

__all__ = ["usable_device"]


def usable_device(name: str) -> str:
    """The device of a ``--device``, "auto" resolved, tried before anything is loaded.

    Args:
        name: auto, cpu, cuda, cuda:1 …

    Raises:
        UserError: If it cannot be used here.
    """
    import torch  # here for start-up time

    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise UserError(f"{device} cannot be used ({reason})", where="--device", cure="try --device cpu") from error
    return device
