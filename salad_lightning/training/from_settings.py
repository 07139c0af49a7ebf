"""A module for those who write Python in place of recipes."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

from salad_lightning.registry import MODEL_KINDS, load_all

__all__ = ["from_settings"]

ModuleT = TypeVar("ModuleT", bound=LightningModule)


def from_settings(module: type[ModuleT], **settings: Any) -> ModuleT:
    """Build a module from what ``model.init_args`` of a recipe may say.

    Its checkpoints hold these settings and no objects, so that other stages, `select` and `export` can read them.

    Args:
        module: The class.
        settings: Plain data; a part is ``{"class_path": …, "init_args": {…}}``, or its name alone.

    Raises:
        ValueError: If they do not fit the class.
    """
    load_all(MODEL_KINDS)  # parts may be plugins
    with _given_hyperparameters_context(hparams=settings, instantiator="lightning.pytorch.cli.instantiate_module"):
        return instantiate_module(module, settings)
