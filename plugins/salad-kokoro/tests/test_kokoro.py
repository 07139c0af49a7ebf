"""The real model class, small and with random weights saved to a folder, through contract and command line."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

kokoro = pytest.importorskip("kokoro", reason="kokoro does not install on this version of Python")

from salad_kokoro.synthesizer import KokoroSynthesizer, _parts, _Word  # noqa: E402 needs kokoro

from salad_lightning.cli import main  # noqa: E402
from salad_lightning.data.format import decode, read_shard  # noqa: E402
from salad_lightning.errors import UserError  # noqa: E402
from salad_lightning.testing.contracts.synthesizer import SynthesizerContract  # noqa: E402

pytestmark = pytest.mark.slow
PACKAGE = Path(__file__).parents[1]
PAGES = [PACKAGE / "README.md", *PACKAGE.parents[1].glob("docs/guides/stage2.md")]
SYMBOLS = (
    ';:,.!?—…"()“” ̃ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ'
)
# The published configuration with sizes as small as the classes allow (their decoder wants 512 twice); the product of
# the upsampling rates and the hop is its 300.
CONFIG = {
    "n_token": 178,
    "hidden_dim": 512,
    "style_dim": 128,
    "n_layer": 1,
    "max_dur": 50,
    "dropout": 0.2,
    "n_mels": 80,
    "text_encoder_kernel_size": 5,
    "plbert": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "num_hidden_layers": 1,
        "dropout": 0.1,
    },
    "istftnet": {
        "upsample_kernel_sizes": [20, 12],
        "upsample_rates": [10, 6],
        "gen_istft_hop_size": 5,
        "gen_istft_n_fft": 20,
        "resblock_dilation_sizes": [[1, 3, 5]],
        "resblock_kernel_sizes": [3],
        "upsample_initial_channel": 512,
    },
    "vocab": {symbol: index + 1 for index, symbol in enumerate(SYMBOLS)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kokoro")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "voices").mkdir()
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    model = kokoro.KModel(repo_id="none", config=CONFIG, model=str(folder / "empty.pth"))
    (folder / "empty.pth").unlink()
    parts = ("bert", "bert_encoder", "predictor", "text_encoder", "decoder")
    # About three frames a phoneme, as in speech: sigmoids of 50 units sum to it.
    model.predictor.duration_proj.linear_layer.bias.data.fill_(-2.7)
    torch.save({name: getattr(model, name).state_dict() for name in parts}, folder / "kokoro-v1_0.pth")
    for voice in ("af_heart", "bm_george"):
        torch.save(torch.randn(510, 1, 256), folder / "voices" / f"{voice}.pt")
    return folder


def build(folder, **settings):
    return KokoroSynthesizer(str(folder), phonemizer="espeak", device="cpu", **settings)


class TestKokoroSynthesizer(SynthesizerContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder):
        self.folder = folder

    def make_synthesizer(self):
        return build(self.folder)


def test_seed_and_voice_are_heard(folder):
    text = "the river runs to the sea"
    one, other = build(folder).speak(text, seed=1), build(folder).speak(text, seed=2)
    assert one.words == other.words  # durations have nothing random in them
    assert np.abs(one.audio - other.audio).max() > 1e-4
    assert build(folder, voice="bm_george").speak(text).words != one.words


def test_times_are_sums_of_the_models_durations(folder):
    """Against the model itself, asked for the same phonemes."""
    synthesizer = build(folder)
    speech = synthesizer.speak("sea and sun")
    words = synthesizer._words("sea and sun")
    phonemes = " ".join(word.phonemes for word in words)
    durations = synthesizer._model(phonemes, synthesizer._styles[len(phonemes) - 1], 1.0, return_output=True).pred_dur
    assert len(speech.audio) == 600 * int(durations.sum())
    at = 1  # after the mark of the beginning
    for word, timed in zip(words, speech.words, strict=True):
        assert timed.start_s == pytest.approx(int(durations[:at].sum()) / 40)
        assert timed.end_s == pytest.approx(int(durations[: at + len(word.phonemes)].sum()) / 40)
        at += len(word.phonemes) + 1


def test_a_text_longer_than_the_context(folder):
    text = "One more sentence about the river and the sea. " * 4
    speech = build(folder).speak(text)
    assert " ".join(word.word for word in speech.words) == text.strip()
    starts = [word.start_s for word in speech.words]
    assert starts == sorted(starts)
    assert speech.words[-1].end_s <= len(speech.audio) / 24_000


def test_parts_end_with_a_sentence_where_they_can():
    words = [_Word(text, "aaaa") for text in ["one", "two.", "three", "four", "five"]]
    assert [[word.text for word in part] for part in _parts(words, 15)] == [["one", "two."], ["three", "four", "five"]]
    assert [len(part) for part in _parts([_Word("x", "aaaa")] * 5, 9)] == [2, 2, 1]


def test_a_mark_without_a_sound_joins_its_neighbour(folder):
    assert [word.word for word in build(folder).speak("well – then").words] == ["well –", "then"]


def test_mistakes(folder, tmp_path):
    with pytest.raises(UserError, match="its voices are: af_heart, bm_george"):
        build(folder, voice="nobody")
    with pytest.raises(UserError, match=r"holds no \.pth file"):
        build(tmp_path)
    with pytest.raises(ValueError, match="speed"):
        build(folder, speed=0)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_of_the_pages(page, folder, tmp_path, monkeypatch):
    """The model at its published name, a phonemizer that needs no download, in this process; the rest as it stands."""
    commands = re.findall(r"^salad-lightning (synthesize (?:.*\\\n)*.*)$", page.read_text(), re.MULTILINE)
    (command,) = [command for command in commands if "Kokoro" in command]
    command = command.replace("\\\n", " ").replace("--workers 4", "")
    words = shlex.split(command.replace("voice: af_heart", "voice: af_heart, phonemizer: espeak"))
    (tmp_path / "hexgrad").mkdir()
    (tmp_path / "hexgrad" / "Kokoro-82M").symlink_to(folder)
    manifest = tmp_path / words[words.index("--manifest") + 1]
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"text": "the river runs", "cluster": 3}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    output = words[words.index("--output") + 1]
    (raw,) = read_shard(tmp_path / output / f"{Path(output).name}-000000.tar")
    sample = decode(raw, source="", sample_rate_hz=24_000)
    assert sample.fields["cluster"] == 3
    assert [word.word for word in sample.words] == ["the", "river", "runs"]
    np.testing.assert_allclose(len(sample.audio) / 24_000, sample.fields["seconds"], atol=1e-3)
