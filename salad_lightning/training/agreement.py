"""What one process of a run has been told, known to all of them at the same batch."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer

__all__ = ["Agreement"]


class Agreement:
    """Takes the greatest of one number a process; all call it equally often, and all get the same answer.

    On several processes the answer is that of the call before: by then it has arrived, and nobody waits for a device.
    """

    def __init__(self) -> None:
        self._asked: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, number: int, trainer: Trainer) -> int:
        """The greatest number.

        Args:
            number: Of this process; not below 0.
            trainer: Of the run.
        """
        if trainer.world_size == 1:
            return number
        flag = torch.full((1,), number, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        arrived = None
        if flag.is_cuda:
            flag = torch.empty(1, dtype=flag.dtype, pin_memory=True).copy_(flag, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        before, self._asked = self._asked, (flag, arrived)
        if before is None:
            return 0
        answer, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return int(answer)
