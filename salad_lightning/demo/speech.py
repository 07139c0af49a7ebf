"""The miniature's speech: who says what, and writing it as audio files with a manifest for ``prepare``."""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch

from salad_lightning.data.audio import resample
from salad_lightning.demo.world import Question, World
from salad_lightning.interfaces import TimedWord
from salad_lightning.synthesizers.espeak import EspeakSynthesizer

__all__ = ["SAMPLE_RATE_HZ", "Utterance", "VoiceSetting", "natural_speech", "speak_all", "spoken_questions"]

SAMPLE_RATE_HZ = 16_000

_ACCENTS = ("en-us", "gmw/en", "en-gb-x-rp")
_VARIANTS = {
    "train": (
        *("m1", "m3", "m5", "m6", "m7", "f1", "f2", "f5", "Alex", "Andrea", "Annie", "Denis", "Gene", "Lee", "Mario"),
        *(
            "Michael",
            "belinda",
            "david",
            "edward",
            "linda",
            "max",
            "paul",
            "robert",
            "victor",
            "Alicia",
            "Andy",
            "Diogo",
        ),
        *(
            "Gene2",
            "Henrique",
            "Hugo",
            "Jacky",
            "Marco",
            "Mike",
            "Nguyen",
            "m8",
            "adam",
            "antonio",
            "aunty",
            "benjamin",
        ),
        *(
            "boris",
            "caleb",
            "ed",
            "iven2",
            "john",
            "marcelo",
            "michel",
            "miguel",
            "norbert",
            "pablo",
            "pedro",
            "quincy",
        ),
        *("rob", "sandro", "shelby", "steph", "travis", "zac"),
    ),
    "val": ("m2", "f3"),
    "test": ("m4", "f4"),
}
_RATES_WPM = (140, 190)
_PITCHES = (35, 65)


class VoiceSetting(NamedTuple):
    """One way of speaking: espeak voice, words a minute, pitch 0 to 99."""

    voice: str
    rate_wpm: int
    pitch: int


class Utterance(NamedTuple):
    """What is said, by whom.

    Attributes:
        key: Unique within its manifest; the audio file's name.
        text: What is said.
        voice: How.
        fields: Further columns of the manifest (``domain``, ``choices``, ``answer`` …).
    """

    key: str
    text: str
    voice: VoiceSetting
    fields: dict[str, Any]


def draw_voice(split: str, rng: random.Random) -> VoiceSetting:
    """A voice of a split, which no other split uses, at some rate and pitch."""
    voice = f"{rng.choice(_ACCENTS)}+{rng.choice(_VARIANTS[split])}"
    return VoiceSetting(voice, rng.randint(*_RATES_WPM), rng.randint(*_PITCHES))


def natural_speech(
    world: World, num_utterances: int, *, seed: int, shares: dict[str, float] | None = None
) -> list[Utterance]:
    """The speech heard in training: documents of the train facts, domains covered as the world says.

    Args:
        world: What there is to talk about.
        num_utterances: How many documents are spoken; one is about 3 s.
        seed: Of the draw.
        shares: Of the domains by name; the world's by default.
    """
    rng = random.Random(f"voices/{seed}")
    shares = shares or {domain.name: domain.speech_share for domain in world.domains}
    documents = world.documents(num_utterances, seed=seed, spoken=True, shares=shares)
    return [
        Utterance(f"train-{index:06d}", text, draw_voice("train", rng), {"domain": domain})
        for index, (domain, text) in enumerate(documents)
    ]


def spoken_questions(world: World, split: str, per_domain: int, *, seed: int) -> list[Utterance]:
    """Questions about facts of a split, each by one of the split's voices, equally many in each domain.

    The whole sentence is spoken, for a prompt that ends in a pause sounds finished; the answer is cut off at its
    onset by whoever asks.

    Args:
        world: What is asked.
        split: ``val`` or ``test``.
        per_domain: Questions of each domain.
        seed: Of the draw.
    """
    rng = random.Random(f"questions/{split}/{seed}")
    by_domain: dict[str, list[Question]] = {domain.name: [] for domain in world.domains}
    for question in world.questions(split):
        by_domain[question.fact.domain].append(question)
    chosen = []
    for questions in by_domain.values():
        rng.shuffle(questions)
        chosen += list(itertools.islice(itertools.cycle(questions), per_domain))
    return [
        Utterance(f"{split}-{index:06d}", question.text, draw_voice(split, rng), question_fields(question))
        for index, question in enumerate(chosen)
    ]


def question_fields(question: Question) -> dict[str, Any]:
    """Manifest columns of a question."""
    return {
        "domain": question.fact.domain,
        "prompt": question.prompt,
        "choices": list(question.choices),
        "answer": question.answer,
    }


def speak_all(utterances: Sequence[Utterance], folder: str | Path, *, workers: int = 1) -> float:
    """Write ``{key}.flac`` for every utterance, and ``manifest.jsonl``.

    A line of the manifest has ``audio`` (relative to the manifest), ``text``, ``words`` (``[word, start_s, end_s]``
    each), ``speaker`` and the utterance's own fields.

    Args:
        utterances: What to say.
        folder: Made where missing.
        workers: Processes.

    Returns:
        Seconds of audio.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [(list(utterances[i : i + 64]), folder) for i in range(0, len(utterances), 64)]
    seconds = 0.0
    partial = folder / "manifest.jsonl.part"
    with partial.open("w", encoding="utf-8") as manifest:
        for rows in _map(chunks, workers):
            for row, duration_s in rows:
                manifest.write(json.dumps(row) + "\n")
                seconds += duration_s
    partial.replace(folder / "manifest.jsonl")
    return seconds


def _map(chunks: list[tuple[list[Utterance], Path]], workers: int) -> Iterator[list[tuple[dict[str, Any], float]]]:
    if workers <= 1:
        yield from map(_speak_chunk, chunks)
        return
    with ProcessPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(_speak_chunk, chunks)


def _speak_chunk(chunk: tuple[list[Utterance], Path]) -> list[tuple[dict[str, Any], float]]:
    utterances, folder = chunk
    rows = []
    for utterance in utterances:
        setting = utterance.voice
        synthesizer = EspeakSynthesizer(setting.voice, setting.rate_wpm, setting.pitch)
        speech = synthesizer.speak(utterance.text)
        audio = resample(speech.audio, synthesizer.sample_rate_hz, SAMPLE_RATE_HZ)
        name = f"{utterance.key}.flac"
        flac = io.BytesIO()  # libsndfile itself waits for the disk after every file
        soundfile.write(flac, audio, SAMPLE_RATE_HZ, format="FLAC", compression_level=0.0)
        (folder / name).write_bytes(flac.getvalue())
        duration_s = len(audio) / SAMPLE_RATE_HZ
        words = [_rounded(word, duration_s) for word in speech.words]
        row = {"audio": name, "text": utterance.text, "words": words, "speaker": setting.voice, **utterance.fields}
        if "choices" in utterance.fields:
            # The sentence is spoken to its end, so that the prompt does not sound finished; heard is the prompt alone.
            row |= {"text": utterance.fields["prompt"], "words": words[:-1], "speech_end_s": words[-1][1]}
        rows.append((row, duration_s))
    return rows


def _rounded(word: TimedWord, duration_s: float) -> list[Any]:
    return [word.word, round(word.start_s, 3), round(min(word.end_s, duration_s), 3)]
