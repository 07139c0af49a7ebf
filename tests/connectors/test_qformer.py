from __future__ import annotations

import pytest
import torch
from torch import nn

from salad_lightning.connectors.qformer import QFormerConnector, _frame_mask
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.connector import ConnectorContract

SMALL = {"num_heads": 2, "hidden_dim": 16}


class TestQFormerConnectorPerWindow(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return QFormerConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, num_queries=2, window=5, **SMALL)


class TestQFormerConnectorPerSpan(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return QFormerConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, num_queries=3, window=None, **SMALL)


class TestQFormerConnectorOneQuery(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return QFormerConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, **SMALL)


def test_lengths():
    per_window = QFormerConnector(encoder_dim=4, llm_dim=6, num_queries=2, window=5, **SMALL)
    assert [per_window.output_lengths(n) for n in (1, 5, 6, 10, 11)] == [2, 2, 4, 4, 6]
    per_span = QFormerConnector(encoder_dim=4, llm_dim=6, num_queries=3, window=None, **SMALL)
    assert [per_span.output_lengths(n) for n in (1, 100)] == [3, 3]


def test_windows_beyond_the_end_have_something_to_attend_to():
    mask = _frame_mask(torch.tensor([7, 1]), num_windows=3, window=3)
    expected = ["111", "111", "100", "100", "100", "100"]
    assert ["".join(str(int(frame)) for frame in row) for row in mask] == expected


def multihead(attention, queries, context):
    """The same attention by torch's own module, in float64."""
    reference = nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    linears = (attention.query, attention.key, attention.value)
    reference.in_proj_weight.copy_(torch.cat([linear.weight for linear in linears]))
    reference.in_proj_bias.copy_(torch.cat([linear.bias for linear in linears]))
    reference.out_proj.weight.copy_(attention.output.weight)
    reference.out_proj.bias.copy_(attention.output.bias)
    return reference(queries, context, context, need_weights=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("window", [5, None])
def test_equals_torch_multihead_attention_window_by_window(window):
    torch.manual_seed(0)
    connector = QFormerConnector(encoder_dim=4, llm_dim=6, num_queries=2, window=window, **SMALL)
    frames = torch.randn(1, 13, 4)
    actual = connector(frames, torch.tensor([13])).embeddings[0]
    connector = connector.double()
    outputs = []
    for piece in frames[0].double().split(window or 13):
        angles = torch.arange(len(piece))[:, None] / 10_000 ** (torch.arange(8) / 8)
        context = connector.input_norm(connector.input(piece) + torch.cat([angles.sin(), angles.cos()], dim=1))
        x = connector.queries
        for layer in connector.layers:
            normed = layer.self_norm(x)
            x = x + multihead(layer.self_attention, normed, normed)
            x = x + multihead(layer.cross_attention, layer.cross_norm(x), context)
            x = x + layer.mlp(layer.mlp_norm(x))
        x = connector.output.linear(connector.norm(x))
        outputs.append(0.02 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(actual.double(), torch.cat(outputs), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_order_inside_a_window_matters():
    torch.manual_seed(0)
    connector = QFormerConnector(encoder_dim=4, llm_dim=6, **SMALL)
    frames = torch.randn(1, 4, 4)
    first, second = (connector(x, torch.tensor([4])).embeddings for x in (frames, frames.flip(1)))
    assert (first - second).abs().max() > 1e-4


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="does not split into 3 heads"):
        QFormerConnector(encoder_dim=4, llm_dim=6, num_heads=3, hidden_dim=16)
