"""Steps whose results lie in folders named by a hash of what they were made from."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["run_step"]


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
