"""A sharded run's checkpoint, a folder, serves whatever a file serves: the next stage, export, one file on demand."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml

from salad_lightning.cli import main
from salad_lightning.errors import UserError
from salad_lightning.model.checkpoint_folder import is_checkpoint_folder, replace_folder, stored_shapes
from salad_lightning.model.parallel import check_device
from salad_lightning.selection.score import check_score_settings
from salad_lightning.selection.settings import ScoreSettings
from salad_lightning.selection.stage1 import distillation_losses
from salad_lightning.testing.runs import TinyRun
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.training.checkpoints import load_checkpoint

pytestmark = pytest.mark.slow
SHARDED = {"class_path": "salad_lightning.model.parallel.FullyShardedStrategy"}


def fit(world, name, model=None, trainer=None, *options):
    overlay = world.folder / f"{name}.yaml"
    overlay.write_text(yaml.safe_dump({"model": {"init_args": model or {}}, "trainer": trainer or {}}))
    return main(world.arguments("fit", name, f"--config={overlay}", *options))


@pytest.fixture(scope="module")
def stage1(world):
    """Folder of a Stage I on one process under FSDP2."""
    callbacks = [{"class_path": name} for name in ("PreDecayCheckpoint", "FinalCheckpoint")]
    assert fit(world, "sharded1", trainer={"strategy": SHARDED, "max_steps": 6, "callbacks": callbacks}) == 0
    folder = world.folder / "sharded1" / "checkpoints"
    assert is_checkpoint_folder(folder / "pre_decay.ckpt")
    assert not list(folder.glob("*.part"))
    return folder


@pytest.mark.parametrize("strategy", [SHARDED, "auto"], ids=["sharded", "single"])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_stage2_takes_its_weights(world, stage1, tmp_path, strategy, form):
    source = stage1 / "pre_decay.ckpt"
    before = load_checkpoint(source, weights_only=True)
    if form == "file":
        assert main(["consolidate", str(source), str(tmp_path / "whole.ckpt")]) == 0
        source = tmp_path / "whole.ckpt"
    name = f"taken-{form}-{strategy if isinstance(strategy, str) else 'sharded'}"
    model = {"init_from": str(source), "require_pre_decay": True, "connector_lr": 0.0, "llm_lr": 0.0}
    trainer = {"strategy": strategy, "max_steps": 1, "callbacks": [{"class_path": "FinalCheckpoint"}]}
    assert fit(world, name, model, trainer) == 0
    after = load_checkpoint(world.folder / name / "checkpoints" / "final.ckpt", weights_only=True)
    assert set(after["state_dict"]) == set(before["state_dict"])
    for key, value in before["state_dict"].items():
        torch.testing.assert_close(after["state_dict"][key], value, rtol=0, atol=0, msg=key)


def test_a_decayed_folder_is_refused(world, stage1, capsys):
    model = {"init_from": str(stage1 / "final.ckpt"), "require_pre_decay": True}
    assert fit(world, "decayed", model, {"max_steps": 1}) == 2
    assert "has decayed" in capsys.readouterr().err


def test_a_selection_scores_with_the_folder(stage1, tmp_path):
    shards = save_speech_shards(tmp_path / "probe", num_samples=4)
    assert main(["consolidate", str(stage1 / "pre_decay.ckpt"), str(tmp_path / "whole.ckpt")]) == 0
    losses = []
    for path in (stage1 / "pre_decay.ckpt", tmp_path / "whole.ckpt"):
        settings = ScoreSettings(
            str(path), intelligibility=False, text_words=(1, 2), speech_words=(2, 4), accelerator="cpu"
        )
        check_score_settings(settings)
        losses.append(distillation_losses(settings, shards, tmp_path))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert all(loss.kl_sum > 0 for loss in losses[0].values())
    with pytest.raises(UserError, match="no such checkpoint"):
        check_score_settings(ScoreSettings(str(tmp_path), intelligibility=False))


def test_export_reads_the_folder(world, stage1, tmp_path):
    assert main(["export", str(stage1 / "final.ckpt"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "speech.safetensors").exists()


def test_going_on_under_another_strategy_is_refused(world, stage1, tmp_path, capsys):
    """Without a traceback, and by what helps: optimizer state is kept in other forms."""
    folder, whole, single = stage1 / "pre_decay.ckpt", tmp_path / "whole.ckpt", world.folder / "single" / "checkpoints"
    assert main(["consolidate", str(folder), str(whole)]) == 0
    assert fit(world, "single", trainer={"max_steps": 2, "callbacks": [{"class_path": "FinalCheckpoint"}]}) == 0
    for checkpoint, strategy in ((folder, "auto"), (whole, "auto"), (whole, SHARDED), (single / "final.ckpt", SHARDED)):
        capsys.readouterr()
        arguments = {"strategy": strategy, "max_steps": 8}
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump({"trainer": arguments}))
        options = [f"--config={overlay}", f"--ckpt_path={checkpoint}"]
        assert main(world.arguments("fit", "refused", *options)) == 2
        message = capsys.readouterr().err
        assert str(checkpoint) in message
        assert "model.init_from" in message, message
    overlay.write_text(yaml.safe_dump({"trainer": {"strategy": SHARDED, "limit_val_batches": 1}}))
    measured = [f"--config={overlay}", f"--ckpt_path={single / 'final.ckpt'}"]
    assert main(world.arguments("validate", "measured", *measured)) == 0


def test_another_connector_is_refused(world, stage1, capsys):
    model = {
        "connector": {"class_path": "MLPConnector", "init_args": {"stack": 4}},
        "init_from": str(stage1 / "final.ckpt"),
    }
    assert fit(world, "other", model) == 2
    message = capsys.readouterr().err
    assert "has another shape" in message
    assert "final.ckpt" in message


def test_a_folder_that_is_not_whole(world, stage1, tmp_path, capsys):
    broken = shutil.copytree(stage1 / "final.ckpt", tmp_path / "broken.ckpt")
    (broken / ".metadata").unlink()
    assert main(["consolidate", str(broken), str(tmp_path / "whole.ckpt")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not list(tmp_path.glob("whole*"))
    assert main(["consolidate", str(tmp_path), str(tmp_path / "whole.ckpt")]) == 2
    assert "not a sharded checkpoint" in capsys.readouterr().err


def test_the_file_is_not_written_over(stage1, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    assert main(["consolidate", str(stage1 / "final.ckpt"), str(tmp_path / "mine")]) == 2
    assert (tmp_path / "mine").read_text() == "mine"


def test_an_older_folder_goes_when_the_new_one_stands(stage1, tmp_path):
    final, aside = tmp_path / "last.ckpt", tmp_path / "last.ckpt.part"
    for step in ("first", "second"):
        shutil.copytree(stage1 / "final.ckpt", aside)
        (aside / "name").write_text(step)
        replace_folder(aside, final)
        assert (final / "name").read_text() == step
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert stored_shapes(final)


@pytest.mark.parametrize("name", ["last", "path"])
def test_a_run_killed_between_two_names_goes_on(world, stage1, name, capsys):
    """`replace_folder` has given the older folder another name, and not yet the newer one its own."""
    folder = world.folder / f"killed-{name}" / "checkpoints"
    shutil.copytree(stage1 / "pre_decay.ckpt", folder / "last.ckpt.old")
    shutil.copytree(stage1 / "final.ckpt", folder / "last.ckpt.part")
    path = "last" if name == "last" else str(folder / "last.ckpt")
    step = load_checkpoint(stage1 / "pre_decay.ckpt", weights_only=True)["global_step"]
    for option in (f"--ckpt_path={path}", f"--model.init_from={folder / 'last.ckpt'}"):  # not that run itself
        assert main(world.arguments("test", f"killed-{name}", option)) == 2
        assert f"give {folder / 'last.ckpt.old'}" in capsys.readouterr().err
    trainer = {"strategy": SHARDED, "max_steps": 6}
    assert fit(world, f"killed-{name}", {}, trainer, f"--ckpt_path={path}") == 0
    rows = TinyRun(folder.parent).metrics()
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(step, 6))


def test_bf16_is_refused_where_it_is_emulated():
    with pytest.raises(UserError, match="no bf16") as error:
        check_device(torch.bfloat16, torch.device("cuda", 0), has_bf16=False)
    assert error.value.where == "trainer.precision"
    check_device(torch.float32, torch.device("cuda", 0), has_bf16=False)
    check_device(torch.bfloat16, torch.device("cuda", 0), has_bf16=True)
    check_device(torch.bfloat16, torch.device("cpu"))
