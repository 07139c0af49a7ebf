"""Rollouts against the plain batch, and runs of the command line in one process and in two."""

from __future__ import annotations

import pytest
import torch
from salad_on_policy.module import OnPolicyModule
from salad_on_policy.rollout import Prompts, sample

from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate, pack
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError
from salad_lightning.objectives.nll import NLLObjective
from salad_lightning.objectives.reverse_kl import ReverseKLObjective
from salad_lightning.projection import logits
from salad_lightning.testing.ranks import finish_ranks, start_ranks
from salad_lightning.testing.runs import TinyRun, save_tiny_world

CONTEXT, TOKENS, ROWS = 128, 6, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("on-policy"))


def build(world, **settings):
    def connector(*, encoder_dim, llm_dim):
        return MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=8, hidden_dim=16, output_scale=0.3)

    defaults = {"rollout_tokens": TOKENS, "rollouts_per_batch": ROWS, "objective": ReverseKLObjective()}
    parts = {"llm": str(world.folder / "llm"), "encoder": LogMelEncoder(), "connector": connector, "context": CONTEXT}
    return OnPolicyModule(**defaults | parts | settings)


@pytest.fixture(scope="module")
def module(world):
    torch.manual_seed(0)
    module = build(world, temperature=1e-4)  # draws the most probable token
    module.configure_model()
    return module


def batch_of(module, folder, builder, rows=4):
    spec = module.sequence_spec()
    documents = [
        document
        for shard in sorted(folder.glob("*.tar"))
        for raw in read_shard(shard)
        for document in builder.build(decode(raw, source="x", sample_rate_hz=spec.sample_rate_hz), spec)
    ]
    packed = next(iter(pack(documents, CONTEXT, rows)))
    return collate(packed.rows, context=CONTEXT, rows_per_batch=rows)


@pytest.fixture(scope="module")
def batch(module, world):
    return batch_of(module, world.folder / "speech", InterleaveDocuments(text_words=(2, 4), speech_words=(2, 5)))


def test_prompts_end_where_the_last_speech_has_been_heard(module, batch):
    prompts = Prompts.of(batch, ROWS, TOKENS, CONTEXT)
    assert prompts.real_P.all()
    rows, chosen = prompts.batch, {info.key for info in prompts.batch.documents}
    assert len(chosen) == ROWS
    ends = rows.span_at_K + rows.span_num_positions_K
    for row in range(ROWS):
        width = rows.input_ids_BS.shape[1]
        inside = (rows.span_at_K // width) == row
        assert int(ends[inside].max()) - row * width == prompts.student_length_P[row]
        # The teacher has read just what was said: all tokens up to the span's last.
        last = (rows.span_token_at_K + rows.span_num_tokens_K)[inside].max()
        assert int(last) - row * rows.teacher_input_ids_RU.shape[1] == prompts.teacher_length_P[row]
    # Spans sound as they did, from fewer clips.
    number = {info.key: at for at, info in enumerate(batch.documents)}
    owners = batch.document_ids_BS.flatten()[batch.span_at_K].tolist()
    wanted = [span for info in rows.documents for span, o in enumerate(owners) if o == number[info.key]]
    expected, found = module.model.embed_speech(batch), module.model.embed_speech(rows)
    assert torch.equal(found.lengths, expected.lengths[wanted])
    widest = found.embeddings.shape[1]
    torch.testing.assert_close(found.embeddings, expected.embeddings[wanted][:, :widest], rtol=0, atol=1e-5)
    assert rows.clips_NL.shape[0] < batch.clips_NL.shape[0]
    assert 0 < rows.audio_seconds < batch.audio_seconds


def test_the_drawn_tokens_are_those_of_a_plain_forward_pass(module, batch):
    """Drawn at a temperature near 0, with cache and padding: every one is the most probable where it is predicted."""
    rolled = module.rollout(batch)
    with torch.no_grad():
        best = logits(module.model.predict(rolled)).argmax(-1)
    assert torch.equal(best, rolled.labels_M)
    assert len(set(rolled.labels_M.tolist())) > 3


def test_student_and_teacher_read_the_same_continuation(module, batch):
    rolled = module.rollout(batch)
    assert 0 < rolled.num_predicted <= ROWS * TOKENS
    for ids, owners, at in (
        (rolled.input_ids_BS, rolled.document_ids_BS, rolled.predict_at_M),
        (rolled.teacher_input_ids_RU, rolled.teacher_document_ids_RU, rolled.teacher_predict_at_M),
    ):
        assert torch.equal(ids.flatten()[at + 1], rolled.labels_M)
        assert torch.equal(owners.flatten()[at], rolled.predict_document_M)
    # The teacher's row begins with the document's own transcript.
    first = [info.key for info in batch.documents].index(rolled.documents[0].key)
    read = rolled.teacher_input_ids_RU[0][rolled.teacher_document_ids_RU[0] == 0].tolist()[:-TOKENS]
    assert read
    assert batch.teacher_input_ids_RU[batch.teacher_document_ids_RU == first].tolist()[: len(read)] == read


def test_an_answer_is_where_the_student_takes_over(module, world):
    template = TemplateDocuments("hear {speech} and say {answer}")
    batch = batch_of(module, world.folder / "choice", template)
    prompts = Prompts.of(batch, ROWS, TOKENS, CONTEXT)
    tokenizer = module.sequence_spec().tokenizer
    for row, length in enumerate(prompts.teacher_length_P.tolist()):
        assert tokenizer.decode(prompts.batch.teacher_input_ids_RU[row, :length]).strip().endswith("and say")


def test_nothing_counts_after_the_end(module, batch):
    prompts = Prompts.of(batch, ROWS, TOKENS, CONTEXT)
    tokens = torch.arange(1, TOKENS + 1).expand(ROWS, -1).clone()
    tokens[0, 2] = tokens[0, 4] = 99
    rolled = prompts.continued(tokens, eos=99)
    assert rolled.labels_M.tolist() == [1, 2, 99] + [1, 2, 3, 4, 5, 6] * (ROWS - 1)
    assert torch.bincount(rolled.predict_document_M).tolist() == [3] + [TOKENS] * (ROWS - 1)


def test_as_many_rows_and_tokens_where_there_is_no_speech(module, world):
    batch = batch_of(module, world.folder / "text", InterleaveDocuments())
    prompts = Prompts.of(batch, ROWS, TOKENS, CONTEXT)
    assert not prompts.real_P.any()
    tokens = sample(module.model, prompts.batch, TOKENS, 1.0)
    assert tokens.shape == (ROWS, TOKENS)
    rolled = module.rollout(batch)
    assert rolled.num_predicted == 0
    output = module.model(rolled, NLLObjective(), None)
    assert output.sum.item() == 0
    output.sum.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in module.model.parameters())
    module.zero_grad()


