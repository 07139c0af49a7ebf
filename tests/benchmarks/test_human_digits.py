"""The digits benchmark on a synthetic folder of the same shape: every command runs, and the report adds up."""

import csv
import importlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(autouse=True)
def _on_path(monkeypatch):
    """The benchmarks are scripts: their folder is on the path when they run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name):
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Ten digits by two synthetic voices, 8 kHz FLAC, as tab-separated manifest."""
    espeak = pytest.importorskip("salad_lightning.synthesizers.espeak")
    folder = tmp_path_factory.mktemp("digits")
    rows = []
    for speaker, voice in (("ada", "en-us+f2"), ("bob", "en-us+m3")):
        synthesizer = espeak.EspeakSynthesizer(voice)
        for word in DIGITS:
            audio = torch.from_numpy(synthesizer.speak(word).audio)
            low = torchaudio.functional.resample(audio, synthesizer.sample_rate_hz, 8000).numpy()
            path = f"audio/{speaker}/{word}.flac"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path, low, 8000)
            rows.append([path, word, speaker, f"{len(low) / 8000:.3f}"])
    with (folder / "manifest.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["audio", "text", "speaker", "seconds"], *rows])
    return folder


def test_answers_are_right_and_choices_differ():
    tasks = load("human_digits_tasks")
    rng = random.Random(0)
    expected = {
        "digit": lambda d: [DIGITS[i] for i in d],
        "read": lambda d: [DIGITS[i] for i in d],
        "add": lambda d: [tasks.NUMBERS[d[0] + d[1]]],
        "larger": lambda d: [DIGITS[d[0] if d[0] > d[1] else d[1]]],
        "last": lambda d: [DIGITS[d[-1]]],
        "count": lambda d: [["one", "two", "three", "four"][len(d) - 1]],
    }
    assert set(expected) == set(tasks.TASKS)
    for name, solve in expected.items():
        for _ in range(100):
            item = tasks.draw_item(name, rng)
            assert item.choices[item.answer].split() == solve(item.digits)
            assert len(set(item.choices)) == (10 if name == "digit" else 4)
            assert item.speech.split() == [DIGITS[digit] for digit in item.digits]
            assert {len(choice.split()) for choice in item.choices} == {len(item.choices[item.answer].split())}


def test_strings_of_recordings_keep_their_words_at_their_times():
    corpus, sound = load("human_digits_corpus"), load("human_digits_sound")
    rng = random.Random(0)
    clips = [np.full(1600, level, dtype=np.float32) for level in (0.25, 0.5)]
    audio, words = corpus.say(clips, ["two", "six"], sound.Voicing(gain=0.5), rng)
    for (word, start_s, end_s), expected, level in zip(words, ("two", "six"), (0.125, 0.25), strict=True):
        part = audio[round(start_s * 16_000) + 16 : round(end_s * 16_000) - 16]
        assert word == expected
        np.testing.assert_allclose(part, level)
    assert words[0][2] < words[1][1]
    assert np.count_nonzero(audio) == 3200


def test_faster_speech_is_shorter_and_higher():
    corpus, sound = load("human_digits_corpus"), load("human_digits_sound")
    tone = np.sin(2 * np.pi * 500 * np.arange(16_000) / 16_000).astype(np.float32)
    audio, words = corpus.say([tone], ["one"], sound.Voicing(speed=1.25), random.Random(0))
    start, end = (round(time * 16_000) for time in words[0][1:])
    assert end - start == pytest.approx(12_800, abs=2)
    spectrum = np.abs(np.fft.rfft(audio[start:end]))
    assert spectrum.argmax() * 16_000 / (end - start) == pytest.approx(625, abs=2)


def test_the_encoder_ignores_padding_and_loudness(tmp_path):
    """Frames of a clip are the same alone and in a padded batch, and (nearly) at a tenth of the loudness."""
    module = load("human_digits_encoder")
    encoder = module.ClipConvEncoder()
    with torch.no_grad():  # as if trained: batch statistics that are not those of a new layer
        for name, value in encoder.state_dict().items():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
    encoder.save_pretrained(tmp_path)
    encoder = module.ClipConvEncoder(str(tmp_path))
    audio = torch.randn(3, 20_000) * 0.1
    lengths = torch.tensor([20_000, 9_001, 1])
    together = encoder.encode(audio, lengths)
    assert together.lengths.tolist() == [16, 8, 1]
    for row, length in enumerate(lengths.tolist()):
        alone = encoder.encode(audio[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together.data[row, : alone.data.shape[1]], alone.data[0], rtol=1e-4, atol=1e-5)
        assert not together.data[row, alone.data.shape[1] :].any()
    louder = encoder.encode(audio * 0.1, lengths)
    torch.testing.assert_close(louder.data[0], together.data[0], rtol=0.01, atol=0.01)


def test_every_word_is_one_token(tmp_path):
    model = pytest.importorskip("salad_lightning.model.llm")
    tasks, corpus = load("human_digits_tasks"), load("human_digits_corpus")
    corpus.write_llm_config(tmp_path)
    tokenizer = model.load_tokenizer(str(tmp_path), model.load_config(str(tmp_path)))
    text = "read: " + " ".join(tasks.NUMBERS) + " ="
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(text)["input_ids"]) == len(tasks.NUMBERS) + 3


def test_a_speaker_without_a_digit_is_named(tmp_path):
    corpus = load("human_digits_corpus")
    soundfile.write(tmp_path / "a.flac", np.zeros(800), 8000)
    (tmp_path / "manifest.tsv").write_text("audio\ttext\tspeaker\na.flac\tone\tada\n")
    with pytest.raises(corpus.UserError, match=r"'ada' has no recording of 'zero'"):
        corpus.write_speech(tmp_path, "train", tmp_path / "out", num_items=3, seed=0)


def test_unknown_speaker_is_a_users_mistake(recordings, tmp_path):
    command = [sys.executable, BENCHMARKS / "human_digits.py", "--data", recordings, "--output", tmp_path]
    done = subprocess.run([*command, "--test-speaker", "eve"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "eve" in done.stderr
    assert "ada" in done.stderr


@pytest.mark.slow
def test_whole_benchmark_on_synthetic_recordings(recordings, tmp_path):
    benchmark, tasks = load("human_digits"), load("human_digits_tasks")
    steps = dict.fromkeys(("llm_steps", "warmup_steps", "stage1_steps"), 3)
    size = benchmark.Size(text_items=300, train_items=40, test_items=10, encoder_steps=2, encoder_clips=8, **steps)
    report = benchmark.run(recordings, tmp_path, test_speaker="bob", size=size)
    json.dumps(report)
    assert set(report["speakers"]) == {"bob"}
    assert set(report["mean"]) == {*tasks.TASKS, "all"}
    for figures in report["mean"].values():
        assert all(0 <= figures[name] <= 1 for name in ("speech_accuracy", "text_accuracy", "base_text_accuracy"))
        assert figures["gap"] == pytest.approx(figures["base_text_accuracy"] - figures["speech_accuracy"])
        assert figures["misalignment"] > 0
        assert figures["forgetting"] >= 0
    # The test heard bob only, training ada only.
    config = (tmp_path / "bob.yaml").read_text()
    assert "shards/train/ada" in config
    assert "shards/train/bob" not in config
    # Nothing runs again.
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / ".steps").glob("*.json")}
    again = benchmark.run(recordings, tmp_path, test_speaker="bob", size=size)
    assert again["speakers"] == report["speakers"]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
