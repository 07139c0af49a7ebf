from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from salad_lightning.connectors.conv import ConvConnector
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.connector import ConnectorContract


class TestConvConnector(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return ConvConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, hidden_dim=16)


class TestConvConnectorOtherStrides(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return ConvConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, strides=(1, 3, 2), kernel_size=5, hidden_dim=16)


@torch.no_grad()
def test_equals_a_loop_over_positions():
    torch.manual_seed(0)
    connector = ConvConnector(encoder_dim=3, llm_dim=6, strides=(2, 3), kernel_size=3, hidden_dim=4)
    frames = torch.randn(1, 9, 3)
    x = list(frames[0])
    for convolution, stride in zip(connector.convolutions, (2, 3), strict=True):
        outputs = []
        for centre in range(0, len(x), stride):
            taps = [x[t] if 0 <= t < len(x) else torch.zeros_like(x[0]) for t in (centre - 1, centre, centre + 1)]
            value = sum(convolution.weight[:, :, k] @ tap for k, tap in enumerate(taps)) + convolution.bias
            outputs.append(F.gelu(value))
        x = outputs
    assert connector.output_lengths(9) == len(x) == 2
    x = connector.output.linear(F.layer_norm(torch.stack(x), (4,)))
    expected = 0.02 * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(connector(frames, torch.tensor([9])).embeddings[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kernel_size", "cure"), [(2, "use 5"), (4, "use 5"), (3, "use 5")])
def test_kernels_that_do_not_fit_are_refused(kernel_size, cure):
    with pytest.raises(UserError, match=cure):
        ConvConnector(encoder_dim=3, llm_dim=6, strides=(4, 2), kernel_size=kernel_size)


def test_no_strides_are_refused():
    with pytest.raises(UserError, match="strides"):
        ConvConnector(encoder_dim=3, llm_dim=6, strides=())
