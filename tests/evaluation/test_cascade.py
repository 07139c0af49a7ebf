"""The cascade's sources, as `SpokenEvaluation` adds them to a test: the same items, examples and settings."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from salad_lightning.data.audio import encode_flac
from salad_lightning.data.choice import ChoiceDocuments
from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.stream import EvaluationStream
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones
from salad_lightning.testing.tiny import save_tiny_tokenizer
from salad_lightning.training.spoken_evaluation import SpokenEvaluation

PROMPT = "Q: {speech}\nA: {answer}"
TEXTS = ("the quick fox", "the lazy dog jumps", "a star", "the small boat")


class Deaf:
    """In place of a recognizer."""

    name, sample_rate_hz = "deaf", 16_000

    def __init__(self, *_):
        pass

    def transcribe(self, clips):
        return ["so"] * len(clips)


def samples(folder, texts, broken=()):
    with ShardWriter(folder, "s", 0) as writer:
        for number, text in enumerate(texts):
            record = {"text": text, "choices": ["yes", "no"], "answer": number % 2, "prompt": PROMPT}
            audio = b"no audio" if number in broken else encode_flac(speak_tones(text)[0], 16_000)
            writer.write(f"k{number}", record, audio)
    return folder


@pytest.fixture
def spec(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    return SequenceSpec(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        context=160,
        sample_rate_hz=16_000,
        causal=True,
        num_frames=lambda count: math.ceil(count / 320),
        frame_span=lambda start_s, end_s: (int(start_s * 50), int(end_s * 50)),
        num_positions=lambda frames, _: frames,
    )


@pytest.fixture
def prepared(tmp_path, spec, monkeypatch):
    """What is tested after the callback's setup, by name."""
    monkeypatch.setattr("salad_lightning.training.spoken_evaluation.Recognizer", Deaf)

    def prepare(*sources):
        data = SpeechDataModule(test=list(sources))
        data.spec = spec
        trainer = SimpleNamespace(
            datamodule=data,
            default_root_dir=tmp_path / "run",
            fast_dev_run=False,
            world_size=1,
            is_global_zero=True,
            strategy=SimpleNamespace(root_device=torch.device("cpu"), barrier=lambda: None),
        )
        SpokenEvaluation("deaf").setup(trainer, None, "test")
        return {source.name: source for source in data.test}

    return prepare


def documents(source, spec):
    return list(EvaluationStream(source, spec, rows_per_batch=1).documents())


def shown(document, spec):
    """How many examples a document begins with."""
    return spec.tokenizer.decode(document.token_ids.tolist()).count("Q:") - 1


@pytest.mark.parametrize("hear_shots", [True, False])
def test_it_has_the_examples_of_the_heard_question(tmp_path, spec, prepared, hear_shots):
    shots = str(samples(tmp_path / "shots", TEXTS))
    builder = ChoiceDocuments(shots=shots, num_shots=3, hear_shots=hear_shots)
    # Two builders on the same shards: each has examples of its own.
    bare = Source(str(samples(tmp_path / "questions", [*TEXTS, "a"])), ChoiceDocuments(), name="bare")
    found = prepared(Source(bare.shards, builder, name="arc"), bare)
    assert list(found) == ["arc", "bare", "arc (cascade)", "bare (cascade)"]
    counts = [shown(document, spec) for document in documents(found["arc"], spec)]
    cascade = documents(found["arc (cascade)"], spec)
    assert [shown(document, spec) for document in cascade] == counts
    if hear_shots:
        assert 0 < min(counts) < 3  # of text alone all three fit
    # Not the examples that differ from what was heard: those that were heard.
    keys = [document.info.fields["shots"] for document in cascade]
    assert keys[0] == (["k1", "k2", "k3"])[: counts[0]]
    assert [shown(document, spec) for document in documents(found["bare (cascade)"], spec)] == [0] * 10


def test_it_leaves_out_what_the_source_may_leave_out(tmp_path, spec, prepared, caplog):
    long = " ".join(TEXTS * 3)  # more positions than the context has; not as text
    path = str(samples(tmp_path / "questions", [*TEXTS, long], broken={1}))
    found = prepared(Source(path, ChoiceDocuments(), name="arc", max_bad_fraction=0.5))
    keys = {name: {document.info.key for document in documents(source, spec)} for name, source in found.items()}
    assert keys == {"arc": {"k0", "k2", "k3"}, "arc (cascade)": {"k0", "k2", "k3"}}
    with pytest.raises(UserError, match="cannot be decoded"):
        prepared(Source(path, ChoiceDocuments(), name="strict"))


def test_commands_and_names_with_a_slash(tmp_path, spec, prepared):
    (shard,) = samples(tmp_path / "questions", TEXTS).glob("*.tar")
    names = ("arc/easy", "arc_easy", "a {b} *")
    found = prepared(*(Source(f"pipe:cat {shard}", ChoiceDocuments(), name=n, allow_pipe=True) for n in names))
    for name in names:
        assert {document.info.key for document in documents(found[f"{name} (cascade)"], spec)} == {
            "k0", "k1", "k2", "k3",
        }  # fmt: skip
    folders = [path.name for path in (tmp_path / "run" / "cascade").iterdir()]
    assert len(folders) == 3
    assert len(list((tmp_path / "run" / "transcripts").glob("*.jsonl"))) == 3
