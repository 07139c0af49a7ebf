"""What a run costs, from counts: floating-point operations, utilisation, memory and GPU-hours. No torch in here."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["QWEN2_5", "Memory", "TransformerSize", "forward_flops", "gpu_hours", "memory_per_gpu",
           "model_flops_utilisation", "predicted_table", "speech_flops", "step_flops"]  # fmt: skip

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
    teacher_mean_context: float | None = None,
    trained_share: float = 1.0,
) -> float:
    """Operations that a training step of the language models needs.

    Three forward passes of the student (a backward pass is one for the activations and one for the weights), one of the
    teacher. Frozen weights have no gradient, only what flows through them. Recomputed activations are not counted:
    they are the price of memory and not what the model needs.

    Args:
        student: In training.
        teacher: Frozen, or None.
        positions: Of the student that hold something.
        teacher_positions: Of the teacher that hold something.
        predicted: Tokens that the heads are applied to.
        mean_context: Positions that a position of the student sees on average.
        teacher_mean_context: The same of the teacher; by default as the student.
        trained_share: Of the student's parameters, 0 to 1.
    """
    total = (2.0 + trained_share) * forward_flops(student, positions, predicted, mean_context)
    if teacher is not None:
        context = mean_context if teacher_mean_context is None else teacher_mean_context
        total += forward_flops(teacher, teacher_positions, predicted, context)
    return total


def speech_flops(
    *, encoder_parameters: int, frames: float, connector_parameters: int, positions: int, trained_share: float = 1.0
) -> float:
    """Operations of the frozen encoder, forward, and of the connector, forward and backward.

    Two a parameter and frame, or position. Layers that run at a higher rate than their output (convolutions over
    samples, what comes before a stack of frames), and attention, cost more: the figure is a lower bound, of a part that
    is small beside the language models.

    Args:
        encoder_parameters: All of them.
        frames: That the encoder makes of audio; none of pre-encoded speech.
        connector_parameters: All of them.
        positions: That the connector makes.
        trained_share: Of the connector's parameters, 0 to 1.
    """
    connector = (2.0 + trained_share) * connector_parameters * positions
    return 2.0 * (encoder_parameters * frames + connector)


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


# https://huggingface.co/Qwen, config.json and weights of the base models.
QWEN2_5 = {
    "0.5B": TransformerSize(494_032_768, 151_936, 896, 24, 896, tied=True),
    "3B": TransformerSize(3_085_938_688, 151_936, 2048, 36, 2048, tied=True),
    "7B": TransformerSize(7_615_616_512, 152_064, 3584, 28, 3584, tied=False),
}


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a step."""

    trained: float
    teacher: float
    gathered: float
    activations: float
    projection: float

    @property
    def total(self) -> float:
        """What lasts, and what forward and backward pass need."""
        return self.trained + self.teacher + self.gathered + self.activations + self.projection


def memory_per_gpu(
    student: TransformerSize,
    teacher: TransformerSize | None,
    *,
    gpus: int,
    positions_per_gpu: int,
    connector_parameters: int = 0,
) -> Memory:
    """Predicted memory under FSDP2: everything sharded over ``gpus``, AdamW, every block's activations recomputed.

    A trained parameter takes 16 bytes (fp32 weight, gradient and two moments), a teacher's 2 (bf16). Gathered in bf16
    (on one GPU: copied) are two blocks (one at work, one prefetched) with the fp32 gradient of one, and the parameters
    outside the blocks, of both models, with the student's fp32 gradient. Activations are a bf16 hidden state a position
    for every block, and 49 · dim bytes a position inside the one at work (what compiled blocks of Qwen2.5's shapes
    keep, benchmarks/cuda_block.py; attention scores are never held). The projection holds its chunk: 1 GiB. AdamW,
    fused, takes nothing besides; another optimizer may.

    Args:
        student: Fully trained.
        teacher: Frozen, or None.
        gpus: 1 or more.
        positions_per_gpu: Of one micro-batch.
        connector_parameters: Trained beside the LLM.

    Raises:
        ValueError: If ``gpus`` is below 1.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, not {gpus}.")
    block = student.block_parameters / student.num_layers
    outside = student.parameters - student.block_parameters
    teachers_outside = 0 if teacher is None else teacher.parameters - teacher.block_parameters
    gathered = 2 * 2 * block + 4 * block + (2 + 4) * outside + 2 * teachers_outside
    return Memory(
        trained=16 * (student.parameters + connector_parameters) / gpus,
        teacher=0.0 if teacher is None else 2 * teacher.parameters / gpus,
        gathered=gathered,
        activations=positions_per_gpu * student.dim * (2 * student.num_layers + 49),
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


def predicted_table(
    *,
    sizes: dict[str, TransformerSize],
    gpus: tuple[int, ...] = (1, 8, 64),
    positions: float = 24e9,
    positions_per_gpu: int = 8192,
    predicted_share: float = 0.6,
    teacher_share: float = 0.8,
    mean_context: float = 200.0,
    mfu: float = 0.4,
    peak_flops_per_second: float = 989e12,
    gpu_gib: float = 80.0,
    connector_parameters: int = 120_000_000,
) -> str:
    """Memory and GPU-hours of Stage I as a Markdown table: fully trained, FSDP2, KL against a teacher of the same size.

    Args:
        sizes: Language models by name.
        gpus: Numbers of them.
        positions: Of the whole run; 24e9 is Stage I (arXiv 2510.13632, section 4).
        positions_per_gpu: Of a micro-batch.
        predicted_share: Predicted tokens a position: speech positions have none.
        teacher_share: Teacher positions a student position: transcripts are shorter than their speech.
        mean_context: Earlier positions that a position sees.
        mfu: Model FLOPs utilisation: measure it, and put it here.
        peak_flops_per_second: Of one GPU.
        gpu_gib: Memory of one GPU; what needs more is marked.
        connector_parameters: Of the connector; the default is the recipe's.
    """
    lines = ["| LLM | GPUs | GiB a GPU | GPU-hours | days |", "|---|---|---|---|---|"]
    for name, size in sizes.items():
        flops = step_flops(
            size,
            size,
            positions=1_000_000,
            teacher_positions=round(1_000_000 * teacher_share),
            predicted=round(1_000_000 * predicted_share),
            mean_context=mean_context,
        )
        hours = gpu_hours(flops / 1_000_000, positions, peak_flops_per_second, mfu)
        for count in gpus:
            memory = (
                memory_per_gpu(
                    size,
                    size,
                    gpus=count,
                    positions_per_gpu=positions_per_gpu,
                    connector_parameters=connector_parameters,
                ).total
                / GIB
            )
            if memory > gpu_gib:
                lines.append(f"| {name} | {count} | {memory:.0f}, does not fit {gpu_gib:.0f} | – | – |")
            else:
                lines.append(f"| {name} | {count} | {memory:.0f} | {hours:,.0f} | {hours / count / 24:,.1f} |")
    return "\n".join(lines)
