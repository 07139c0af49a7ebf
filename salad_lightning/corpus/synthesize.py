"""``salad-lightning synthesize``: a manifest of texts to shards of synthetic speech with word times.

As in ``prepare``, row ``i`` belongs to shard ``i // samples_per_shard``, workers make whole shards, and a killed
command goes on with those that are missing. Voice and randomness of every text are decided by seed and key, so the
bytes are the same however often it is killed.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import yaml

from salad_lightning.corpus.budget import Budget, gather
from salad_lightning.corpus.keyed_rows import keyed, row_batches, rows_digest
from salad_lightning.corpus.limits import check_sizes
from salad_lightning.corpus.manifest import read_rows
from salad_lightning.corpus.output_folder import INDEX, sha256_of, shard_prefix
from salad_lightning.corpus.pool import map_in_order
from salad_lightning.corpus.workspace import Workspace, finish_publication, numbered_anew, open_workspace
from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run", "synthesize", "voice_of"]

_FAILED = "failed.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--manifest",
        type=Path,
        required=True,
        metavar="FILE",
        help="texts: a .jsonl, .tsv or .parquet with `text`; optional `key`; all other columns are kept",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--synthesizer", default="EspeakSynthesizer", metavar="NAME", help="see `plugins` (default: EspeakSynthesizer)"
    )
    parser.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="YAML",
        help="arguments of the synthesizer for one voice, such as '{voice: en-us+f2, rate_wpm: 160}'; give it several "
        "times to draw one of them for each text",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides who says what (default: 0)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; GPUs are shared among them")
    parser.add_argument("--source", metavar="NAME", help="name of the shards; the output folder's name by default")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help="resample (default: the synthesizer's own rate)")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="stop when a larger share of the texts cannot be spoken (default: 0.05); those left out are listed in "
        "failed.jsonl",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")


def run(args: argparse.Namespace) -> None:
    """Speak what the options say, and print what came of it."""
    begin = time.perf_counter()
    index = synthesize(
        args.manifest,
        args.output,
        synthesizer=args.synthesizer,
        voices=[voice_of(text) for text in args.voice],
        seed=args.seed,
        workers=args.workers,
        source=args.source,
        text_column=args.text_column,
        samples_per_shard=args.samples_per_shard,
        sample_rate_hz=args.sample_rate,
        max_bad_fraction=args.max_bad_fraction,
        overwrite=args.overwrite,
    )
    took = time.perf_counter() - begin
    failed = "".join(f", {count} × {reason}" for reason, count in index["failed"].items())
    print(
        f"{args.output}: {index['num_samples']} samples, {index['seconds'] / 3600:.2f} h in {len(index['shards'])} "
        f"shards after {took:.1f} s{failed}"
    )


def synthesize(
    manifest: str | Path,
    output: str | Path,
    *,
    synthesizer: str = "EspeakSynthesizer",
    voices: Sequence[dict[str, Any]] = (),
    seed: int = 0,
    workers: int = 1,
    source: str | None = None,
    text_column: str = "text",
    samples_per_shard: int = 1000,
    sample_rate_hz: int | None = None,
    max_bad_fraction: float = 0.05,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Speak every text of a manifest; goes on where a killed run with the same inputs stopped.

    A text that cannot be spoken (the synthesizer raises, or gives silence, or word times outside the audio) is left out
    and listed in ``failed.jsonl`` with the reason.

    Args:
        manifest: ``.jsonl``, ``.tsv``, ``.csv`` or ``.parquet``.
        output: Folder for the shards; made if missing.
        synthesizer: Name of an installed synthesizer, or the full path of a class.
        voices: Arguments of the synthesizer, one dict a voice; each text is said by one of them.
        seed: Decides which voice says what, and the synthesizer's own randomness.
        workers: Processes.
        source: Shards are called ``{source}-000000.tar``; the output folder's name by default.
        text_column: Column of the text.
        samples_per_shard: Rows of the manifest a shard.
        sample_rate_hz: Rate of the FLAC files; None keeps the synthesizer's.
        max_bad_fraction: Share of the texts that may fail before this stops, 0 to 1.
        overwrite: Replace the files listed in the folder's index.

    Returns:
        The content of ``index.json``: counts, seconds and SHA-256 in all and by shard, and what failed.

    Raises:
        UserError: If the folder holds something else, a setting is wrong, or too many texts fail.
    """
    output = Path(output)
    source = shard_prefix(source, output)
    check_sizes(samples_per_shard, workers, sample_rate_hz, max_bad_fraction)
    settings: dict[str, Any] = {
        "synthesizer": synthesizer,
        "voices": tuple(json.dumps(voice, sort_keys=True) for voice in voices or ({},)),
        "seed": seed,
        "text_column": text_column,
        "sample_rate_hz": sample_rate_hz,
    }
    read_rows(Path(manifest))  # complains where it cannot be read
    note = json.dumps([sha256_of(Path(manifest)), source, samples_per_shard, settings])
    if finish_publication(output) == note:
        index: dict[str, Any] = json.loads((output / INDEX).read_text(encoding="utf-8"))
        return index
    with open_workspace(output, overwrite=overwrite, inputs=[manifest]) as space:
        reports = _speak_all(space, Path(manifest), source, settings, samples_per_shard, workers, max_bad_fraction)
        return _publish(space, note, source, settings, reports)


def voice_of(text: str) -> dict[str, Any]:
    """A ``--voice``: settings in YAML.

    Raises:
        UserError: If it is no mapping.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"not a mapping: {text}", where="--voice", cure="write it as '{voice: en-us+f2, rate_wpm: 160}'"
        )
    return value


def _speak_all(
    space: Workspace,
    manifest: Path,
    source: str,
    settings: dict[str, Any],
    samples_per_shard: int,
    workers: int,
    max_bad_fraction: float,
) -> list[dict[str, Any]]:
    """Reports of all shards, in order."""
    # Here, not above: torch comes with it, and `synthesize --help` should answer at once.
    from salad_lightning.corpus.speaking import SpeechJob, speak_shard

    jobs = (
        SpeechJob(space.folder, f"{source}-{number:06d}.tar", rows_digest(settings, batch), batch, **settings)
        for number, batch in enumerate(row_batches(keyed(read_rows(manifest)), samples_per_shard))
    )
    cure = "mend the texts or the synthesizer, or raise --max-bad-fraction to leave them out"
    budget = Budget(max_bad_fraction, "texts could not be spoken", cure, all_may_be=False)
    made = map_in_order(functools.partial(space.finished_or_made, speak_shard), jobs, workers)
    try:
        reports = gather(space, made, budget, operator.itemgetter("failed"), progress="synthesize", unit=" texts")
    except BrokenProcessPool as error:
        cure = "type the same command again to go on; --workers 1 shows at which shard it dies"
        raise UserError("a process of the synthesizer died", where=str(manifest), cure=cure) from error
    if not reports:
        raise UserError("there is no row", where=str(manifest), cure="list at least one text")
    return reports


def _publish(
    space: Workspace, note: str, source: str, settings: dict[str, Any], reports: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    failed = [failure for report in reports for failure in report["failed"]]
    names, shards = numbered_anew(reports, source)
    index = {
        "source": source,
        **settings,
        "voices": [json.loads(voice) for voice in settings["voices"]],
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "seconds": round(sum(shard["seconds"] for shard in shards), 3),
        "failed": dict(sorted(Counter(failure["reason"] for failure in failed).items())),
        "shards": shards,
    }
    return space.publish(note, names, index, lists={_FAILED: failed})
