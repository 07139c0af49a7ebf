"""A generated text world: made-up names, facts about them, and the sentences that tell the facts.

Names are built from syllables that all domains share, and each syllable is one token and one sound, so that a name
never heard can still be recognised. How well natural speech covers a domain is graded, from well to not at all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["SYLLABLE_PATTERN", "Domain", "Fact", "Question", "World", "build_world", "sentence_windows", "words_of"]

# Spellings that espeak-ng pronounces the same way wherever they stand in a word ("ee" is always the vowel of "see").
_CONSONANTS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "sh", "ch", "j")
_VOWELS = ("ee", "oh", "ay", "oy", "oo")
_FIRST_VOWELS = ("ah", *_VOWELS)
_FALSE_FRIENDS = ("gee",)  # sounds like "jee"

SYLLABLE_PATTERN = "▁?[^aeiou▁]+(?:" + "|".join(_FIRST_VOWELS) + ")"
"""What the tokenizer splits names by; "▁" marks the beginning of a word."""

_NUM_FIRST, _NUM_INNER = 30, 26
_NUM_ENTITIES, _NUM_VALUES, _NUM_CHOICES = 12, 7, 4
_NUM_GROUPS = _NUM_ENTITIES // _NUM_CHOICES  # of entities that are asked about together

# Relation words of each domain, and the share of the natural speech it gets.
_DOMAINS: dict[str, tuple[float, str]] = {
    "lands": (0.225, "king lake hill crop coin"),
    "ships": (0.225, "mast port crew flag route"),
    "crafts": (0.225, "guild drill paint cloth clay"),
    "music": (0.225, "drum chant band harp scale"),
    "plants": (0.06, "root stem bark fruit scent"),
    "beasts": (0.03, "den prey herd pelt trail"),
    "sports": (0.01, "team pitch badge score song"),
    "healing": (0.0, "herb salve cure nurse ward"),
    "stars": (0.0, "moon ring orb tilt dust"),
    "laws": (0.0, "judge writ fine clerk court"),
}
_WELL_COVERED = 0.1

_PHRASINGS = (
    "the {relation} of {entity} is {value}",
    "{entity} has the {relation} {value}",
    "for {entity} the {relation} is {value}",
    "{value} is the {relation} of {entity}",
)
# Shares of the documents that repeat themselves, in text and in speech: from them the LLM learns to copy, and the
# connector which sound is which token. The rest are sentences about one entity, so many at most.
_ROLLS, _ECHOES, _MAX_SENTENCES = {False: 0.08, True: 0.25}, {False: 0.12, True: 0.25}, {False: 4, True: 2}
_NUM_PROMPTS = 3  # the phrasings that end in the value and so can be asked


class Domain(NamedTuple):
    """A topic.

    Attributes:
        name: Its name.
        speech_share: Share of the natural training speech it gets, 0 to 1.
        entities: Names of the things the facts are about, the most frequent first.
        relations: What is told about each.
    """

    name: str
    speech_share: float
    entities: tuple[str, ...]
    relations: tuple[str, ...]

    @property
    def heard(self) -> bool:
        """Whether natural speech covers it well."""
        return self.speech_share >= _WELL_COVERED


class Fact(NamedTuple):
    """``relation`` of ``entity`` is ``value``.

    Attributes:
        domain: Name of the domain.
        entity: What it is about.
        relation: What is told.
        value: The answer.
        choices: Four values of the same relation in fixed order, ``value`` among them.
        weight: How often it appears in text, relative.
        split: ``train``: may be heard in training; ``val`` and ``test``: never heard there.
    """

    domain: str
    entity: str
    relation: str
    value: str
    choices: tuple[str, ...]
    weight: float
    split: str

    def sentence(self, phrasing: int) -> str:
        """The fact in one of the phrasings, without a full stop."""
        return _PHRASINGS[phrasing].format(relation=self.relation, entity=self.entity, value=self.value)


class Question(NamedTuple):
    """A fact as a sentence to be completed by one of four choices.

    Attributes:
        fact: What is asked.
        text: The whole sentence, answer and full stop included; this is what is spoken.
        prompt: The sentence up to the answer.
        choices: Four answers, not spoken.
        answer: Index of the right one.
    """

    fact: Fact
    text: str
    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class World:
    """All there is to know.

    Attributes:
        seed: It was built from.
        domains: Topics.
        facts: Facts of all domains.
        syllables: Of the names: those that begin a word, and those that go on.
    """

    seed: int
    domains: tuple[Domain, ...]
    facts: tuple[Fact, ...]
    syllables: tuple[tuple[str, ...], tuple[str, ...]]

    def words(self) -> set[str]:
        """Every word of every sentence."""
        return {word for fact in self.facts for i in range(len(_PHRASINGS)) for word in fact.sentence(i).split()}

    def questions(self, split: str | None = None) -> list[Question]:
        """Every fact of a split (or of all) in every phrasing that ends in the answer."""
        facts = [fact for fact in self.facts if split in (None, fact.split)]
        return [_question(fact, phrasing) for fact in facts for phrasing in range(_NUM_PROMPTS)]

    def documents(
        self, num_documents: int, *, seed: int, spoken: bool = False, shares: dict[str, float] | None = None
    ) -> list[tuple[str, str]]:
        """Draw short documents, each about one entity.

        Args:
            num_documents: How many.
            seed: Of the draw.
            spoken: Facts of the train split only.
            shares: Share of each domain by name; missing ones get none. None takes domains alike.

        Returns:
            ``(domain, text)`` each.
        """
        rng = random.Random(f"{self.seed}/{seed}")
        known: dict[str, dict[str, list[Fact]]] = {}
        for fact in self.facts:
            if not spoken or fact.split == "train":
                known.setdefault(fact.domain, {}).setdefault(fact.entity, []).append(fact)
        names = [name for name in known if shares is None or shares.get(name, 0.0) > 0]
        weights = [1.0 if shares is None else shares[name] for name in names]
        documents = []
        for name in rng.choices(names, weights, k=num_documents):
            entities = known[name]
            popularity = [sum(fact.weight for fact in facts) for facts in entities.values()]
            facts = entities[rng.choices(list(entities), popularity)[0]]
            documents.append((name, _document(facts, rng, spoken)))
        return documents


def build_world(seed: int = 0) -> World:
    """Build the world that belongs to a seed."""
    rng = random.Random(seed)
    first = [c + v for c, v in itertools.product(_CONSONANTS, _FIRST_VOWELS) if c + v not in _FALSE_FRIENDS]
    inner = [c + v for c, v in itertools.product(_CONSONANTS, _VOWELS) if c + v not in _FALSE_FRIENDS]
    first, inner = rng.sample(first, _NUM_FIRST), rng.sample(inner, _NUM_INNER)
    pool = [(a, b) for a, b in itertools.product(first, inner) if _sounds(a)[0] != _sounds(b)[0]]
    rng.shuffle(pool)
    entities = []
    for _ in _DOMAINS:
        entities.append(_far_apart(pool, _NUM_ENTITIES))
        pool = [name for name in pool if name not in entities[-1]]
    values = iter(pool)
    domains, facts = [], []
    for names, (name, (share, words)) in zip(entities, _DOMAINS.items(), strict=True):
        domain = Domain(name, share, tuple(a + b for a, b in names), tuple(words.split()))
        domains.append(domain)
        for position, relation in enumerate(domain.relations):
            answers = ["".join(value) for value in itertools.islice(values, _NUM_VALUES)]
            facts += _facts(domain, position, relation, answers, rng)
    return World(seed, tuple(domains), tuple(facts), (tuple(first), tuple(inner)))


def sentence_windows(texts: Iterable[str], size: int = 5) -> set[tuple[str, ...]]:
    """All runs of ``size`` words in any of the texts (a shorter text counts as a whole)."""
    windows = set()
    for text in texts:
        words = words_of(text)
        windows |= {tuple(words[i : i + size]) for i in range(max(len(words) - size, 0) + 1)}
    return windows


def words_of(text: str) -> list[str]:
    """Words of a text without punctuation, in lower case."""
    return [word.strip(".,?!").lower() for word in text.split()]


def _facts(domain: Domain, position: int, relation: str, answers: Sequence[str], rng: random.Random) -> list[Fact]:
    """One relation of all entities of a domain.

    Every third entity has its test fact here, or its validation fact: a relation of each entity is kept for either,
    so that all words are heard in training, and no combination that is asked. The entities asked about together have
    different values, which are the choices of all their questions: whoever hears nothing is right once in four.
    """
    values = {rank: rng.choice(answers) for rank in range(_NUM_ENTITIES)}
    splits: dict[int, str] = {}
    choices: dict[int, tuple[str, ...]] = {}
    for group in range(_NUM_GROUPS):
        asked = {group: "test", _NUM_GROUPS + group % 2: "val"}.get(position)
        members = range(group, _NUM_ENTITIES, _NUM_GROUPS)
        if asked is not None:
            together = rng.sample(answers, len(members))
            values |= dict(zip(members, together, strict=True))
            splits |= dict.fromkeys(members, asked)
            choices |= {rank: tuple(rng.sample(together, len(together))) for rank in members}
    facts = []
    for rank, entity in enumerate(domain.entities):
        value = values[rank]
        others = rng.sample([answer for answer in answers if answer != value], _NUM_CHOICES - 1)
        offered = choices.get(rank) or tuple(rng.sample([value, *others], _NUM_CHOICES))
        weight = (rank + 1) ** -0.5 * rng.uniform(0.5, 1.5)  # long-tailed
        facts.append(Fact(domain.name, entity, relation, value, offered, weight, splits.get(rank, "train")))
    return facts


def _question(fact: Fact, phrasing: int) -> Question:
    sentence = fact.sentence(phrasing)
    prompt = sentence[: -len(fact.value) - 1]
    return Question(fact, sentence + ".", prompt, fact.choices, fact.choices.index(fact.value))


def _document(facts: Sequence[Fact], rng: random.Random, spoken: bool) -> str:
    """A roll of names read twice, one sentence said twice, or sentences about one entity."""
    kind = rng.random()
    weights = [fact.weight for fact in facts]
    if kind < _ROLLS[spoken]:
        names = sorted({name for fact in facts for name in (fact.entity, *fact.choices)})
        roll = " and ".join(rng.sample(names, rng.randint(1, 3)))
        return f"{roll} again {roll}."
    if kind < _ROLLS[spoken] + _ECHOES[spoken]:
        sentence = rng.choices(facts, weights)[0].sentence(rng.randrange(len(_PHRASINGS)))
        return f"{sentence} again {sentence}."
    chosen = rng.choices(facts, weights, k=rng.randint(2, _MAX_SENTENCES[spoken]))
    return " and ".join(fact.sentence(rng.randrange(len(_PHRASINGS))) for fact in chosen) + "."


def _sounds(syllable: str) -> tuple[str, str]:
    """Consonant and vowel."""
    return syllable[:-2], syllable[-2:]


def _far_apart(names: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """The first ``count`` names of which any two differ in at least two sounds."""
    kept: list[tuple[str, str]] = []
    for name in names:
        sounds = _sounds(name[0]) + _sounds(name[1])
        near = (sum(a != b for a, b in zip(sounds, _sounds(o[0]) + _sounds(o[1]), strict=True)) < 2 for o in kept)
        if not any(near):
            kept.append(name)
            if len(kept) == count:
                return kept
    raise ValueError(f"only {len(kept)} of {count} names are far enough apart")
