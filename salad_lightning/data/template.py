"""A prompt with a spoken part and an answer: for instruction data, multiple choice and generation."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from salad_lightning.batch import DocumentInfo
from salad_lightning.data.audio import Clip
from salad_lightning.data.documents import Control, DocumentBuilder, bos_ids
from salad_lightning.data.format import Utterance
from salad_lightning.data.segments import Document, SpeechSpan
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.tokens import tokenize
from salad_lightning.errors import UserError

__all__ = ["Heard", "Piece", "TemplateDocuments", "check_length", "join_pieces"]


class Heard(NamedTuple):
    """Speech in a prompt.

    Attributes:
        clip: ``[L]`` samples, decoded or not yet, or ``[T, …]`` what the encoder stored.
        num_frames: Encoder frames.
        seconds: Duration.
        encoded: Whether it is what the encoder stored.
    """

    clip: Clip
    num_frames: int
    seconds: float
    encoded: bool


class Piece(NamedTuple):
    """A template filled in.

    Attributes:
        text: All of it, the transcript included.
        speech: Characters ``[first, stop)`` that are spoken, or None.
        answer: Characters of the answer, or None.
        heard: What is heard in the place of ``speech``; None where it is read.
        num_words: Words of ``speech``.
    """

    text: str
    speech: tuple[int, int] | None
    answer: tuple[int, int] | None
    heard: Heard | None
    num_words: int


class TemplateDocuments(DocumentBuilder):
    r"""A prompt with a spoken part, and an answer that alone carries loss.

    ``{speech}`` stands for the transcript: the student hears it, the teacher reads it; an utterance without audio is
    read by both. ``{answer}`` is the JSON field ``answer``: a string, or an index into the field ``choices``. Any other
    ``{name}`` is the JSON field of that name. A field ``speech_end_s`` cuts the audio there.

    Args:
        template: For example ``"Question: {speech}\nAnswer: {answer}"``. Without ``{answer}`` it is a prompt to
            generate from.
        all_choices: One document for each of ``choices`` (to score them) in place of the right one (to train on).
        append_eos: Whether the answer ends with the end-of-sequence token, which is predicted too.
        control: "muted" silences the audio, "shuffled" puts another utterance's audio in its place, "none" leaves it.

    Raises:
        UserError: If the template has a part twice, a format or a conversion, or cannot be parsed.
    """

    def __init__(
        self,
        template: str = "{speech} {answer}",
        all_choices: bool = False,
        append_eos: bool = False,
        control: Control = "none",
    ) -> None:
        super().__init__(append_eos, control)
        self.template, self.all_choices = template, all_choices
        try:
            names = self.names
            is_plain = not any(form or conversion for *_, form, conversion in string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"{template!r} does not parse ({error})", where="template") from error
        if names.count("speech") > 1 or names.count("answer") > 1 or "" in names:
            raise UserError(
                f"{template!r} must name its fields, with {{speech}} and {{answer}} at most once each", where="template"
            )
        if not is_plain:  # the transcript, formatted, is not what is spoken
            raise UserError(
                f"{template!r} formats or converts a field", where="template", cure="leave out what follows `:` or `!`"
            )

    @property
    def names(self) -> list[str]:
        """What the template names, in order."""
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """See `DocumentBuilder.build`; nothing here is random.

        Raises:
            UserError: If a field is missing, ``answer`` fits no choice, an option to score has no token, or a document
                is longer than the context.
        """
        heard = self.hear(utterance, spec)
        documents = []
        for choice, answer in self.answers(utterance):
            piece = self.piece(utterance, answer, heard)
            documents.append(join_pieces([piece], utterance, choice, spec, self._eos(spec) if piece.answer else []))
        for document in documents:
            check_length(document, utterance, spec)
        return documents

    def answers(self, utterance: Utterance) -> list[tuple[int | None, str]]:
        """Number and text of the options that become documents; the number is None where there is nothing to choose.

        Raises:
            UserError: If ``answer`` or ``choices`` are missing, or do not go together.
        """
        if "answer" not in self.names:
            return [(None, "")]
        answer, choices = utterance.fields.get("answer"), utterance.fields.get("choices")
        if choices is None and isinstance(answer, str):
            return [(None, answer)]
        if not isinstance(choices, list):
            raise UserError(
                "the JSON has no `answer` text, and no `choices` with the `answer`'s index",
                where=utterance.where,
                cure="add the field, or leave {answer} out of the template",
            )
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if self.all_choices:
            return [(index, str(choice)) for index, choice in enumerate(choices)]
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise UserError(
                f"`answer` is {answer!r}, which is none of the {len(choices)} choices", where=utterance.where
            )
        return [(answer, str(choices[answer]))]

    def hear(self, utterance: Utterance, spec: SequenceSpec) -> Heard | None:
        """What stands for ``{speech}``; None where it is read.

        Raises:
            UserError: If it is shorter than a frame, or was encoded by another encoder.
        """
        num_samples, rate = utterance.num_samples, spec.sample_rate_hz
        if not num_samples or "speech" not in self.names:
            return None
        self._check_encoded(utterance, spec)
        end_s = utterance.fields.get("speech_end_s", num_samples / rate)
        if not isinstance(end_s, int | float) or end_s < 0:
            raise UserError(f"`speech_end_s` is {end_s!r}, not seconds", where=utterance.where)
        cut = end_s * rate < num_samples
        if cut:
            num_samples = max(math.ceil(end_s * rate), 1)
        num_frames = spec.num_frames(num_samples)
        if cut and spec.causal:
            num_frames = min(num_frames, spec.frame_span(0.0, end_s)[1])
        if num_frames < 1:
            raise UserError(
                f"{num_samples / rate:.3f} s of speech are shorter than one encoder frame", where=utterance.where
            )
        if utterance.encoded is None:
            return Heard(self._clip(utterance.clip(0, num_samples)), num_frames, num_samples / rate, False)
        if cut and not spec.causal:
            raise UserError(
                "the end cannot be cut off what this encoder made of the whole utterance: its frames hear what follows",
                where=utterance.where,
                cure="use shards of audio for this source",
            )
        return Heard(utterance.encoded.data[:num_frames], num_frames, num_samples / rate, True)

    def piece(self, utterance: Utterance, answer: str, heard: Heard | None) -> Piece:
        """The template filled in.

        Args:
            utterance: With the fields that the template names.
            answer: Stands for ``{answer}``.
            heard: Of `hear`.

        Raises:
            UserError: If the utterance lacks a field.
        """
        known: dict[str, Any] = {**utterance.fields, "text": utterance.text, "speech": utterance.text, "answer": answer}
        text, ranges = "", {}
        for literal, name, _, _ in string.Formatter().parse(self.template):
            text += literal
            if name is None:
                continue
            if name not in known:
                raise UserError(
                    f"the template asks for {{{name}}}, which the JSON does not have",
                    where=utterance.where,
                    cure="use one of " + ", ".join(sorted(known)),
                )
            value = str(known[name])
            ranges[name] = (len(text), len(text) + len(value))
            text += value
        words = max(len(utterance.text.split()), 1)
        return Piece(text, ranges.get("speech"), ranges.get("answer"), heard, words)


def join_pieces(
    pieces: Sequence[Piece], utterance: Utterance, choice: int | None, spec: SequenceSpec, eos: Sequence[int] = ()
) -> Document:
    """One document of filled-in templates, one after the other; the last one's answer carries the loss.

    Args:
        pieces: Examples, and what is asked; what is heard of them is all audio, or all pre-encoded.
        utterance: What is asked.
        choice: Which of its options the last piece spells.
        spec: Of the model.
        eos: Tokens behind the answer.

    Raises:
        UserError: If an option that is to be scored has no token.
    """
    tokens = tokenize("".join(piece.text for piece in pieces), spec.tokenizer)
    bos = bos_ids(spec)
    token_ids = np.concatenate([bos, tokens.ids, eos]).astype(np.int64)
    predicted = np.zeros(len(token_ids), dtype=np.bool_)
    at = sum(len(piece.text) for piece in pieces[:-1])
    if pieces[-1].answer is not None:
        first, stop = np.searchsorted(tokens.last_char, [at + edge for edge in pieces[-1].answer]) + len(bos)
        if choice is not None and stop <= first:
            raise UserError(
                f"option {choice} has no token of its own, and no score", where=utterance.where, cure="give it a text"
            )
        predicted[first:stop] = True
        predicted[len(token_ids) - len(eos) :] = True
    spans: list[SpeechSpan] = []
    clips: list[Clip] = []
    begin = 0
    for piece in pieces:
        if piece.heard is not None and piece.speech is not None:
            edges = [begin + edge for edge in piece.speech]
            first, stop = (int(edge) + len(bos) for edge in np.searchsorted(tokens.last_char, edges))
            if stop > first:
                clip, frames, seconds, _ = piece.heard
                positions = spec.num_positions(frames, piece.num_words)
                spans.append(SpeechSpan(first, stop, len(clips), 0, frames, piece.num_words, positions, seconds))
                clips.append(clip)
        begin += len(piece.text)
    if len(predicted):
        predicted[0] = False  # nothing comes before it
    for span in spans:
        predicted[span.start : span.stop] = False
    info = DocumentInfo(utterance.key, utterance.source, utterance.fields, choice)
    encoded = any(piece.heard.encoded for piece in pieces if piece.heard is not None)
    return Document(token_ids, predicted, info, spans, clips, encoded)


def check_length(document: Document, utterance: Utterance, spec: SequenceSpec) -> None:
    """Refuse what does not fit a row.

    Raises:
        UserError: If it does not.
    """
    longest = max(document.num_positions, document.num_tokens)
    if longest > spec.context:
        raise UserError(
            f"the document fills {longest} positions, and `context` is {spec.context}",
            where=utterance.where,
            cure="raise `context`, or leave this sample out",
        )
