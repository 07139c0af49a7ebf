"""Steps whose results lie in folders named by a hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["fingerprint", "run_step"]


def run_step(output: Path, name: str, inputs: Mapping[str, Any], work: Callable[[Path], object]) -> Path:
    """Do a step unless it has been done from the same inputs.

    Args:
        output: Folder of all steps.
        name: Of the step.
        inputs: All that decides the result, as plain data.
        work: Writes the result into a folder. After it was killed it gets the same folder again, with what it has left
            there.

    Returns:
        The folder ``{name}-{hash}``, which has this name only when it is complete.
    """
    stated = json.dumps(inputs, indent=1, sort_keys=True)
    title = f"{name}-{hashlib.sha256(stated.encode()).hexdigest()[:12]}"
    final, partial = output / title, output / f".{title}.partial"
    console = Console(stderr=True)
    if final.is_dir():
        console.print(f"[dim]✓ {title}: made from the same inputs before[/dim]", highlight=False)
        return final
    console.print(f"[bold]{title}[/bold]", highlight=False)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / "inputs.json").write_text(stated, encoding="utf-8")
    begin = time.perf_counter()
    work(partial)
    (partial / "seconds.json").write_text(json.dumps(round(time.perf_counter() - begin, 2)))
    partial.rename(final)
    return final


def fingerprint(paths: Sequence[str | Path]) -> list[str]:
    """Name and content hash of each file; a folder stands for all files in it, and a name that is no path for itself.

    Args:
        paths: Files, folders, or names of models on a hub.
    """
    return [entry for path in paths for entry in _entries(Path(path))]


def _entries(path: Path) -> list[str]:
    if not path.exists():
        return [str(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return [f"{file.name} {_sha256(file)}" for file in files]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
