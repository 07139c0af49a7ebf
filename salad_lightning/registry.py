"""What the installed packages offer, read from their entry points.

Installing a package is its registration: its metadata names its classes under one of the groups below, each by the
class's own name. That name is then also what one writes in YAML and on the command line. Loading a class makes it a
known subclass of its interface, which is how jsonargparse finds short names. Only the standard library is imported
here; loading an entry point imports whatever that part needs.
"""

from __future__ import annotations

import difflib
import inspect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from salad_lightning.errors import UserError

__all__ = ["INTERFACES", "MODEL_KINDS", "Kind", "Part", "Registry", "State", "load_all"]

Kind = Literal["encoder", "connector", "objective", "synthesizer", "module"]
State = Literal["ok", "failed", "clash"]

INTERFACES: dict[Kind, str] = {
    "encoder": "salad_lightning.interfaces.Encoder",
    "connector": "salad_lightning.interfaces.Connector",
    "objective": "salad_lightning.interfaces.Objective",
    "synthesizer": "salad_lightning.interfaces.Synthesizer",
    "module": "salad_lightning.training.base.TokenLossModule",
}
"""The class each kind must subclass; its entry-point group is ``salad_lightning.<kind>s``."""

MODEL_KINDS: tuple[Kind, ...] = ("encoder", "connector", "objective", "module")
"""What a model is made of: to load voices takes time, and training has no use for them."""


@dataclass(frozen=True)
class Part:
    """One entry point, loaded or not.

    Attributes:
        kind: Which of `INTERFACES`.
        name: Entry-point name, class name and YAML name alike.
        package: The distribution that offers it.
        version: Of that distribution.
        target: ``module:Class``.
        state: ``ok``; ``failed`` to load; or ``clash``, where two packages claim the name.
        reason: Why it is not ``ok``; empty otherwise.
        cls: The class where ``ok``.
    """

    kind: Kind
    name: str
    package: str
    version: str
    target: str
    state: State
    reason: str = ""
    cls: type | None = None


@dataclass(frozen=True)
class Registry:
    """Everything the installed packages offer, usable or not."""

    parts: tuple[Part, ...]

    def names(self, kind: Kind) -> list[str]:
        """Names of the usable parts of one kind, sorted."""
        return sorted(part.name for part in self.parts if part.kind == kind and part.state == "ok")

    def find(self, kind: Kind, name: str, *, where: str = "") -> type:
        """The class of a name.

        Args:
            kind: Which of `INTERFACES`.
            name: Entry-point name.
            where: File, line or key that asked for it, for the error's text.

        Raises:
            UserError: If no package offers the name, the one that does cannot be loaded, or two packages claim it.
        """
        for part in self.parts:
            if (part.kind, part.name) == (kind, name):
                if part.cls is not None:
                    return part.cls
                raise UserError(f"{kind} {name!r} cannot be used: {part.reason}", where=where, cure=_cure(part))
        raise UserError(f"no installed package offers the {kind} {name!r}", where=where, cure=self._offer(kind, name))

    def _offer(self, kind: Kind, name: str) -> str:
        same_kind = [part for part in self.parts if part.kind == kind]
        close = difflib.get_close_matches(name.lower(), [part.name.lower() for part in same_kind], n=1)
        meant = [part.name for part in same_kind if part.name.lower() in close]
        lines = [f"did you mean {meant[0]}?"] if meant else []
        lines.append(f"known {kind}s: {', '.join(self.names(kind)) or 'none'}")
        lines += [
            f"not usable: {part.name} of {part.package} ({part.reason})" for part in same_kind if part.state != "ok"
        ]
        lines.append("a class that no package registers is named by its full path, such as my_package.my_module.MyPart")
        return "\n    ".join(lines)


def load_all(kinds: Iterable[Kind] = tuple(INTERFACES)) -> Registry:
    """Load every entry point of some groups; one that fails is recorded with its reason and stops nothing.

    Args:
        kinds: Which; all of them by default.
    """
    parts: list[Part] = []
    for kind in kinds:
        by_name: defaultdict[str, list[EntryPoint]] = defaultdict(list)
        for entry in entry_points(group=f"salad_lightning.{kind}s"):
            by_name[entry.name].append(entry)
        for _, claims in sorted(by_name.items()):
            parts += [_load(kind, claims[0])] if len(claims) == 1 else _clash(kind, claims)
    return Registry(tuple(parts))


def _load(kind: Kind, entry: EntryPoint) -> Part:
    try:
        cls = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # A module may do anything while it is imported, sys.exit() included.
        return _part(kind, entry, "failed", f"{type(error).__name__}: {error}".strip())
    if reason := _unfit(kind, entry.name, cls):
        return _part(kind, entry, "failed", reason)
    return _part(kind, entry, "ok", cls=cls)


def _unfit(kind: Kind, name: str, cls: object) -> str:
    if not isinstance(cls, type):
        return f"the entry point leads to {cls!r}, which is not a class"
    if cls.__name__ != name:
        return f"the entry point is called {name} but leads to the class {cls.__name__}; the two names must be equal"
    # By name, so that this module needs no torch.
    if INTERFACES[kind] not in {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}:
        return f"{name} is not a subclass of {INTERFACES[kind]}"
    if inspect.isabstract(cls):
        return f"{name} does not define {', '.join(sorted(getattr(cls, '__abstractmethods__', ())))}"
    return ""


def _clash(kind: Kind, claims: Iterable[EntryPoint]) -> list[Part]:
    claims = list(claims)
    packages = " and ".join(sorted({f"{_origin(entry)[0]} ({entry.value})" for entry in claims}))
    return [_part(kind, entry, "clash", f"the name is claimed by {packages}") for entry in claims]


def _part(kind: Kind, entry: EntryPoint, state: State, reason: str = "", cls: type | None = None) -> Part:
    package, version = _origin(entry)
    return Part(kind, entry.name, package, version, entry.value, state, reason, cls)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "unknown")


def _cure(part: Part) -> str:
    if part.state == "clash":
        return "uninstall one of the packages, or name the class by its full path, such as " + part.target.replace(
            ":", "."
        )
    return f"repair or reinstall {part.package} {part.version}, or uninstall it"
