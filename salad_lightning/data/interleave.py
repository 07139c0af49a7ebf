"""Interleaved text and speech from timed transcripts: the training documents of SALAD."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from salad_lightning.batch import DocumentInfo
from salad_lightning.data.audio import Clip
from salad_lightning.data.documents import Control, DocumentBuilder, bos_ids
from salad_lightning.data.format import TIME_SLACK_S, Utterance
from salad_lightning.data.segments import Document, SpeechSpan
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.tokens import Unit, spoken_units, tokenize
from salad_lightning.errors import UserError

__all__ = ["InterleaveDocuments"]


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
        control: Control = "none",
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
        if not utterance.num_samples:
            return self._plain(utterance, tokens.ids, spec)
        if utterance.words is None:
            raise UserError(
                "the transcript has no word times, which interleaving needs",
                where=utterance.where,
                cure="add `words` to the shard, or use TemplateDocuments for this source",
            )
        self._check_encoded(utterance, spec)
        if utterance.encoded is not None and not spec.causal:
            raise UserError(
                "spans cannot be cut out of what this encoder made of whole utterances: its frames hear what follows",
                where=utterance.where,
                cure="interleave from shards of audio, or use TemplateDocuments for this source",
            )
        audio_s = utterance.num_samples / spec.sample_rate_hz
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
        if segments:  # nearly always one, and then there is no need to see how many of them fit
            whole = self._assemble(utterance, ids, units, segments, spec)
            if max(whole.num_positions, whole.num_tokens) <= spec.context:
                return [whole] if whole.predicted.any() else []
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
        first_unit, stop_unit = segments[0].first, segments[-1].stop
        bos = bos_ids(spec)
        eos = self._eos(spec) if stop_unit == len(units) else []
        shift = len(bos) - units[first_unit].first_token
        rate = spec.sample_rate_hz
        audio_s = utterance.num_samples / rate
        # A later piece of a long utterance is encoded from its own first word on; pre-encoded, from the very beginning.
        whole = not first_unit or utterance.encoded is not None
        offset = 0 if whole else int(units[first_unit].start_s * rate)
        spans: list[SpeechSpan] = []
        clips: list[Clip] = []
        for is_speech, first, stop in segments:
            if not is_speech:
                continue
            start_s = units[first].start_s if first else 0.0
            end_s = min(units[stop - 1].end_s, units[stop].start_s, audio_s) if stop < len(units) else audio_s
            if spec.causal:
                clip = _until(utterance, offset, math.ceil(end_s * rate), spec)
                first_frame, last_frame = spec.frame_span(start_s - offset / rate, end_s - offset / rate)
                if len(clip):
                    last_frame = min(last_frame, spec.num_frames(math.ceil(end_s * rate) - offset))
            else:
                clip = utterance.clip(round(start_s * rate), round(end_s * rate))
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
        encoded = utterance.encoded is not None
        return Document(token_ids, predicted, info, spans, [self._clip(clip) for clip in clips], encoded)

    def _plain(self, utterance: Utterance, ids: NDArray[np.int64], spec: SequenceSpec) -> list[Document]:
        bos = bos_ids(spec)
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


def _until(utterance: Utterance, offset: int, stop: int, spec: SequenceSpec) -> Clip:
    """The utterance's audio ``[offset, stop)`` in samples, or the frames it was encoded to up to ``stop``."""
    if utterance.encoded is not None:
        return utterance.encoded.data[: spec.num_frames(max(stop, 1))]
    return utterance.clip(offset, stop)
