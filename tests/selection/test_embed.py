"""Embeddings against scikit-learn on everything at once, and against Hugging Face one text at a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.preprocessing import normalize
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from salad_lightning.errors import UserError
from salad_lightning.selection import embed as embed_module
from salad_lightning.selection.corpus import TextCorpus, read_corpus
from salad_lightning.selection.embed import embed
from salad_lightning.selection.settings import EmbedSettings, TextSettings
from salad_lightning.selection.transformer_embedding import pooling_of
from salad_lightning.testing.tiny import SENTENCES, save_tiny_tokenizer

TEXTS = [*SENTENCES, *(" ".join(s.split()[::-1]) for s in SENTENCES), "wind", "bread and apples " * 40, "a cat", "!?"]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "texts").mkdir()
    return read_corpus(TextSettings([str(tmp_path / "pool.jsonl")]), tmp_path / "texts")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "embed").mkdir()
    return tmp_path / "embed"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_tiny_tokenizer(folder)
    vocab_size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def read(vectors):
    return np.load(vectors.path)


def reference(encoder, pooling):
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"][:64]])
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_texts_by_number(corpus):
    assert len(corpus) == len(TEXTS)
    assert [corpus[i]["text"] for i in (3, 0, 11)] == [TEXTS[3], TEXTS[0], TEXTS[11]]
    assert corpus.texts(2, 99) == TEXTS[2:]
    assert TextCorpus(corpus.path.parent).num_bytes().sum() == corpus.path.stat().st_size


def test_tfidf(corpus, folder, monkeypatch):
    monkeypatch.setattr(embed_module, "_BLOCK", 5)
    ours = read(embed(corpus, EmbedSettings(dim=6), folder))
    counts = HashingVectorizer(n_features=1 << 18, alternate_sign=False, norm=None).transform(TEXTS)
    weights = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    theirs = normalize(TruncatedSVD(6, random_state=1).fit_transform(weights))
    # Directions of an SVD are free in sign: angles between texts are what counts.
    np.testing.assert_allclose(ours @ ours.T, theirs @ theirs.T, atol=1e-4)
    assert not ours[TEXTS.index("!?")].any()
    assert ours.dtype == np.float32


def test_tfidf_of_fewer_texts_than_dimensions(corpus, folder):
    assert embed(corpus, EmbedSettings(dim=512), folder).shape == (len(TEXTS), len(TEXTS) - 1)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_any_hugging_face_encoder(corpus, folder, encoder, pooling):
    settings = EmbedSettings(encoder=str(encoder), pooling=pooling, batch_size=3, accelerator="cpu")
    np.testing.assert_allclose(read(embed(corpus, settings, folder)), reference(encoder, pooling), atol=1e-5)


@pytest.mark.slow
def test_several_processes_share_the_texts(corpus, folder, encoder):
    settings = EmbedSettings(encoder=str(encoder), batch_size=2, accelerator="cpu", devices=2)
    np.testing.assert_allclose(read(embed(corpus, settings, folder)), reference(encoder, "mean"), atol=1e-5)


def test_a_killed_run_goes_on_with_the_rows_that_are_left(corpus, folder, encoder):
    settings = EmbedSettings(encoder=str(encoder), accelerator="cpu")
    embed(corpus, settings, folder)
    done, rows = np.load(folder / "done.npy"), np.load(folder / "embeddings.npy")
    done[4:] = False
    rows[:] = 7
    np.save(folder / "done.npy", done)
    np.save(folder / "embeddings.npy", rows)
    again = read(embed(corpus, settings, folder))
    assert (again[:4] == 7).all()
    np.testing.assert_allclose(again[4:], reference(encoder, "mean")[4:], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ],
)
def test_a_sentence_transformers_folder_says_how_it_pools(tmp_path, config, pooling):
    assert pooling_of(str(tmp_path)) == "mean"
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **config}))
    assert pooling_of(str(tmp_path)) == pooling


def test_pooling_that_is_not_supported(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    with pytest.raises(UserError, match="pooling_mode_lasttoken"):
        pooling_of(str(tmp_path))
