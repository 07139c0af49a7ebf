"""The model card of an export, written from what the run left behind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from salad_lightning import __version__

__all__ = ["model_card"]

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_LICENSE = "# TODO: name the licence; those of the language model, the encoder and the training data bind you."
_FIGURES = ("speech_accuracy", "text_accuracy", "base_text_accuracy", "misalignment", "forgetting", "kl", "nll")
_SPEECH_USE = """```python
from salad_lightning.export import load_pretrained

model = load_pretrained("THIS FOLDER")
print(model.generate("question.wav", prompt="{speech}", max_new_tokens=64))
```

The language model alone is in `llm`, for `AutoModelForCausalLM`."""
_TEXT_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```"""


def model_card(
    name: str,
    settings: dict[str, Any],
    step: int,
    *,
    fit: dict[str, Any] | None = None,
    test: dict[str, Any] | None = None,
    sources: Sequence[dict[str, Any]] = (),
    llm_only: bool = False,
) -> str:
    """Content of ``README.md``.

    Args:
        name: Title.
        settings: Hyperparameters of the run.
        step: Optimizer steps.
        fit: Content of the run's ``fit.json``.
        test: Content of the run's ``test.json``.
        sources: Of the training data, as the run's configuration lists them.
        llm_only: Whether only the language model is in the folder.
    """
    what = "the language model of a speech-adapted LLM, for text" if llm_only else "a speech-adapted text LLM"
    parts = [
        _front_matter(settings, llm_only),
        f"# {name}",
        f"This is {what}, trained with salad-lightning {__version__} by cross-modal distillation "
        "(SALAD, arXiv 2510.13632).",
        "## Use\n\n" + (_TEXT_USE if llm_only else _SPEECH_USE),
        "## Training\n\n" + _table(_training(settings, step, fit or {}) | _data(sources)),
    ]
    if test:
        parts.append(
            "## Figures\n\nFrom the `test.json` of the run's folder; misalignment, forgetting, KL and NLL are nats per "
            "token.\n\n" + _figures(test)
        )
    return "\n\n".join(parts) + "\n"


def _front_matter(settings: dict[str, Any], llm_only: bool) -> str:
    llm = str(settings["llm"])
    content: dict[str, Any] = {
        "library_name": "transformers" if llm_only else "salad-lightning",
        "tags": ["salad", "speech"],
    }
    if _HUB_NAME.fullmatch(llm) and not Path(llm).is_dir():
        content["base_model"] = llm
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}{_LICENSE}\nlicense: other\n---"


def _training(settings: dict[str, Any], step: int, fit: dict[str, Any]) -> dict[str, Any]:
    rows = {
        "language model": _public(settings["llm"]),
        "encoder": _class(settings["encoder"]),
        "connector": _class(settings["connector"]),
        "objective": _class(settings["objective"]),
        "context": f"{settings['context']} positions",
        "steps": step,
        "learning rates": f"{settings['connector_lr']:g} (connector), {settings['llm_lr']:g} (language model)",
    }
    # The counts of fit.json are of the run's end.
    if fit.get("steps") == step:
        rows["positions trained on"] = f"{fit['tokens']:,.0f}"
        rows["speech heard"] = f"{fit['audio_seconds'] / 3600:,.2f} h"
        rows["trained parameters"] = f"{fit['trainable_parameters']:,}"
    return rows


def _data(sources: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every source with its share of the positions."""
    total = sum(float(source["weight"]) for source in sources)
    shares = (f"{source['name']} ({float(source['weight']) / total:.0%} of the positions)" for source in sources)
    return {"data": ", ".join(shares)} if sources else {}


def _class(node: Any) -> str:
    """A part as its class and arguments."""
    if not isinstance(node, dict):
        return str(node)
    arguments = ", ".join(f"{key}={_public(value)!r}" for key, value in (node.get("init_args") or {}).items())
    return f"`{str(node['class_path']).rpartition('.')[2]}({arguments})`"


def _public(value: Any) -> Any:
    """Of a folder its name alone: where it lay concerns nobody."""
    return Path(value).name if isinstance(value, str) and Path(value).is_dir() else value


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _figures(test: dict[str, Any]) -> str:
    columns = [name for name in _FIGURES if any(name in figures["all"] for figures in test.values())]
    lines = [
        "| set | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, figures in test.items():
        values = (f"{figures['all'][column]:.3f}" if column in figures["all"] else "–" for column in columns)
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)
