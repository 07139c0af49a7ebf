"""``salad-lightning plugins``: which parts the installed packages offer, and why some of them cannot be used."""

from __future__ import annotations

import argparse
import json

from salad_lightning.registry import Part, load_all

__all__ = ["add_arguments", "run"]

_COLUMNS = ("kind", "name", "package", "version", "state")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: argparse.Namespace) -> None:
    """Load every entry point and print what came of it; a broken part is listed, not raised."""
    rows = [_row(part) for part in load_all().parts]
    print(json.dumps(rows, indent=2) if args.json else _table(rows))


def _row(part: Part) -> dict[str, str]:
    return {
        "kind": part.kind,
        "name": part.name,
        "package": part.package,
        "version": part.version,
        "state": part.state,
        "target": part.target,
        "reason": part.reason,
    }


def _table(rows: list[dict[str, str]]) -> str:
    widths = {column: max([len(column), *(len(row[column]) for row in rows)]) for column in _COLUMNS}
    lines = ["  ".join(column.ljust(widths[column]) for column in _COLUMNS)]
    lines += ["  ".join(row[column].ljust(widths[column]) for column in _COLUMNS) for row in rows]
    reasons = [f"{row['name']} of {row['package']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([line.rstrip() for line in lines] + (["", *reasons] if reasons else []))
