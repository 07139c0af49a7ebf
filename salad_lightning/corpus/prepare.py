"""``salad-lightning prepare``: recordings with transcripts, or plain text, to shards.

Row ``i`` belongs to shard ``i // samples_per_shard`` whatever becomes of it, so workers make whole shards and a killed
command goes on with those that are missing. The shards appear together, when all are complete; ``index.json`` is last.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from salad_lightning.corpus.budget import Budget, gather
from salad_lightning.corpus.card import dataset_card
from salad_lightning.corpus.keyed_rows import keyed, row_batches, rows_digest
from salad_lightning.corpus.limits import check_limits, check_sizes
from salad_lightning.corpus.manifest import Row
from salad_lightning.corpus.output_folder import INDEX, sha256_of, shard_prefix
from salad_lightning.corpus.pool import map_in_order
from salad_lightning.corpus.readers import READERS, input_files
from salad_lightning.corpus.rules import BROKEN, Rules
from salad_lightning.corpus.workspace import Workspace, finish_publication, numbered_anew, open_workspace
from salad_lightning.errors import UserError

__all__ = ["add_arguments", "prepare", "run"]

_REJECTED, _CARD = "rejected.jsonl", "README.md"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    what = parser.add_argument_group("input, one of").add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--manifest",
        metavar="FILE",
        help="recordings: a .tsv or .csv (with a header), .jsonl or .parquet with `audio` (a path, relative to this "
        "file) and `text`; optional `words` (JSON, [[word, start_s, end_s], …]), `key`; all other columns are kept",
    )
    what.add_argument("--text", metavar="PATH", help="plain text: .jsonl, .parquet or .tar files, a folder or a glob")
    what.add_argument(
        "--hf",
        metavar="PATH",
        help="one split of a Hugging Face dataset on disk, with an audio column; a folder or glob",
    )
    what.add_argument("--lhotse", metavar="FILE", help="lhotse cuts, .jsonl or .jsonl.gz; word alignments are kept")
    what.add_argument("--librispeech", metavar="DIR", help="folders of *.trans.txt beside their recordings")
    what.add_argument(
        "--tars", metavar="PATH", help="WebDataset tars: audio with .txt or .json; a folder, glob, braces"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--source", metavar="NAME", help="name of the shards; the output folder's name by default")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="column of the text (default: text)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="rows (default: 1000)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1); same result")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")
    sound = parser.add_argument_group("audio")
    sound.add_argument("--sample-rate", type=int, metavar="HZ", help="resample (default: keep each recording's rate)")
    sound.add_argument("--trim", action="store_true", help="cut silence off both ends, but for 0.1 s")
    sound.add_argument("--loudness", type=float, metavar="DBFS", help="bring to this RMS level, e.g. -23")
    rules = parser.add_argument_group("what is left out, each with its reason in rejected.jsonl (default: nothing)")
    rules.add_argument("--min-seconds", type=float, metavar="S", help="shorter samples")
    rules.add_argument(
        "--max-seconds",
        type=float,
        metavar="S",
        help="longer samples; where there are word times they are cut in pauses instead",
    )
    rules.add_argument("--min-level", type=float, metavar="DBFS", help="quieter samples by RMS; -60 is silence")
    rules.add_argument(
        "--max-clipped", type=float, metavar="SHARE", help="more samples at full scale than this, 0 to 1"
    )
    rules.add_argument("--min-chars-per-second", type=float, metavar="N", help="slower: text is missing")
    rules.add_argument("--max-chars-per-second", type=float, metavar="N", help="faster: audio is missing; 35 is a lot")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="broken rows (no text, unreadable audio, …) that are left out before the command stops (default: 0.01)",
    )


def run(args: argparse.Namespace) -> None:
    """Prepare what the options say, and print what came of it."""
    kind = next(kind for kind in READERS if getattr(args, kind) is not None)
    index = prepare(
        getattr(args, kind),
        args.output,
        kind=kind,
        source=args.source,
        text_column=args.text_column,
        samples_per_shard=args.samples_per_shard,
        sample_rate_hz=args.sample_rate,
        trim=args.trim,
        level_dbfs=args.loudness,
        rules=Rules(
            args.min_seconds,
            args.max_seconds,
            args.min_level,
            args.max_clipped,
            args.min_chars_per_second,
            args.max_chars_per_second,
        ),
        max_bad_fraction=args.max_bad_fraction,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    hours = f", {index['seconds'] / 3600:.2f} h" if kind != "text" else ""
    print(f"{args.output}: {index['num_samples']} samples{hours} in {len(index['shards'])} shards")
    for reason, count in index["rejected"].items():
        print(f"  left out, {reason}: {count}")


@dataclass(frozen=True)
class _Request:
    """All that decides what is written."""

    inputs: str
    kind: str
    source: str
    text_column: str
    samples_per_shard: int
    sample_rate_hz: int | None
    trim: bool
    level_dbfs: float | None
    rules: Rules

    def settings(self) -> dict[str, Any]:
        """Options for the dataset card, where they are not the default."""
        options = {"trim": self.trim or None, "level_dbfs": self.level_dbfs, **asdict(self.rules)}
        return {name: value for name, value in options.items() if value is not None}


def prepare(
    inputs: str | Path,
    output: str | Path,
    *,
    kind: str = "manifest",
    source: str | None = None,
    text_column: str = "text",
    samples_per_shard: int = 1000,
    sample_rate_hz: int | None = None,
    trim: bool = False,
    level_dbfs: float | None = None,
    rules: Rules | None = None,
    max_bad_fraction: float = 0.01,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write shards, their index and a dataset card; the same input gives the same bytes, however often it is killed.

    Args:
        inputs: Path of the corpus; see `add_arguments`.
        output: Folder for the shards; made if missing.
        kind: What the corpus is, one of `READERS`.
        source: Shards are called ``{source}-000000.tar``; the output folder's name by default.
        text_column: Column of the text.
        samples_per_shard: Rows of every shard but the last.
        sample_rate_hz: Rate of the FLAC files; None keeps each recording's own.
        trim: Whether silence at both ends is cut off.
        level_dbfs: Root mean square that audio is brought to; None leaves it.
        rules: What is left out; nothing by default.
        max_bad_fraction: Share of broken rows that are left out before this stops, 0 to 1.
        workers: Processes.
        overwrite: Replace the files listed in the folder's index.

    Returns:
        The content of ``index.json``: counts, seconds and SHA-256 in all and by shard, and what was left out.

    Raises:
        UserError: If a number is out of range, the input cannot be read, too many rows are broken, no sample is left,
            the disk is full, or the folder holds anything that must not be replaced.
    """
    output = Path(output)
    source = shard_prefix(source, output)
    rules = rules or Rules()
    check_sizes(samples_per_shard, workers, sample_rate_hz, max_bad_fraction)
    check_limits("--loudness", level_dbfs, -120, 0, "dBFS")
    rules.check()
    request = _Request(
        str(inputs), kind, source, text_column, samples_per_shard, sample_rate_hz, trim, level_dbfs, rules
    )
    note = json.dumps([asdict(request), _content(request.inputs)], sort_keys=True)
    rows = READERS[kind](request.inputs)
    if finish_publication(output) == note:
        index: dict[str, Any] = json.loads((output / INDEX).read_text(encoding="utf-8"))
        return index
    with open_workspace(output, overwrite=overwrite, inputs=input_files(kind, request.inputs)) as space:
        reports = _make_shards(space, request, rows, workers, max_bad_fraction)
        return _publish(space, request, note, reports)


