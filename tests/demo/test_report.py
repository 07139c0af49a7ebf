import json

import pytest

from salad_lightning.demo.arms import Arm, arm_steps, base_steps, learning_curve
from salad_lightning.demo.pipeline import Step
from salad_lightning.demo.report import write_report
from salad_lightning.demo.stage2 import STAGE2_ARMS, stage2_steps

DOMAINS = {"rivers": True, "stars": False, "laws": False}
FIGURES = ("speech_accuracy", "text_accuracy", "base_text_accuracy", "misalignment", "forgetting")


@pytest.fixture
def root(tmp_path):
    """Two tested arms, as `fit` and `test` leave them."""
    (tmp_path / "world").mkdir()
    rows = [{"name": name, "heard": heard, "speech_share": 0.5 * heard} for name, heard in DOMAINS.items()]
    (tmp_path / "world" / "domains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, name in enumerate(("stage1_kl-0", "stage1_nll-0")):
        folder = tmp_path / name
        (folder / "logs" / "version_0").mkdir(parents=True)
        values = {"rivers": 0.9 - 0.1 * number, "stars": 0.4, "laws": 0.2}
        groups = {"all": {}, "groups": dict.fromkeys(FIGURES, values)}
        (folder / "test.json").write_text(json.dumps({"questions": groups, "muted": groups, "shuffled": groups}))
        fit = {"steps": 5, "seconds": 2.0, "trainable_parameters": 7, "tokens": 100.0, "audio_seconds": 3.0}
        (folder / "fit.json").write_text(json.dumps(fit))
        columns = "step,train/tokens,train/loss,val/questions/misalignment,val/questions/forgetting\n"
        (folder / "logs" / "version_0" / "metrics.csv").write_text(columns + "0,10,2.0,,\n1,,,1.5,0.1\n2,20,1.0,,\n")
    return tmp_path


def test_report_has_the_documented_schema(root, capsys):
    report = write_report([Arm("stage1_kl"), Arm("stage1_nll")], root)
    assert json.loads((root / "report.json").read_text()) == report
    kl, nll = report["arms"]
    assert (kl["name"], nll["name"], kl["seed"]) == ("stage1_kl", "stage1_nll", 0)
    for figure in FIGURES:
        assert set(kl[figure]) == {"heard", "unheard", "domains"}
        assert set(kl[figure]["domains"]) == set(DOMAINS)
    assert kl["speech_accuracy"]["heard"] == 0.9
    assert nll["speech_accuracy"]["heard"] == 0.8
    assert kl["speech_accuracy"]["unheard"] == pytest.approx(0.3)
    assert (kl["train_seconds"], kl["audio_seconds"], kl["tokens"], kl["trainable_parameters"]) == (2.0, 3.0, 100.0, 7)
    assert {"versions", "machine"} < set(report)
    for plot in ("gap_by_domain", "misalignment_and_forgetting", "learning_curves"):
        assert (root / f"{plot}.png").stat().st_size > 10_000
    assert "control: muted audio" in capsys.readouterr().out


def test_curves_come_from_the_training_log_not_from_a_later_test(root):
    later = root / "stage1_kl-0" / "logs" / "version_10"
    later.mkdir()
    (later / "metrics.csv").write_text("step,test/questions/misalignment\n5,0.3\n")
    assert learning_curve(Arm("stage1_kl"), root, "val/questions/misalignment") == [(10.0, 1.5)]


def test_arms_share_what_they_can_and_stand_on_steps_that_exist(root, request):
    recipes = request.config.rootpath / "recipes"
    other = '--model.init_args.connector={"class_path": "MLPConnector"}'
    arms = [
        Arm("kl"),
        Arm("nll", ("--model.init_args.objective=NLLObjective",)),
        Arm("mlp", (other,)),
        Arm("kl", seed=1),
    ]
    steps: dict[str, Step] = {step.name: step for step in base_steps(recipes, root)}
    for arm in arms:
        for step in arm_steps(arm, recipes, root):
            assert steps.setdefault(step.name, step) == step, "two different steps of one name"
    assert {name for name in steps if name.startswith("warmup")} == {"warmup-0", "warmup-mlp-0", "warmup-1"}
    for step in steps.values():
        assert set(step.after) <= set(steps)
        assert all(path.is_file() for path in step.reads)


def test_stage_two_is_reported_with_what_was_selected(root, capsys):
    clusters = {
        "0": {"web": 0.5, "misalignment": 1.5, "target": 0.9, "texts": 9, "seconds": 30.0},
        "1": {"web": 0.5, "misalignment": None, "target": 0.0, "texts": 0, "seconds": 0.0},
    }
    names = [arm.name for arm in STAGE2_ARMS]
    for name in names:
        folder = root / f"{name}-0"
        folder.mkdir()
        for file in ("test.json", "fit.json"):
            (folder / file).write_text((root / "stage1_kl-0" / file).read_text())
    for name in ("active", "uniform"):
        folder = root / f"selection_{name}"
        folder.mkdir()
        (folder / "selection.json").write_text(json.dumps(clusters))
        (folder / "manifest.jsonl").write_text(json.dumps({"domain": "laws", "estimated_seconds": 30.0}) + "\n")
    report = write_report([Arm("stage1_kl"), *(Arm(name) for name in names)], root)
    selections = {row["name"]: row.get("selection") for row in report["arms"]}
    assert selections["stage2_active"] == selections["stage2_uniform"] == clusters
    assert selections["stage1_more"] is selections["stage1_kl"] is None
    assert (root / "selection.png").stat().st_size > 10_000
    assert "II: active" in capsys.readouterr().out


def test_stage_two_stands_on_stage_one_and_differs_in_its_data_alone(root, request):
    recipes = request.config.rootpath / "recipes"
    arm = Arm("stage1_kl")
    steps = {step.name: step for step in [*base_steps(recipes, root), *arm_steps(arm, recipes, root)]}
    steps |= {step.name: step for step in stage2_steps(recipes, root, arm)}
    for step in steps.values():
        assert set(step.after) <= set(steps)
        assert all(path.is_file() for path in step.reads)
    trains = {}
    for name in (arm.name for arm in STAGE2_ARMS):
        command = steps[f"{name}-0"].command
        (train,) = (word for word in command if word.startswith("--data.init_args.train="))
        trains[name] = json.loads(train.partition("=")[2])
        assert f"--model.init_args.init_from={root / 'stage1_kl-0' / 'checkpoints' / 'pre_decay.ckpt'}" in command
    weights = {name: {source["name"]: source["weight"] for source in train} for name, train in trains.items()}
    assert weights == {
        "stage2_active": {"natural": 1.0, "active": 1.0, "text": 1.0},
        "stage2_uniform": {"natural": 1.0, "uniform": 1.0, "text": 1.0},
        "stage1_more": {"natural": 2.0, "text": 1.0},
    }
