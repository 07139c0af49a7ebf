"""Block by block from safetensors: the same model as `from_pretrained` gives, and never two blocks whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from salad_lightning.errors import UserError
from salad_lightning.model.llm import load_config
from salad_lightning.model.small import small_qwen2
from salad_lightning.model.streaming import meta_parameters, stream_language_model
from salad_lightning.testing.tiny import save_tiny_llm

CONFIGS = {
    "tied": lambda: small_qwen2(64, 3),
    "own head": lambda: LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    return save_tiny_llm(tmp_path / "llm", config=CONFIGS[request.param]())


def stream(folder, place=lambda block: None, dtype=torch.float32):
    return stream_language_model(str(folder), 300, dtype=dtype, device=torch.device("cpu"), place=place)


def logits(hf):
    return hf(input_ids=torch.arange(3, 40)[None]).logits


@torch.no_grad()
@pytest.mark.parametrize("split", [False, True])
def test_logits_equal_those_of_from_pretrained(folder, split):
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()
    if split:
        (folder / "model.safetensors").unlink()
        expected.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    model = stream(folder)
    assert torch.equal(logits(model.hf), logits(expected))
    tied = expected.config.tie_word_embeddings
    assert (model.hf.lm_head.weight is model.hf.model.embed_tokens.weight) == tied
    model.check_against_hugging_face()


def test_blocks_are_placed_one_by_one(folder):
    """When a block is handed over it is filled, and none after it is."""
    filled, alive = [], []

    def place(block):
        filled.append(block)
        assert not any(parameter.is_meta for parameter in block.parameters())
        alive.append(sum(parameter.numel() for parameter in block.parameters()))
        for parameter in block.parameters():
            parameter.data = torch.zeros(())  # sharding leaves a part

    with meta_parameters():
        one = sum(
            p.numel() for p in AutoModelForCausalLM.from_config(load_config(str(folder))).model.layers[0].parameters()
        )
    model = stream(folder, place=place)
    assert filled == list(model.blocks)
    assert alive == [one] * 3
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_dtype(folder):
    assert {parameter.dtype for parameter in stream(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_weight_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model.norm.weight has the shape \(3,\)"):
        stream(folder)


def test_other_names_are_left_to_from_pretrained(folder):
    weights = {f"odd.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert stream(folder) is None
    (folder / "model.safetensors").unlink()
    assert stream(folder) is None


def test_buffers_have_their_values(tmp_path):
    folder = save_tiny_llm(tmp_path / "llm", weights=False)
    config = load_config(str(folder))
    with meta_parameters():
        hf = AutoModelForCausalLM.from_config(config)
    plain = AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in hf.parameters())
    for (name, ours), (_, theirs) in zip(hf.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu", "and everything is as before"
