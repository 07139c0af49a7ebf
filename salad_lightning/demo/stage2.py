"""Stage II in miniature: select, speak, encode, train on from Stage I's pre-decay checkpoint; and its controls."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from salad_lightning.demo.arms import Arm, cli
from salad_lightning.demo.pipeline import Step

__all__ = ["STAGE2_ARMS", "Selection", "Stage2Arm", "selection_of", "stage2_steps"]


@dataclass(frozen=True)
class Selection:
    """A choice of text and its speech.

    Attributes:
        name: Of its folder and its shards.
        overrides: Options of ``select``.
        synthesizer: Who speaks what was chosen; by default the built-in one.
        voices: Its arguments; by default those that speak the probes.
        scored: Names the steps that selections share which differ in their draw alone.
    """

    name: str
    overrides: tuple[str, ...] = ()
    synthesizer: str = ""
    voices: tuple[dict[str, Any], ...] = ()
    scored: str = "selection"


@dataclass(frozen=True)
class Stage2Arm:
    """A run from the pre-decay checkpoint with the learning rate falling to 0.

    Attributes:
        name: Of the arm.
        selection: What is spoken of the recipe's active third; None for an arm without synthetic speech.
        weights: Of the natural speech and of the text, where that third is theirs; the recipe's by default.
    """

    name: str
    selection: Selection | None = None
    weights: tuple[float, float] = (1.0, 1.0)


_FEW_POINTS = "--trainer.val_check_interval=200"  # of the learning curve, for time, as in the demo's Stage I

STAGE2_ARMS = (
    Stage2Arm("stage2_active", Selection("active")),
    Stage2Arm("stage2_uniform", Selection("uniform", ("--draw.gamma=0",))),
    # The two thirds of speech that Stage I had are natural here too; the text is that of the other arms.
    Stage2Arm("stage1_more", weights=(2.0, 1.0)),
)
"""γ of the paper; γ = 0; as many more steps without synthetic speech; all with one text and the same learning rates."""


def stage2_steps(
    recipes: Path, root: Path, stage1: Arm, arms: Sequence[Stage2Arm] = STAGE2_ARMS, *, world_seed: int = 0
) -> list[Step]:
    """Everything from the pre-decay checkpoint of a Stage I arm to tested models.

    Args:
        recipes: The project's recipe folder.
        root: Where to, as the commands are to name it.
        stage1: The arm to go on from; its seed is that of all that follows.
        arms: What to train; the first with a selection makes what the others' draws share.
        world_seed: Of the world.
    """
    build = [sys.executable, "-m", "salad_lightning.demo.build", "recognizer", "--root", str(root)]
    steps = [Step("recognizer", [*build, "--seed", str(world_seed)], weight=1)]
    first: dict[str, str] = {}
    for arm in arms:
        if arm.selection is not None:
            steps += _selection_steps(arm.selection, recipes, root, stage1, first.get(arm.selection.scored))
            first.setdefault(arm.selection.scored, f"select-{arm.selection.name}")
        steps += _training_steps(arm, recipes, root, stage1)
    return list({step.name: step for step in steps}.values())


def selection_of(name: str, root: Path) -> dict[str, dict[str, Any]]:
    """Cluster → ``web``, ``misalignment``, ``target``, ``texts``, ``seconds`` of a selection."""
    content: dict[str, dict[str, Any]] = json.loads((_selected(name, root) / "selection.json").read_text())
    return content


def _selected(name: str, root: Path) -> Path:
    return root / f"selection_{name}"


def _pre_decay(stage1: Arm, root: Path) -> Path:
    return root / f"{stage1.name}-{stage1.seed}" / "checkpoints" / "pre_decay.ckpt"


def _selection_steps(selection: Selection, recipes: Path, root: Path, stage1: Arm, first: str | None) -> list[Step]:
    select, mini = recipes / "scale" / "mini_select.yaml", recipes / "scale" / "mini.yaml"
    name, shards = selection.name, root / "shards" / selection.name
    options = [
        f"--score.checkpoint={_pre_decay(stage1, root)}", f"--output={_selected(name, root)}",
        f"--steps={root / f'{selection.scored}_steps-{stage1.seed}'}", f"--draw.seed={stage1.seed}",
    ]  # fmt: skip
    # What is chosen is said by the voices that speak the probes.
    voices = selection.voices or yaml.safe_load(select.read_text())["probe"]["voices"]
    spoken_by = ["--synthesizer", selection.synthesizer] if selection.synthesizer else []
    spoken_by += [word for voice in voices for word in ("--voice", json.dumps(voice))]
    after = (f"{stage1.name}-{stage1.seed}", "text", "recognizer", "prepare-speech_train", *([first] if first else []))
    return [
        Step(
            f"select-{name}",
            [*cli("select"), "--config", str(select), *options, *selection.overrides],
            after,
            (select,),
            weight=8,
        ),
        Step(
            f"synthesize-{name}",
            [
                *cli("synthesize"), "--manifest", str(_selected(name, root) / "manifest.jsonl"),
                "--output", str(shards), "--sample-rate", "16000", *spoken_by, "--overwrite",
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


def _training_steps(arm: Stage2Arm, recipes: Path, root: Path, stage1: Arm) -> list[Step]:
    configs = (recipes / "stage2.yaml", recipes / "scale" / "mini.yaml", recipes / "scale" / "mini_stage2.yaml")
    name, before = f"{arm.name}-{stage1.seed}", f"{stage1.name}-{stage1.seed}"
    spoken = [f"encode-{arm.selection.name}"] if arm.selection else []
    after = (before, "prepare-speech_val", "prepare-text_broad", *spoken)
    folder = root / name
    shared = [word for path in configs for word in ("--config", str(path))]
    sources = json.dumps(_sources(arm, configs[-1], root))
    shared += [f"--data.init_args.train={sources}", f"--trainer.default_root_dir={folder}"]
    seed = [f"--seed_everything={stage1.seed}", f"--data.init_args.seed={stage1.seed + 1}"]
    start = f"--model.init_args.init_from={_pre_decay(stage1, root)}"
    checkpoint = f"--ckpt_path={folder / 'checkpoints' / 'final.ckpt'}"
    return [
        Step(name, [*cli("fit"), *shared, *seed, start, _FEW_POINTS], after, configs, weight=6),
        Step(f"test-{name}", [*cli("test"), *shared, checkpoint], (name, "prepare-speech_test"), configs),
    ]


def _sources(arm: Stage2Arm, recipe: Path, root: Path) -> list[dict[str, Any]]:
    """The recipe's, with shards under ``root`` and the arm's own in the place of the active third."""
    natural, active, text = yaml.safe_load(recipe.read_text())["data"]["init_args"]["train"]
    natural, text = natural | {"weight": arm.weights[0]}, text | {"weight": arm.weights[1]}
    sources = [{**source, "shards": str(root / "shards" / Path(source["shards"]).name)} for source in (natural, text)]
    if arm.selection is not None:
        own = f"{arm.selection.name}_encoded"
        sources.insert(1, {**active, "name": arm.selection.name, "shards": str(root / "shards" / own)})
    return sources
