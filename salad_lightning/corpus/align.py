"""``salad-lightning align``: word times for shards, from a CTC model."""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_lightning import __version__
from salad_lightning.corpus.limits import check_limits, check_positive
from salad_lightning.corpus.workspace import Workspace, open_workspace
from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.corpus.aligner import Alignment, CtcAligner
    from salad_lightning.corpus.written_shard import Sample
    from salad_lightning.data.format import RawSample, Utterance

__all__ = ["add_arguments", "align_shards", "run"]

_PROBLEMS = "problems.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        f"{parser.description or ''}. Writes the shards again with `words`, `word_confidence` (0 to 1, null for words "
        "that the model cannot spell), `confidence` and `low_confidence`. Samples that cannot be aligned keep no word "
        f"times; they and those of low confidence are listed in {_PROBLEMS}. Go on after a kill with the same command."
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, .tar files, globs or braces")
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face CTC model with its vocabulary")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the aligned shards")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu; auto takes a GPU where there is one")
    parser.add_argument(
        "--batch-seconds", type=float, default=240.0, metavar="S", help="audio at a time (default: 240)"
    )
    parser.add_argument(
        "--min-confidence", type=float, default=0.5, metavar="P", help="below it an utterance is flagged (default: 0.5)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")


def run(args: argparse.Namespace) -> None:
    """Align, and print what came of it."""
    index = align_shards(
        args.shards,
        args.output,
        args.model,
        device=args.device,
        batch_seconds=args.batch_seconds,
        min_confidence=args.min_confidence,
        overwrite=args.overwrite,
    )
    counts = ", ".join(f"{name} {index[name]}" for name in ("aligned", "low_confidence", "not_aligned", "broken"))
    print(f"{args.output}: {index['num_samples']} samples in {len(index['shards'])} shards; {counts}")


