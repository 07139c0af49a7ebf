"""A pool of three topics, one of which the synthesizer only mumbles, and all that a selection from it needs."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny_ctc import save_tiny_ctc

# Words whose tones are 100 Hz apart or more, so that a small recognizer tells them from each other.
TOPICS = {
    "plants": ["tree", "seed", "fern", "grass"],
    "outside": ["bird", "horse", "cloud", "sand"],
    "broken": ["pond", "flute", "clay", "horn"],
}
WORDS = [word for topic in TOPICS.values() for word in topic]
TONES = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"


def sentence(rng, words, count):
    """Words of a topic, none twice in a row: the recognizer hears long tones as one."""
    said = [rng.choice(words)]
    while len(said) < count:
        said.append(rng.choice([word for word in words if word != said[-1]]))
    return " ".join(said)


def pool(per_topic=60, num_words=8, seed=0):
    rng = random.Random(seed)
    rows = {}
    for topic, words in TOPICS.items():
        texts = set()
        while len(texts) < per_topic:
            texts.add(sentence(rng, words, num_words))
        rows |= dict.fromkeys(sorted(texts), topic)
    shuffled = rng.sample(sorted(rows), len(rows))
    return [{"text": text, "topic": rows[text]} for text in shuffled]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def stage1(tmp_path_factory):
    """Checkpoints of a Stage I of seconds."""
    world = save_tiny_world(tmp_path_factory.mktemp("stage1"))
    callbacks = ("PreDecayCheckpoint", "FinalCheckpoint")
    run = world.run("fit", "out", "--trainer.max_steps=6", *(f"--trainer.callbacks+={name}" for name in callbacks))
    return run.folder / "checkpoints"


@pytest.fixture(scope="session")
def recognizer(tmp_path_factory):
    """A CTC model that understands the tones."""
    return save_tiny_ctc(tmp_path_factory.mktemp("ctc"), WORDS)


@pytest.fixture
def settings(tmp_path, stage1, recognizer):
    """The selection as plain data; `write` puts it into a file."""
    write_jsonl(tmp_path / "pool.jsonl", pool())
    return {
        "texts": {"paths": [str(tmp_path / "pool.jsonl")]},
        "embed": {"dim": 8},
        "cluster": {"num_clusters": 3},
        "probe": {"texts_per_cluster": 6, "synthesizer": TONES, "voices": [{"mumbles_at": TOPICS["broken"]}]},
        "score": {
            "checkpoint": str(stage1 / "pre_decay.ckpt"),
            "recognizer": str(recognizer),
            "text_words": [1, 2],
            "speech_words": [2, 4],
            "accelerator": "cpu",
        },
        "draw": {"seconds": 60, "max_share": 0.8},
        "output": str(tmp_path / "selection"),
    }


@pytest.fixture
def write(tmp_path):
    def to_file(settings):
        path = tmp_path / "select.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return to_file
