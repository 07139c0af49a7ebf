"""The contract of every connector, and what is particular to this one."""

from __future__ import annotations

import pytest
import torch
from salad_gru.connector import GRUConnector

from salad_lightning.testing.contracts.connector import ConnectorContract


class TestGRUConnector(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return GRUConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=3, hidden_dim=16)


@torch.no_grad()
def test_a_position_knows_what_came_before_it_and_nothing_after():
    torch.manual_seed(0)
    connector = GRUConnector(encoder_dim=4, llm_dim=6, stack=2, hidden_dim=8)
    frames, lengths = torch.randn(1, 12, 4), torch.tensor([12])
    before = connector(frames, lengths).embeddings
    frames[:, 6] += 1.0
    change = (connector(frames, lengths).embeddings - before).abs().sum(-1)[0]
    assert (change[:3] == 0).all()
    assert (change[3:] > 0).all()


@torch.no_grad()
def test_embeddings_start_at_the_scale_of_an_embedding_table():
    torch.manual_seed(0)
    connector = GRUConnector(encoder_dim=16, llm_dim=256, hidden_dim=128, output_scale=0.05)
    embeddings = connector(torch.randn(4, 40, 16), torch.full((4,), 40)).embeddings
    assert embeddings.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.1)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="stack=0"):
        GRUConnector(encoder_dim=4, llm_dim=4, stack=0)
