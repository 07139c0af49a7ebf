"""From utterances to documents: interleaved text and speech, or a template with a spoken part.

The transcript is tokenised once. A student hears the stretches called spans and reads the rest; a teacher reads all of
it; so both predict the very same tokens (arXiv 2510.13632, section 3).
"""

from __future__ import annotations

import json
import math
import random
import string
from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from salad_lightning.batch import DocumentInfo
from salad_lightning.data.format import TIME_SLACK_S, Utterance
from salad_lightning.data.segments import Document, SpeechSpan
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.tokens import Unit, bos_id, spoken_units, tokenize
from salad_lightning.errors import UserError

__all__ = ["DocumentBuilder", "InterleaveDocuments", "TemplateDocuments"]

_Control = Literal["none", "muted", "shuffled"]


class DocumentBuilder(ABC):
    """Turns an utterance into documents; shared by training, evaluation and generation.

    Args:
        append_eos: Whether a document ends with the tokenizer's end-of-sequence token, which is predicted too.
        control: A control condition for evaluation: "muted" silences the audio, "shuffled" puts another utterance's
            audio in its place, "none" leaves it.
    """

    def __init__(self, append_eos: bool, control: _Control) -> None:
        self.append_eos, self.control = append_eos, control

    @abstractmethod
    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """Documents of one utterance, each at most ``spec.context`` positions long for student and for teacher.

        Args:
            utterance: With its audio at ``spec.sample_rate_hz``.
            spec: Lengths and tokenizer of the model.
            seed: Together with source, key and epoch it decides every random choice.
            epoch: How often the source has been read before.

        Raises:
            UserError: If the utterance lacks what the builder needs, or the context is too short.
        """

    def fingerprint(self) -> str:
        """Class and settings, to tell whether a stream can be resumed."""
        return json.dumps([type(self).__name__, vars(self)], sort_keys=True)

    def _eos(self, spec: SequenceSpec) -> list[int]:
        if not self.append_eos:
            return []
        if spec.tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token", where="append_eos", cure="set `append_eos: false`"
            )
        return [int(spec.tokenizer.eos_token_id)]

    def _clip(self, audio: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.zeros_like(audio) if self.control == "muted" else audio


def _bos(spec: SequenceSpec) -> list[int]:
    bos = bos_id(spec.tokenizer)
    return [] if bos is None else [bos]


class _Segment(NamedTuple):
    """Units ``[first, stop)`` of a transcript, read or heard."""

    is_speech: bool
    first: int
    stop: int


class InterleaveDocuments(DocumentBuilder):
    """Alternates text spans and speech spans of a timed transcript (arXiv 2510.13632, section on interleaving).

    Span lengths are uniform; cuts fall between words. Utterances without audio become plain text, split where longer
    than the context. A speech span begins with its first word and ends with its last: it never hears the next word.

    Args:
        text_words: Fewest and most words of a text span; 0 lets two speech spans meet.
        speech_words: Fewest and most words of a speech span.
        start_with_text_probability: Chance that the first span is text.
        append_eos: Whether a transcript ends with the end-of-sequence token, which is predicted too.
        control: "muted" silences the audio, "none" leaves it.

    Raises:
        UserError: If a range is empty or the control is "shuffled", which has no meaning for timed words.
    """

    def __init__(
        self,
        text_words: tuple[int, int] = (10, 30),
        speech_words: tuple[int, int] = (5, 15),
        start_with_text_probability: float = 0.5,
        append_eos: bool = True,
        control: _Control = "none",
    ) -> None:
        super().__init__(append_eos, control)
        for name, (low, high), least in (("text_words", text_words, 0), ("speech_words", speech_words, 1)):
            if not (least <= low <= high and high >= 1):
                raise UserError(
                    f"[{low}, {high}] is not a range of words", where=name, cure=f"give {least} ≤ fewest ≤ most"
                )
        if control == "shuffled":
            raise UserError(
                "another utterance's audio has other word times",
                where="control: shuffled",
                cure="use TemplateDocuments",
            )
        self.text_words, self.speech_words = tuple(text_words), tuple(speech_words)
        self.start_with_text_probability = start_with_text_probability

    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """See `DocumentBuilder.build`.

        Raises:
            UserError: If audio comes without word times, the words do not spell the text, or one span is longer than
                the context.
        """
        tokens = tokenize(utterance.text, spec.tokenizer)
        if utterance.audio is None:
            return self._plain(utterance, tokens.ids, spec)
        if utterance.words is None:
            raise UserError(
                "the transcript has no word times, which interleaving needs",
                where=utterance.where,
                cure="add `words` to the shard, or use TemplateDocuments for this source",
            )
        audio_s = len(utterance.audio) / spec.sample_rate_hz
        if utterance.words and utterance.words[-1].end_s > audio_s + TIME_SLACK_S:
            raise UserError(
                f"the last word ends at {utterance.words[-1].end_s:.2f} s, the audio at {audio_s:.2f} s",
                where=utterance.where,
                cure="align this sample again",
            )
        units = spoken_units(utterance.text, utterance.words, tokens)
        if units is None:
            raise UserError(
                f"`words` do not spell the text {utterance.text[:80]!r}",
                where=utterance.where,
                cure="both must have the same letters in the same order; align this sample again",
            )
        rng = random.Random(f"{seed}/{utterance.source}/{utterance.key}/{epoch}")
        return self._fill(utterance, tokens.ids, units, self._segments(units, rng), spec)

    def _segments(self, units: list[Unit], rng: random.Random) -> list[_Segment]:
        is_speech = rng.random() >= self.start_with_text_probability
        segments, first = [], 0
        while first < len(units):
            wanted, stop = rng.randint(*(self.speech_words if is_speech else self.text_words)), first
            while stop < len(units) and wanted > 0:
                wanted -= units[stop].num_words
                stop += 1
            if stop > first:
                segments.append(_Segment(is_speech, first, stop))
            is_speech, first = not is_speech, stop
        return segments

    def _fill(
        self,
        utterance: Utterance,
        ids: NDArray[np.int64],
        units: list[Unit],
        segments: list[_Segment],
        spec: SequenceSpec,
    ) -> list[Document]:
        """Join segments into as few documents as the context allows, in order."""
        documents: list[Document] = []
        current: list[_Segment] = []
        fitting: Document | None = None
        for segment in segments:
            longer = self._assemble(utterance, ids, units, [*current, segment], spec)
            if fitting is not None and max(longer.num_positions, longer.num_tokens) > spec.context:
                documents.append(fitting)
                current = []
                longer = self._assemble(utterance, ids, units, [segment], spec)
            if max(longer.num_positions, longer.num_tokens) > spec.context:
                kind = "speech" if segment.is_speech else "text"
                raise UserError(
                    f"a {kind} span of {segment.stop - segment.first} words fills "
                    f"{max(longer.num_positions, longer.num_tokens)} positions, and `context` is {spec.context}",
                    where=utterance.where,
                    cure=f"raise `context`, or lower `{kind}_words`",
                )
            current.append(segment)
            fitting = longer
        if fitting is not None:
            documents.append(fitting)
        return [document for document in documents if document.predicted.any()]

    def _assemble(
        self,
        utterance: Utterance,
        ids: NDArray[np.int64],
        units: list[Unit],
        segments: list[_Segment],
        spec: SequenceSpec,
    ) -> Document:
        assert utterance.audio is not None
        first_unit, stop_unit = segments[0].first, segments[-1].stop
        bos = _bos(spec)
        eos = self._eos(spec) if stop_unit == len(units) else []
        shift = len(bos) - units[first_unit].first_token
        rate = spec.sample_rate_hz
        audio_s = len(utterance.audio) / rate
        # A later piece of a long utterance is encoded from its own first word on.
        offset = int((units[first_unit].start_s if first_unit else 0.0) * rate)
        spans: list[SpeechSpan] = []
        clips: list[NDArray[np.float32]] = []
        for is_speech, first, stop in segments:
            if not is_speech:
                continue
            start_s = units[first].start_s if first else 0.0
            end_s = min(units[stop - 1].end_s, units[stop].start_s, audio_s) if stop < len(units) else audio_s
            if spec.causal:
                clip = utterance.audio[offset : math.ceil(end_s * rate)]
                first_frame, last_frame = spec.frame_span(start_s - offset / rate, end_s - offset / rate)
                if len(clip):
                    last_frame = min(last_frame, spec.num_frames(len(clip)))
            else:
                clip = utterance.audio[round(start_s * rate) : round(end_s * rate)]
                first_frame, last_frame = 0, spec.num_frames(len(clip)) if len(clip) else 0
            if not len(clip) or last_frame <= first_frame:
                continue  # too short for one frame: read as text
            if spec.causal:
                clips = [clip]  # one clip, cut after the last span's end, serves all spans
            else:
                clips.append(clip)
            words = sum(unit.num_words for unit in units[first:stop])
            spans.append(
                SpeechSpan(
                    start=units[first].first_token + shift,
                    stop=units[stop - 1].stop_token + shift,
                    clip=len(clips) - 1,
                    first_frame=first_frame,
                    num_frames=last_frame - first_frame,
                    num_words=words,
                    num_positions=spec.num_positions(last_frame - first_frame, words),
                    seconds=end_s - start_s,
                )
            )
        piece = ids[units[first_unit].first_token : units[stop_unit - 1].stop_token]
        token_ids = np.concatenate([bos, piece, eos]).astype(np.int64)
        predicted = np.ones(len(token_ids), dtype=np.bool_)
        predicted[0] = False  # nothing comes before it
        for span in spans:
            predicted[span.start : span.stop] = False
        info = DocumentInfo(utterance.key, utterance.source, utterance.fields)
        return Document(token_ids, predicted, info, spans, [self._clip(clip) for clip in clips])

    def _plain(self, utterance: Utterance, ids: NDArray[np.int64], spec: SequenceSpec) -> list[Document]:
        bos = _bos(spec)
        rest = np.concatenate([ids, self._eos(spec)]).astype(np.int64)
        room = spec.context - len(bos)
        if room < 2:
            raise UserError(f"{spec.context} positions hold no text", where="context", cure="raise `context`")
        documents = []
        for start in range(0, len(rest), room):
            token_ids = np.concatenate([bos, rest[start : start + room]]).astype(np.int64)
            predicted = np.ones(len(token_ids), dtype=np.bool_)
            predicted[0] = False
            info = DocumentInfo(utterance.key, utterance.source, utterance.fields)
            documents.append(Document(token_ids, predicted, info))
        return [document for document in documents if document.predicted.any()]


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
        UserError: If the template has a part twice or cannot be parsed.
    """

    def __init__(
        self,
        template: str = "{speech} {answer}",
        all_choices: bool = False,
        append_eos: bool = False,
        control: _Control = "none",
    ) -> None:
        super().__init__(append_eos, control)
        self.template, self.all_choices = template, all_choices
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise UserError(f"{template!r} does not parse ({error})", where="template") from error
        if names.count("speech") > 1 or names.count("answer") > 1 or "" in names:
            raise UserError(
                f"{template!r} must name its fields, with {{speech}} and {{answer}} at most once each", where="template"
            )

    def build(self, utterance: Utterance, spec: SequenceSpec, *, seed: int = 0, epoch: int = 0) -> list[Document]:
        """See `DocumentBuilder.build`; nothing here is random.

        Raises:
            UserError: If a field is missing, ``answer`` fits no choice, or a document is longer than the context.
        """
        clip, num_frames, seconds = self._speech(utterance, spec)
        return [
            self._assemble(utterance, answer, choice, clip, num_frames, seconds, spec)
            for choice, answer in self._answers(utterance)
        ]

    def _answers(self, utterance: Utterance) -> list[tuple[int | None, str]]:
        if "{answer}" not in self.template:
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

    def _speech(self, utterance: Utterance, spec: SequenceSpec) -> tuple[NDArray[np.float32] | None, int, float]:
        if utterance.audio is None or "{speech}" not in self.template:
            return None, 0, 0.0
        clip, rate = utterance.audio, spec.sample_rate_hz
        end_s = utterance.fields.get("speech_end_s", len(clip) / rate)
        if not isinstance(end_s, int | float) or end_s < 0:
            raise UserError(f"`speech_end_s` is {end_s!r}, not seconds", where=utterance.where)
        cut = end_s * rate < len(clip)
        if cut:
            clip = clip[: max(math.ceil(end_s * rate), 1)]
        num_frames = spec.num_frames(len(clip))
        if cut and spec.causal:
            num_frames = min(num_frames, spec.frame_span(0.0, end_s)[1])
        if num_frames < 1:
            raise UserError(
                f"{len(clip) / rate:.3f} s of speech are shorter than one encoder frame", where=utterance.where
            )
        return self._clip(clip), num_frames, len(clip) / rate

    def _assemble(
        self,
        utterance: Utterance,
        answer: str,
        choice: int | None,
        clip: NDArray[np.float32] | None,
        num_frames: int,
        seconds: float,
        spec: SequenceSpec,
    ) -> Document:
        text, ranges = self._render(utterance, answer)
        tokens = tokenize(text, spec.tokenizer)
        bos = _bos(spec)
        eos = self._eos(spec) if "answer" in ranges else []
        token_ids = np.concatenate([bos, tokens.ids, eos]).astype(np.int64)
        predicted = np.zeros(len(token_ids), dtype=np.bool_)
        if "answer" in ranges:
            first, stop = np.searchsorted(tokens.last_char, ranges["answer"]) + len(bos)
            predicted[first:stop] = True
            predicted[len(token_ids) - len(eos) :] = True
        spans, clips = [], []
        if clip is not None:
            first, stop = (int(edge) + len(bos) for edge in np.searchsorted(tokens.last_char, ranges["speech"]))
            if stop > first:
                words = max(len(utterance.text.split()), 1)
                positions = spec.num_positions(num_frames, words)
                spans.append(SpeechSpan(first, stop, 0, 0, num_frames, words, positions, seconds))
                clips.append(clip)
        if len(predicted):
            predicted[0] = False  # nothing comes before it
        for span in spans:
            predicted[span.start : span.stop] = False
        info = DocumentInfo(utterance.key, utterance.source, utterance.fields, choice)
        document = Document(token_ids, predicted, info, spans, clips)
        longest = max(document.num_positions, document.num_tokens)
        if longest > spec.context:
            raise UserError(
                f"the document fills {longest} positions, and `context` is {spec.context}",
                where=utterance.where,
                cure="raise `context`, or leave this sample out",
            )
        return document

    def _render(self, utterance: Utterance, answer: str) -> tuple[str, dict[str, tuple[int, int]]]:
        """The whole text, and the character ranges of speech and answer in it."""
        known: dict[str, Any] = {**utterance.fields, "text": utterance.text, "speech": utterance.text, "answer": answer}
        text, ranges = "", {}
        for literal, name, form, _ in string.Formatter().parse(self.template):
            text += literal
            if name is None:
                continue
            if name not in known:
                raise UserError(
                    f"the template asks for {{{name}}}, which the JSON does not have",
                    where=utterance.where,
                    cure="use one of " + ", ".join(sorted(known)),
                )
            value = format(known[name], form or "")
            ranges[name] = (len(text), len(text) + len(value))
            text += value
        return text, ranges
