"""Encoder and connector as ``config.json`` describes them, and the folders an encoder was built from."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from salad_lightning.errors import UserError
from salad_lightning.export.config import SaladConfig
from salad_lightning.interfaces import Connector, ConnectorFactory, Encoder

__all__ = ["build_parts", "copy_folders"]

_FOLDER = "encoder"


def copy_folders(value: Any, target: Path, name: str = "") -> Any:
    """Copy every local model folder among an encoder's arguments into the export; names on a hub stay names.

    Args:
        value: ``{"class_path": …, "init_args": …}`` or a value in it.
        target: The export folder.
        name: Of the argument that is looked at.

    Returns:
        ``value`` with ``{"folder": path inside the export}`` in the place of folders.
    """
    if isinstance(value, dict):
        return {key: copy_folders(inner, target, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [copy_folders(inner, target, f"{name}{index}") for index, inner in enumerate(value)]
    # By its file: a folder of the working directory may be called like an option.
    if not isinstance(value, str) or not (Path(value).expanduser() / "config.json").is_file():
        return value
    relative = f"{_FOLDER}/{name}"
    while (target / relative).exists():  # two encoders in one have arguments of one name
        relative += "_"
    shutil.copytree(Path(value).expanduser(), target / relative, ignore=shutil.ignore_patterns(".*"))
    return {"folder": relative}


def build_parts(config: SaladConfig, folder: Path) -> tuple[Encoder, Connector]:
    """The encoder with its weights, and a fresh connector.

    Args:
        config: Of the export.
        folder: The export, which holds the encoder's folders.

    Raises:
        UserError: If a part cannot be built, or the encoder is not the one that the connector was trained on.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Encoder, "encoder")
    parser.add_argument("--connector", type=ConnectorFactory)
    where = str(folder / "config.json")
    try:
        nodes = {"encoder": _resolve(config.encoder, folder), "connector": config.connector}
        parts = parser.instantiate_classes(parser.parse_object(nodes))
        encoder: Encoder = parts.encoder
        connector: Connector = parts.connector(
            encoder_dim=encoder.output_dim, llm_dim=config.get_text_config().hidden_size
        )
    except (ArgumentError, argparse.ArgumentError, TypeError, ValueError, ImportError) as error:
        names = [(node or {}).get("class_path") for node in (config.encoder, config.connector)]
        raise UserError(
            f"the encoder or the connector cannot be built: {error}",
            where=where,
            cure=f"install the packages of {names[0]} and {names[1]}",
        ) from error
    if config.encoder_identity != (found := encoder.identity()):
        raise UserError(
            f"the model was trained on the encoder {config.encoder_identity}, and this one is {found}",
            where=where,
            cure="restore the encoder's weights as they were",
        )
    return encoder, connector


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        if set(value) == {"folder"}:
            return str(folder / value["folder"])
        return {key: _resolve(inner, folder) for key, inner in value.items()}
    return [_resolve(inner, folder) for inner in value] if isinstance(value, list) else value
