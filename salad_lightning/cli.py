"""``salad-lightning``: finds the subcommand, and turns a user's mistake into one message and exit code 2.

Only the standard library is imported here, and after that only what the chosen subcommand needs, so that ``--help``
answers at once. A subcommand is a module with ``add_arguments(parser)`` and ``run(args)``; the four of Lightning share
one module with ``run(subcommand, argv)``, because LightningCLI brings its own parser.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import sys
import traceback
from typing import NamedTuple

from salad_lightning import __version__
from salad_lightning.errors import UserError

__all__ = ["COMMANDS", "Command", "main"]


class Command(NamedTuple):
    """A subcommand.

    Attributes:
        summary: One line for ``--help``.
        module: Where it lives; imported only when it is chosen.
        lightning: Whether its module parses its arguments by itself, as LightningCLI does.
    """

    summary: str
    module: str
    lightning: bool = False


_LIGHTNING = "salad_lightning.commands.lightning"
COMMANDS = {
    "fit": Command("train a model as YAML files and --key=value overrides say", _LIGHTNING, lightning=True),
    "validate": Command("measure a model on the validation data", _LIGHTNING, lightning=True),
    "test": Command("measure a model on the test data", _LIGHTNING, lightning=True),
    "predict": Command("run a model over data and write what it predicts", _LIGHTNING, lightning=True),
    "prepare": Command("turn a manifest of recordings, or plain text, into shards", "salad_lightning.corpus.prepare"),
    "align": Command("find when each word of a transcript is spoken, by a CTC model", "salad_lightning.corpus.align"),
    "lint": Command("read shards through and report every problem", "salad_lightning.corpus.lint"),
    "encode": Command("run a recipe's frozen encoder once over shards", "salad_lightning.commands.encode"),
    "select": Command(
        "choose, by misalignment, which texts to speak", "salad_lightning.commands.select", lightning=True
    ),
    "synthesize": Command("turn a manifest of texts into shards of speech", "salad_lightning.corpus.synthesize"),
    "questions": Command(
        "turn a multiple-choice dataset into shards of spoken questions", "salad_lightning.commands.questions"
    ),
    "transcribe": Command("measure word and character error rates on shards", "salad_lightning.commands.transcribe"),
    "generate": Command(
        "let an exported model continue prompts with speech in them", "salad_lightning.commands.generate"
    ),
    "consolidate": Command("write a sharded checkpoint as one file", "salad_lightning.commands.consolidate"),
    "export": Command("write a checkpoint as a Hugging Face folder", "salad_lightning.commands.export"),
    "report": Command("show runs side by side on one HTML page", "salad_lightning.commands.report"),
    "plugins": Command(
        "list the installed encoders, connectors, objectives and synthesizers", "salad_lightning.commands.plugins"
    ),
    "demo": Command("train and measure the miniature world on this machine", "salad_lightning.demo.run"),
}
_DEBUG = "SALAD_DEBUG"
# Of the place that is written to, and nobody's bug.
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EIO)
# For errors that are not our own words.
_HINT = f"  (full traceback: {_DEBUG}=1)"


def main(argv: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: Arguments after the program's name; those of this process where None.

    Returns:
        The exit code: 0, 2 after a user's mistake, 130 after Ctrl-C, 143 after SIGTERM. Anything else is a bug and
        raises.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get(_DEBUG, "") not in ("", "0")
    if arguments[:1] == ["--debug"]:
        debug, arguments = True, arguments[1:]
    try:
        _dispatch(arguments)
    except KeyboardInterrupt:
        print("salad-lightning: interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:  # argparse's --help and errors; Lightning's way to end after Ctrl-C
        if isinstance(stop.__context__, KeyboardInterrupt):
            return 130
        if type(stop).__name__ == "SIGTERMException":  # Lightning's, after the micro-batch in which a signal came
            return 143 if stop.code is None else int(stop.code)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"salad-lightning: {message}", file=sys.stderr)
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"salad-lightning {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        cure = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown subcommand {name!r}", cure=f"{cure}known: {', '.join(COMMANDS)}")
    # Imported here for start-up time: only the chosen subcommand pays for what it needs.
    module = importlib.import_module(command.module)
    if command.lightning:
        module.run(name, rest)
        return
    parser = argparse.ArgumentParser(prog=f"salad-lightning {name}", description=command.summary)
    module.add_arguments(parser)
    module.run(parser.parse_args(rest))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: salad-lightning [--help] [--version] [--debug] SUBCOMMAND ...",
            "",
            "Speech-adapted text LLMs by cross-modal distillation.",
            "",
            "subcommands:",
            *lines,
            "",
            "salad-lightning SUBCOMMAND --help explains one of them; --debug before it shows tracebacks.",
        ]
    )


def _explain(error: Exception) -> str | None:
    """What to tell the user, or None where the error is a bug of ours."""
    if isinstance(error, UserError):
        return _unwrap(str(error))
    if (
        isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError))
        and error.filename
    ):
        return f"{error.filename}: {error.strerror}\n{_HINT}"
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return f"{error.filename or 'writing'}: {error.strerror}\n{_HINT}"
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return f"writing: {error}\n{_HINT}"
    # Lightning's own word for a user's mistake; by name, because importing it costs seconds.
    if any(base.__name__ == "MisconfigurationException" for base in type(error).__mro__):
        return f"{error}\n{_HINT}"
    return None


def _unwrap(message: str) -> str:
    """Torch hands on a data-loading worker's error with the worker's traceback in front: keep the message."""
    if not message.startswith("Caught UserError in "):
        return message
    return re.split(r"^(?:[\w.]*\.)?UserError: ", message, flags=re.MULTILINE)[-1].strip()
