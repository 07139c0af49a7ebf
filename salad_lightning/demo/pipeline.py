"""Runs commands that depend on each other, several at a time, and skips those whose inputs have not changed."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from salad_lightning.demo.launcher import Launcher, Process
from salad_lightning.errors import UserError

__all__ = ["Step", "run_steps", "seconds_taken", "source_fingerprint"]


@dataclass(frozen=True)
class Step:
    """A command and what it stands on.

    Attributes:
        name: Unique; names the log and the stamp.
        command: Program and arguments, run in the pipeline's folder.
        after: Steps that must have run before.
        reads: Files whose content decides the result, beside the command itself (recipes).
        weight: Heavier steps start first where several are ready.
    """

    name: str
    command: list[str]
    after: tuple[str, ...] = ()
    reads: tuple[Path, ...] = field(default=())
    weight: float = 1.0


@dataclass
class _Running:
    step: Step
    process: Process
    started: float
    task: object
    log: Path


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    *,
    lanes: int = 2,
    fingerprint: str = "",
    state: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> None:
    """Run every step once, in an order that respects ``after``; each has one thread and a log of its own.

    Args:
        steps: In any order.
        folder: Working directory.
        lanes: Steps at a time.
        fingerprint: Joins every step's key; a change of it runs everything again.
        state: Where logs and stamps go: beside the results, so that both go together. By default ``.steps`` in
            ``folder``.
        variables: Of the environment, beside this process's own.

    Raises:
        UserError: If a step fails; the end of its log is shown, and the others running are stopped.
    """
    state = state or folder / ".steps"
    state.mkdir(parents=True, exist_ok=True)
    keys = _keys(steps, fingerprint)
    done = {step.name for step in steps if _stamp(state, step.name).get("key") == keys[step.name]}
    console = Console()
    for step in steps:
        if step.name in done:
            console.print(f"[dim]✓ {step.name}: unchanged since the last run[/dim]")
    waiting = sorted((step for step in steps if step.name not in done), key=lambda step: -step.weight)
    running: list[_Running] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=console, transient=True) as progress,
        closing(Launcher(folder, variables)) as launcher,
    ):
        while waiting or running:
            for step in [s for s in waiting if set(s.after) <= done][: max(lanes - len(running), 0)]:
                waiting.remove(step)
                console.print(f"[bold]$ {_shown(step.command)}[/bold]", soft_wrap=True, highlight=False)
                running.append(_start(step, launcher, state, progress))
            time.sleep(0.1)
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                progress.remove_task(entry.task)  # type: ignore[arg-type]
                _finish(entry, state, keys[entry.step.name], console)
                done.add(entry.step.name)


def seconds_taken(state: Path, name: str) -> float:
    """Wall-clock seconds of a step's last run, by the folder of its stamp."""
    return float(str(_stamp(state, name).get("seconds", 0.0)))


def source_fingerprint() -> str:
    """A hash of this package's own code, so that a change of it is not mistaken for nothing."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _shown(command: list[str]) -> str:
    """As a reader would type it."""
    return shlex.join([Path(command[0]).name, *command[1:]])


def _keys(steps: Sequence[Step], fingerprint: str) -> dict[str, str]:
    """A step's key covers its command, the files it reads, and the keys of what it stands on."""
    by_name = {step.name: step for step in steps}
    keys: dict[str, str] = {}

    def key(step: Step) -> str:
        if step.name not in keys:
            parts = [fingerprint, *step.command, *(path.read_text() for path in step.reads)]
            parts += [key(by_name[name]) for name in step.after]
            keys[step.name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        return keys[step.name]

    return {step.name: key(step) for step in steps}


def _start(step: Step, launcher: Launcher, state: Path, progress: Progress) -> _Running:
    log = state / f"{step.name}.log"
    # From now on its results are no longer those of the run before.
    (state / f"{step.name}.json").unlink(missing_ok=True)
    begin, process = time.perf_counter(), launcher.start(step.command, log)
    return _Running(step, process, begin, progress.add_task(step.name, total=None), log)


def _finish(entry: _Running, state: Path, key: str, console: Console) -> None:
    seconds = time.perf_counter() - entry.started
    if code := entry.process.poll():
        tail = "\n".join(entry.log.read_text(errors="replace").splitlines()[-25:])
        raise UserError(
            f"step {entry.step.name!r} failed with exit code {code}:\n{tail}",
            cure=f"the whole log: {entry.log}",
        )
    aside = state / f"{entry.step.name}.part"
    aside.write_text(json.dumps({"key": key, "seconds": round(seconds, 1)}))
    aside.replace(state / f"{entry.step.name}.json")
    console.print(f"[green]✓ {entry.step.name}[/green] {seconds:.0f} s", highlight=False)


def _stamp(state: Path, name: str) -> dict[str, object]:
    path = state / f"{name}.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}
