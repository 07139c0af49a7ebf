"""How rows of public multiple-choice datasets become questions: their own field names, and how each task is put."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from salad_lightning.errors import UserError

__all__ = ["OWN", "TEMPLATES", "Question", "Schema", "Template", "read_question"]

Counted = Literal["index", "number", "label", "letter", "own"]
_ASKED = "Question: {speech}\nAnswer: {answer}"
_CONTINUED = "{speech} {answer}"
_LETTER = re.compile(r"(?:^|\s)\(?([A-J])[.):]\s+")


class Question(NamedTuple):
    """A multiple-choice question.

    Attributes:
        text: What is spoken.
        choices: Options.
        answer: Index of the right one.
        prompt: Template of `TemplateDocuments`.
        category: Of the dataset's own kinds, by which results are broken down; the task where it has none.
    """

    text: str
    choices: list[str]
    answer: int
    prompt: str
    category: str


class Schema(NamedTuple):
    """Fields of one published form of a dataset; a dot leads into nested fields, and through lists of objects.

    Attributes:
        question: Fields whose texts, joined, are spoken.
        choices: The field that lists the options, or one field an option.
        answer: Field of the answer.
        counted: How it is given: an ``index`` from 0, a ``number`` from 1, one of the ``labels``, a ``letter`` from A;
            ``own`` is an index, or an option's text.
        labels: Field that lists the options' labels.
        category: Field of the category.
        joined: Between the question's fields.
        lettered: The options stand in the question as "A. … B. …", where they are spoken too.
    """

    question: tuple[str, ...]
    choices: tuple[str, ...]
    answer: str
    counted: Counted
    labels: str = ""
    category: str = ""
    joined: str = " "
    lettered: bool = False

    @property
    def fields(self) -> list[str]:
        """All that a row must have."""
        return [*self.question, *self.choices, self.answer, *([self.labels] if self.labels else [])]


class Template(NamedTuple):
    """A task.

    Attributes:
        prompt: How a question is put to the model.
        schemas: Published forms of its rows; the first whose fields a row has is taken.
        clean: Applied to question and options.
        source: Where the fields are documented.
    """

    prompt: str
    schemas: tuple[Schema, ...]
    source: str
    clean: Callable[[str], str] = str.strip


def _without_headings(text: str) -> str:
    """HellaSwag's WikiHow half has ``[title]``, ``[step]`` and the like between sentences."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


_VOICEBENCH = Schema(("prompt",), (), "reference", "letter", category="category", lettered=True)
_AI2 = (
    Schema(("question",), ("choices.text",), "answerKey", "label", labels="choices.label"),
    Schema(("question.stem",), ("question.choices.text",), "answerKey", "label", labels="question.choices.label"),
)

TEMPLATES: Mapping[str, Template] = {
    "story_cloze": Template(
        _CONTINUED,
        (
            Schema(
                tuple(f"input_sentence_{number}" for number in range(1, 5)),
                ("sentence_quiz1", "sentence_quiz2"),
                "answer_right_ending",
                "number",
            ),
            Schema(
                tuple(f"InputSentence{number}" for number in range(1, 5)),
                ("RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2"),
                "AnswerRightEnding",
                "number",
            ),
        ),
        "https://cs.rochester.edu/nlp/rocstories/ and https://huggingface.co/datasets/juletxara/xstory_cloze",
    ),
    "mmsu": Template(
        _ASKED,
        (
            _VOICEBENCH,
            Schema(("question",), ("options",), "answer_index", "index", category="category"),
            Schema(("question",), ("choice_a", "choice_b", "choice_c", "choice_d"), "answer_gt", "own"),
        ),
        "https://huggingface.co/datasets/hlt-lab/voicebench and https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro",
    ),
    "openbookqa": Template(
        _CONTINUED,
        (
            Schema(("question_stem",), ("choices.text",), "answerKey", "label", labels="choices.label"),
            _AI2[1],
            _VOICEBENCH,
        ),
        "https://huggingface.co/datasets/allenai/openbookqa",
    ),
    "hellaswag": Template(
        _CONTINUED,
        (Schema(("activity_label", "ctx"), ("endings",), "label", "index", category="split_type", joined=": "),),
        "https://huggingface.co/datasets/Rowan/hellaswag",
        _without_headings,
    ),
    "arc_challenge": Template(_ASKED, _AI2, "https://huggingface.co/datasets/allenai/ai2_arc"),
    "piqa": Template(
        _ASKED,
        (Schema(("goal",), ("sol1", "sol2"), "label", "index"),),
        "https://huggingface.co/datasets/ybisk/piqa",
    ),
}
"""Task name to template."""

