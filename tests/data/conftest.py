"""Tokenizers and specs that the data tests share."""

import math

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from salad_lightning.data.spec import SequenceSpec
from salad_lightning.testing.tiny import SENTENCES, save_tiny_tokenizer

RATE = 16_000


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """GPT-2's and Qwen's kind: byte-level, no BOS."""
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    save_tiny_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="session")
def bos_tokenizer():
    """Llama's kind: Metaspace, a BOS by template."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*SENTENCES, "ABCDEFGHIJKLMNOPQRSTUVWXYZ.?:,!"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_spec(byte_tokenizer):
    """Specs of an encoder with 80 ms frames and a connector that halves them, one switch embedding on either side."""

    def make(context=128, causal=True, tokenizer=byte_tokenizer, frame_rate=12.5):
        hop = round(RATE / frame_rate)

        def frame_span(start_s, end_s):
            last = int(end_s * frame_rate + 1e-3)
            return min(int(start_s * frame_rate + 1e-3), last), last

        return SequenceSpec(
            tokenizer=tokenizer,
            context=context,
            sample_rate_hz=RATE,
            causal=causal,
            num_frames=lambda samples: math.ceil(samples / hop),
            frame_span=frame_span,
            num_positions=lambda frames, words: math.ceil(frames / 2) + 2,
        )

    return make
