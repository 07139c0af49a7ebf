"""The dataset card of prepared shards: README.md, written from facts."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["dataset_card"]


def dataset_card(index: dict[str, Any], settings: dict[str, Any], facts: dict[str, Any]) -> str:
    """Markdown with the metadata block of a Hugging Face dataset card.

    Args:
        index: Content of ``index.json``.
        settings: Options that were set, by name.
        facts: ``fields`` and ``languages`` (counts by name), ``speakers`` (their number).
    """
    name, hours = index["source"], index["seconds"] / 3600
    languages = sorted(facts["languages"])
    metadata = ["---", f"pretty_name: {json.dumps(name)}"]
    if languages:
        metadata += ["language:", *(f"- {json.dumps(language)}" for language in languages)]
    rate = f"{index['sample_rate_hz']} Hz" if index["sample_rate_hz"] else "as recorded"
    rows = [
        ("samples", f"{index['num_samples']:,}"),
        *([("audio", f"{hours:.2f} h of mono 16-bit FLAC, sample rate {rate}")] if index["seconds"] else []),
        ("shards", f"{len(index['shards'])} WebDataset tars, listed in index.json with counts, seconds and SHA-256"),
        *([("speakers", f"{facts['speakers']:,}")] if facts["speakers"] else []),
        *([("languages", ", ".join(f"{key} ({facts['languages'][key]:,})" for key in languages))] if languages else []),
    ]
    body = [f"# {name}", "", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    body += ["", "## Fields", "", "| field of the JSON | samples that have it |", "|---|---|"]
    body += [f"| {field} | {count:,} |" for field, count in sorted(facts["fields"].items())]
    body += ["", "## How it was made", "", f"`salad-lightning prepare` on {index['num_rows']:,} rows."]
    if settings:
        body += ["", "| option | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())]
    body += ["", "## Left out", ""]
    if index["rejected"]:
        body += ["Listed one by one in rejected.jsonl.", "", "| reason | rows or segments |", "|---|---|"]
        body += [f"| {reason} | {count:,} |" for reason, count in index["rejected"].items()]
    else:
        body += ["Nothing."]
    return "\n".join([*metadata, "---", "", *body]) + "\n"