def align_shards(
    shards: str | list[str],
    output: str | Path,
    model: str,
    *,
    device: str = "auto",
    batch_seconds: float = 240.0,
    min_confidence: float = 0.5,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write shards again, with word times; goes on where an earlier run was killed.

    Args:
        shards: Folders, files, globs or braces.
        output: Folder for shards of the same names.
        model: Folder or Hugging Face name of a CTC model.
        device: Where it runs, or "auto".
        batch_seconds: Padded audio at a time.
        min_confidence: Utterances with a lower mean confidence are flagged.
        overwrite: Replace the files listed in the folder's index.

    Returns:
        The content of ``index.json``.

    Raises:
        UserError: If a number is out of range, shards or model cannot be read, no sample has audio, two shards have one
            name, or the folder must not be replaced.
    """
    # Here, not above: these bring torch and transformers along, and `align --help` should answer at once.
    from tqdm import tqdm  # type: ignore[import-untyped]

    from salad_lightning.corpus.aligner import CtcAligner
    from salad_lightning.corpus.device import usable_device
    from salad_lightning.corpus.written_shard import published, shard_digest, shards_by_name

    check_positive("--batch-seconds", batch_seconds, "s")
    check_limits("--min-confidence", min_confidence, 0, 1)
    output = Path(output)
    paths = shards_by_name(shards)
    made_with = [__version__, model, min_confidence]
    if (index := published(output, made_with, paths.values())) is not None:
        return index
    _check_audio(paths.values())
    chosen = usable_device(device)

    @functools.cache  # a run that finds everything finished needs no model
    def aligner() -> CtcAligner:
        return CtcAligner(model, chosen, batch_seconds)

    with open_workspace(output, overwrite=overwrite, inputs=paths.values()) as space:
        reports = [
            _aligned_shard(space, name, path, shard_digest(made_with, path), aligner, min_confidence)
            for name, path in tqdm(paths.items(), desc="align", unit=" shards")
        ]
        return _publish(space, Path(model).name, reports)


def _check_audio(paths: Iterable[str]) -> None:
    """Refuse shards of which no sample has audio; those where one has are read up to it."""
    from salad_lightning.data.format import AUDIO_EXTENSIONS, read_shard  # as above

    encoded = False
    for raw in (raw for path in paths for raw in read_shard(path)):
        if any(extension in raw.members for extension in AUDIO_EXTENSIONS):
            return
        encoded = encoded or raw.has_audio
    if encoded:
        raise UserError("the audio is already encoded", where="shards", cure="align shards of audio, then encode those")
    raise UserError("no sample has audio", where="shards", cure="align shards of audio")


def _aligned_shard(
    space: Workspace, name: str, path: str, digest: str, aligner: Callable[[], CtcAligner], min_confidence: float
) -> dict[str, Any]:
    from salad_lightning.corpus.written_shard import write_shard  # as above

    if (report := space.finished(name, digest)) is not None:
        return report
    samples, problems, counts = _aligned_samples(path, aligner(), min_confidence)
    facts = {"problems": problems, "counts": counts}
    return write_shard(space.folder, name, digest, samples, lambda: facts)


def _aligned_samples(
    path: str, aligner: CtcAligner, min_confidence: float
) -> tuple[list[Sample], list[dict[str, Any]], dict[str, int]]:
    from salad_lightning.corpus.written_shard import Sample  # as above

    counts: Counter[str] = Counter()
    problems: list[dict[str, Any]] = []
    raws, utterances = [], []
    for raw, utterance in _decoded(path, aligner.sample_rate_hz):
        if isinstance(utterance, UserError):
            counts["broken"] += 1
            problems.append({"shard": path, "key": raw.key, "problem": utterance.what})
            continue
        raws.append(raw)
        utterances.append(utterance)
    spoken = [utterance for utterance in utterances if utterance.audio is not None]
    clips = [utterance.audio for utterance in spoken if utterance.audio is not None]
    found = {
        utterance.key: alignment
        for utterance, alignment in zip(spoken, aligner.align(clips, [entry.text for entry in spoken]), strict=True)
    }
    samples = []
    for raw, utterance in zip(raws, utterances, strict=True):
        record = json.loads(raw.members["json"])
        if (alignment := found.get(raw.key)) is not None:
            kind, problem = _note(record, alignment, min_confidence)
            counts[kind] += 1
            if problem:
                problems.append({"shard": path, "key": raw.key, "problem": problem})
        extension = next((extension for extension in raw.members if extension != "json"), "flac")
        seconds = 0.0 if utterance.audio is None else len(utterance.audio) / aligner.sample_rate_hz
        samples.append(Sample(raw.key, record, raw.members.get(extension), extension, seconds))
    return samples, problems, dict(counts)


def _decoded(path: str, sample_rate_hz: int) -> Iterator[tuple[RawSample, Utterance | UserError]]:
    from salad_lightning.data.format import decode, read_shard  # as above

    for raw in read_shard(path):
        try:
            yield raw, decode(raw, source="", sample_rate_hz=sample_rate_hz)
        except UserError as error:
            yield raw, error


def _note(record: dict[str, Any], alignment: Alignment, min_confidence: float) -> tuple[str, str]:
    """Put word times into a sample's JSON; returns what to count it as, and the problem if there is one."""
    confidence = alignment.confidence
    record["confidence"], record["low_confidence"] = round(confidence, 4), confidence < min_confidence
    if alignment.problem:
        record.pop("words", None)
        record.pop("word_confidence", None)
        return "not_aligned", alignment.problem
    record["words"] = alignment.words
    record["word_confidence"] = [value if value is None else round(value, 4) for value in alignment.confidences]
    if confidence < min_confidence:
        return "low_confidence", f"low confidence, {confidence:.3f}"
    return "aligned", ""


def _publish(space: Workspace, model: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [report for report in reports if report["num_samples"]]
    if not kept:
        raise UserError("no sample can be used", cure="see what is wrong with `salad-lightning lint`")
    problems = [problem for report in reports for problem in report["problems"]]
    columns = ("name", "num_samples", "seconds", "sha256")
    index = {
        "model": model,
        "num_samples": sum(report["num_samples"] for report in kept),
        "seconds": round(sum(report["seconds"] for report in kept), 3),
        **{
            name: sum(report["counts"].get(name, 0) for report in reports)
            for name in ("aligned", "low_confidence", "not_aligned", "broken")
        },
        "shards": [{column: report[column] for column in columns} for report in kept],
    }
    names = {report["name"]: report["name"] for report in kept}
    request = json.dumps([report["digest"] for report in reports])
    return space.publish(request, names, index, lists={_PROBLEMS: problems})
