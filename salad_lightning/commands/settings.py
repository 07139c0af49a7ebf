"""What a command line and its YAML files say, with the place where each thing is said.

jsonargparse's own errors name neither file nor line, and bury a wrong class name in a page of attempts. Reading the
same input beforehand, as plain YAML nodes, allows errors that say where.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from salad_lightning.errors import UserError
from salad_lightning.registry import MODEL_KINDS, Registry

__all__ = ["Setting", "check_part_names", "read_settings"]

# How jsonargparse spells a class and its arguments; the short forms leave these levels out.
_WRAPPERS = ("class_path", "init_args", "dict_kwargs")


class Setting(NamedTuple):
    """One key that was set.

    Attributes:
        key: Dotted, without the ``class_path`` and ``init_args`` levels: ``model.connector.num_layers``.
        value: As text; empty for a mapping or a list.
        where: ``file:line`` or the command-line option.
    """

    key: str
    value: str
    where: str


def read_settings(argv: Sequence[str]) -> list[Setting]:
    """Everything set by ``--config`` files and by ``--key=value`` options, in order.

    Raises:
        UserError: If a configuration file is missing or empty, is not YAML, or is not a mapping.
    """
    settings: list[Setting] = []
    for option, value in _options(argv):
        if option in ("--config", "-c"):
            settings += _read_file(value)
        elif option.startswith("--"):
            settings.append(Setting(_short(option[2:].split(".")), value, f"{option}={value}"))
    return settings


def check_part_names(settings: Sequence[Setting], registry: Registry) -> None:
    """Look every short name of a part up; full class paths are left to jsonargparse.

    Raises:
        UserError: For a name that no package offers, that failed to load, or that two packages claim.
    """
    modules = {part.name for part in registry.parts if part.kind == "module"}
    for setting in settings:
        if setting.key == "model" and setting.value in modules:  # others are this package's own, or full paths
            registry.find("module", setting.value, where=f"{setting.where} ({setting.key})")
        root, _, last = setting.key.rpartition(".")
        for kind in MODEL_KINDS:
            if last == kind and root.startswith("model") and setting.value.isidentifier() and setting.value != "null":
                registry.find(kind, setting.value, where=f"{setting.where} ({setting.key})")


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    index = 0
    while index < len(argv):
        option, equals, value = argv[index].partition("=")
        index += 1
        if not equals and index < len(argv) and not argv[index].startswith("-"):
            value = argv[index]
            index += 1
        yield option, value


def _read_file(name: str) -> list[Setting]:
    # jsonargparse also takes YAML itself and URLs in place of a file.
    if "://" in name or name.lstrip().startswith("{"):
        return []
    path = Path(name)
    if not path.is_file():
        siblings = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(name, siblings, n=1)
        raise UserError(
            "no such configuration file",
            where=name,
            cure=f"did you mean {close[0]}?" if close else "give --config the path of a YAML file",
        )
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(
            f"not valid YAML: {problem}", where=where, cure="check indentation, colons and quotes"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not a YAML file in UTF-8: {error}", where=name, cure="give --config a YAML file") from None
    if root is None:
        raise UserError("the configuration file is empty: it sets no key", where=name, cure="fill it, or leave it out")
    if not isinstance(root, yaml.MappingNode):
        raise UserError("a configuration is a mapping of keys to values", where=name, cure="start it with `trainer:`")
    return list(_walk(root, (), name))


def _walk(node: yaml.Node, path: tuple[str, ...], name: str) -> Iterator[Setting]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            # A wrapper level says nothing by itself, but class_path gives its parent's value.
            if inner[-1] not in _WRAPPERS or inner[-1] == "class_path":
                text = value.value if isinstance(value, yaml.ScalarNode) else ""
                yield Setting(_short(inner), text, f"{name}:{key.start_mark.line + 1}")
            yield from _walk(value, inner, name)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _walk(item, path, name)


def _short(path: Sequence[str]) -> str:
    return ".".join(part for part in path if part not in _WRAPPERS)