def _content(inputs: str) -> str:
    """Of a file, so that one that was changed is read again; of folders and globs nothing is known but the name."""
    return sha256_of(Path(inputs)) if Path(inputs).is_file() else ""


def _make_shards(
    space: Workspace, request: _Request, rows: Iterator[Row], workers: int, max_bad_fraction: float
) -> list[dict[str, Any]]:
    """Reports of all shards, in order."""
    # Here, not above: the maker brings torch along, and `prepare --help` should answer at once.
    from salad_lightning.corpus.shard_maker import ShardJob, make_shard

    jobs = (
        ShardJob(
            folder=space.folder,
            name=f"{request.source}-{number:06d}.tar",
            digest=rows_digest(asdict(request), batch),
            rows=batch,
            has_audio=request.kind != "text",
            text_column=request.text_column,
            sample_rate_hz=request.sample_rate_hz,
            trim=request.trim,
            level_dbfs=request.level_dbfs,
            rules=request.rules,
        )
        for number, batch in enumerate(row_batches(keyed(rows), request.samples_per_shard))
    )
    budget = Budget(max_bad_fraction, "broken rows", "put them right, or raise --max-bad-fraction to leave them out")
    made = map_in_order(functools.partial(space.finished_or_made, make_shard), jobs, workers)
    reports = gather(space, made, budget, _broken, progress="prepare", unit=" rows")
    if not reports:
        raise UserError("there is no row", where=request.inputs, cure="list at least one sample")
    return reports


def _broken(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [rejection for rejection in report["rejected"] if rejection["reason"] in BROKEN]


def _publish(space: Workspace, request: _Request, note: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    rejected = [rejection for report in reports for rejection in report["rejected"]]
    reasons = dict(sorted(Counter(rejection["reason"] for rejection in rejected).items()))
    kept = [report for report in reports if report["num_samples"]]
    names, shards = numbered_anew(reports, request.source)
    if not kept:
        counts = ", ".join(f"{reason}: {count}" for reason, count in reasons.items())
        raise UserError(f"no row is left ({counts})", where=request.inputs, cure="relax the rules")
    index = {
        "source": request.source,
        "sample_rate_hz": request.sample_rate_hz,
        "num_rows": sum(report["num_rows"] for report in reports),
        "num_samples": sum(report["num_samples"] for report in kept),
        "seconds": round(sum(report["seconds"] for report in kept), 3),
        "rejected": reasons,
        "shards": shards,
    }
    facts: dict[str, Any] = {name: dict(_total(report[name] for report in kept)) for name in ("fields", "languages")}
    facts["speakers"] = len({speaker for report in kept for speaker in report["speakers"]})
    card = dataset_card(index, request.settings(), facts)
    return space.publish(note, names, index, texts={_CARD: card}, lists={_REJECTED: rejected})


def _total(counts: Iterator[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total