def test_draws_follow_the_students_distribution(module, batch):
    """The first token of one prompt, drawn 120 times, against the softmax of a plain forward pass."""
    prompts = Prompts.of(batch, 1, 1, CONTEXT)
    with torch.no_grad():
        probabilities = logits(module.model.predict(prompts.continued(torch.zeros(1, 1, dtype=torch.long), None)))
        expected = (probabilities.double() / 2.0).softmax(-1)[0]
        drawn = torch.stack([sample(module.model, prompts.batch, 1, 2.0)[0, 0] for _ in range(120)])
    likely = expected.topk(2).indices
    shares = torch.stack([(drawn == token).double().mean() for token in likely])
    spread = (expected[likely] * (1 - expected[likely]) / 120).sqrt()
    assert ((shares - expected[likely]).abs() < 4 * spread).all()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rollout_tokens": 0}, "rollout_tokens is 0"),
        ({"rollout_tokens": CONTEXT}, "no room"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"objective": NLLObjective()}, "NLLObjective does not ask the teacher"),
    ],
)
def test_values_out_of_range(world, settings, word):
    with pytest.raises(UserError, match=word):
        build(world, **settings)


OPTIONS = [
    "--model=OnPolicyModule",
    "--model.rollout_tokens=8",
    "--model.rollouts_per_batch=4",
    "--model.objective=ReverseKLObjective",
    "--model.llm_lr=3e-3",
    "--model.connector_lr=3e-3",
]


@pytest.mark.slow
def test_fifty_steps_of_a_recipe(world):
    run = world.run("fit", "run", *OPTIONS, "--trainer.max_steps=50", "--trainer.callbacks+=FinalCheckpoint")
    loss = run.column("train/loss")
    assert len(loss) == 50
    assert sum(loss[-10:]) < 0.7 * sum(loss[:10])
    assert run.checkpoint("final.ckpt")["hyper_parameters"]["rollout_tokens"] == 8


@pytest.mark.slow
def test_two_sharded_ranks_stay_in_step(world):
    """One reads speech, the other may have none in its batch; the models are whole only inside the draw."""
    overlay = world.folder / "sharded.yaml"
    overlay.write_text("trainer: {strategy: {class_path: salad_lightning.model.parallel.FullyShardedStrategy}}")
    options = [*OPTIONS, f"--config={overlay}", "--trainer.devices=2", "--trainer.max_steps=4"]
    arguments = world.arguments("fit", "two", *options, "--data.rows_per_batch=1")
    finish_ranks(world.folder, start_ranks(world.folder, 2, "-m", "salad_lightning", *arguments))
    losses = TinyRun(world.folder / "two").column("train/loss")
    assert len(losses) == 4
    assert all(value >= 0 for value in losses)
