"""The monitor measures what the model's own measure says, and leaves training as it was."""

from __future__ import annotations

import pytest
import torch

from salad_lightning.cli import main
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.data.stream import EvaluationStream
from salad_lightning.errors import UserError
from salad_lightning.evaluation.gap import measure
from salad_lightning.model.llm import load_language_model
from salad_lightning.model.speech_llm import predict_transcripts
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.training.from_checkpoint import module_of
from salad_lightning.training.misalignment_monitor import MisalignmentMonitor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = save_tiny_world(tmp_path_factory.mktemp("monitor"))
    for cluster in range(2):  # keys are the same in both, seeds are not
        save_speech_shards(
            world.folder / f"probe{cluster}", num_samples=3, samples_per_shard=3, seed=7 + cluster,
            fields={"cluster": cluster},
        )  # fmt: skip
    return world


def options(world, *extra):
    at = "--trainer.callbacks"
    monitor = [
        f"{at}+=MisalignmentMonitor",
        f"{at}.shards=[{world.folder}/probe0, {world.folder}/probe1]",
        f"{at}.documents=InterleaveDocuments",
        f"{at}.documents.text_words=[1, 2]",
        f"{at}.documents.speech_words=[2, 4]",
        f"{at}.every_n_steps=2",
    ]
    return [*monitor, *extra]


def test_curves_by_cluster_are_those_of_the_checkpoint(world):
    run = world.run("fit", "watched", "--trainer.max_steps=4", *options(world, "--trainer.callbacks+=FinalCheckpoint"))
    columns = {name for row in run.metrics() for name in row if name.startswith("probe/")}
    assert columns == {f"probe/{group}{name}" for group in ("", "0/", "1/") for name in ("misalignment", "kl")}
    logged = {name: run.column(name) for name in columns}
    assert {len(values) for values in logged.values()} == {2}  # after steps 2 and 4
    # Once more, from the weights at step 4, by a plain loop.
    path = run.folder / "checkpoints" / "final.ckpt"
    module = module_of(str(path), allow_decayed=True)
    module.configure_model()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"], strict=False)
    module.eval()
    teacher = load_language_model(str(world.folder / "llm"), len(module._tokenizer)).eval()
    for cluster in range(2):
        source = Source(str(world.folder / f"probe{cluster}"), InterleaveDocuments((1, 2), (2, 4)), name="probe")
        sums = {"misalignment": [0.0, 0], "kl": [0.0, 0]}
        for batch in EvaluationStream(source, module.sequence_spec(), rows_per_batch=1):
            with torch.no_grad():
                measured = measure(module.model, batch, predict_transcripts(teacher, batch))
            sums["kl"][0] += float(measured.kl_M.sum())
            sums["kl"][1] += len(measured.kl_M)
            sums["misalignment"][0] += float(measured.misalignment_M[measured.after_speech_M].sum())
            sums["misalignment"][1] += int(measured.after_speech_M.sum())
        for name, (total, count) in sums.items():
            assert logged[f"probe/{cluster}/{name}"][-1] == pytest.approx(total / count, rel=1e-3)


def test_training_is_the_same_with_and_without_it(world):
    watched = world.run("fit", "with", "--trainer.max_steps=5", *options(world, "--trainer.callbacks+=FinalCheckpoint"))
    alone = world.run("fit", "without", "--trainer.max_steps=5", "--trainer.callbacks+=FinalCheckpoint")
    ours, theirs = (run.checkpoint("final.ckpt")["state_dict"] for run in (watched, alone))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_under_accumulation_a_step_is_measured_once(world):
    run = world.run("fit", "accumulated", "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=3",
                    *options(world))  # fmt: skip
    assert len(run.column("probe/kl")) == 2


def test_mistakes(world, capsys):
    with pytest.raises(UserError, match="every_n_steps"):
        MisalignmentMonitor("x", InterleaveDocuments(), every_n_steps=0)
    missing = [option.replace("probe1", "nowhere") for option in options(world)]
    assert main(world.arguments("fit", "missing", *missing)) == 2
    assert "nowhere: the shard does not exist" in capsys.readouterr().err
