"""A folder of shards in the making: finished ones wait aside, survive a kill, and appear when all are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from salad_lightning.corpus.output_folder import INDEX, PARTIAL, replaceable, sha256_of
from salad_lightning.errors import UserError

__all__ = ["Workspace", "finish_publication", "numbered_anew", "open_workspace", "write_aside"]

_PUBLISH = "publish.json"
_WORTH_KEEPING = 1000


class Workspace:
    """What `open_workspace` gives.

    Attributes:
        output: The folder that is being made.
        folder: Where finished shards wait, each with a report, ``{name}.json``.
    """

    def __init__(self, output: Path, replaced: list[str]) -> None:
        self.output, self.folder = output, output / PARTIAL
        self._replaced = replaced

    def finished(self, name: str, digest: str) -> dict[str, Any] | None:
        """The report of a shard that an earlier run finished from the same input, its file checked; None otherwise."""
        try:
            report: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            if report["digest"] == digest and (
                not report["sha256"] or report["sha256"] == sha256_of(self.folder / name)
            ):
                return report
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def finished_or_made(self, make: Callable[[Any], dict[str, Any]], job: Any) -> dict[str, Any]:
        """A shard's report: that of an earlier run, or of ``make(job)``; a job has ``name`` and ``digest``."""
        return self.finished(job.name, job.digest) or make(job)

    def forget(self, unwanted: Callable[[dict[str, Any]], object]) -> None:
        """Remove finished shards whose report is ``unwanted``: the next run makes them again."""
        for path in self.folder.glob("*.tar.json"):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # of another command, or not readable
                if unwanted(json.loads(path.read_text(encoding="utf-8"))):
                    path.unlink()  # first: a shard without a report is not finished
                    path.with_suffix("").unlink(missing_ok=True)

    def publish(
        self,
        request: str,
        shards: dict[str, str],
        index: dict[str, Any],
        *,
        texts: dict[str, str] | None = None,
        lists: dict[str, list[Any]] | None = None,
    ) -> dict[str, Any]:
        """Put everything in its place, the index last; `finish_publication` goes on after a kill.

        Args:
            request: What was asked for.
            shards: Names here to names in the output.
            index: Content of ``index.json``; the other files are added to it.
            texts: File name to content.
            lists: File name to what becomes a line of JSON each; a file only where there is any.

        Returns:
            The index.
        """
        files = dict(texts or {})
        for name, rows in (lists or {}).items():
            if rows:
                files[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        index = {**index, "files": list(files)}
        for name, text in {**files, INDEX: json.dumps(index, indent=2) + "\n"}.items():
            write_aside(self.folder / name, text)
        moves = shards | {name: name for name in files} | {INDEX: INDEX}
        remove = [name for name in self._replaced if name not in moves.values()]
        write_aside(self.folder / _PUBLISH, json.dumps({"request": request, "moves": moves, "remove": remove}))
        _publish(self.output)
        return index


def finish_publication(output: Path) -> str | None:
    """Move what a command that was killed while it moved files had left, and return its request; None otherwise."""
    partial = output / PARTIAL
    if not (partial / _PUBLISH).is_file():
        return None
    with _locked(partial):
        request = json.loads((partial / _PUBLISH).read_text(encoding="utf-8"))["request"]
        _publish(output)
    return str(request)


@contextlib.contextmanager
def open_workspace(output: Path, *, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Iterator[Workspace]:
    """A workspace in ``output``, for one command at a time.

    After a kill, Ctrl-C or a full disk its finished shards are kept for the next run. After a `UserError` they are
    kept where they hold a thousand samples or more, and otherwise nothing is left.

    Args:
        output: Made where missing.
        overwrite: Whether what an earlier run published there may be replaced.
        inputs: Files that the command reads; see `replaceable`.

    Raises:
        UserError: If the folder holds anything that must not be replaced, another command is at work in it, or the disk
            is full.
    """
    partial = output / PARTIAL
    replaced = [path.name for path in replaceable(output, overwrite, inputs) if path.name != INDEX]
    created = not output.exists()
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        for path in partial.iterdir():
            if path.is_dir():  # unfinished
                shutil.rmtree(path, ignore_errors=True)
        try:
            yield Workspace(output, replaced)
        except UserError:
            if _finished_samples(partial) < _WORTH_KEEPING:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            if error.filename is not None and not str(error.filename).startswith(str(output)):
                raise  # an input
            raise UserError(
                f"the shards cannot be written ({error.strerror})",
                where=str(output),
                cure="make room, then type the same command again: finished shards are kept",
            ) from error
        else:
            shutil.rmtree(partial, ignore_errors=True)
        finally:
            if created and output.exists() and not any(output.iterdir()):
                output.rmdir()


def write_aside(path: Path, text: str) -> None:
    """Write a file under its final name only when it is complete."""
    aside = path.with_name(f".{path.name}.part")
    # Paths and rows that are listed as broken may hold what is no UTF-8.
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, path)


def numbered_anew(reports: Sequence[dict[str, Any]], source: str) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Names without gaps for the shards that have samples.

    Args:
        reports: Of all shards, each with name, number of samples, seconds and SHA-256.
        source: What the names begin with.

    Returns:
        Name in the workspace to the new one, and what the index says of every shard.
    """
    kept = [report for report in reports if report["num_samples"]]
    names = {report["name"]: f"{source}-{number:06d}.tar" for number, report in enumerate(kept)}
    columns = ("num_samples", "seconds", "sha256")
    shards = [{"name": names[report["name"]]} | {column: report[column] for column in columns} for report in kept]
    return names, shards


def _publish(output: Path) -> None:
    partial = output / PARTIAL
    plan = json.loads((partial / _PUBLISH).read_text(encoding="utf-8"))
    if (partial / INDEX).exists():  # otherwise everything was moved already
        (output / INDEX).unlink(missing_ok=True)  # without it a set of shards is known to be incomplete
        for name in plan["remove"]:
            (output / name).unlink(missing_ok=True)
        for name, final in plan["moves"].items():
            if (partial / name).exists():
                os.replace(partial / name, output / final)
    shutil.rmtree(partial, ignore_errors=True)


def _finished_samples(partial: Path) -> int:
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in partial.glob("*.tar.json")]
    return sum(report["num_samples"] for report in reports)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl  # not on Windows, where two commands in one folder are not told apart
    except ImportError:
        yield
        return
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                "another command is writing here",
                where=str(folder.parent),
                cure="wait for it, or choose another --output",
            ) from error
        yield
