"""Writes whole export folders: aside, and renamed when they are complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError
from salad_lightning.export.config import SaladConfig
from salad_lightning.export.modeling import SaladForConditionalGeneration, save_language_model
from salad_lightning.export.parts import copy_folders
from salad_lightning.export.processor import SaladProcessor
from salad_lightning.model.llm import LanguageModel
from salad_lightning.model.speech_llm import SpeechLLM

__all__ = ["check_target", "save_llm", "save_speech_llm"]

_CARD = "README.md"


def check_target(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        UserError: If ``folder`` is a file, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError("the folder is not empty", where=str(folder), cure="name a new folder")


def save_speech_llm(
    model: SpeechLLM,
    folder: str | Path,
    *,
    spec: SequenceSpec,
    encoder: dict[str, Any],
    connector: dict[str, Any],
    card: str,
) -> None:
    """Write the folder that `salad_lightning.export.load_pretrained` and ``AutoModel`` read.

    Args:
        model: Trained.
        folder: Must be empty or missing.
        spec: Tokenizer, context and encoder of the model.
        encoder: Class and arguments the encoder was built with; local folders among them are copied.
        connector: Class and arguments the connector was built with.
        card: Content of ``README.md``.

    Raises:
        UserError: If ``folder`` holds something.
    """
    with _aside(Path(folder)) as aside:
        config = SaladConfig(
            encoder=copy_folders(encoder, aside),
            encoder_identity=spec.encoder,
            connector=connector,
            switch_embeddings=model.switch is not None,
            context=spec.context,
            sample_rate_hz=spec.sample_rate_hz,
            text_config={**model.llm.hf.config.to_dict(), "_name_or_path": ""},  # a path here says nothing there
        )
        SaladForConditionalGeneration(config, model).save_pretrained(aside)
        SaladProcessor(spec.tokenizer, spec.sample_rate_hz).save_pretrained(aside)
        (aside / _CARD).write_text(card, encoding="utf-8")


def save_llm(llm: LanguageModel, folder: str | Path, *, tokenizer: PreTrainedTokenizerFast, card: str) -> None:
    """Write the language model alone, as `AutoModelForCausalLM` reads it.

    Args:
        llm: Trained.
        folder: Must be empty or missing.
        tokenizer: Its tokenizer.
        card: Content of ``README.md``.

    Raises:
        UserError: If ``folder`` holds something.
    """
    with _aside(Path(folder)) as aside:
        save_language_model(llm, aside)
        tokenizer.save_pretrained(aside)
        (aside / _CARD).write_text(card, encoding="utf-8")


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    check_target(folder)
    aside = folder.resolve().with_name(f".{folder.resolve().name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
