"""``salad-lightning questions``: a multiple-choice dataset to shards of spoken questions."""

from __future__ import annotations

import argparse
from pathlib import Path

from salad_lightning.errors import UserError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("rows", type=Path, metavar="FILE", help="the dataset: .jsonl, .parquet, .csv or .tsv")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for shards and manifests")
    parser.add_argument(
        "--task",
        required=True,
        metavar="NAME",
        help="story_cloze, mmsu, openbookqa, hellaswag, arc_challenge or piqa, whose published field names are known; "
        "under any other name rows are {question and/or context, choices, answer (an index, or the text of one)} with "
        "optional category, prompt, and shots (a list of such rows)",
    )
    parser.add_argument("--shots", type=Path, metavar="FILE", help="rows of the same form, such as the train split")
    parser.add_argument("--num-shots", type=int, default=5, metavar="N", help="examples taken from it (default: 5)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="answers, one a line, where rows have none (PIQA)")
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="in place of the task's own: {speech} stands for the question, {answer} for an option, {name} for a field",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N rows")
    speech = parser.add_argument_group("speech")
    speech.add_argument(
        "--audio-column", metavar="NAME", help="recordings, as paths beside FILE or as bytes, in place of a synthesizer"
    )
    speech.add_argument("--synthesizer", default="EspeakSynthesizer", metavar="NAME", help="see `plugins`")
    speech.add_argument(
        "--voice", action="append", default=[], metavar="YAML", help="as of `synthesize`; several times for several"
    )
    speech.add_argument("--seed", type=int, default=0, help="decides who says what (default: 0)")
    speech.add_argument("--sample-rate", type=int, metavar="HZ", help="resample")
    speech.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that an earlier run wrote")


def run(args: argparse.Namespace) -> None:
    """Write the shards, and say what to put into the recipe."""
    # Imported here for start-up time.
    from salad_lightning.corpus.synthesize import voice_of
    from salad_lightning.evaluation.question_shards import question_shards

    options = {"sample_rate_hz": args.sample_rate, "workers": args.workers, "overwrite": args.overwrite}
    if args.audio_column is None:
        voices = [voice_of(text) for text in args.voice]
        options |= {"synthesizer": args.synthesizer, "voices": voices, "seed": args.seed}
    for name in ("num_shots", "limit"):
        if (count := getattr(args, name)) is not None and count < 1:
            raise UserError(f"--{name.replace('_', '-')} is {count}", cure="give 1 or more, or leave it out")
    counts = question_shards(
        args.rows,
        args.output,
        task=args.task,
        shots=args.shots,
        num_shots=args.num_shots,
        labels=args.labels,
        prompt=args.prompt,
        audio_column=args.audio_column,
        limit=args.limit,
        **options,
    )
    for name, count in counts.items():
        print(f"{args.output / name}: {count} samples")
