"""What every connector must hold, as tests."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from salad_lightning.interfaces import Connector, ConnectorOutput
from salad_lightning.testing.device_reads import DeviceReads

__all__ = ["ConnectorContract"]

_ENCODER_DIM, _LLM_DIM = 12, 20
_LENGTHS = (1, 2, 7, 16, 23, 40)


class ConnectorContract:
    """Subclass it in a test file as ``class TestMine(ConnectorContract)`` and say how to build a small connector.

    Spans stand in a batch with random numbers, not zeros, beyond their ends: a connector that reads padding is caught
    even where its biases are still zero.

    Attributes:
        atol: Largest difference that rounding may make in fp32, relative to the outputs' root mean square.
    """

    atol: float = 1e-4

    def make_connector(self, encoder_dim: int, llm_dim: int) -> Connector:
        """A freshly initialised connector for the two widths, small enough to run in milliseconds."""
        raise NotImplementedError

    def test_init_is_keyword_only_and_annotated(self) -> None:
        """The command line finds every setting by name and type, and the two widths cannot be swapped."""
        parameters = dict(inspect.signature(type(self._connector())).parameters)
        for name, parameter in parameters.items():
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name} is not keyword-only"
            assert parameter.annotation is not inspect.Parameter.empty, f"{name} is not annotated"
        assert {"encoder_dim", "llm_dim"} <= set(parameters)

    def test_output_lengths_same_for_int_and_tensor(self) -> None:
        """One arithmetic serves the data pipeline and the model; a span never fills less than one position."""
        connector = self._connector()
        lengths = torch.arange(1, 200)
        words = (lengths // 3).clamp(min=1)
        as_tensor = connector.output_lengths(lengths, num_words=words)
        as_ints = [
            connector.output_lengths(length, num_words=word)
            for length, word in zip(lengths.tolist(), words.tolist(), strict=True)
        ]
        assert all(type(length) is int for length in as_ints), "an int in must give an int out"
        assert as_tensor.tolist() == as_ints
        assert not as_tensor.is_floating_point()
        assert min(as_ints) >= 1

    @torch.no_grad()
    def test_output(self) -> None:
        """Widths, lengths as announced, finite embeddings, extra losses that are finite scalars."""
        connector = self._connector()
        frames, lengths = _spans()
        output = _apply(connector, frames, lengths)
        assert output.embeddings.ndim == 3
        assert output.embeddings.shape[0] == len(lengths)
        assert output.embeddings.shape[2] == _LLM_DIM
        assert torch.isfinite(output.embeddings).all()
        announced = connector.output_lengths(lengths, num_words=_words(lengths))
        if connector.exact:
            assert torch.equal(output.lengths, announced), "output_lengths is not exact"
        assert (output.lengths <= announced).all(), "output_lengths is not an upper bound"
        assert (output.lengths >= 1).all()
        assert output.embeddings.shape[1] >= int(output.lengths.max())
        for name, loss in output.losses.items():
            assert loss.ndim == 0, f"loss {name} is not a scalar"
            assert torch.isfinite(loss), f"loss {name} is not finite"

    @torch.no_grad()
    def test_words_that_are_not_known(self) -> None:
        """`generate` has no transcript: a word count of 0 means the same as none, and its bound holds too."""
        connector = self._connector().eval()
        frames, lengths = _spans()
        unknown = torch.zeros_like(lengths)
        announced = connector.output_lengths(lengths, num_words=unknown)
        assert torch.equal(announced, connector.output_lengths(lengths))
        assert announced.tolist() == [connector.output_lengths(length, num_words=0) for length in lengths.tolist()]
        output = connector(frames, lengths, num_words_N=unknown)
        assert (output.lengths <= announced).all(), "output_lengths is not an upper bound"
        assert (output.lengths >= 1).all()

    @torch.no_grad()
    def test_padding_and_neighbours_change_nothing(self) -> None:
        """A span alone, in a batch, and in a batch padded further gives the same embeddings."""
        connector = self._connector().eval()
        frames, lengths = _spans()
        batch = _apply(connector, frames, lengths)
        longer = torch.cat([frames, torch.randn(len(lengths), 13, _ENCODER_DIM)], dim=1)
        padded = _apply(connector, longer, lengths)
        assert torch.equal(padded.lengths, batch.lengths)
        tolerance = self.atol * float(batch.embeddings[0, 0].square().mean().sqrt())
        for row, length in enumerate(lengths.tolist()):
            alone = _apply(connector, frames[row : row + 1, :length], lengths[row : row + 1])
            valid = int(batch.lengths[row])
            assert int(alone.lengths[0]) == valid
            expected = alone.embeddings[0, :valid]
            for name, other in (("its neighbours", batch), ("padding", padded)):
                difference = float((other.embeddings[row, :valid] - expected).abs().max())
                assert difference <= tolerance, f"{name} changed a span of {length} frames by {difference:.2e}"

    def test_reads_nothing_back_from_the_device(self) -> None:
        """Sizes are known from the frames' shape, so forward and backward never wait for the device."""
        connector = self._connector()
        frames, lengths = _spans()
        words = _words(lengths)
        connector(frames, lengths, num_words_N=words)  # whatever is cached
        with DeviceReads() as reads:
            output = connector(frames, lengths, num_words_N=words)
            sum(output.losses.values(), output.embeddings.sum()).backward()
        assert not reads.found, "\n".join(reads.found)

    def test_every_parameter_gets_a_finite_gradient(self) -> None:
        """Parameters outside the graph would hang data-parallel training and never learn."""
        connector = self._connector()
        _backward(connector, _apply(connector, *_spans()))

    def test_bf16(self) -> None:
        """Forward and backward are finite with bf16 parameters, and under bf16 autocast."""
        frames, lengths = _spans()
        connector = self._connector().bfloat16()
        output = _apply(connector, frames.bfloat16(), lengths)
        assert output.embeddings.dtype == torch.bfloat16
        _backward(connector, output)
        connector = self._connector()
        with torch.autocast("cpu", torch.bfloat16):
            output = _apply(connector, frames, lengths)
        _backward(connector, output)

    @torch.no_grad()
    def test_state_round_trip(self) -> None:
        """Everything the output depends on is in the state dict."""
        first, second = self._connector(seed=0).eval(), self._connector(seed=1).eval()
        frames, lengths = _spans()
        expected = _apply(first, frames, lengths).embeddings
        assert not torch.equal(_apply(second, frames, lengths).embeddings, expected), "the seed changes nothing"
        second.load_state_dict(first.state_dict())
        assert torch.equal(_apply(second, frames, lengths).embeddings, expected)

    def _connector(self, seed: int = 0) -> Connector:
        torch.manual_seed(seed)
        return self.make_connector(_ENCODER_DIM, _LLM_DIM)


def _spans() -> tuple[Tensor, Tensor]:
    frames = torch.randn(len(_LENGTHS), max(_LENGTHS), _ENCODER_DIM, generator=torch.Generator().manual_seed(3))
    return frames, torch.tensor(_LENGTHS)


def _words(lengths: Tensor) -> Tensor:
    return (lengths // 3).clamp(min=1)


def _apply(connector: Connector, frames: Tensor, lengths: Tensor) -> ConnectorOutput:
    output: ConnectorOutput = connector(frames, lengths, num_words_N=_words(lengths))
    return output


def _backward(connector: Connector, output: ConnectorOutput) -> None:
    valid = torch.arange(output.embeddings.shape[1]) < output.lengths[:, None]
    weights = torch.randn(output.embeddings.shape, generator=torch.Generator().manual_seed(4))
    total = (output.embeddings.float() * weights)[valid].sum()
    assert torch.isfinite(total), "the output is not finite"
    sum(output.losses.values(), start=total).backward()  # type: ignore[no-untyped-call]
    for name, parameter in connector.named_parameters():
        if parameter.grad is None:
            pytest.fail(f"no gradient for {name}")
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
