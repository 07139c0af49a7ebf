from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config

from salad_lightning.model.llm import build_language_model
from salad_lightning.training.cost import (
    GIB,
    QWEN2_5,
    TransformerSize,
    forward_flops,
    gpu_hours,
    memory_per_gpu,
    model_flops_utilisation,
    predicted_table,
    speech_flops,
    step_flops,
)
from salad_lightning.training.speed_monitor import size_of

QWEN_3B = QWEN2_5["3B"]


@pytest.fixture
def model():
    config = Qwen2Config(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False)  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def tiny_size(model, tied=False):
    return TransformerSize(sum(p.numel() for p in model.parameters()), 512, 64, 3, 64, tied)


def test_block_parameters(model):
    outside = model.get_input_embeddings().weight.numel() + model.lm_head.weight.numel()
    assert tiny_size(model).block_parameters == sum(p.numel() for p in model.parameters()) - outside
    assert QWEN_3B.block_parameters == pytest.approx(2.77e9, rel=2e-3)


def test_flops_equal_those_that_torch_counts(model):
    positions = 128
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, positions, dtype=torch.long)).logits.sum().backward()
    # Eager attention computes the masked half too: every position sees all of them. Norms and biases count for torch
    # as no products, for us as parameters.
    expected = 3 * forward_flops(tiny_size(model), positions, positions, mean_context=positions)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-2)


def test_only_predicted_tokens_pay_for_the_head(model):
    size = tiny_size(model)
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
    assert 0 < one.gathered == eight.gathered < one.trained / 8
    assert one.activations == 8192 * 2048 * (2 * 36 + 49)
    assert 50 * GIB < one.total < 60 * GIB
    assert eight.total == sum(eight)
    assert memory_per_gpu(QWEN_3B, None, gpus=1, positions_per_gpu=1).teacher == 0
    with pytest.raises(ValueError, match="gpus"):
        memory_per_gpu(QWEN_3B, None, gpus=0, positions_per_gpu=1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("0.5B", (896, 4864, 24, 14, 2, 151_936, True)),
        ("3B", (2048, 11_008, 36, 16, 2, 151_936, True)),
        ("7B", (3584, 18_944, 28, 28, 4, 152_064, False)),
    ],
)
def test_published_sizes(name, shape):
    dim, mlp, layers, heads, kv_heads, vocab, tied = shape
    config = Qwen2Config(hidden_size=dim, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied)  # fmt: skip
    with torch.device("meta"):
        assert size_of(build_language_model(config, vocab)) == QWEN2_5[name]


def test_frozen_weights_and_speech():
    counts = {"positions": 100, "teacher_positions": 0, "predicted": 10, "mean_context": 5}
    full, frozen = (step_flops(QWEN_3B, None, **counts, trained_share=share) for share in (1.0, 0.0))
    assert frozen == pytest.approx(full * 2 / 3)
    # By hand: a frozen encoder of 10 weights over 7 frames, a connector of 20 over 3 positions, three passes.
    counted = speech_flops(encoder_parameters=10, frames=7, connector_parameters=20, positions=3)
    assert counted == 2 * 10 * 7 + 3 * 2 * 20 * 3


def test_the_table_of_the_recipes_is_the_predicted_one():
    table = predicted_table(sizes={name: QWEN2_5[name] for name in ("3B", "7B")})
    assert table in (Path(__file__).parents[2] / "recipes" / "README.md").read_text()
    cells = [line.split(" | ") for line in table.splitlines()[2:]]
    assert "does not fit" in cells[3][2]
    # Hours are of all GPUs together, so days are a matter of their number alone.
    assert cells[1][3] == cells[2][3]
    assert float(cells[0][4].strip(" |")) == pytest.approx(8 * float(cells[1][4].strip(" |")), rel=0.03)
    twice = predicted_table(sizes={"3B": QWEN_3B}, mfu=0.8, gpus=(8,))
    assert float(twice.splitlines()[2].split(" | ")[3]) == pytest.approx(float(cells[1][3]) / 2, rel=0.01)
