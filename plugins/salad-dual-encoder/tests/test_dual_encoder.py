"""The contract of every encoder on four pairs, what the joined frames are, and a run of the command line."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from salad_dual_encoder.encoder import DualEncoder

from salad_lightning.cli import main
from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.encoders.whisper import WhisperEncoder
from salad_lightning.errors import UserError
from salad_lightning.testing.contracts.encoder import EncoderContract
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny_encoders import (
    save_tiny_causal_conv,
    save_tiny_mimi,
    save_tiny_wavlm,
    save_tiny_whisper,
)


def whisper(folder, layers="last"):
    return WhisperEncoder(save_tiny_whisper(folder / "whisper"), layers=layers)


class TestWhisperAndWavLM(EncoderContract):
    """SALMONN's arrangement: two encoders at 50 frames a second, of which one gives a frame less."""

    def make_encoder(self):
        return DualEncoder(whisper(self.folder), SelfSupervisedEncoder(save_tiny_wavlm(self.folder / "wavlm")))


class TestWhisperAndLogMel(EncoderContract):
    def make_encoder(self):
        return DualEncoder(whisper(self.folder, "all"), LogMelEncoder())


class TestMimiAndWhisper(EncoderContract):
    """12.5 and 50 frames a second, of audio at 24 and at 16 kHz."""

    # Transformers' (see Mimi's own test), and torchaudio's of a length that is on the host anyway.
    device_reads = 2

    def make_encoder(self):
        return DualEncoder(MimiEncoder(save_tiny_mimi(self.folder / "mimi")), whisper(self.folder))


class TestTwoCausalEncoders(EncoderContract):
    def make_encoder(self):
        first = CausalConvEncoder(save_tiny_causal_conv(self.folder / "one"))
        return DualEncoder(first, CausalConvEncoder(save_tiny_causal_conv(self.folder / "two", seed=1)))


def test_causal_only_where_both_are(tmp_path):
    causal = CausalConvEncoder(save_tiny_causal_conv(tmp_path / "conv"))
    assert DualEncoder(causal, causal).causal
    assert not DualEncoder(causal, whisper(tmp_path)).causal


@torch.no_grad()
def test_frames_are_those_of_the_two_side_by_side(tmp_path):
    """Each common frame holds four of Whisper's, in their order, and one of the slower encoder's."""
    slow, fast = CausalConvEncoder(save_tiny_causal_conv(tmp_path / "conv")), whisper(tmp_path)
    audio, lengths = 0.1 * torch.randn(1, 16_000), torch.tensor([16_000])
    frames = DualEncoder(slow, fast)(audio, lengths).frames[0, :, 0]
    width = slow.output_dim
    parts = [part(audio, lengths).frames[0, :, 0] for part in (slow, fast)]
    normal = [(part - part.mean(1, keepdim=True)) / (part.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
              for part in parts]  # fmt: skip
    assert frames.shape == (13, width + 4 * fast.output_dim)
    torch.testing.assert_close(frames[:, :width], normal[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[:12, width:], normal[1][:48].reshape(12, -1), rtol=0, atol=1e-5)
    # The last is begun: 2 of its 4 frames are there.
    torch.testing.assert_close(frames[12, width : width + 32], normal[1][48:].flatten(), rtol=0, atol=1e-5)
    assert (frames[12, width + 32 :] == 0).all()


def test_layers(tmp_path):
    three = whisper(tmp_path, "all")
    assert three.num_layers == 3
    wavlm = SelfSupervisedEncoder(save_tiny_wavlm(tmp_path / "wavlm"))
    joined = DualEncoder(three, LogMelEncoder())
    frames = joined(torch.randn(1, 8000), torch.tensor([8000])).frames
    assert frames.shape[2] == joined.num_layers == 3
    # The one layer of the second encoder stands beside each of the first's.
    assert torch.equal(frames[..., 0, three.output_dim :], frames[..., 2, three.output_dim :])
    deep = SelfSupervisedEncoder(save_tiny_wavlm(tmp_path / "deep", num_hidden_layers=4))
    assert wavlm.num_layers == 3
    with pytest.raises(UserError, match="3 and 5 layers"):
        DualEncoder(three, deep)


def test_rates_that_do_not_fit(tmp_path):
    encoder, other = whisper(tmp_path), LogMelEncoder()
    other.frame_rate_hz = 80.0
    with pytest.raises(UserError, match="50 and 80 frames a second"):
        DualEncoder(encoder, other)


def test_the_identity_is_that_of_both(tmp_path):
    def build(seed):
        folder = save_tiny_causal_conv(tmp_path / str(seed), seed=seed)
        return DualEncoder(LogMelEncoder(), CausalConvEncoder(folder)).identity()

    assert build(0) == build(0) != build(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    world = save_tiny_world(tmp_path_factory.mktemp("dual"))
    overlay = {
        "class_path": "DualEncoder",
        "init_args": {
            "first": {"class_path": "WhisperEncoder", "init_args": {"path": save_tiny_whisper(world.folder / "w")}},
            "second": {
                "class_path": "SelfSupervisedEncoder",
                "init_args": {"path": save_tiny_wavlm(world.folder / "s")},
            },
        },
    }
    (world.folder / "dual.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"encoder": overlay}}}))
    options = ["--config", str(world.folder / "dual.yaml"), "--trainer.max_steps=50"]
    return world.run("fit", "dual", *options, "--trainer.callbacks+=FinalCheckpoint")


@pytest.mark.slow
def test_fifty_steps_of_a_recipe(run):
    loss = run.column("train/loss")
    assert len(loss) == 50
    assert all(0 <= value < 10 for value in loss)
    assert "model.layer_mix" in run.checkpoint("final.ckpt")["state_dict"]


@pytest.mark.slow
def test_both_encoders_are_exported(run, tmp_path):
    assert main(["export", str(run.folder / "checkpoints" / "final.ckpt"), str(tmp_path / "out")]) == 0
    encoder = json.loads((tmp_path / "out" / "config.json").read_text())["encoder"]["init_args"]
    folders = [encoder[name]["init_args"]["path"]["folder"] for name in ("first", "second")]
    assert len(set(folders)) == 2
    assert all((tmp_path / "out" / folder / "config.json").is_file() for folder in folders)
