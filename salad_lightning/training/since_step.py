"""What was read since the last optimizer step: no checkpoint has its gradients, so whoever goes on reads it again."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from salad_lightning.batch import SpeechBatch

__all__ = ["SinceStep", "validate_again"]


class _Place(NamedTuple):
    """Of the last optimizer step in Lightning's loop."""

    batches: int  # micro-batches of the run
    logged_steps: int  # before Lightning counts this one; it does so once more where a run goes on


class SinceStep:
    """The micro-batches of the step at hand.

    A checkpoint may be asked for at any of them, by the clock or by a signal. It then says that none was read.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []
        self._work = {"tokens": 0.0, "audio_seconds": 0.0}
        self._place: _Place | None = None

    def add(self, batch: SpeechBatch, trainer: Trainer) -> None:
        """One more micro-batch, of which every process has one."""
        loop = trainer.fit_loop.epoch_loop
        if self._place is None:  # a run begins, and goes on, where a step does
            self._place = _Place(loop.batch_progress.total.ready - 1, loop._batches_that_stepped - 1)
        self._states.append(batch.stream_state)
        self._work["tokens"] += batch.num_positions * trainer.world_size
        self._work["audio_seconds"] += batch.audio_seconds * trainer.world_size

    def end(self, trainer: Trainer) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """The optimizer has stepped.

        Returns:
            Where the data stream stood after each micro-batch, and the tokens and seconds of audio in them.
        """
        loop = trainer.fit_loop.epoch_loop
        ended = self._states, self._work
        self._states, self._work = [], dict.fromkeys(self._work, 0.0)
        self._place = _Place(loop.batch_progress.total.ready, loop._batches_that_stepped)
        return ended

    def take_back(self, checkpoint: dict[str, Any]) -> None:
        """Make a checkpoint's counts those of the last step; one that was saved there stays as it is."""
        loops = checkpoint.get("loops", {}).get("fit_loop")
        if loops is None or self._place is None:
            return
        progress = loops["epoch_loop.batch_progress"]
        ahead = progress["total"]["ready"] - self._place.batches
        if not ahead and progress["total"]["processed"] == self._place.batches:
            return
        for counts in (progress["total"], progress["current"]):
            last = counts["ready"] - ahead
            # As Lightning counts when a step has just ended; it goes on behind that batch.
            counts.update(ready=last, started=last, processed=last, completed=last - 1)
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self._place.logged_steps


def validate_again(checkpoint: dict[str, Any]) -> None:
    """Let a run that goes on begin the validation anew in which its checkpoint was saved.

    Lightning would go on with it at the batch behind, in loaders that begin at their first.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
    done = progress["total"]["completed"]
    # As Lightning counts within a batch, which it then repeats.
    progress["total"].update(ready=done + 1, started=done + 1, processed=done, completed=done)
    progress["current"].update(ready=1, started=1, processed=0, completed=0)
