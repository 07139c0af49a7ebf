from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from salad_lightning.connectors.causal_transformer import CausalTransformerConnector
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.connector import ConnectorContract

SMALL = {"num_layers": 2, "dim": 24, "mlp_dim": 40, "num_heads": 6, "num_kv_heads": 2}


class TestCausalTransformerConnector(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return CausalTransformerConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, **SMALL)


class TestCausalTransformerConnectorStacked(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return CausalTransformerConnector(
            encoder_dim=encoder_dim, llm_dim=llm_dim, **{**SMALL, "stack": 4, "num_kv_heads": 6}
        )


def test_size_at_the_paper_sizes():
    """Everything from Mimi's latents (512) to Qwen2.5-3B's embeddings (2048) counts, biases and norms included."""
    with torch.device("meta"):
        connector = CausalTransformerConnector(encoder_dim=512, llm_dim=2048)
    total = sum(parameter.numel() for parameter in connector.parameters())
    assert 0.98 * 122e6 <= total <= 1.02 * 122e6
    block = 2 * 960**2 + 2 * 960 * 320 + 3 * 960 * 2560 + 2 * 960
    assert total == 12 * block + (512 + 1) * 960 + 960 + (960 + 1) * 2048 + 2048


def llama(connector):
    """Hugging Face's Llama with the connector's weights."""
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": connector.rope_theta},
    )
    model = LlamaModel(config).eval()
    names = {
        "attention_norm": "input_layernorm",
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    state = {"norm.weight": connector.norm.weight, "embed_tokens.weight": torch.zeros(2, 24)}
    for name, tensor in connector.layers.state_dict().items():
        index, part, _ = name.split(".")
        state[f"layers.{index}.{names[part]}.weight"] = tensor
    model.load_state_dict(state)
    return model


@torch.no_grad()
@pytest.mark.parametrize("rope_theta", [10_000.0, 100.0])
def test_equals_hugging_face_llama(rope_theta):
    torch.manual_seed(0)
    connector = CausalTransformerConnector(encoder_dim=8, llm_dim=12, rope_theta=rope_theta, **SMALL)
    for parameter in connector.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    frames, lengths = torch.randn(3, 30, 8), torch.tensor([30, 1, 17])
    output = connector(frames, lengths)
    hidden = llama(connector)(inputs_embeds=connector.input(frames)).last_hidden_state
    x = connector.output.linear(hidden)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * connector.output.norm.weight * 0.02
    assert torch.equal(output.lengths, lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(output.embeddings[row, :length], expected[row, :length], rtol=1e-5, atol=2e-7)
        assert not output.embeddings[row, length:].any()


@torch.no_grad()
def test_never_looks_ahead():
    torch.manual_seed(0)
    connector = CausalTransformerConnector(encoder_dim=8, llm_dim=12, **SMALL)
    frames = torch.randn(1, 20, 8)
    changed = torch.cat([frames[:, :11], torch.randn(1, 9, 8)], dim=1)
    first, second = (connector(x, torch.tensor([20])).embeddings[0] for x in (frames, changed))
    torch.testing.assert_close(first[:11], second[:11], rtol=1e-5, atol=1e-7)
    assert (first[11] - second[11]).abs().max() > 1e-4


def test_leaves_the_meta_device_without_garbage():
    """No buffer has to be rebuilt after weights are loaded into a model made on the meta device."""
    torch.manual_seed(0)
    connector = CausalTransformerConnector(encoder_dim=8, llm_dim=12, **SMALL)
    with torch.device("meta"):
        other = CausalTransformerConnector(encoder_dim=8, llm_dim=12, **SMALL)
    other.to_empty(device="cpu").load_state_dict(connector.state_dict())
    frames, lengths = torch.randn(2, 9, 8), torch.tensor([9, 4])
    assert torch.equal(other(frames, lengths).embeddings, connector(frames, lengths).embeddings)


@pytest.mark.parametrize("wrong", [{"num_heads": 5}, {"num_kv_heads": 4}, {"num_heads": 24, "num_kv_heads": 24}])
def test_heads_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="do not fit together"):
        CausalTransformerConnector(encoder_dim=8, llm_dim=12, **{**SMALL, **wrong})
