"""What every encoder must hold; subclass it in a plugin's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from salad_lightning.interfaces import Encoder, EncoderOutput, Stored
from salad_lightning.testing.device_reads import DeviceReads

__all__ = ["EncoderContract"]


class EncoderContract:
    """Tests of one encoder.

    Subclass it under a name that starts with ``Test`` and give it `make_encoder`::

        class TestMyEncoder(EncoderContract):
            def make_encoder(self):
                return MyEncoder()

    Attributes:
        tolerance: Largest difference between a frame computed in a padded batch and alone, relative to the largest
            value of the clip's frames (at least 1).
        device_reads: How often encoding a batch may read a value back from the device, and so wait for it: 0, but for
            what a library's model does inside. Sizes are known from the audio's shape.
        folder: An empty folder, where `make_encoder` can save a model to load.
    """

    tolerance: float = 1e-4
    device_reads: int = 0
    folder: Path

    def make_encoder(self) -> Encoder:
        """A new encoder, always with the same weights."""
        raise NotImplementedError

    @pytest.fixture
    def encoder(self, tmp_path: Path) -> Encoder:
        """The encoder under test."""
        self.folder = tmp_path
        return self.make_encoder()

    def test_attributes(self, encoder: Encoder) -> None:
        """Every attribute of the interface is there, of its type and in its range."""
        assert isinstance(encoder, Encoder)
        assert type(encoder.sample_rate_hz) is int
        assert encoder.sample_rate_hz > 0
        assert type(encoder.frame_rate_hz) is float
        assert 0 < encoder.frame_rate_hz <= encoder.sample_rate_hz
        assert type(encoder.output_dim) is int
        assert encoder.output_dim > 0
        assert type(encoder.num_layers) is int
        assert encoder.num_layers > 0
        assert type(encoder.causal) is bool

    def test_output_lengths_are_the_same_for_int_and_tensor(self, encoder: Encoder) -> None:
        """The same whole number for an int and in a tensor, at least 1, never falling, at the frame rate."""
        second = encoder.sample_rate_hz
        samples = sorted({*range(1, 300), *range(1, 3 * second, 97), second, 2 * second, 29 * second})
        as_tensor = encoder.output_lengths(torch.tensor(samples))
        as_int = [encoder.output_lengths(num_samples) for num_samples in samples]
        assert not as_tensor.is_floating_point()
        assert all(type(length) is int for length in as_int)
        assert as_tensor.tolist() == as_int
        assert as_int[0] >= 1
        assert as_int == sorted(as_int)
        assert abs(as_int[-1] - 29 * encoder.frame_rate_hz) <= 2

    def test_output_lengths_are_exact(self, encoder: Encoder) -> None:
        """A clip alone gives exactly the frames announced, around every edge."""
        frame = round(encoder.sample_rate_hz / encoder.frame_rate_hz)
        for num_samples in [1, 2, frame - 1, frame, frame + 1, 2 * frame, 3 * frame - 1, 3 * frame, 5 * frame + 7]:
            stored = encoder.encode(*_batch([_noise(max(num_samples, 1))]))
            expected = encoder.output_lengths(max(num_samples, 1))
            assert stored.lengths.tolist() == [expected], num_samples
            assert stored.data.shape[1] == expected, num_samples

    def test_shapes_and_round_trip(self, encoder: Encoder) -> None:
        """``forward`` is ``embed(encode(…))``: ``[N, T, K, D]``, finite, floating point."""
        audio_NL, lengths_N = _clips(encoder)
        output = encoder(audio_NL, lengths_N)
        stored = encoder.encode(audio_NL, lengths_N)
        again = encoder.embed(stored)
        assert isinstance(output, EncoderOutput)
        assert isinstance(stored, Stored)
        num_frames = encoder.output_lengths(int(lengths_N.max()))
        assert output.frames.shape == (len(lengths_N), num_frames, encoder.num_layers, encoder.output_dim)
        assert output.frames.is_floating_point()
        assert output.frames.isfinite().all()
        assert output.lengths.tolist() == encoder.output_lengths(lengths_N).tolist()
        torch.testing.assert_close(output.frames, again.frames, rtol=0, atol=0)

    def test_a_stored_clip_embeds_alone(self, encoder: Encoder) -> None:
        """What is stored of one clip, cut to its length as a shard holds it, gives the frames it gave in the batch."""
        stored = encoder.encode(*_clips(encoder))
        frames = encoder.embed(stored).frames
        for index, length in enumerate(stored.lengths.tolist()):
            alone = encoder.embed(Stored(stored.data[index : index + 1, :length].clone(), stored.lengths[index, None]))
            self._assert_equal(alone.frames[0], frames[index, :length])

    def test_frames_differ(self, encoder: Encoder) -> None:
        """Frames depend on the audio: otherwise the other tests would show nothing."""
        audio_NL, lengths_N = _clips(encoder)
        output = encoder(audio_NL, lengths_N)
        shared = output.frames[:2, : int(output.lengths[:2].min())]
        assert (shared[0] - shared[1]).abs().max() > 10 * self.tolerance

    def test_padding_changes_no_valid_frame(self, encoder: Encoder) -> None:
        """Clips of several lengths, padded further than the longest, give the frames they give alone."""
        audio_NL, lengths_N = _clips(encoder)
        padded = torch.nn.functional.pad(audio_NL, (0, encoder.sample_rate_hz // 3))
        output = encoder(padded, lengths_N)
        for index, length in enumerate(lengths_N.tolist()):
            alone = encoder(audio_NL[index : index + 1, :length], lengths_N[index : index + 1])
            num_frames = int(output.lengths[index])
            assert alone.lengths.tolist() == [num_frames]
            self._assert_equal(output.frames[index, :num_frames], alone.frames[0])

    def test_zero_beyond_lengths(self, encoder: Encoder) -> None:
        """Stored data and frames are exactly zero beyond each length."""
        stored = encoder.encode(*_clips(encoder))
        frames = encoder.embed(stored).frames
        assert stored.lengths.min() < stored.data.shape[1]
        for index, length in enumerate(stored.lengths.tolist()):
            assert not stored.data[index, length:].any()
            assert not frames[index, length:].any()

    def test_frozen(self, encoder: Encoder) -> None:
        """No parameter takes gradient, and ``train()`` changes neither mode nor output."""
        audio_NL, lengths_N = _clips(encoder)
        before = encoder(audio_NL, lengths_N).frames
        encoder.train()
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        torch.testing.assert_close(encoder(audio_NL, lengths_N).frames, before, rtol=0, atol=0)

    def test_a_second_encoder_is_equal(self, encoder: Encoder) -> None:
        """The same arguments give the same encoder: nothing in it is drawn at random."""
        clips = _clips(encoder)
        torch.testing.assert_close(self.make_encoder()(*clips).frames, encoder(*clips).frames, rtol=0, atol=0)

    def test_reads_little_back_from_the_device(self, encoder: Encoder) -> None:
        """Neither ``encode`` nor ``embed`` waits for the device, once the first batch has filled what is cached."""
        clips = _clips(encoder)
        encoder.embed(encoder.encode(*clips))
        with DeviceReads() as reads:
            encoder.embed(encoder.encode(*clips))
        assert len(reads.found) <= self.device_reads, "\n".join(reads.found)

    def test_silence_is_finite(self, encoder: Encoder) -> None:
        """Digital silence, down to a single sample, gives finite frames."""
        for num_samples in (1, encoder.sample_rate_hz // 2):
            frames = encoder(*_batch([torch.zeros(num_samples)])).frames
            assert frames.isfinite().all()

    def test_a_span_hears_nothing_past_its_end(self, encoder: Encoder) -> None:
        """Causal only: other audio from a span's end on changes no frame of the span, and does change later ones."""
        if not encoder.causal:
            pytest.skip("not causal: every span is encoded alone")
        rate = encoder.sample_rate_hz
        audio = _noise(2 * rate)
        before = encoder(*_batch([audio])).frames[0]
        on_an_edge = [round(count * 1000 / encoder.frame_rate_hz) / 1000 for count in (4, 7)]
        for end_s in (*on_an_edge, 0.5, 0.777, 1.001, 1.6):
            changed = audio.clone()
            changed[round(end_s * rate) :] = 3 * _noise(2 * rate, seed=1)[round(end_s * rate) :]
            after = encoder(*_batch([changed])).frames[0]
            first, last = encoder.frame_span(0.0, end_s)
            assert last > first
            self._assert_equal(after[first:last], before[first:last])
            assert (after[last:] - before[last:]).abs().max() > 10 * self.tolerance

    def test_a_prefix_gives_the_first_frames(self, encoder: Encoder) -> None:
        """Causal only: audio cut at a frame's edge gives the first frames of the whole."""
        if not encoder.causal:
            pytest.skip("not causal: every span is encoded alone")
        samples_per_frame = encoder.sample_rate_hz / encoder.frame_rate_hz
        audio = _noise(2 * encoder.sample_rate_hz)
        whole = encoder(*_batch([audio])).frames[0]
        for num_frames in (1, 5, 11):
            prefix = encoder(*_batch([audio[: round(num_frames * samples_per_frame)]])).frames[0]
            assert prefix.shape[0] == num_frames
            self._assert_equal(prefix, whole[:num_frames])

    def _assert_equal(self, actual: Tensor, expected: Tensor) -> None:
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=self.tolerance * scale)


def _noise(num_samples: int, seed: int = 0) -> Tensor:
    """Noise whose loudness wanders, so that no statistic of a part is that of the whole."""
    generator = torch.Generator().manual_seed(1000 * seed + num_samples)
    noise = torch.randn(num_samples, generator=generator)
    swell = torch.sin(torch.arange(num_samples) * (7.0 / max(num_samples, 2000)) + seed).abs()
    return (0.02 + 0.2 * swell) * noise


def _batch(clips: list[Tensor]) -> tuple[Tensor, Tensor]:
    lengths_N = torch.tensor([len(clip) for clip in clips])
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True), lengths_N


def _clips(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Four clips of a sixth of a second to a second, at lengths that are no whole frames; one of 5 samples."""
    rate = encoder.sample_rate_hz
    return _batch([_noise(num_samples) for num_samples in (rate, rate // 6 + 13, 5, rate // 2 + 1)])
