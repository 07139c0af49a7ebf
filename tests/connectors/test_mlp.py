from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.connector import ConnectorContract


class TestMLPConnector(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=3, hidden_dim=16)


class TestMLPConnectorUnstacked(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=1, num_layers=1)


@torch.no_grad()
def test_equals_a_loop_over_groups():
    torch.manual_seed(0)
    connector = MLPConnector(encoder_dim=4, llm_dim=6, stack=3, hidden_dim=8, num_layers=3)
    for parameter in connector.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    linears = [module for module in connector.modules() if isinstance(module, torch.nn.Linear)]
    frames = torch.randn(1, 7, 4)
    output = connector(frames, torch.tensor([7]))
    assert output.lengths.tolist() == [3]
    for position in range(3):
        group = [F.layer_norm(frame, (4,), connector.norm.weight, connector.norm.bias) for frame in frames[0]]
        group = [*group, *[torch.zeros(4)] * 2][3 * position : 3 * position + 3]
        x = torch.cat(group)
        for linear in linears[:2]:
            x = F.gelu(linear.weight @ x + linear.bias)
        x = linears[2].weight @ x + linears[2].bias
        expected = x / (x.square().mean() + 1e-6).sqrt() * connector.output.norm.weight * 0.02
        torch.testing.assert_close(output.embeddings[0, position], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_output_starts_at_the_scale_of_an_embedding_table(scale):
    connector = MLPConnector(encoder_dim=32, llm_dim=64, output_scale=scale)
    embeddings = connector(50 * torch.randn(2, 10, 32), torch.tensor([10, 10])).embeddings
    torch.testing.assert_close(embeddings.square().mean(-1).sqrt(), torch.full((2, 5), scale), rtol=1e-3, atol=0)


def test_no_spans():
    assert MLPConnector(encoder_dim=4, llm_dim=6)(torch.zeros(0, 5, 4), torch.zeros(0).long()).embeddings.shape[0] == 0


def test_sizes_below_one_are_refused():
    with pytest.raises(UserError, match="MLPConnector: stack must be positive, not 0"):
        MLPConnector(encoder_dim=4, llm_dim=6, stack=0)
