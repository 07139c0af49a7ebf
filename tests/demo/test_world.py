import collections

import pytest

from salad_lightning.demo.speech import natural_speech, spoken_questions
from salad_lightning.demo.tokenizer import train_tokenizer
from salad_lightning.demo.world import build_world, sentence_windows, words_of


@pytest.fixture(scope="module")
def world():
    return build_world(0)


def test_size(world):
    assert len(world.words()) >= 400
    assert len(world.facts) >= 500
    assert len(world.domains) >= 8
    assert {len(set(fact.choices)) for fact in world.facts} == {4}
    assert all(fact.value in fact.choices for fact in world.facts)


def test_same_seed_same_world(world):
    assert build_world(0) == world
    assert build_world(1) != world
    assert world.documents(50, seed=3) == build_world(0).documents(50, seed=3)
    assert world.documents(50, seed=3) != world.documents(50, seed=4)


def test_coverage_is_graded(world):
    shares = [domain.speech_share for domain in world.domains]
    assert sum(shares) == pytest.approx(1)
    assert len({share for share in shares if 0 < share < 0.1}) >= 2
    assert shares.count(0.0) >= 2
    assert 0 < sum(domain.heard for domain in world.domains) < len(world.domains)
    heard = collections.Counter(utterance.fields["domain"] for utterance in natural_speech(world, 3000, seed=0))
    for domain in world.domains:
        assert heard[domain.name] / 3000 == pytest.approx(domain.speech_share, abs=0.03)


def test_long_tail(world):
    counts = collections.Counter(
        fact for _, text in world.documents(5000, seed=1) for fact in world.facts if fact.sentence(0) in text
    )
    ordered = sorted((counts[fact] for fact in world.facts), reverse=True)
    assert sum(ordered[:60]) > 0.2 * sum(ordered)
    assert ordered[-1] < ordered[0] / 5


def test_no_test_sentence_is_heard_in_training(world):
    heard = [utterance.text for utterance in natural_speech(world, 4000, seed=0)]
    windows = sentence_windows(heard)
    for split in ("val", "test"):
        asked = sentence_windows(utterance.text for utterance in spoken_questions(world, split, 40, seed=0))
        assert not windows & asked
    assert windows & sentence_windows(question.text for question in world.questions("train")), "the check sees nothing"


def test_all_asked_words_of_heard_domains_are_heard(world):
    heard = {word for utterance in natural_speech(world, 2400, seed=0) for word in words_of(utterance.text)}
    well_covered = {domain.name for domain in world.domains if domain.heard}
    for question in world.questions("test"):
        if question.fact.domain in well_covered:
            assert set(words_of(question.prompt)) <= heard


def test_splits_differ_in_voices(world):
    voices = {
        "train": {utterance.voice.voice for utterance in natural_speech(world, 500, seed=0)},
        **{s: {u.voice.voice for u in spoken_questions(world, s, 20, seed=0)} for s in ("val", "test")},
    }
    assert not voices["train"] & voices["val"]
    assert not voices["train"] & voices["test"]
    assert not voices["val"] & voices["test"]


def test_unheard_domains_use_heard_syllables(world):
    first, inner = world.syllables
    heard, unheard = set(), set()
    for fact in world.facts:
        domain = next(domain for domain in world.domains if domain.name == fact.domain)
        for name in (fact.entity, *fact.choices):
            (heard if domain.heard else unheard).update(_split(name, first, inner))
    assert len(unheard - heard) <= 0.1 * len(unheard)


def test_questions_are_complete_sentences(world):
    for question in world.questions():
        assert question.text == f"{question.prompt} {question.choices[question.answer]}."
    assert len(world.questions()) == sum(len(world.questions(split)) for split in ("train", "val", "test"))


def test_sentence_windows():
    assert sentence_windows(["A b, c d e. f"]) == {("a", "b", "c", "d", "e"), ("b", "c", "d", "e", "f")}
    assert sentence_windows(["too short"]) == {("too", "short")}


def test_tokenizer(world, tmp_path):
    texts = [text for _, text in world.documents(3000, seed=0)]
    tokenizer = train_tokenizer(texts, tmp_path)
    assert 100 < len(tokenizer) <= 600
    first, inner = world.syllables
    names = {name for fact in world.facts for name in (fact.entity, *fact.choices)}
    for name in names:
        begin, end = _split(name, first, inner)
        assert tokenizer.tokenize(name) == ["▁" + begin, end]
    for text in [*texts[:50], "Any text, 42 even!"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    assert type(tokenizer).from_pretrained(tmp_path)(texts[0]).input_ids == tokenizer(texts[0]).input_ids


def _split(name, first, inner):
    return next((a, name[len(a) :]) for a in first if name.startswith(a) and name[len(a) :] in inner)


def test_whoever_hears_nothing_is_right_once_in_four(world):
    """Any fixed preference among names gives chance exactly: choices come in sets, each choice right once."""
    for split in ("val", "test"):
        sets = {}
        for fact in world.facts:
            if fact.split == split:
                sets.setdefault((fact.domain, fact.relation, frozenset(fact.choices)), []).append(fact.value)
        assert all(sorted(values) == sorted(choices) for (_, _, choices), values in sets.items())
