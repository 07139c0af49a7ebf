"""Questions after examples: what is heard, what is read, what is scored, and how many examples fit."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from salad_lightning.data.arrays import encode_array
from salad_lightning.data.audio import encode_flac
from salad_lightning.data.choice import ChoiceDocuments
from salad_lightning.data.format import Encoded, Utterance
from salad_lightning.data.packing import collate
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones

PROMPT = "Q: {speech}\nA: {answer}"
SHOTS = [("the quick fox", ["runs", "sleeps"], 0), ("the lazy dog jumps", ["no", "yes"], 1), ("a star", ["x", "y"], 1)]


def asked(text="the small boat", **fields):
    audio, _ = speak_tones(text)
    values = {"choices": ["sinks", "crosses the river"], "answer": 1, "prompt": PROMPT, **fields}
    return Utterance("q", "s", text, recording=audio, fields=values)


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shots")
    with ShardWriter(folder, "shots", 2) as writer:
        for number, (text, choices, answer) in enumerate(SHOTS):
            record = {"text": text, "choices": choices, "answer": answer, "prompt": PROMPT}
            writer.write(f"k{number}", record, encode_flac(speak_tones(text)[0], 16_000))
    return str(folder)


def told(document, tokenizer):
    """The document as text, spans in brackets, what is scored in stars."""
    text = ""
    starts, stops = {s.start for s in document.spans}, {s.stop for s in document.spans}
    for index, token in enumerate(document.token_ids.tolist()):
        text += "]" * (index in stops) + "[" * (index in starts)
        text += "*" * bool(document.predicted[index] > document.predicted[index - 1]) + tokenizer.decode([token])
    return text + "*" * bool(document.predicted[-1])


def test_without_examples_it_is_a_template(make_spec):
    spec = make_spec(context=256)
    mine = ChoiceDocuments().build(asked(), spec)
    theirs = TemplateDocuments(PROMPT, all_choices=True).build(asked(), spec)
    assert [document.info.choice for document in mine] == [0, 1]
    for one, other in zip(mine, theirs, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.predicted.tolist() == other.predicted.tolist()
        assert one.spans == other.spans


def test_examples_come_first_heard_with_their_right_answers(make_spec, shots, byte_tokenizer):
    spec = make_spec(context=1024)
    document = ChoiceDocuments(shots=shots).build(asked(), spec)[1]
    wanted = (
        "Q:[ the quick fox]\nA: runs\n\nQ:[ the lazy dog jumps]\nA: yes\n\nQ:[ a star]\nA: y\n\n"
        "Q:[ the small boat]\nA:* crosses the river*"
    )
    assert told(document, byte_tokenizer) == wanted
    assert [span.clip for span in document.spans] == [0, 1, 2, 3]
    lengths = [len(speak_tones(text)[0]) for text in (*(text for text, *_ in SHOTS), "the small boat")]
    assert [len(clip) for clip in document.clips] == lengths
    assert [span.num_words for span in document.spans] == [3, 4, 2, 3]
    batch = collate([[document]], context=1024, rows_per_batch=1, trim=True)
    assert batch.span_clip_K.tolist() == [0, 1, 2, 3]
    assert batch.num_predicted == sum(document.predicted)
    read = ChoiceDocuments(shots=shots, hear_shots=False, num_shots=2).build(asked(), spec)[1]
    assert told(read, byte_tokenizer).startswith("Q: the quick fox\nA: runs\n\nQ: the lazy")
    assert len(read.spans) == len(read.clips) == 1


def test_as_many_examples_as_fit_and_the_same_for_every_option(make_spec, shots):
    full = ChoiceDocuments(shots=shots).build(asked(), make_spec(context=1024))
    needed = max(max(document.num_positions, document.num_tokens) for document in full)
    for context, count in ((needed, 4), (needed - 1, 3)):
        documents = ChoiceDocuments(shots=shots).build(asked(), make_spec(context=context))
        assert {len(document.spans) for document in documents} == {count}
    alone = ChoiceDocuments(num_shots=0).build(asked(), make_spec(context=1024))
    longest = max(max(document.num_positions, document.num_tokens) for document in alone)
    assert {len(d.spans) for d in ChoiceDocuments(shots=shots).build(asked(), make_spec(context=longest))} == {1}
    with pytest.raises(UserError, match="`context` is"):
        ChoiceDocuments(shots=shots).build(asked(), make_spec(context=longest - 1))


def test_own_examples_by_key_and_never_the_question_itself(make_spec, shots, byte_tokenizer):
    spec = make_spec(context=1024)
    one = ChoiceDocuments(shots=shots).build(asked(shots=["k2"]), spec)[0]
    assert told(one, byte_tokenizer).startswith("Q:[ a star]\nA: y\n\nQ:[ the small boat]")
    known = ChoiceDocuments(shots=shots, num_shots=1).build(asked(SHOTS[0][0]), spec)[0]
    assert told(known, byte_tokenizer).startswith("Q:[ the lazy dog jumps]")


def test_controls(make_spec, shots):
    muted = ChoiceDocuments(shots=shots, control="muted").build(asked(), make_spec(context=1024))[0]
    assert all(not np.any(clip) for clip in muted.clips)
    assert len(muted.clips) == 4


BAD = {
    "no options": ({"choices": None}, {}, "`choices` are None"),
    "one option": ({"choices": ["a"]}, {}, "`choices` are"),
    "no answer": ({"answer": 2}, {}, "`answer` is 2"),
    "truth": ({"answer": True}, {}, "`answer` is True"),
    "ambiguous": ({"choices": ["a", "a"], "answer": "a"}, {}, "`answer` is 'a'"),
    "nothing to score": ({"choices": ["a", ""]}, {}, "option 1 has no token"),
    "no prompt": ({"prompt": None}, {}, "how the question is put"),
    "unknown field": ({}, {"template": "{speech} {foo} {answer}"}, "asks for {foo}"),
    "unknown example": ({"shots": ["nine"]}, {}, "no example 'nine'"),
    "key in a list": ({"shots": [["k1"]]}, {}, "no list of keys"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes(make_spec, shots, kind):
    fields, settings, message = BAD[kind]
    with pytest.raises(UserError, match=message.replace("{", r"\{")):
        ChoiceDocuments(shots=shots, **settings).build(asked(**fields), make_spec(context=1024))


def test_mistakes_in_the_settings():
    for settings, message in (
        ({"template": "{speech}"}, "no place for the {answer}"),
        ({"template": "{{answer}} {speech}"}, "no place for the {answer}"),
        ({"template": "{speech} {answer:>6}"}, "formats or converts"),
        ({"template": "{speech} {answer!r}"}, "formats or converts"),
        ({"num_shots": -1}, "num_shots is -1"),
        ({"template": "{speech} {answer"}, "does not parse"),
    ):
        with pytest.raises(UserError, match=message.replace("{", r"\{")):
            ChoiceDocuments(**settings)


def _stored(utterance):
    num_samples = len(utterance.audio)
    frames = np.ones((math.ceil(num_samples / 1280), 3), np.float32)  # of the spec's 80 ms
    return dataclasses.replace(utterance, recording=None, encoded=Encoded(frames, "mimi", num_samples))


@pytest.fixture(scope="module")
def stored_shots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored_shots")
    with ShardWriter(folder, "shots", 2) as writer:
        for number, (text, choices, answer) in enumerate(SHOTS):
            encoded = _stored(asked(text)).encoded
            record = {"text": text, "choices": choices, "answer": answer, "prompt": PROMPT}
            record["encoded"] = {"by": encoded.by, "num_samples": encoded.num_samples}
            writer.write(f"k{number}", record, encode_array(encoded.data), "frames.npy")
    return str(folder)


def test_what_is_heard_is_all_audio_or_all_encoded(make_spec, shots, stored_shots):
    spec = dataclasses.replace(make_spec(context=1024), encoder="mimi")
    question = dataclasses.replace(asked(), shard="asked.tar")
    for heard, examples, stored in ((question, stored_shots, "shots-"), (_stored(question), shots, "asked.tar: q")):
        with pytest.raises(UserError, match="is pre-encoded, and that of") as caught:
            ChoiceDocuments(shots=examples).build(heard, spec)
        before, after = caught.value.what.split(" is pre-encoded")
        assert stored in before
        assert {"shots-" in before, "asked.tar: q" in before} == {"shots-" in after, "asked.tar: q" in after}
        assert caught.value.where == "asked.tar: q"
        (document, _) = ChoiceDocuments(shots=examples, hear_shots=False).build(heard, spec)
        assert document.encoded == (heard is not question)
    text = dataclasses.replace(question, recording=None)
    for heard, examples, count, encoded in (
        (_stored(question), stored_shots, 4, True),
        (question, shots, 4, False),
        (text, stored_shots, 3, True),
        (text, shots, 3, False),
    ):
        for document in ChoiceDocuments(shots=examples).build(heard, spec):
            assert (document.encoded, len(document.clips)) == (encoded, count)
        batch = collate([[document]], context=1024, rows_per_batch=1, trim=True)
        assert (batch.stored_NT is not None, len(batch.clips_NL)) == (encoded, 0 if encoded else count)


def test_an_option_without_a_token_is_refused_by_templates_too(make_spec):
    with pytest.raises(UserError, match="option 1 has no token"):
        TemplateDocuments(PROMPT, all_choices=True).build(asked(choices=["a", ""]), make_spec(context=256))
