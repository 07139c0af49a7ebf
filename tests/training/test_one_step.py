"""The loss of one step against a plain Hugging Face computation that shares no code with ours."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from salad_lightning.batch import SpeechBatch
from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.format import Utterance
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate, pack
from salad_lightning.data.segments import Document
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.interfaces import TimedWord
from salad_lightning.objectives.forward_kl import ForwardKLObjective
from salad_lightning.objectives.mixture import MixtureObjective
from salad_lightning.objectives.nll import NLLObjective
from salad_lightning.testing.tiny import SENTENCES, save_tiny_llm
from salad_lightning.training.speech_llm_module import SpeechLLMModule

CONTEXT = 160


def utterances() -> list[Utterance]:
    rng = np.random.default_rng(0)
    made = []
    for number, text in enumerate(SENTENCES):
        words = text.split()
        step = 0.25
        timed = [TimedWord(word, i * step, (i + 1) * step) for i, word in enumerate(words)]
        audio = rng.normal(0, 0.1, int(step * len(words) * 16000)).astype(np.float32)
        made.append(Utterance(f"u{number}", "test", text, timed, audio))
    return [*made, Utterance("plain", "text", "only text here, and nothing to hear")]


@pytest.fixture
def module(tmp_path, request) -> SpeechLLMModule:
    student = save_tiny_llm(tmp_path / "student", seed=0)
    teacher = save_tiny_llm(tmp_path / "teacher", seed=1)  # another model, so that KL is far from 0
    torch.manual_seed(0)
    made = SpeechLLMModule(
        llm=str(student),
        teacher=str(teacher),
        encoder=LogMelEncoder(),
        connector=lambda *, encoder_dim, llm_dim: MLPConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, stack=8),
        objective=getattr(request, "param", ForwardKLObjective)(),
        context=CONTEXT,
    )
    made.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    made.configure_model()
    return made


def documents(module: SpeechLLMModule) -> list[Document]:
    builder = InterleaveDocuments(text_words=(2, 5), speech_words=(2, 5))
    spec = module.sequence_spec()
    return [document for u in utterances() for document in builder.build(u, spec, seed=3)]


def packed(module: SpeechLLMModule) -> SpeechBatch:
    rows = next(iter(pack(documents(module), CONTEXT, 8))).rows
    assert max(len(row) for row in rows) > 1, "the test wants several documents in a row"
    return collate(rows, context=CONTEXT, rows_per_batch=8)


def plain(module: SpeechLLMModule, tmp_path) -> dict[str, float]:
    """One document at a time, no packing, no masks, whole vocabularies, in float64."""
    student, teacher = (AutoModelForCausalLM.from_pretrained(tmp_path / n).double() for n in ("student", "teacher"))
    encoder, connector = module.model.encoder, module.model.connector
    nll = kl = count = 0.0
    for document in documents(module):
        ids = torch.tensor(document.token_ids)
        q = teacher(input_ids=ids[None]).logits[0].log_softmax(-1)
        pieces, tokens_of, at = [], [], 0
        for span in [*document.spans, None]:
            stop = len(ids) if span is None else span.start
            pieces.append(student.get_input_embeddings()(ids[at:stop]))
            tokens_of += list(range(at, stop))
            if span is not None:
                clip = torch.tensor(document.clips[span.clip])[None]
                frames = encoder(clip, torch.tensor([clip.shape[1]])).frames[:, :, 0]
                cut = frames[:, span.first_frame : span.first_frame + span.num_frames]
                speech = connector(cut, torch.tensor([span.num_frames])).embeddings[0]
                pieces.append(speech.double())
                tokens_of += [-1] * len(speech)
                at = span.stop
        p = student(inputs_embeds=torch.cat(pieces)[None]).logits[0].log_softmax(-1)
        for position in range(1, len(tokens_of)):
            token = tokens_of[position]
            if token >= 1:
                nll -= float(p[position - 1, ids[token]])
                kl += float((q[token - 1].exp() * (q[token - 1] - p[position - 1])).sum())
                count += 1
    return {"nll": nll, "kl": kl, "count": count}


@pytest.mark.parametrize(
    ("module", "alpha"),
    [(ForwardKLObjective, 1.0), (NLLObjective, 0.0), (lambda: MixtureObjective(alpha=0.25), 0.25)],
    indirect=["module"],
)
def test_loss_equals_plain_hugging_face(module, alpha, tmp_path):
    batch = packed(module)
    output = module.model(batch, module.objective, module.teach(batch))
    expected = plain(module, tmp_path)
    assert int(output.count) == expected["count"]
    reference = alpha * expected["kl"] + (1 - alpha) * expected["nll"]
    assert float(output.sum) == pytest.approx(reference, rel=1e-5)


def test_a_document_does_not_see_its_neighbour(module):
    batch = packed(module)
    first = batch.document_ids_BS[0] == batch.document_ids_BS[0, 0]
    before = module.model.predict(batch).hidden
    batch.input_ids_BS[0, first] = (batch.input_ids_BS[0, first] + 5) % 250
    after = module.model.predict(batch).hidden
    changed = (before != after).any(-1)
    own = batch.predict_document_M == batch.document_ids_BS[0, 0]
    assert changed[own].any()
    assert not changed[~own].any()


def test_without_audio_the_connector_still_gets_a_zero_gradient(module):
    builder = InterleaveDocuments()
    rows = [builder.build(utterances()[-1], module.sequence_spec())]
    batch = collate(rows, context=CONTEXT, rows_per_batch=1)
    assert batch.span_at_K.numel() == 0
    module.model(batch, module.objective, module.teach(batch)).sum.backward()
    for name, parameter in module.model.connector.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
