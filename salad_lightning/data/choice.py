"""Multiple choice: a spoken question after spoken examples, one document for each option."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from salad_lightning.data.documents import Control, DocumentBuilder
from salad_lightning.data.format import Utterance, decode, read_shard
from salad_lightning.data.segments import Document
from salad_lightning.data.sources import expand_shards
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.template import Heard, Piece, TemplateDocuments, check_length, join_pieces
from salad_lightning.errors import UserError

__all__ = ["ChoiceDocuments", "right_choice"]

_PROMPT = "prompt"


class ChoiceDocuments(DocumentBuilder):
    r"""A question with ``choices``, of which ``answer`` (an index, or the text of one) is right; each option is scored.

    Before the question come examples with their right answers, as many as fit the context beside the longest option
    (arXiv 2510.13632, section 5). All of a document is heard by the student and read by the teacher, the same examples
    included, so speech and text input are of the same items.

    Args:
        template: As of `TemplateDocuments`, such as ``"Question: {speech}\nAnswer: {answer}"``; by default every
            sample's field ``prompt``.
        shots: Shards of the examples, samples like the questions. A question may list the keys of its own in its field
            ``shots``; all others take the first ones.
        num_shots: Most examples.
        hear_shots: Whether the student hears the examples, or reads them.
        separator: Between examples and question.
        control: "muted" silences all audio, "shuffled" puts another utterance's audio in the question's place.

    Raises:
        UserError: If the template does not parse or has no ``{answer}``.
    """

    def __init__(
        self,
        template: str | None = None,
        shots: str | None = None,
        num_shots: int = 5,
        hear_shots: bool = True,
        separator: str = "\n\n",
        control: Control = "none",
    ) -> None:
        super().__init__(False, control)
        if num_shots < 0:
            raise UserError(f"num_shots is {num_shots}", where="num_shots", cure="give 0 or more")
        self.template, self.shots, self.num_shots = template, shots, num_shots
        self.hear_shots, self.separator = hear_shots, separator
        if template is not None:
            _builder(template, control)

    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """See `DocumentBuilder.build`; nothing here is random.

        Raises:
            UserError: If a field is missing, ``answer`` is none of the choices, an option has no token, there is no
                such example, some of the speech is audio and some pre-encoded, or the question alone is longer than the
                context.
        """
        builder = _builder(self._prompt(utterance), self.control)
        right_choice(utterance)
        heard = builder.hear(utterance, spec)
        options = [(choice, builder.piece(utterance, text, heard)) for choice, text in builder.answers(utterance)]
        shots = self.examples_of(utterance, spec)
        examples = [self._example(shot, spec) for shot in shots]
        _check_alike([*zip(shots, (piece.heard for piece in examples), strict=True), (utterance, heard)])
        for count in range(len(examples), -1, -1):
            pieces = [piece._replace(text=piece.text + self.separator) for piece in examples[:count]]
            documents = [join_pieces([*pieces, piece], utterance, choice, spec) for choice, piece in options]
            if all(max(document.num_positions, document.num_tokens) <= spec.context for document in documents):
                return documents
        for document in documents:
            check_length(document, utterance, spec)
        raise AssertionError("unreachable: one of them was too long")

    def _prompt(self, utterance: Utterance) -> str:
        prompt = self.template or utterance.fields.get(_PROMPT)
        if not isinstance(prompt, str):
            raise UserError(
                f"neither `template` nor the sample's field `{_PROMPT}` says how the question is put",
                where=utterance.where,
                cure="set `template`, or write the shards with `salad-lightning questions`",
            )
        return prompt

    def examples_of(self, utterance: Utterance, spec: SequenceSpec) -> Sequence[Utterance]:
        """The examples that may come before a question, in order; as many are taken as fit the context.

        Raises:
            UserError: If the question names one that is not there.
        """
        if self.shots is None or not self.num_shots:
            return []
        known = _examples(self.shots, spec.sample_rate_hz)
        wanted = utterance.fields.get("shots")
        if wanted is None:  # never the question itself, should it be among them
            return [shot for shot in known.values() if shot.text != utterance.text][: self.num_shots]
        if not isinstance(wanted, list) or not all(isinstance(key, str) for key in wanted):
            raise UserError(f"`shots` is {wanted!r}, no list of keys", where=utterance.where)
        if missing := [key for key in wanted if key not in known]:
            raise UserError(
                f"there is no example {missing[0]!r}", where=utterance.where, cure=f"check the keys in {self.shots}"
            )
        return [known[key] for key in wanted][: self.num_shots]

    def _example(self, shot: Utterance, spec: SequenceSpec) -> Piece:
        builder = _builder(self._prompt(shot), self.control)
        answer = str(shot.fields["choices"][right_choice(shot)])
        return builder.piece(shot, answer, builder.hear(shot, spec) if self.hear_shots else None)


def right_choice(utterance: Utterance) -> int:
    """Which option is right.

    Raises:
        UserError: If ``choices`` are fewer than two, or ``answer`` is none of them.
    """
    choices, answer = utterance.fields.get("choices"), utterance.fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise UserError(f"`choices` are {choices!r}", where=utterance.where, cure="give a list of two or more")
    if isinstance(answer, str) and choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise UserError(f"`answer` is {answer!r}, which is none of the {len(choices)} choices", where=utterance.where)
    return answer


def _check_alike(heard: Sequence[tuple[Utterance, Heard | None]]) -> None:
    """Refuse audio beside pre-encoded speech in a document; the question comes last."""
    places = {speech.encoded: utterance.where for utterance, speech in heard if speech is not None}
    if len(places) > 1:
        raise UserError(
            f"the speech of {places[True]} is pre-encoded, and that of {places[False]} is audio",
            where=heard[-1][0].where,
            cure="encode both the questions and the `shots`, or neither",
        )


@functools.lru_cache(maxsize=64)
def _builder(template: str, control: Control) -> TemplateDocuments:
    builder = TemplateDocuments(template, all_choices=True, control=control)
    if "answer" not in builder.names:
        raise UserError(f"{template!r} has no place for the {{answer}}", where="template", cure="put {answer} in it")
    return builder


@functools.lru_cache(maxsize=8)
def _examples(shards: str, sample_rate_hz: int) -> Mapping[str, Utterance]:
    """All examples by key, in order; they are few."""
    found = (raw for path in expand_shards(shards, remote=True) for raw in read_shard(path))
    return {raw.key: decode(raw, source="shots", sample_rate_hz=sample_rate_hz, keep_int16=True) for raw in found}
