import json

import pytest
import soundfile
import torch

from salad_lightning.demo.encoder_training import train_encoder
from salad_lightning.demo.speech import SAMPLE_RATE_HZ, natural_speech, speak_all, spoken_questions
from salad_lightning.demo.world import build_world
from salad_lightning.encoders.causal_conv import CausalConvEncoder


def test_manifest_and_audio(tmp_path):
    world = build_world(0)
    utterances = [*natural_speech(world, 3, seed=0), *spoken_questions(world, "test", 1, seed=0)]
    seconds = speak_all(utterances, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    heard = [utterance.fields.get("prompt", utterance.text) for utterance in utterances]
    assert [row["text"] for row in rows] == heard
    total = 0.0
    for row in rows:
        audio, rate_hz = soundfile.read(tmp_path / row["audio"])
        assert rate_hz == SAMPLE_RATE_HZ
        total += len(audio) / rate_hz
        assert " ".join(word for word, _, _ in row["words"]) == row["text"]
        assert row["words"][-1][2] <= len(audio) / rate_hz + 1e-9
        assert {"speaker", "domain"} <= row.keys()
    assert total == pytest.approx(seconds)
    question = rows[-1]
    assert question["speech_end_s"] == pytest.approx(question["words"][-1][2], abs=0.002)
    audio, rate_hz = soundfile.read(tmp_path / question["audio"])
    assert len(audio) / rate_hz > question["speech_end_s"] + 0.2, "the answer is spoken, so that the prompt goes on"
    assert {"choices", "answer", "prompt"} <= question.keys()


def test_processes_write_the_same(tmp_path):
    utterances = natural_speech(build_world(0), 70, seed=0)
    speak_all(utterances, tmp_path / "one")
    speak_all(utterances, tmp_path / "two", workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.slow
def test_encoder_learns_phonemes(tmp_path):
    report = train_encoder(tmp_path, num_clips=60, steps=40, batch_size=16)
    assert report.frame_accuracy > 0.35  # the most frequent phoneme alone makes less than 0.15
    assert report.num_phonemes > 30
    encoder = CausalConvEncoder(str(tmp_path))
    assert encoder.frame_rate_hz == 12.5
    assert encoder(torch.randn(1, 16000) * 0.1, torch.tensor([16000])).frames.isfinite().all()
