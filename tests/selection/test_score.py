"""Means, errors and shrinkage against resampling and simulation; losses and error rates against the plain loop."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from salad_lightning.data.audio import encode_flac
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source
from salad_lightning.data.stream import EvaluationStream
from salad_lightning.errors import UserError
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.model.execution import Execution
from salad_lightning.model.llm import load_language_model
from salad_lightning.model.speech_llm import predict_transcripts
from salad_lightning.selection.intelligibility import character_error_rates
from salad_lightning.selection.score import Probe, cluster_score, mean_and_error, shrink
from salad_lightning.selection.settings import ScoreSettings
from salad_lightning.selection.stage1 import TextLoss, distillation_losses
from salad_lightning.testing.shards import save_speech_shards, speak_tones
from salad_lightning.training.from_checkpoint import module_of
from salad_lightning.training.handover import check_not_decayed


def test_the_error_is_that_of_resampled_texts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 60, 80)
    losses = [TextLoss(float(n * rng.gamma(2, 0.5)), int(n)) for n in tokens]
    mean, error = mean_and_error(losses)
    sums = np.array([loss.kl_sum for loss in losses])
    assert mean == pytest.approx(sums.sum() / tokens.sum())
    picks = rng.integers(0, 80, (4000, 80))
    assert error == pytest.approx((sums[picks].sum(1) / tokens[picks].sum(1)).std(), rel=0.1)


def test_one_text_has_no_error_of_its_own():
    assert mean_and_error([TextLoss(6.0, 3)]) == (2.0, math.inf)


def test_shrinkage_by_hand():
    means, errors = [1.0, 2.0, 3.0], [0.5, 0.5, 0.5]
    between = 1.0 - 0.25
    keep = between / (between + 0.25)
    np.testing.assert_allclose(shrink(means, errors), [2 - keep, 2, 2 + keep])


def test_badly_measured_clusters_move_to_the_mean_and_well_measured_ones_stay():
    values = shrink([1.0, 5.0, 3.0, 9.0], [0.01, 0.01, 0.01, math.inf])
    np.testing.assert_allclose(values[:3], [1, 5, 3], atol=0.01)
    assert values[3] == pytest.approx(3.0, abs=0.01)


def test_differences_that_are_all_noise_vanish():
    np.testing.assert_allclose(shrink([1.0, 1.1, 0.9], [0.5, 0.5, 0.5]), [1, 1, 1], atol=1e-9)
    np.testing.assert_allclose(shrink([2.0, 2.0], [0.0, 0.0]), [2, 2])
    np.testing.assert_allclose(shrink([2.0], [0.3]), [2])


def test_shrinking_halves_the_error_where_noise_is_as_large_as_the_differences():
    rng = np.random.default_rng(1)
    raw = shrunk = 0.0
    for _ in range(200):
        truth = rng.normal(3, 0.5, 30)
        errors = rng.uniform(0.2, 1.2, 30)
        measured = rng.normal(truth, errors)
        raw += ((measured - truth) ** 2).mean()
        shrunk += ((np.array(shrink(measured.tolist(), errors.tolist())) - truth) ** 2).mean()
    assert shrunk < 0.45 * raw


def probes(count, cluster=0):
    return [Probe(f"k{i}", cluster, "some words", 2.0) for i in range(count)]


LIMITS = ScoreSettings("unused", max_cluster_cer=0.15, max_text_cer=0.5)


def test_texts_and_clusters_that_are_not_understood():
    losses = {f"k{i}": TextLoss(float(i), 1) for i in range(10)}
    dropped = []
    fine = cluster_score(0, probes(10), losses, {f"k{i}": 0.9 if i == 9 else 0.0 for i in range(10)}, LIMITS, dropped)
    assert not fine.dropped
    assert fine.cer == pytest.approx(0.09)
    assert fine.num_texts == 9
    assert fine.raw == pytest.approx(4.0)  # without the ninth
    assert fine.chars_per_second == 5.0
    assert [(row["key"], row["reason"]) for row in dropped] == [("k9", "character error rate 0.90")]
    broken = cluster_score(1, probes(10, 1), losses, {f"k{i}": 0.2 for i in range(10)}, LIMITS, [])
    assert broken.dropped == "character error rate 0.20"
    assert cluster_score(1, probes(10, 1), losses, None, LIMITS, []).dropped == ""
    assert cluster_score(2, [], losses, None, LIMITS, []).dropped == "no text of it could be spoken"


def test_a_rate_above_one_counts_as_one():
    losses = {f"k{i}": TextLoss(1.0, 1) for i in range(10)}
    entry = cluster_score(0, probes(10), losses, {f"k{i}": 7.0 if i == 0 else 0.0 for i in range(10)}, LIMITS, [])
    assert entry.cer == pytest.approx(0.1)


def test_texts_without_a_token_to_predict_are_listed():
    dropped = []
    losses = {"k0": TextLoss(0.0, 0), "k1": TextLoss(2.0, 2)}
    assert cluster_score(0, probes(2), losses, None, LIMITS, dropped).num_texts == 1
    assert dropped[0]["reason"] == "too short to be heard and predicted"


@pytest.mark.slow
def test_losses_are_those_of_a_plain_loop_in_float64(stage1, tmp_path):
    shards = save_speech_shards(tmp_path / "probe", num_samples=7)
    settings = ScoreSettings(
        str(stage1 / "pre_decay.ckpt"), text_words=(1, 2), speech_words=(2, 4), rows_per_batch=2, accelerator="cpu"
    )
    ours = distillation_losses(settings, shards, tmp_path)
    module = module_of(settings.checkpoint)
    module.configure_model()
    weights = torch.load(settings.checkpoint, weights_only=True)["state_dict"]
    assert set(weights) <= set(module.state_dict())
    module.load_state_dict(weights, strict=False)
    module.eval()
    teacher = load_language_model(module.hparams["llm"], len(module._tokenizer)).eval()
    source = Source(str(shards), InterleaveDocuments((1, 2), (2, 4)), name="probe")
    seen = 0
    for batch in EvaluationStream(source, module.sequence_spec(), rows_per_batch=1):
        with torch.no_grad():
            q, p = (
                torch.log_softmax((prediction.hidden @ prediction.head.weight.T).double(), -1)
                for prediction in (predict_transcripts(teacher, batch), module.model.predict(batch))
            )
        kl_M = (q.exp() * (q - p)).sum(-1)
        for number, info in enumerate(batch.documents):
            first = min(batch.span_at_K[batch.document_ids_BS.flatten()[batch.span_at_K] == number].tolist())
            heard_M = (batch.predict_document_M == number) & (batch.predict_at_M >= first)
            assert ours[info.key].num_tokens == int(heard_M.sum()) > 0
            assert ours[info.key].kl_sum == pytest.approx(float(kl_M[heard_M].sum()), rel=1e-4)
            seen += 1
    assert seen == len(ours) == 7


def test_a_rate_that_is_still_warming_up_has_not_decayed():
    group = {"lr": 1e-4, "initial_lr": 1e-3}
    checkpoint = {
        "global_step": 50,
        "hyper_parameters": {"schedule": {"warmup_steps": 100}},
        "optimizer_states": [{"param_groups": [group]}],
    }
    check_not_decayed(checkpoint, "x.ckpt")
    with pytest.raises(UserError, match=r"decayed to 0\.0001 of 0\.001"):
        check_not_decayed({**checkpoint, "global_step": 200}, "x.ckpt")


@pytest.mark.slow
def test_how_it_was_trained_on_a_gpu_does_not_matter(stage1, tmp_path):
    checkpoint = torch.load(stage1 / "pre_decay.ckpt", weights_only=True)
    execution = checkpoint["hyper_parameters"]["execution"] = {"attention": "flex", "compile": True}
    torch.save(checkpoint, tmp_path / "flex.ckpt")
    module = module_of(str(tmp_path / "flex.ckpt"))
    assert module._execution == Execution() != Execution(**execution)
    module._execution.check(torch.device("cpu"))


def test_another_kind_of_checkpoint(tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": {"llm": "x"}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of a speech LLM"):
        module_of(str(tmp_path / "x.ckpt"))


@pytest.mark.slow
def test_error_rates_of_a_recognizer(recognizer, tmp_path):
    """What was said, something else, and noise."""
    said = "tree cloud horn grass bird pond"
    audio, _ = speak_tones(said, seed=1)
    noise = 0.2 * np.random.default_rng(0).standard_normal(len(audio)).clip(-1, 1).astype(np.float32)
    with ShardWriter(tmp_path, "probe") as writer:
        writer.write("right", {"text": "Tree, cloud; horn: grass - bird. Pond!"}, encode_flac(audio, 16_000))
        writer.write("wrong", {"text": "sand " * 6}, encode_flac(audio, 16_000))
        writer.write("noise", {"text": said}, encode_flac(noise.astype(np.float32), 16_000))
    rates = character_error_rates(sorted(tmp_path.glob("*.tar")), Recognizer(str(recognizer)))
    assert rates["right"] < 0.1
    assert rates["wrong"] > 0.5
    assert rates["noise"] > 0.5


def test_a_folder_that_is_no_recognizer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2"}))
    with pytest.raises(UserError, match=r"score\.recognizer"):
        Recognizer(str(tmp_path), where="score.recognizer")
