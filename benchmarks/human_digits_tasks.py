"""Number tasks that are spoken by stringing recordings of single digits together, and that a tiny LLM knows in text."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DIGITS", "NUMBERS", "TASKS", "TEMPLATE", "Item", "Task", "digit_items", "draw_item"]

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen"
)

NUMBERS = tuple(_WORDS.split())
"""Words of the answers; only the first ten are ever spoken."""

DIGITS = NUMBERS[:10]

TEMPLATE = "{prompt}: {speech} = {answer}"
"""How an item reads; a `TemplateDocuments` template."""

_NUM_CHOICES = 4


class Item(NamedTuple):
    """One question about spoken digits.

    Attributes:
        domain: Name of its task.
        prompt: First word of its text.
        digits: What is spoken, 0 to 9 each.
        choices: Answers, not spoken.
        answer: Index of the right one.
    """

    domain: str
    prompt: str
    digits: tuple[int, ...]
    choices: tuple[str, ...]
    answer: int

    @property
    def speech(self) -> str:
        """Transcript of what is spoken."""
        return _spell(self.digits)

    @property
    def text(self) -> str:
        """The whole item with its right answer, as the LLM reads it."""
        return TEMPLATE.format(prompt=self.prompt, speech=self.speech, answer=self.choices[self.answer])


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        prompt: First word of its text.
        num_digits: Fewest and most digits spoken.
        solve: Digits to the right answer.
        others: Digits and a source of chance to the wrong answers.
    """

    prompt: str
    num_digits: tuple[int, int]
    solve: Callable[[Sequence[int]], str]
    others: Callable[[Sequence[int], random.Random], list[str]]


def draw_item(name: str, rng: random.Random) -> Item:
    """An item of the task called ``name``."""
    task = TASKS[name]
    digits = tuple(rng.randrange(10) for _ in range(rng.randint(*task.num_digits)))
    return _item(name, digits, rng)


def digit_items(digits: Sequence[int]) -> list[Item]:
    """Reading one digit, with all ten as choices: chance is 0.1."""
    return [_item("digit", (digit,), random.Random(digit)) for digit in digits]


def _item(name: str, digits: tuple[int, ...], rng: random.Random) -> Item:
    task = TASKS[name]
    right = task.solve(digits)
    choices = [right, *task.others(digits, rng)]
    rng.shuffle(choices)
    return Item(name, task.prompt, digits, tuple(choices), choices.index(right))


def _spell(digits: Sequence[int]) -> str:
    return " ".join(DIGITS[digit] for digit in digits)


def _misread(digits: Sequence[int], rng: random.Random) -> list[str]:
    """Readings with one digit wrong."""
    wrong: set[str] = set()
    while len(wrong) < _NUM_CHOICES - 1:
        heard = list(digits)
        place = rng.randrange(len(heard))
        heard[place] = rng.choice([digit for digit in range(10) if digit != heard[place]])
        wrong.add(_spell(heard))
    return sorted(wrong)


def _other_digits(digits: Sequence[int], rng: random.Random) -> list[str]:
    """All nine other digits."""
    return [digit for digit in DIGITS if digit != DIGITS[digits[0]]]


def _near(words: Sequence[str], right: Callable[[Sequence[int]], str], spoken: bool) -> Callable[..., list[str]]:
    """Wrong answers among ``words``: the other spoken digits first where ``spoken``, then any."""

    def draw(digits: Sequence[int], rng: random.Random) -> list[str]:
        heard = [DIGITS[digit] for digit in sorted(set(digits))] if spoken else []
        first = [word for word in heard if word != right(digits)]
        rest = [word for word in words if word != right(digits) and word not in first]
        return [*first, *rng.sample(rest, len(rest))][: _NUM_CHOICES - 1]

    return draw


def _sum(digits: Sequence[int]) -> str:
    return NUMBERS[sum(digits)]


def _largest(digits: Sequence[int]) -> str:
    return DIGITS[max(digits)]


def _last(digits: Sequence[int]) -> str:
    return DIGITS[digits[-1]]


def _count(digits: Sequence[int]) -> str:
    return NUMBERS[len(digits)]


TASKS: dict[str, Task] = {
    "digit": Task("read", (1, 1), _spell, _other_digits),
    "read": Task("read", (2, 4), _spell, _misread),
    "add": Task("add", (2, 2), _sum, _near(NUMBERS, _sum, spoken=False)),
    "larger": Task("larger", (2, 2), _largest, _near(DIGITS, _largest, spoken=True)),
    "last": Task("last", (2, 4), _last, _near(DIGITS, _last, spoken=True)),
    "count": Task("count", (1, 4), _count, _near(NUMBERS[1:5], _count, spoken=False)),
}
"""By the name that results are broken down by."""
