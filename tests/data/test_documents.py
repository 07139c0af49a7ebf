import copy
import math
import random

import numpy as np
import pytest
import torch

from salad_lightning.data.format import Utterance
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.data.tokens import bos_id, spoken_units, tokenize
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError
from salad_lightning.interfaces import TimedWord
from salad_lightning.testing.shards import random_text, speak_tones


def _utterance(num_words=20, seed=0, **changes):
    text = random_text(random.Random(seed), num_words)
    audio, words = speak_tones(text, seed=seed)
    values = {"words": [TimedWord(*word) for word in words], "recording": audio, **changes}
    return Utterance(f"k{seed}", "s", changes.pop("text", text), **{k: v for k, v in values.items() if k != "text"})


def _read(document, tokenizer):
    """The document as text, spans in brackets."""
    text, position = "", 0
    for span in document.spans:
        text += tokenizer.decode(document.token_ids[position : span.start])
        text += "[" + tokenizer.decode(document.token_ids[span.start : span.stop]) + "]"
        position = span.stop
    return text + tokenizer.decode(document.token_ids[position:])


# --- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer"])
def test_units_spell_the_text_with_space_before_and_punctuation_after(kind, request):
    tokenizer = request.getfixturevalue(kind)
    text = 'He said: "seven bright stars, twenty-one boats" - and  no more!'
    words = ["he", "said", "seven", "bright stars", "twenty", "one", "boats", "", "and", "no", "more"]
    timed = [TimedWord(word, i / 10, (i + 1) / 10) for i, word in enumerate(words)]
    tokens = tokenize(text, tokenizer)
    units = spoken_units(text, timed, tokens)
    assert units[0].first_token == 0
    assert units[-1].stop_token == len(tokens.ids)
    pieces = []
    for unit, after in zip(units, [*units[1:], None], strict=True):
        assert after is None or (after.first_token == unit.stop_token)
        pieces.append(text[_start(tokens, unit) : tokens.last_char[unit.stop_token - 1] + 1].strip())
    expected = ["He", "said:", '"seven', "bright stars,", "twenty-", "one", 'boats"', "- and", "no", "more!"]
    assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
    for piece in pieces:  # a token may fuse neighbours, but nothing is cut elsewhere than between words
        assert piece in " ".join(expected) or piece in "".join(expected)
    assert sum(unit.num_words for unit in units) == 11
    assert units[-1].end_s == pytest.approx(1.1)


def _start(tokens, unit):
    return 0 if unit.first_token == 0 else tokens.last_char[unit.first_token - 1] + 1


def test_words_that_share_a_token_are_one_unit(byte_tokenizer):
    text = "a the fox"
    tokens = tokenize(text, byte_tokenizer)
    covered = [text[a : b + 1] for a, b in zip(tokens.first_char, tokens.last_char, strict=True)]
    assert "the" in covered  # one token
    timed = [TimedWord("a", 0, 1), TimedWord("t", 1, 2), TimedWord("he", 2, 3), TimedWord("fox", 3, 4)]
    units = spoken_units(text, timed, tokens)
    assert [(unit.start_s, unit.end_s, unit.num_words) for unit in units] == [(0, 1, 1), (1, 3, 2), (3, 4, 1)]


@pytest.mark.parametrize("words", [["the", "slow"], ["the"], ["the", "quick", "fox"], []])
def test_words_that_do_not_spell_the_text_are_seen(byte_tokenizer, words):
    text = "The quick"
    timed = [TimedWord(word, i, i + 1) for i, word in enumerate(words)]
    assert spoken_units(text, timed, tokenize(text, byte_tokenizer)) is None


def test_bos_only_where_the_tokenizer_adds_it(byte_tokenizer, bos_tokenizer):
    assert bos_id(byte_tokenizer) is None
    assert bos_id(bos_tokenizer) == bos_tokenizer.bos_token_id


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer"])
@pytest.mark.parametrize("text", ["naïve 東京 🙂 café", "  leading and trailing  ", "a\n\nb", "x"])
def test_token_ids_are_the_tokenizers_own(kind, text, request):
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenize(text, tokenizer)
    assert tokens.ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (np.diff(tokens.last_char) >= 0).all()
    assert tokens.last_char.max() == len(text) - 1


