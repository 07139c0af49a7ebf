"""From jsonargparse's errors to one that names the key, the place and the nearest valid key."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger

from salad_lightning.commands.settings import Setting
from salad_lightning.data.documents import DocumentBuilder
from salad_lightning.errors import UserError
from salad_lightning.interfaces import Connector, Encoder, Objective, Synthesizer

__all__ = ["explain"]

_UNKNOWN_KEY = re.compile(
    r"Option '(?P<option>[^']+)' is not accepted"
    r"|does not accept (?:option|nested key) '(?P<nested>[^']+)'"
    r"|unrecognized arguments: --(?P<argument>[^\s=]+)"
    r"|Key '(?P<key>[^']+)' is not expected"
)
_MISSING_KEYS = re.compile(r"the following arguments are required: (.+)|Key ['\"]([^'\"]+)['\"] is required")
_WRONG_VALUE = re.compile(r"Expected (?:a|an|to be) (?!<class 'NoneType'>)(.+?)\. Got value: (.*)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\w+)")
_PARENT_KEY = re.compile(r"Parser key \"([^\"]+)\"|Group '([^']+)' does not accept")
_CLASS_PATH = re.compile(r"class_path[ =]'([^']+)'")
# Lines, and beginnings of lines, that only describe the search; what is left of a message is its point.
_NOISE = re.compile(
    r"^[\s-]*(Does not validate against|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but"
    r"|Parser key|Problem with given class_path).*|Type <class '[\w.]+'> expects a function or a callable class: "
)
_BASES = (
    *(LightningModule, LightningDataModule, Callback, Logger),
    *(Encoder, Connector, Objective, Synthesizer, DocumentBuilder),
)
_WRAPPERS = re.compile(r"\.(class_path|init_args|dict_kwargs)\b")


def explain(error: Exception, parser: ArgumentParser, settings: Sequence[Setting], subcommand: str) -> UserError:
    """Say the same as ``error``, in one message that a user can act on.

    Args:
        error: What jsonargparse raised.
        parser: The subcommand's parser; knows the top-level keys.
        settings: What was set, and where.
        subcommand: Whose ``--help`` to point to.
    """
    message = str(error)
    parents = [_short(key or group) for key, group in _PARENT_KEY.findall(message)]
    help_command = f"salad-lightning {subcommand} --help"
    if match := _UNKNOWN_KEY.search(message):
        key = ".".join([*parents, _short(next(filter(None, match.groups())))])
        key, valid = _first_unknown(key, message, parser)
        what = f"there is no key {key!r}"
        cure = help_command if valid is None else _nearest(key.rpartition(".")[2], valid)
        return UserError(what, where=_place(key, settings), cure=cure)
    if match := _MISSING_KEYS.search(message):
        keys = [".".join([*parents, _short(key)]) for key in re.split(r",\s*", match[1] or match[2])]
        return UserError(f"missing: {', '.join(keys)}", cure=f"set it in a YAML file or by --{keys[0]}=…")
    key = ".".join(parents)
    if match := _UNKNOWN_CLASS.search(message):
        close = difflib.get_close_matches(match[1], {cls.__name__ for cls in _subclasses(_BASES)}, n=1)
        cure = (
            f"did you mean {close[0]}?" if close else "name it by its full path, such as my_package.my_module.MyClass"
        )
        what = f"{key}: no class called {match[1]!r} is known"
        return UserError(what, where=_place(key, settings, match[1]), cure=cure)
    if match := _WRONG_VALUE.search(message):
        expected = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match[1])
        value = match[2].strip()
        what = f"{key!r} takes {expected}, not {value!r}"
        return UserError(what, where=_place(key, settings, value), cure=help_command)
    lines = [text for line in message.splitlines() if (text := _NOISE.sub("", line).strip(" -"))]
    what = "\n    ".join([f"{key}: {lines[0]}" if key and lines else key, *lines[1:]])
    class_path = (_class_paths(message) or [""])[-1]
    return UserError(what, where=_place(key, settings, class_path), cure=help_command)


def _short(key: str) -> str:
    return _WRAPPERS.sub("", key)


def _place(key: str, settings: Sequence[Setting], value: str = "") -> str:
    """Where a key was last set to ``value``, or else at all; the last one wins in jsonargparse too.

    The value tells apart what shares a key: the items of a list, and files that are each checked by themselves.
    """
    places = [setting for setting in reversed(settings) if setting.key == key]
    return next((setting.where for setting in places if setting.value == value), places[0].where if places else "")


def _nearest(key: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, valid, n=1)
    if not close and len(longer := [name for name in valid if name.startswith(key)]) == 1:
        close = longer
    if close:
        return f"did you mean {close[0]!r}?"
    return f"keys here: {', '.join(valid)}" if valid else "nothing can be set here: remove it"


def _first_unknown(key: str, message: str, parser: ArgumentParser) -> tuple[str, list[str] | None]:
    """The shortest beginning of ``key`` that is unknown, and the keys that would have been valid in its place.

    None where these cannot be told.
    """
    if class_paths := _class_paths(message):
        builder = _imported(class_paths[-1])
        return key, None if builder is None else sorted(_init_keys(builder))
    root = ""
    for part in key.split("."):
        destinations = (action.dest for action in parser._actions if action.dest.startswith(root))
        valid = sorted({dest.removeprefix(root).split(".")[0] for dest in destinations} - {"help"})
        if part not in valid:
            return root + part, valid
        root += f"{part}."
    return key, None


def _class_paths(message: str) -> list[str]:
    """The classes in which the error is, from the outermost."""
    # What comes after is the whole value, with classes that have nothing to do with the error.
    return _CLASS_PATH.findall(message.partition("Given value")[0])


def _imported(path: str) -> Any:
    """The class, or function that makes one, that jsonargparse meant: it has been imported. None where it is not."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if callable(found) else None


def _subclasses(classes: Iterable[type]) -> Iterable[type]:
    for cls in classes:
        yield cls
        yield from _subclasses(cls.__subclasses__())


# What the model supplies when it builds a part; not for users to set.
_RUNTIME = ("self", "encoder_dim", "llm_dim")


def _init_keys(builder: Any) -> list[str]:
    keys: list[str] = []
    bases = builder.__mro__ if isinstance(builder, type) else ()
    for maker in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [builder]:
        parameters = inspect.signature(maker).parameters.values()
        keys += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [key for key in dict.fromkeys(keys) if key not in _RUNTIME]
