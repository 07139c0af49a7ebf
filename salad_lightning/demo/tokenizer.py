"""The miniature's tokenizer: BPE that never merges beyond a syllable."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from salad_lightning.demo.world import SYLLABLE_PATTERN

__all__ = ["train_tokenizer"]

_PRINTABLE = [chr(code) for code in range(33, 127)]


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """Train on texts and save for Hugging Face's ``AutoTokenizer``.

    Words are split at syllables before BPE sees them, as large tokenizers split numbers at digits: a name is a few
    tokens that other names share, whatever its frequency.

    Args:
        texts: The text corpus.
        folder: Where to save; made where missing.
        vocab_size: Upper bound.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Split(Regex(SYLLABLE_PATTERN), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<unk>", "<eos>"],
        initial_alphabet=[*_PRINTABLE, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>", model_max_length=2048
    )
    fast.save_pretrained(str(folder))
    return fast
