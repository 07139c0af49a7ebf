"""What a run costs, from counts: floating-point operations, utilisation, memory and GPU-hours. No torch in here."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Memory", "TransformerSize", "forward_flops", "gpu_hours", "memory_per_gpu", "model_flops_utilisation",
           "step_flops"]  # fmt: skip

GIB = 2**30


class TransformerSize(NamedTuple):
    """The counts of a language model that its cost depends on.

    Attributes:
        parameters: All of them, a tied embedding counted once.
        vocab_size: Rows of the embedding, padding included.
        dim: Width of the hidden states.
        num_layers: Transformer blocks.
        attention_dim: Query heads times their width; equal to ``dim`` in most models.
        tied: Whether the head is the embedding.
    """

    parameters: int
    vocab_size: int
    dim: int
    num_layers: int
    attention_dim: int
    tied: bool

    @property
    def block_parameters(self) -> int:
        """Those of all blocks: without embedding and head."""
        return self.parameters - self.vocab_size * self.dim * (1 if self.tied else 2)


def forward_flops(size: TransformerSize, positions: int, predicted: int, mean_context: float) -> float:
    """Operations of one forward pass, a multiplication and an addition counted as two.

    Blocks cost ``2 · block_parameters`` a position; looking an embedding up costs nothing, and the head
    ``2 · vocab_size · dim`` a *predicted* token, as only those are projected. Attention costs
    ``4 · attention_dim · num_layers`` for each earlier position of the same document that a position sees: 2 for the
    scores and 2 for the mix of values (Kaplan et al., arXiv 2001.08361, section 2.1, and PaLM, arXiv 2204.02311,
    appendix B, which this counts causally).

    Args:
        size: The model.
        positions: Positions that hold something, padding excluded.
        predicted: Tokens that the head is applied to.
        mean_context: Positions that a position sees on average: half the document's length, plus a half.
    """
    blocks = 2.0 * size.block_parameters + 4.0 * size.attention_dim * size.num_layers * mean_context
    return blocks * positions + 2.0 * size.vocab_size * size.dim * predicted


def step_flops(
    student: TransformerSize,
    teacher: TransformerSize | None,
    *,
    positions: int,
    teacher_positions: int,
    predicted: int,
    mean_context: float,
) -> float:
    """Operations that a training step needs: three forward passes of the student (a backward pass is two), one of the
    teacher. Recomputed activations are not counted: they are the price of memory and not what the model needs.
    """  # noqa: D205
    total = 3.0 * forward_flops(student, positions, predicted, mean_context)
    if teacher is not None:
        total += forward_flops(teacher, teacher_positions, predicted, mean_context)
    return total


def model_flops_utilisation(flops: float, seconds: float, peak_flops_per_second: float) -> float:
    """MFU: ``flops / (seconds · peak)``, 0 to 1 (PaLM, arXiv 2204.02311, appendix B).

    Args:
        flops: Of `step_flops`, all ranks together.
        seconds: That they took.
        peak_flops_per_second: Dense peak in the dtype of the matrix products, all GPUs together: 989e12 for bf16 on one
            H100 or H200, 312e12 on one A100.

    Raises:
        ValueError: If a figure is not positive.
    """
    if not (seconds > 0 and peak_flops_per_second > 0):
        raise ValueError(f"seconds ({seconds}) and peak ({peak_flops_per_second}) must be positive.")
    return flops / (seconds * peak_flops_per_second)


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a step."""

    trained: float
    teacher: float
    gathered: float
    activations: float
    projection: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(self)


def memory_per_gpu(
    student: TransformerSize, teacher: TransformerSize | None, *, gpus: int, positions_per_gpu: int
) -> Memory:
    """Predicted memory under FSDP2: everything sharded over ``gpus``, AdamW, every block's activations recomputed.

    A trained parameter takes 16 bytes (fp32 weight, gradient and two moments), a teacher's 2 (bf16). Gathered in bf16
    are two blocks (one at work, one prefetched) with the fp32 gradient of one, and the parameters outside the blocks,
    of both models, with the student's fp32 gradient. Activations are a bf16 hidden state a position for every block,
    and 34 · dim bytes a position inside the one at work (Korthikanti et al., arXiv 2205.05198, section 4, without
    attention scores, which are never held). The projection holds its chunk: 1 GiB.

    Args:
        student: Fully trained.
        teacher: Frozen, or None.
        gpus: 1 or more.
        positions_per_gpu: Of one micro-batch.

    Raises:
        ValueError: If ``gpus`` is below 1.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, not {gpus}.")
    block = student.block_parameters / student.num_layers
    outside = student.parameters - student.block_parameters
    teachers_outside = 0 if teacher is None else teacher.parameters - teacher.block_parameters
    gathered = 0.0 if gpus == 1 else 2 * 2 * block + 4 * block + (2 + 4) * outside + 2 * teachers_outside
    return Memory(
        trained=16 * student.parameters / gpus,
        teacher=0.0 if teacher is None else 2 * teacher.parameters / gpus,
        gathered=gathered,
        activations=positions_per_gpu * student.dim * (2 * student.num_layers + 34),
        projection=float(GIB),
    )


def gpu_hours(flops_per_position: float, positions: float, peak_flops_per_second: float, mfu: float) -> float:
    """GPU-hours of a run.

    Args:
        flops_per_position: `step_flops` over the positions of a step.
        positions: Of the whole run.
        peak_flops_per_second: Of one GPU.
        mfu: Measured.

    Raises:
        ValueError: If ``mfu`` is not in (0, 1].
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be above 0 and at most 1, not {mfu}.")
    return flops_per_position * positions / (peak_flops_per_second * mfu) / 3600