def test_nothing_is_cut_or_padded_whatever_the_tokenizer_was_told(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    text = "the quick fox runs over seven bright stars"
    whole = tokenize(text, byte_tokenizer).ids.tolist()
    tokenizer.backend_tokenizer.enable_truncation(5)  # as a tokenizer.json may say
    tokenizer.backend_tokenizer.enable_padding(length=99)
    assert tokenize(text, tokenizer).ids.tolist() == whole
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(text, padding="max_length", truncation=True, max_length=5)
    assert tokenize(text, tokenizer).ids.tolist() == whole
    assert tokenize("a", tokenizer).ids.tolist() == tokenize("a", byte_tokenizer).ids.tolist()


# --- interleave -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer"])
def test_interleaving_obeys_lengths_times_and_alignment(make_spec, kind, causal, request):
    tokenizer = request.getfixturevalue(kind)
    spec = make_spec(context=4096, causal=causal, tokenizer=tokenizer)
    builder = InterleaveDocuments((3, 6), (2, 5))
    starts_with_text = 0
    for seed in range(30):
        utterance = _utterance(40, seed)
        (document,) = builder.build(utterance, spec, seed=1)
        bos = int(kind == "bos_tokenizer")
        plain = tokenizer(utterance.text)["input_ids"]
        assert document.token_ids.tolist() == [*plain, tokenizer.eos_token_id]
        starts_with_text += document.spans[0].start > bos
        edges = [(span.start, span.stop) for span in document.spans]
        for number, span in enumerate(document.spans):
            assert span.num_words >= 2 or span is document.spans[-1]  # the transcript may end
            assert span.num_words <= 5
            assert span.num_positions == math.ceil(span.num_frames / 2) + 2
            assert number == 0 or span.start > edges[number - 1][1]
        spoken = np.zeros(len(document.token_ids), dtype=bool)
        for start, stop in edges:
            spoken[start:stop] = True
        expected = ~spoken
        expected[0] = False
        assert (document.predicted == expected).all()
        assert len(document.clips) == (1 if causal else len(document.spans))
        for text_gap in np.split(np.flatnonzero(~spoken), np.flatnonzero(np.diff(np.flatnonzero(~spoken)) > 1) + 1):
            words = tokenizer.decode(document.token_ids[text_gap], skip_special_tokens=True).split()
            assert len(words) <= 6
    assert 5 <= starts_with_text <= 25


def test_draws_depend_on_seed_key_and_epoch_alone(make_spec):
    spec, builder, utterance = make_spec(context=4096), InterleaveDocuments((1, 4), (1, 4)), _utterance(40)

    def spans(**which):
        return [(span.start, span.stop) for span in builder.build(utterance, spec, **which)[0].spans]

    assert spans(seed=1, epoch=2) == spans(seed=1, epoch=2)
    assert len({str(spans(seed=seed, epoch=epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("causal", [True, False])
def test_no_span_hears_past_its_end(make_spec, causal):
    """Audio after a span's last word is replaced by noise: not one of the span's frames changes."""
    encoder = LogMelEncoder(frame_rate_hz=12.5)
    spec = make_spec(context=4096, causal=causal)
    utterance = _utterance(30, 3)
    builder = InterleaveDocuments((1, 3), (2, 4))
    (document,) = builder.build(utterance, spec)
    units = spoken_units(utterance.text, utterance.words, tokenize(utterance.text, spec.tokenizer))
    ends = {unit.stop_token: unit.end_s for unit in units[:-1]}
    checked = 0
    for number, span in enumerate(document.spans):
        if span.stop not in ends:
            continue
        after = math.ceil(ends[span.stop] * 16_000) + 1
        noisy = utterance.audio.copy()
        noisy[after:] = np.random.default_rng(0).uniform(-1, 1, len(noisy) - after)
        changed = Utterance(utterance.key, "s", utterance.text, utterance.words, noisy)
        (other,) = builder.build(changed, spec)
        frames = []
        for version in (document, other):
            clip = torch.from_numpy(version.clips[span.clip])[None]
            output = encoder(clip, torch.tensor([clip.shape[1]])).frames
            assert output.shape[1] == spec.num_frames(clip.shape[1])
            frames.append(output[:, version.spans[number].first_frame :][:, : span.num_frames])
            assert frames[-1].shape[1] == span.num_frames
        assert torch.equal(frames[0], frames[1])
        checked += 1
    assert checked >= 3


def test_span_audio_begins_and_ends_with_its_words(make_spec):
    spec = make_spec(context=4096, causal=False)
    utterance = _utterance(20, 5)
    (document,) = InterleaveDocuments((1, 3), (2, 4), start_with_text_probability=1.0).build(utterance, spec)
    units = spoken_units(utterance.text, utterance.words, tokenize(utterance.text, spec.tokenizer))
    for span, clip in zip(document.spans, document.clips, strict=True):
        inside = [unit for unit in units if span.start <= unit.first_token < span.stop]
        start, end = round(inside[0].start_s * 16_000), round(inside[-1].end_s * 16_000)
        np.testing.assert_array_equal(clip, utterance.audio[start:end])
        assert span.num_frames == spec.num_frames(end - start)
        assert span.first_frame == 0


def test_a_span_shorter_than_a_frame_is_read(make_spec):
    spec = make_spec(context=4096, frame_rate=2.0)  # 500 ms frames, words of 100 to 300 ms
    documents = [InterleaveDocuments((1, 1), (1, 1)).build(_utterance(20, seed), spec)[0] for seed in range(5)]
    assert all(span.num_frames >= 1 for document in documents for span in document.spans)
    read = [document for document in documents if len(document.spans) < 9]
    assert read
    assert all((~document.predicted).sum() < len(document.token_ids) for document in read)


@pytest.mark.parametrize("causal", [True, False])
def test_long_utterances_are_split_and_nothing_is_lost(make_spec, bos_tokenizer, causal):
    spec = make_spec(context=60, tokenizer=bos_tokenizer, causal=causal)
    utterance = _utterance(120, 7)
    documents = InterleaveDocuments((2, 5), (2, 5)).build(utterance, spec)
    assert len(documents) > 3
    joined = np.concatenate([document.token_ids[1:] for document in documents])  # without BOS
    plain = bos_tokenizer(utterance.text, add_special_tokens=False)["input_ids"]
    assert joined.tolist() == [*plain, bos_tokenizer.eos_token_id]
    for document in documents:
        assert max(document.num_positions, document.num_tokens) <= 60
        assert document.token_ids[0] == bos_tokenizer.bos_token_id
        assert not document.predicted[0]
        for span in document.spans:
            assert span.first_frame + span.num_frames <= spec.num_frames(len(document.clips[span.clip]))
    total_s = sum(span.seconds for document in documents for span in document.spans)
    assert 0.3 * len(utterance.audio) / 16_000 < total_s < 0.8 * len(utterance.audio) / 16_000


def test_plain_text_is_split_at_the_context(make_spec):
    spec = make_spec(context=32)
    utterance = _utterance(60, 2, recording=None, words=None)
    documents = InterleaveDocuments().build(utterance, spec)
    joined = np.concatenate([document.token_ids for document in documents])
    assert joined.tolist() == [*spec.tokenizer(utterance.text)["input_ids"], spec.tokenizer.eos_token_id]
    assert all(document.num_tokens <= 32 and not document.spans for document in documents)
    assert all(document.predicted[1:].all() and not document.predicted[0] for document in documents)


def test_muted_keeps_everything_but_the_audio(make_spec):
    spec, utterance = make_spec(context=4096), _utterance(20)
    (plain,) = InterleaveDocuments((1, 3), (1, 3)).build(utterance, spec)
    (muted,) = InterleaveDocuments((1, 3), (1, 3), control="muted").build(utterance, spec)
    assert muted.spans == plain.spans
    assert (muted.clips[0] == 0).all()
    assert (plain.clips[0] != 0).any()


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"words": None}, 4096, "no word times"),
        ({"words": [TimedWord("wrong", 0, 1)]}, 4096, "do not spell"),
        ({"recording": np.zeros(1000, np.float32)}, 4096, "the last word ends"),
        ({}, 10, "`context`"),
    ],
)
def test_unusable_utterances_are_named(make_spec, changes, context, message):
    with pytest.raises(UserError, match=message) as caught:
        InterleaveDocuments().build(_utterance(30, **changes), make_spec(context=context))
    assert "k0" in str(caught.value)
    assert "→" in str(caught.value)


@pytest.mark.parametrize("settings", [{"text_words": (3, 1)}, {"speech_words": (0, 2)}, {"control": "shuffled"}])
def test_unusable_settings_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        InterleaveDocuments(**settings)


# --- template -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_tokenizer", "bos_tokenizer"])
def test_template_hears_the_speech_and_predicts_the_answer(make_spec, kind, request):
    tokenizer = request.getfixturevalue(kind)
    spec = make_spec(tokenizer=tokenizer)
    utterance = _utterance(8, text="seven bright stars", fields={"answer": "the fox", "domain": "d"})
    (document,) = TemplateDocuments("Question: {speech}\nAnswer: {answer}", append_eos=True).build(utterance, spec)
    full = tokenizer("Question: seven bright stars\nAnswer: the fox")["input_ids"]
    assert document.token_ids.tolist() == [*full, tokenizer.eos_token_id]
    (span,) = document.spans
    assert tokenizer.decode(document.token_ids[span.start : span.stop]).strip() == "seven bright stars"
    assert tokenizer.decode(document.token_ids[document.predicted], skip_special_tokens=True).strip() == "the fox"
    assert document.predicted[-1]
    assert document.info.fields["domain"] == "d"
    assert document.info.choice is None
    assert span.num_frames == spec.num_frames(len(utterance.audio))
    assert span.num_words == 3


def test_choices_give_the_right_one_or_all(make_spec):
    fields = {"choices": ["the cat", "a dog", "the sun"], "answer": 1}
    utterance = _utterance(6, fields=fields)
    (right,) = TemplateDocuments().build(utterance, make_spec())
    documents = TemplateDocuments(all_choices=True).build(utterance, make_spec())
    assert right.info.choice == 1
    assert [document.info.choice for document in documents] == [0, 1, 2]
    spec = make_spec()
    said = [spec.tokenizer.decode(document.token_ids[document.predicted]).strip() for document in documents]
    assert said == fields["choices"]
    assert all(document.clips[0] is documents[0].clips[0] for document in documents)  # encoded once


@pytest.mark.parametrize("causal", [True, False])
def test_speech_is_cut_at_speech_end(make_spec, causal):
    spec = make_spec(causal=causal)
    utterance = _utterance(8, fields={"answer": "the fox", "speech_end_s": 0.5})
    (document,) = TemplateDocuments().build(utterance, spec)
    assert len(document.clips[0]) == 8000
    assert document.spans[0].num_frames == (6 if causal else 7)  # 6.25 frames: the last would be silence


def test_text_only_samples_and_prompts_without_answer(make_spec):
    spec = make_spec()
    (document,) = TemplateDocuments().build(_utterance(6, recording=None, words=None, fields={"answer": "fox"}), spec)
    assert not document.spans
    assert document.predicted.any()
    (prompt,) = TemplateDocuments("Say: {speech}").build(_utterance(6), spec)
    assert prompt.spans
    assert not prompt.predicted.any()


@pytest.mark.parametrize(
    ("template", "fields", "context", "message"),
    [
        ("{speech} {answer}", {}, 128, "no `answer`"),
        ("{speech} {answer}", {"choices": ["a"], "answer": 3}, 128, "none of the 1 choices"),
        ("{speech} {topic}", {}, 128, "{topic}"),
        ("{speech} {answer}", {"answer": "a"}, 4, "`context` is 4"),
        ("{speech} {answer}", {"answer": "a", "speech_end_s": "x"}, 128, "not seconds"),
    ],
)
def test_unusable_template_samples_are_named(make_spec, template, fields, context, message):
    with pytest.raises(UserError, match=message) as caught:
        TemplateDocuments(template).build(_utterance(6, fields=fields), make_spec(context=context))
    assert "k0" in str(caught.value)


def test_braces_that_are_text_name_nothing(make_spec):
    utterance = _utterance(6, fields={"answer": "fox"})
    (prompt,) = TemplateDocuments("{{speech}} {{answer}}: {text}").build(utterance, make_spec())
    assert not prompt.spans
    assert not prompt.predicted.any()


@pytest.mark.parametrize(
    "template", ["{speech} {speech}", "{}", "{speech", "{speech:d}", "{speech!s}", "{speech} {answer:>6}", "{answer!r}"]
)
def test_unusable_templates_are_refused(template):
    with pytest.raises(UserError, match="template"):
        TemplateDocuments(template)