OWN = Template(
    _ASKED,
    (
        Schema(("context", "question"), ("choices",), "answer", "own", category="category"),
        Schema(("question",), ("choices",), "answer", "own", category="category"),
        Schema(("context",), ("choices",), "answer", "own", category="category"),
    ),
    "salad-lightning questions --help",
)
"""For rows of one's own: ``question`` and/or ``context``, ``choices``, ``answer``; ``prompt`` in place of the usual."""


def read_question(row: Mapping[str, Any], task: str, template: Template, where: str) -> Question:
    """One row of a dataset.

    Args:
        row: Field to value.
        task: Name of the task.
        template: Says which fields it has.
        where: File and line, for messages.

    Raises:
        UserError: If the row has the fields of no schema, a text is missing or empty, or the answer is none of them.
    """
    schema = next((schema for schema in template.schemas if all(_has(row, name) for name in schema.fields)), None)
    if schema is None:
        wanted = "; or ".join(", ".join(schema.fields) for schema in template.schemas)
        raise UserError(
            f"the row has not the fields of {task}",
            where=where,
            cure=f"it takes {wanted}; this row has {', '.join(map(str, row))}",
        )
    text = template.clean(schema.joined.join(str(_get(row, name)).strip() for name in schema.question))
    options = _options(text) if schema.lettered else _listed(row, schema)
    choices = [template.clean(option) for option in options]
    empty = [str(number) for number, choice in enumerate(choices) if not choice]
    if not text or empty or len(choices) < 2:
        what = "the question is empty" if not text else f"there are {len(choices)} choices"
        raise UserError(
            f"choice {empty[0]} is empty" if empty else what, where=where, cure="complete or remove the row"
        )
    answer = _answer(_get(row, schema.answer), choices, _listed_labels(row, schema), schema.counted)
    if answer is None:
        raise UserError(
            f"`{schema.answer}` is {_get(row, schema.answer)!r}, which is none of the {len(choices)} choices",
            where=where,
            cure="give the right one; the test split of some datasets is published without",
        )
    category = _get(row, schema.category) if schema.category and _has(row, schema.category) else task
    return Question(text, choices, answer, str(row.get("prompt") or template.prompt) if template is OWN
                    else template.prompt, str(category))  # fmt: skip


def _get(row: Any, path: str) -> Any:
    for name in path.split("."):
        row = [entry[name] for entry in row] if isinstance(row, list) else row[name]
    return row


def _has(row: Mapping[str, Any], path: str) -> bool:
    try:
        return _get(row, path) is not None
    except (KeyError, TypeError, IndexError):
        return False


def _listed(row: Mapping[str, Any], schema: Schema) -> list[str]:
    values = [_get(row, name) for name in schema.choices]
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return [str(value) for value in values]


def _listed_labels(row: Mapping[str, Any], schema: Schema) -> list[str]:
    return [str(label) for label in _get(row, schema.labels)] if schema.labels else []


def _options(text: str) -> list[str]:
    """Options of a prompt that spells them as "A. … B. …"."""
    edges: list[re.Match[str]] = []
    for match in _LETTER.finditer(text):
        if match[1] == "ABCDEFGHIJ"[len(edges) : len(edges) + 1]:
            edges.append(match)
    stops = [match.start() for match in edges[1:]] + [len(text)]
    return [text[match.end() : stop].strip() for match, stop in zip(edges, stops, strict=True)]


def _answer(value: Any, choices: list[str], labels: list[str], counted: Counted) -> int | None:
    """Index of the right option, or None."""
    number: int | None = None
    text = str(value).strip()
    if counted == "label":
        number = labels.index(text) if text in labels else None
    elif counted == "letter":
        number = "ABCDEFGHIJ".find(text.strip("().").upper()) if len(text.strip("().")) == 1 else None
    elif counted == "own" and isinstance(value, str):
        number = choices.index(text) if choices.count(text) == 1 else None
    elif re.fullmatch(r"\d+", text):
        number = int(text) - (counted == "number")
    return number if number is not None and 0 <= number < len(choices) else None
