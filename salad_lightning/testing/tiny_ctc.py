"""A small speech recognizer for the tones of `speak_tones`: a Hugging Face CTC folder, trained in seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from salad_lightning.testing.shards import speak_tones

__all__ = ["save_tiny_ctc"]

_RATE_HZ, _FRAME_RATE_HZ = 16_000, 50


def save_tiny_ctc(folder: Path, words: Sequence[str], *, steps: int = 150, seed: int = 0) -> Path:
    """Train a wav2vec 2.0 of one layer to write down spoken tones, and save it with its tokenizer.

    Args:
        folder: Where to; made if missing.
        words: All it can write, a token each.
        steps: Of 4 clips.
        seed: Of weights and clips.

    Returns:
        ``folder``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: index for index, token in enumerate(["<pad>", "|", "<unk>", *words])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer: Any = Wav2Vec2CTCTokenizer(folder / "vocab.json")  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(folder)
    extractor: Any = Wav2Vec2FeatureExtractor(sampling_rate=_RATE_HZ)  # type: ignore[no-untyped-call]
    extractor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Wav2Vec2ForCTC(_config(len(vocab)))
        _train(model, words, vocab, steps, random.Random(seed))
    model.save_pretrained(folder)
    return folder


def _config(vocab_size: int) -> Wav2Vec2Config:
    return Wav2Vec2Config(
        vocab_size=vocab_size,
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=96,
        # A filter bank long enough to tell tones apart, then down to 50 frames a second.
        conv_dim=(64, 48),
        conv_kernel=(400, 4),
        conv_stride=(80, 4),
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=0,
    )


def _train(model: Wav2Vec2ForCTC, words: Sequence[str], vocab: dict[str, int], steps: int, rng: random.Random) -> None:
    """By cross-entropy on frames, whose words are known here: the CTC loss takes many times the steps to align."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for step in range(steps):
        said = [" ".join(rng.choices(words, k=8)) for _ in range(4)]
        clips = [speak_tones(text, seed=4 * step + i) for i, text in enumerate(said)]
        length = min(len(audio) for audio, _ in clips)
        audio_NL = torch.stack([torch.from_numpy(audio[:length]) for audio, _ in clips])
        audio_NL = (audio_NL - audio_NL.mean(1, keepdim=True)) / audio_NL.std(1, keepdim=True)  # as the extractor does
        logits_NTV = model(audio_NL).logits
        targets_NT = torch.zeros(logits_NTV.shape[:2], dtype=torch.long)
        for row, (_, timed) in enumerate(clips):
            for word, start_s, end_s in timed:
                first, last = round(start_s * _FRAME_RATE_HZ), round(end_s * _FRAME_RATE_HZ) - 1
                targets_NT[row, first:last] = vocab[word]
                targets_NT[row, last : last + 1] = vocab["|"]
        loss = torch.nn.functional.cross_entropy(logits_NTV.transpose(1, 2), targets_NT)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    model.train(False)
