from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from salad_lightning.training.cost import (
    GIB,
    TransformerSize,
    forward_flops,
    gpu_hours,
    memory_per_gpu,
    model_flops_utilisation,
    step_flops,
)

# https://huggingface.co/Qwen/Qwen2.5-3B: 3.09 B parameters, 2.77 B without embedding
QWEN_3B = TransformerSize(3_085_938_688, 151_936, 2048, 36, 2048, tied=True)


@pytest.fixture
def model():
    config = Qwen2Config(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def size_of(model, tied=False):
    return TransformerSize(sum(p.numel() for p in model.parameters()), 512, 64, 3, 64, tied)


def test_block_parameters(model):
    outside = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    assert size_of(model).block_parameters == sum(p.numel() for p in model.parameters()) - outside
    assert QWEN_3B.block_parameters == pytest.approx(2.77e9, rel=2e-3)


def test_flops_equal_those_that_torch_counts(model):
    positions = 128
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, positions, dtype=torch.long)).logits.sum().backward()
    # Eager attention computes the masked half too: every position sees all of them. Norms and biases count for torch
    # as no products, for us as parameters.
    expected = 3 * forward_flops(size_of(model), positions, positions, mean_context=positions)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-2)


def test_only_predicted_tokens_pay_for_the_head(model):
    size = size_of(model)
    assert forward_flops(size, 100, 40, 10) - forward_flops(size, 100, 10, 10) == 30 * 2 * 512 * 64


def test_a_step_is_three_passes_of_the_student_and_one_of_the_teacher():
    one = forward_flops(QWEN_3B, 2048, 1000, 500)
    counts = {"positions": 2048, "teacher_positions": 2048, "predicted": 1000, "mean_context": 500}
    assert step_flops(QWEN_3B, None, **counts) == pytest.approx(3 * one)
    assert step_flops(QWEN_3B, QWEN_3B, **counts) == pytest.approx(4 * one)


def test_utilisation_and_hours():
    assert model_flops_utilisation(5e14, 1.0, 1e15) == 0.5
    # 24 B positions of a 3B model and its teacher, by hand: 8 N D / (989e12 · 0.5) s
    assert gpu_hours(8 * 2.77e9, 24e9, 989e12, 0.5) == pytest.approx(298.8, rel=1e-3)
    with pytest.raises(ValueError, match="positive"):
        model_flops_utilisation(1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="mfu"):
        gpu_hours(1.0, 1.0, 1.0, 1.5)


def test_memory():
    one, eight = (memory_per_gpu(QWEN_3B, QWEN_3B, gpus=gpus, positions_per_gpu=8192) for gpus in (1, 8))
    assert one.trained == 8 * eight.trained == 16 * QWEN_3B.parameters
    assert one.teacher == 8 * eight.teacher == 2 * QWEN_3B.parameters
    assert one.gathered == 0 < eight.gathered < one.trained / 8
    assert one.activations == 8192 * 2048 * (2 * 36 + 34)
    assert 50 * GIB < one.total < 60 * GIB
    assert one.total == sum(one)
    assert memory_per_gpu(QWEN_3B, None, gpus=1, positions_per_gpu=1).teacher == 0
    with pytest.raises(ValueError, match="gpus"):
        memory_per_gpu(QWEN_3B, None, gpus=0, positions_per_gpu=1)
