"""LoRA and 4-bit weights against the language model as it was."""

from __future__ import annotations

import pytest
import torch

from salad_lightning.errors import UserError
from salad_lightning.model.adapters import LoRA, adapters_off, add_adapters, merge_adapters, nf4, quantization_kl
from salad_lightning.model.llm import load_config, load_language_model, load_tokenizer
from salad_lightning.testing.tiny import save_tiny_llm

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llm(tmp_path_factory.mktemp("llm"), width=128))


def load(folder, dtype=torch.float32, **options):
    return load_language_model(folder, len(load_tokenizer(folder, load_config(folder))), dtype, **options)


def hidden(llm):
    every = torch.arange(30)
    return llm(every[None], torch.zeros(1, 30, dtype=torch.long), every, input_ids_BS=every[None] + 3).hidden


def disturb(llm):
    """Updates that are no longer zero."""
    torch.manual_seed(1)
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapters_it_is_the_untouched_model_bit_for_bit(folder, dtype):
    original, llm = load(folder, dtype), load(folder, dtype)
    add_adapters(llm, LoRA(rank=4))
    with torch.no_grad():
        torch.testing.assert_close(hidden(llm), hidden(original))  # updates begin at zero
        disturb(llm)
        assert not torch.allclose(hidden(llm), hidden(original), rtol=1e-2)
        with adapters_off(llm):
            assert torch.equal(hidden(llm), hidden(original))
        assert not torch.allclose(hidden(llm), hidden(original), rtol=1e-2)


def test_only_the_updates_are_trained_and_in_fp32(folder):
    llm = load(folder, torch.bfloat16)
    add_adapters(llm, LoRA(rank=4, targets=["q_proj", "v_proj"]))
    trained = {name for name, parameter in llm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2  # layers, matrices, halves
    assert all("lora_" in name and ("q_proj" in name or "v_proj" in name) for name in trained)
    assert {p.dtype for p in llm.parameters() if p.requires_grad} == {torch.float32}
    with adapters_off(llm):
        pass
    assert {name for name, parameter in llm.named_parameters() if parameter.requires_grad} == trained
    disturb(llm)
    hidden(llm).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in llm.parameters() if p.requires_grad)


def test_merged_it_is_a_plain_model_that_computes_the_same(folder):
    llm = load(folder)
    names = set(llm.state_dict())
    add_adapters(llm, LoRA(rank=4))
    disturb(llm)
    with torch.no_grad():
        expected = hidden(llm)
        merge_adapters(llm)
        torch.testing.assert_close(hidden(llm), expected, rtol=1e-4, atol=1e-4)
    assert set(llm.state_dict()) == names


def test_targets_that_match_nothing(folder):
    with pytest.raises(UserError, match="not found") as error:
        add_adapters(load(folder), LoRA(targets=["no_such_layer"]))
    assert error.value.where == "model.lora.targets"


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="rank"):
        LoRA(**bad)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_four_bits(folder):
    pytest.importorskip("bitsandbytes")
    exact = load(folder)
    quantized = load(folder, quantization=nf4(torch.float32))
    kinds = {type(module).__name__ for module in quantized.blocks.modules()}
    assert "Linear4bit" in kinds
    ids = list(range(3, 40))
    kl = quantization_kl(exact, quantized, ids)
    logits = [llm.hf(input_ids=torch.tensor([ids])).logits.double().log_softmax(-1) for llm in (exact, quantized)]
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert kl == pytest.approx(float(expected), rel=1e-3)
    assert kl > 1e-5
    assert quantization_kl(exact, exact, ids) == pytest.approx(0, abs=1e-6)
    base = hidden(quantized)
    add_adapters(quantized, LoRA(rank=4))
    disturb(quantized)
    assert not torch.allclose(hidden(quantized), base, rtol=1e-2)
    with adapters_off(quantized):
        assert torch.equal(hidden(quantized), base)
