import json

import numpy as np
import pytest

from salad_lightning.demo.recognizer_training import train_recognizer
from salad_lightning.demo.world import build_world
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.evaluation.transcription import normalise


def test_it_learns_and_is_a_folder_that_the_filter_loads(tmp_path):
    world = build_world(0)
    short = train_recognizer(tmp_path / "short", world, num_clips=12, steps=4)
    longer = train_recognizer(tmp_path / "longer", world, num_clips=12, steps=60)
    assert longer["frame_accuracy"] > short["frame_accuracy"] + 0.1
    assert np.isfinite(longer["ctc_loss"])
    vocab = json.loads((tmp_path / "longer" / "vocab.json").read_text())
    assert sorted(vocab.values()) == list(range(len(vocab)))
    recognizer = Recognizer(str(tmp_path / "longer"))
    assert recognizer.sample_rate_hz == 16_000
    noise = np.random.default_rng(0).standard_normal(16_000).astype(np.float32)
    written = normalise(recognizer.transcribe([noise])[0])
    assert set(written) <= set("abcdefghijklmnopqrstuvwxyz ")


def test_names_are_spelled_by_sounds_and_other_words_as_a_whole():
    from salad_lightning.demo.recognizer_training import _tokens

    assert _tokens("rahday") == ["r", "ah", "d", "ay"]
    assert _tokens("of the") == ["of", "|", "the"]
    assert "".join(_tokens("shoochee.")) == "shoochee"


@pytest.fixture(autouse=True)
def _speaks():
    pytest.importorskip("espeakng_loader")
