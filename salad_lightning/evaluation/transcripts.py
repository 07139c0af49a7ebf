"""What a recognizer hears in shards, kept on disk: a killed run goes on, and the same audio is heard once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from salad_lightning.data.format import AUDIO_EXTENSIONS, RawSample, Utterance, decode
from salad_lightning.data.reader import read_shards
from salad_lightning.data.sources import expand_shards
from salad_lightning.data.tolerance import Tolerance
from salad_lightning.errors import UserError

__all__ = ["Transcript", "Transcripts", "audio_digest"]

Hear = Callable[[NDArray[np.float32]], str]


class Transcript(NamedTuple):
    """A sample and what was heard.

    Attributes:
        raw: As its shard holds it.
        utterance: Decoded, its audio cut where the question ends.
        heard: The text.
    """

    raw: RawSample
    utterance: Utterance
    heard: str


class Transcripts:
    """Transcribes shards with one recognizer.

    Args:
        folder: For ``{name}.jsonl``, to which every transcript is added at once.
        recognizer: Name of what hears, another one for other weights (`model_name`); a folder belongs to one.
        hear: Clip at ``sample_rate_hz`` to text.
        sample_rate_hz: Hertz.

    Raises:
        UserError: If the folder holds transcripts of another recognizer.
    """

    def __init__(self, folder: Path, recognizer: str, hear: Hear, sample_rate_hz: int) -> None:
        self._folder, self._hear, self._rate = folder, hear, sample_rate_hz
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "recognizer.txt"
        if note.exists() and note.read_text(encoding="utf-8") != recognizer:
            raise UserError(
                f"the folder holds what {note.read_text(encoding='utf-8')} heard, not {recognizer}",
                where=str(folder),
                cure="name another folder, or remove this one",
            )
        note.write_text(recognizer, encoding="utf-8")
        self._known: dict[str, str] = {}
        self.read()

    def read(self) -> None:
        """Take over what other processes have transcribed meanwhile."""
        for path in sorted(self._folder.glob("*.jsonl")):
            # A line may be cut off, inside a character even, where the run before was killed; and it may hold
            # characters that splitlines() takes for line breaks.
            for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    self._known[row["audio"]] = row["heard"]

    def of(
        self,
        shards: str | list[str],
        name: str,
        *,
        part: int = 0,
        num_parts: int = 1,
        allow_pipe: bool = False,
        tolerance: Tolerance | None = None,
    ) -> Iterator[Transcript]:
        """Every ``num_parts``-th sample from number ``part``, in the order of the shards.

        Args:
            shards: As `Source.shards`.
            name: Of the file for new transcripts, and of the progress bar.
            part: Of this process.
            num_parts: Processes that share the work.
            allow_pipe: As `Source.allow_pipe`.
            tolerance: Takes note of what cannot be read; by default that is an error.

        Raises:
            UserError: If a sample has no audio, or more of them cannot be decoded than may be.
        """
        tolerance = tolerance or Tolerance(name)
        paths = expand_shards(shards, remote=True, allow_pipe=allow_pipe)
        samples = read_shards(paths, tolerance, allow_pipe=allow_pipe)
        with (self._folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" if file.tell() else "")  # behind a line that was cut off
            for number, raw in enumerate(tqdm(samples, desc=f"transcribe {name}", unit=" clips")):
                if number % num_parts != part:
                    continue
                tolerance.count("sample")
                try:
                    utterance = decode(raw, source="", sample_rate_hz=self._rate)
                except UserError as error:
                    tolerance.skip("sample", error, raw.shard, raw.key)
                    continue
                utterance = self._cut(utterance)
                digest = audio_digest(raw) + str(utterance.fields.get("speech_end_s", ""))
                if digest not in self._known:
                    assert utterance.audio is not None
                    self._known[digest] = self._hear(utterance.audio)
                    row = {"audio": digest, "key": raw.key, "heard": self._known[digest]}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                yield Transcript(raw, utterance, self._known[digest])

    def _cut(self, utterance: Utterance) -> Utterance:
        # Never skipped: whoever takes no audio would have the item all the same.
        if utterance.audio is None:
            raise UserError(
                "the sample has no audio to be recognized", where=utterance.where, cure="use shards of audio"
            )
        end_s = utterance.fields.get("speech_end_s")
        if isinstance(end_s, int | float):
            cut = utterance.audio[: max(math.ceil(end_s * self._rate), 1)]
            return dataclasses.replace(utterance, recording=cut)
        return utterance


def audio_digest(raw: RawSample) -> str:
    """SHA-256 of a sample's audio as its shard holds it, recorded or encoded; "none" where there is none."""
    for extension in (*AUDIO_EXTENSIONS, "frames.npy", "codes.npy"):
        if extension in raw.members:
            return hashlib.sha256(raw.members[extension]).hexdigest()
    return "none"
