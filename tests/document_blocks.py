"""The documents of the project, the fenced blocks in them, and the commands in those."""

from __future__ import annotations

import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipes" / "README.md",
        *ROOT.glob("plugins/*/README.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/guides/*.md"),
    ]
)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    title: str
    text: str


def blocks(document):
    pattern = r"^ *```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^ *```$"
    text = (ROOT / document).read_text()
    return [Block(*found) for found in re.findall(pattern, text, re.DOTALL | re.MULTILINE)]


@contextmanager
def shown_files(document, folder):
    """The files that a document shows, in a folder from which Python imports meanwhile."""
    for block in blocks(document):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def command_lines(document):
    """Lines of shell blocks, of blocks without a language what is surely a command, and commands in recipes' tables.

    One with "…" in it is a sketch.
    """
    lines = []
    for block in blocks(document):
        if block.language in ("", "bash") and not block.title:
            for line in block.text.replace("\\\n", " ").splitlines():
                surely = re.match(r"\s*(salad-lightning|make|pip|cp|torchrun|sbatch|python)\b", line)
                if surely or (block.language == "bash" and line.strip()):
                    lines.append(line.strip())
    if document == "recipes/README.md":
        for row in re.findall(r"^\|.*", (ROOT / document).read_text(), re.MULTILINE):
            found = re.findall(r"`(?:salad-lightning )?([a-z]+ (?:--[^`]*|outputs/[^`]*))`", row)
            lines += [f"salad-lightning {command}" for command in found]
    return [line for line in lines if "…" not in line]


def words_of(line):
    """The command without variables and launchers of several machines, with at most two workers, as a list of words."""
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    if words and words[0] == "sbatch":
        words = shlex.split(words[words.index("--wrap") + 1])
    if words and words[0] == "srun":
        words = words[1:]
    return ["2" if before == "--workers" else word for before, word in zip(["", *words], words, strict=False)]
