"""The language model wrapper against Hugging Face's own, one document at a time."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from salad_lightning.errors import UserError
from salad_lightning.model.llm import (
    LanguageModel,
    build_language_model,
    load_config,
    load_language_model,
    load_tokenizer,
)
from salad_lightning.projection import logits
from salad_lightning.testing.tiny import save_tiny_llm, save_tiny_tokenizer

VOCAB = 50
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
# Every window is shorter than the documents below.
CONFIGS = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen2-tied": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "llama": LlamaConfig(**SMALL),
    "mistral-window": MistralConfig(**SMALL, sliding_window=4),
    "phi3-window": Phi3Config(**SMALL, sliding_window=4),
    "gemma2": Gemma2Config(
        **SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=3.0
    ),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "granite": GraniteConfig(**SMALL, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "cohere": CohereConfig(**SMALL, logit_scale=0.25),
}  # fmt: skip


def packed(lengths_by_row):
    """Ids, positions and documents of rows that hold documents of these lengths, padded by 3."""
    width = max(sum(lengths) for lengths in lengths_by_row) + 3
    ids, positions, owners = (torch.zeros(len(lengths_by_row), width, dtype=torch.long) for _ in range(3))
    owners -= 1
    documents = []
    for row, lengths in enumerate(lengths_by_row):
        start = 0
        for length in lengths:
            ids[row, start : start + length] = torch.randint(0, VOCAB, (length,))
            positions[row, start : start + length] = torch.arange(length)
            owners[row, start : start + length] = len(documents)
            documents.append((row, start, length))
            start += length
    return ids, positions, owners, documents


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_equal_hugging_face_one_by_one(name):
    model = build_language_model(CONFIGS[name], VOCAB).double().eval()
    ids, positions, owners, documents = packed([(7, 9, 3), (12, 1, 5)])
    every = torch.arange(ids.numel())
    ours = logits(model(positions, owners, every, input_ids_BS=ids)).view(*ids.shape, VOCAB)
    largest = 0.0
    for row, start, length in documents:
        expected = model.hf(input_ids=ids[row : row + 1, start : start + length], use_cache=False).logits[0]
        largest = max(largest, float(expected.detach().abs().max()))
        torch.testing.assert_close(ours[row, start : start + length], expected.float(), rtol=1e-4, atol=1e-5)
    assert largest > 0.1, "the model says nothing"
    model.check_against_hugging_face()


def test_embeddings_in_place_of_ids_give_the_same():
    model = build_language_model(CONFIGS["gemma3"], VOCAB).eval()
    ids, positions, owners, _ = packed([(5, 6)])
    at = torch.tensor([1, 4, 8])
    by_ids = model(positions, owners, at, input_ids_BS=ids)
    by_embeddings = model(positions, owners, at, embeddings_BSD=model.embed(ids))
    assert by_ids.hidden.shape == (3, 32)
    torch.testing.assert_close(by_ids.hidden, by_embeddings.hidden)


def test_rows_of_nothing_but_padding_stay_finite():
    model = build_language_model(CONFIGS["qwen2"], VOCAB)
    zeros = torch.zeros(2, 4, dtype=torch.long)
    prediction = model(zeros, zeros - 1, torch.zeros(0, dtype=torch.long), input_ids_BS=zeros)
    assert prediction.hidden.shape == (0, 32)
    prediction.hidden.sum().backward()
    gradients = [parameter.grad for parameter in model.hf.base_model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


class Loud(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_a_head_that_does_more_than_ours_is_refused():
    model = build_language_model(CONFIGS["llama"], VOCAB)
    changed = Loud(32, VOCAB, bias=False)
    changed.weight = model.hf.lm_head.weight
    model.hf.lm_head = changed
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits in a way that is not supported"):
        model.check_against_hugging_face()


class Leaking(LanguageModel):
    def _mask(self, document_ids_BS, position_ids_BS):
        return super()._mask(torch.zeros_like(document_ids_BS), position_ids_BS)


def test_a_model_that_mixes_documents_is_refused():
    model = build_language_model(CONFIGS["llama"], VOCAB)
    with pytest.raises(UserError, match="not supported"):
        Leaking(model.hf, VOCAB).check_against_hugging_face()


def test_rows_of_the_head_beyond_the_vocabulary_are_never_predicted():
    model = build_language_model(CONFIGS["qwen2"], VOCAB - 7)
    ids, positions, owners, _ = packed([(5,)])
    prediction = model(positions, owners, torch.arange(5), input_ids_BS=ids % (VOCAB - 7))
    assert logits(prediction).shape == (5, VOCAB - 7)
    model.check_against_hugging_face()


def test_sizes_and_blocks():
    model = build_language_model(CONFIGS["qwen2"], VOCAB)
    assert model.dim == 32
    assert len(model.blocks) == 3


# Loading


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("saved") / "llm")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "llm")


def resize(folder, rows):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))


def test_a_saved_model_comes_back(saved):
    config = load_config(str(saved))
    tokenizer = load_tokenizer(str(saved), config)
    model = load_language_model(str(saved), len(tokenizer))
    plain = AutoModelForCausalLM.from_pretrained(saved)
    for (name, ours), theirs in zip(model.hf.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert next(load_language_model(str(saved), len(tokenizer), torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("loader", [load_config, lambda path: load_language_model(path, 10)])
def test_a_missing_folder(loader, tmp_path):
    with pytest.raises(UserError, match="no such folder, nor a hub name") as raised:
        loader(str(tmp_path / "nowhere"))
    assert "HF_HUB_OFFLINE" in str(raised.value)


def test_a_folder_without_config(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no readable config.json.*\n.*it holds: notes.txt"):
        load_config(str(tmp_path))


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"does not hold weights of a language model.*\n.*config.json"):
        load_language_model(str(folder), 10)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b""])
def test_weights_that_are_no_weights(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"weights|language model"):
        load_language_model(str(folder), 10)


def test_weights_that_are_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_language_model(str(folder), 10)


def test_weights_that_lack_a_tensor(folder):
    config = json.loads((folder / "config.json").read_text())
    changed = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=r"lack \d+ tensors, model.layers.2"):
        load_language_model(str(folder), 10)


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UserError, match="mlp"):
        load_language_model(str(folder), 10)


def test_a_folder_without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(str(folder), load_config(str(folder)))


@pytest.mark.parametrize("rows", [250, 2000])
def test_a_tokenizer_of_another_model(folder, rows):
    resize(folder, rows)
    with pytest.raises(UserError, match=rf"different vocabularies: \d+ tokens, {rows} embedding rows"):
        load_tokenizer(str(folder), load_config(str(folder)))


def test_a_padded_vocabulary_is_accepted(folder):
    tokenizer = load_tokenizer(str(folder), load_config(str(folder)))
    resize(folder, len(tokenizer) + 20)
    assert len(load_tokenizer(str(folder), load_config(str(folder)))) == len(tokenizer)


def test_a_model_of_another_kind(tmp_path):
    """A learned absolute position, or blocks under another name: refused, or read right."""
    config = GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"})
    model = build_language_model(config, VOCAB)
    save_tiny_tokenizer(tmp_path)
    model.check_against_hugging_face()


def test_the_tokenizer_is_the_one_in_the_file(tmp_path):
    # transformers' AutoTokenizer would put Qwen2's pre-tokenizer in place of this one, because of config.json
    folder = save_tiny_llm(tmp_path / "llm")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "fox": 2, "<|endoftext|>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>").save_pretrained(folder)
    config = load_config(str(folder))
    config.vocab_size = 4
    assert load_tokenizer(str(folder), config)("the fox the")["input_ids"] == [1, 2, 1]
