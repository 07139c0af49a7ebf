"""A connector whose lengths are bounded beforehand gives what one of exactly these lengths gives."""

from __future__ import annotations

import pytest
import torch

from salad_lightning.connectors.conv import ConvConnector
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate, pack
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.interfaces import Connector, ConnectorOutput
from salad_lightning.model.generation import Decoding, generate, prompt_document
from salad_lightning.model.llm import load_config, load_language_model, load_tokenizer
from salad_lightning.model.small import small_qwen2
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.testing.tiny import save_tiny_llm


class Bounded(Connector):
    """Another connector, of which only an upper bound of the lengths is announced."""

    exact = False

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def output_lengths(self, lengths, *, num_words=None):
        return self.inner.output_lengths(lengths) + 3 + lengths % 4

    def forward(self, frames_NTD, lengths_N, *, num_words_N=None):
        embeddings, lengths, _ = self.inner(frames_NTD, lengths_N)
        return ConnectorOutput(embeddings, lengths, {})


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "switch"])
def pair(request, tmp_path_factory):
    """For either connector: the model and how its data is laid out."""
    folder = tmp_path_factory.mktemp("bounded")
    save_speech_shards(folder / "speech", num_samples=6)
    save_tiny_llm(folder / "llm", config=small_qwen2(32, 2, initializer_range=0.3))
    tokenizer = load_tokenizer(str(folder / "llm"), load_config(str(folder / "llm")))
    torch.manual_seed(0)
    encoder, exact = LogMelEncoder(), None
    models = []
    for wrap in (lambda inner: inner, Bounded):
        llm = load_language_model(str(folder / "llm"), len(tokenizer))
        exact = exact or ConvConnector(encoder_dim=encoder.output_dim, llm_dim=llm.dim, output_scale=0.5)
        connector = wrap(exact)
        model = SpeechLLM(llm=llm, encoder=encoder, connector=connector, switch_embeddings=request.param).eval()
        if models:
            model.switch = models[0][0].switch
        settings = {"encoder": encoder, "connector": connector, "switch_embeddings": request.param, "identity": ""}
        models.append((model, SequenceSpec.of_parts(tokenizer, 256, **settings)))
    utterances = [
        decode(raw, source="speech", sample_rate_hz=encoder.sample_rate_hz)
        for shard in sorted((folder / "speech").glob("*.tar"))
        for raw in read_shard(shard)
    ]
    return models, utterances


def batch(spec, utterances):
    builder = InterleaveDocuments(text_words=(0, 3), speech_words=(1, 3))  # some spans meet
    documents = [document for utterance in utterances for document in builder.build(utterance, spec)]
    rows = list(pack(documents, spec.context, 8))
    return collate(rows[0].rows, context=spec.context, rows_per_batch=8)


def by_token(model, batch):
    """Hidden state of every predicted token by document and order: rows are packed differently."""
    hidden = model.predict(batch).hidden
    return {info.key: hidden[batch.predict_document_M == number] for number, info in enumerate(batch.documents)}


@torch.no_grad()
def test_predictions_are_those_of_exact_lengths(pair):
    ((exact, exact_spec), (bounded, spec)), utterances = pair
    expected = by_token(exact, batch(exact_spec, utterances))
    wide = batch(spec, utterances)
    assert wide.num_positions > batch(exact_spec, utterances).num_positions + 30
    found = by_token(bounded, wide)
    assert set(found) == set(expected)
    for key, hidden in expected.items():
        torch.testing.assert_close(found[key], hidden, rtol=0, atol=1e-4)


@torch.no_grad()
def test_positions_count_what_is_there(pair):
    (_, (bounded, spec)), utterances = pair
    wide = batch(spec, utterances)
    spliced = bounded.splice(wide)
    for number in range(len(wide.documents)):
        positions = spliced.position_ids_BS[spliced.document_ids_BS == number].tolist()
        assert positions == list(range(len(positions)))
    left_out = int((wide.document_ids_BS >= 0).sum() - (spliced.document_ids_BS >= 0).sum())
    lengths = bounded.embed_speech(wide).lengths
    edges = 0 if bounded.switch is None else 2
    assert left_out == int((wide.span_num_positions_K - lengths - edges).sum()) > 0


def test_generation_is_that_of_exact_lengths(pair):
    models, utterances = pair
    texts = []
    for model, spec in models:
        prompts = [prompt_document("so {speech} then", one, spec, max_new_tokens=6) for one in utterances[:3]]
        texts.append(generate(model, prompts, Decoding(max_new_tokens=6), tokenizer=spec.tokenizer))
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) > 1
