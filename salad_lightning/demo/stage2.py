"""Stage II in miniature: select, speak, encode, train on from Stage I's pre-decay checkpoint; two controls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from salad_lightning.demo.arms import Arm, cli
from salad_lightning.demo.pipeline import Step

__all__ = ["SELECTED", "STAGE2_ARMS", "selection_of", "stage2_steps"]

STAGE2_ARMS = ("stage2_active", "stage2_uniform", "stage1_more")
"""γ of the paper; γ = 0; and as many more steps of Stage I's own mixture at the same learning rates."""

SELECTED = STAGE2_ARMS[:2]
"""Those with a selection of their own."""

_GAMMAS = {"active": None, "uniform": 0}  # None: the recipe's


def stage2_steps(recipes: Path, root: Path, stage1: Arm) -> list[Step]:
    """Everything from the pre-decay checkpoint of a Stage I arm to three tested models.

    Args:
        recipes: The project's recipe folder.
        root: Where to, as the commands are to name it.
        stage1: The arm to go on from; its seed is that of all that follows.
    """
    before = f"{stage1.name}-{stage1.seed}"
    select, mini = recipes / "scale" / "mini_select.yaml", recipes / "scale" / "mini.yaml"
    checkpoint = root / before / "checkpoints" / "pre_decay.ckpt"
    recognizer = [sys.executable, "-m", "salad_lightning.demo.build", "recognizer", "--root", str(root)]
    steps = [Step("recognizer", recognizer, weight=1)]
    for name, gamma in _GAMMAS.items():
        output = root / f"selection_{name}"
        options = [f"--score.checkpoint={checkpoint}", f"--output={output}", f"--draw.seed={stage1.seed}"]
        options += [] if gamma is None else [f"--draw.gamma={gamma}"]
        shards = root / "shards" / name
        voices = [word for voice in _voices(select) for word in ("--voice", json.dumps(voice))]
        steps += [
            Step(
                f"select-{name}",
                [*cli("select"), "--config", str(select), *options],
                (before, "text", "recognizer", "prepare-speech_train"),
                (select,),
                weight=8,
            ),
            Step(
                f"synthesize-{name}",
                [
                    *cli("synthesize"), "--manifest", str(output / "manifest.jsonl"), "--output", str(shards),
                    "--sample-rate", "16000", *voices, "--overwrite",
                ],
                (f"select-{name}",),
                weight=8,
            ),
            Step(
                f"encode-{name}",
                [*cli("encode"), str(shards), "--output", f"{shards}_encoded", "--config", str(mini), "--overwrite"],
                (f"synthesize-{name}", "encoder"),
                (mini,),
                weight=8,
            ),
        ]  # fmt: skip
    configs = (recipes / "stage2.yaml", mini, recipes / "scale" / "mini_stage2.yaml")
    sources = _train_sources(configs[-1], root)
    mixtures = {
        "stage2_active": sources,
        "stage2_uniform": [_renamed(source, "active", "uniform", root) for source in sources],
        # The two thirds of speech that Stage I had are natural here too.
        "stage1_more": [{**source, "weight": 2.0 if source["name"] == "natural" else source["weight"]}
                        for source in sources if source["name"] != "active"],
    }  # fmt: skip
    for name in STAGE2_ARMS:
        spoken = name.removeprefix("stage2_")
        after = (before, "prepare-speech_val", *([f"encode-{spoken}"] if spoken in _GAMMAS else []))
        folder = root / f"{name}-{stage1.seed}"
        shared = [word for path in configs for word in ("--config", str(path))]
        shared += [f"--data.init_args.train={json.dumps(mixtures[name])}", f"--trainer.default_root_dir={folder}"]
        seed = [f"--seed_everything={stage1.seed}", f"--data.init_args.seed={stage1.seed + 1}"]
        start = f"--model.init_args.init_from={checkpoint}"
        steps += [
            Step(f"{name}-{stage1.seed}", [*cli("fit"), *shared, *seed, start], after, configs, weight=6),
            Step(
                f"test-{name}-{stage1.seed}",
                [*cli("test"), *shared, f"--ckpt_path={folder / 'checkpoints' / 'final.ckpt'}"],
                (f"{name}-{stage1.seed}", "prepare-speech_test"),
                configs,
            ),
        ]
    return steps


def selection_of(name: str, root: Path) -> dict[str, dict[str, Any]]:
    """Cluster → ``web``, ``misalignment``, ``target``, ``texts``, ``seconds`` of an arm's selection."""
    path = root / f"selection_{name.removeprefix('stage2_')}" / "selection.json"
    content: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return content


def _voices(recipe: Path) -> list[dict[str, Any]]:
    """Those that speak the probes: what is chosen is said by the same ones."""
    voices: list[dict[str, Any]] = yaml.safe_load(recipe.read_text())["probe"]["voices"]
    return voices


def _train_sources(recipe: Path, root: Path) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = yaml.safe_load(recipe.read_text())["data"]["init_args"]["train"]
    return [{**source, "shards": str(root / "shards" / Path(source["shards"]).name)} for source in sources]


def _renamed(source: dict[str, Any], old: str, new: str, root: Path) -> dict[str, Any]:
    if source["name"] != old:
        return source
    return {**source, "name": new, "shards": str(root / "shards" / f"{new}_encoded")}
