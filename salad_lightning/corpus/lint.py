"""``salad-lightning lint``: reads shards through, and reports every problem with its place."""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_lightning.corpus.output_folder import INDEX, sha256_of
from salad_lightning.corpus.pool import map_in_order
from salad_lightning.errors import UserError

if TYPE_CHECKING:
    from salad_lightning.corpus.shard_reader import ShardFacts

__all__ = ["add_arguments", "lint", "run"]

# Spans of 10 to 30 words are read and of 5 to 15 heard (arXiv 2510.13632), so two words in three are read.
_SHARE_READ = 2 / 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = (
        f"{parser.description or ''}. The exit code is 0 where all is well, 1 where there are problems."
    )
    parser.add_argument("shards", nargs="+", metavar="SHARDS", help="folders, .tar files, globs or braces")
    parser.add_argument("--tokenizer", metavar="DIR", help="count tokens with this Hugging Face tokenizer")
    parser.add_argument(
        "--positions-per-second",
        type=float,
        default=12.5,
        metavar="HZ",
        help="what encoder and connector make of a second of speech, for the estimate (default: 12.5)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="histogram of durations, or of lengths of plain text")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Print the report; exit with 1 where there are problems."""
    report, lengths = lint(
        args.shards,
        tokenizer=args.tokenizer,
        positions_per_second=args.positions_per_second,
        workers=args.workers,
    )
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else _as_text(report))
    if args.plot:
        _plot(lengths, report["seconds"] > 0, args.plot)
    if report["problems"]:
        raise SystemExit(1)


def lint(
    shards: str | list[str],
    *,
    tokenizer: str | None = None,
    positions_per_second: float = 12.5,
    workers: int = 1,
) -> tuple[dict[str, Any], list[float]]:
    """Read everything.

    Args:
        shards: Folders, files, globs or braces.
        tokenizer: Folder of a Hugging Face tokenizer, or None.
        positions_per_second: Of speech.
        workers: Processes.

    Returns:
        The report (counts, seconds, positions, languages, speakers, and ``problems`` with ``shard``, ``key`` and
        ``problem``), and the seconds of every sample with audio; where there is none, the characters of every text.

    Raises:
        UserError: If there are no shards, or no tokenizer.
    """
    # Here, not above: both bring torch or transformers along, and `lint --help` should answer at once.
    from tqdm import tqdm  # type: ignore[import-untyped]

    from salad_lightning.corpus.shard_reader import load_tokenizer, read_facts
    from salad_lightning.data.sources import expand_shards

    paths = expand_shards(shards)
    if tokenizer:
        load_tokenizer(tokenizer)
    total = Counter[str]()
    languages, speakers, rates, seen = Counter[str](), Counter[str](), Counter[str](), dict[str, str]()
    problems: list[dict[str, str]] = []
    durations: list[float] = []
    characters: list[float] = []
    results = map_in_order(functools.partial(read_facts, tokenizer=tokenizer), paths, workers)
    for path, facts in zip(paths, tqdm(results, desc="lint", unit=" shards", total=len(paths)), strict=True):
        problems += [{"shard": path, "key": key, "problem": problem} for key, problem in facts.problems]
        problems += _repeated(path, facts, seen)
        durations += facts.seconds
        characters += facts.characters
        total.update(samples=facts.num_samples, audio=facts.num_audio, timed=facts.num_timed, tokens=facts.num_tokens)
        total.update(words=facts.num_words)
        for counter, counts in ((languages, facts.languages), (speakers, facts.speakers), (rates, facts.rates)):
            counter.update(counts)
    for folder in sorted({Path(path).parent for path in paths}):
        problems += _against_index(folder, {Path(path).name for path in paths if Path(path).parent == folder})
    seconds = sum(durations)
    report: dict[str, Any] = {
        "shards": len(paths),
        "samples": total["samples"],
        "samples_with_audio": total["audio"],
        "samples_with_word_times": total["timed"],
        "seconds": round(seconds, 3),
        "hours": round(seconds / 3600, 3),
        "words": total["words"],
        "sample_rates_hz": dict(sorted(rates.items())),
        "languages": dict(sorted(languages.items())),
        "speakers": len(speakers),
        "problems": problems,
    }
    if tokenizer:
        report["tokens"] = total["tokens"]
        if seconds:
            read = total["tokens"] / seconds
            report["positions_per_second"] = {
                "read": round(read, 3),
                "heard": positions_per_second,
                "interleaved": round(_SHARE_READ * read + (1 - _SHARE_READ) * positions_per_second, 3),
            }
    return report, durations or characters


def _repeated(path: str, facts: ShardFacts, seen: dict[str, str]) -> list[dict[str, str]]:
    """Keys that another shard has too."""
    problems = []
    for key in facts.keys:
        first = seen.setdefault(key, path)
        if first != path:
            problems.append({"shard": path, "key": key, "problem": f"the key is in {first} too"})
    return problems


def _against_index(folder: Path, names: set[str]) -> list[dict[str, str]]:
    """Shards that differ from what ``index.json`` says of them, among those that were given."""
    path = folder / INDEX
    if not path.is_file():
        return []
    try:
        listed = {shard["name"]: shard["sha256"] for shard in json.loads(path.read_text(encoding="utf-8"))["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        return [{"shard": str(path), "key": "", "problem": f"the index does not parse ({error})"}]
    whole = names >= {file.name for file in folder.glob("*.tar")}
    problems = []
    for name in sorted(names | (set(listed) if whole else set())):
        if name not in listed:
            problem = f"{INDEX} does not list the shard"
        elif not (folder / name).is_file():
            problem = f"the shard is missing, but {INDEX} lists it"
        elif sha256_of(folder / name) != listed[name]:
            problem = f"the content is not what {INDEX} says (SHA-256)"
        else:
            continue
        problems.append({"shard": str(folder / name), "key": "", "problem": problem})
    return problems


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"{name.replace('_', ' ')}: {_shown(value)}" for name, value in report.items() if name != "problems"]
    problems = report["problems"]
    lines += [
        ": ".join(part for part in (row["shard"], row["key"]) if part) + f": {row['problem']}" for row in problems
    ]
    return "\n".join([*lines, f"{len(problems)} problems" if problems else "no problem"])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items()) or "–"
    return f"{value:,}"


def _plot(lengths: list[float], is_audio: bool, path: Path) -> None:
    import matplotlib  # heavy, and only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.5))
    axes.hist(lengths, bins=60)
    axes.set_xlabel("duration in seconds" if is_audio else "length in characters")
    axes.set_ylabel("samples")
    figure.tight_layout()
    aside = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(aside, dpi=120, format=path.suffix.lstrip(".") or "png")
    except (OSError, ValueError) as error:
        raise UserError(f"the plot cannot be written ({error})", where=str(path), cure="name a .png file") from error
    finally:
        plt.close(figure)
    aside.replace(path)
