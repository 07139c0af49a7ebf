"""Training the recognizer of the selection's filter: a small wav2vec 2.0-BERT, independent of the scored model."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2BertConfig, Wav2Vec2BertForCTC, Wav2Vec2CTCTokenizer

from salad_lightning.data.audio import resample
from salad_lightning.demo.speech import SAMPLE_RATE_HZ, draw_voice
from salad_lightning.demo.world import SYLLABLE_PATTERN, World
from salad_lightning.synthesizers.espeak import EspeakSynthesizer

__all__ = ["train_recognizer"]

_FRAME_RATE_HZ = 50  # of the feature extractor: pairs of mel frames
_CHUNK = 100  # frames of a training clip
_SYLLABLE = re.compile(SYLLABLE_PATTERN)
_BLANK, _GAP, _UNKNOWN = "<pad>", "|", "<unk>"

_Timed = Sequence[tuple[str, float, float]]


def train_recognizer(
    folder: str | Path, world: World, *, seed: int = 0, num_clips: int = 1500, steps: int = 1000, batch_size: int = 24
) -> dict[str, float]:
    """Train on the world's words in random order, and made-up names, to write consonants, vowels and whole words.

    Like a recognizer from elsewhere, it knows the language, all of its words alike, and no sentence of the world.
    First by cross-entropy on frames, for words are timed and the sounds of a name share its time equally: by itself
    the CTC loss takes many times the steps to align. Then by CTC, which writes each token once.

    Args:
        folder: Where to; made where missing.
        world: Whose words it is to know.
        seed: Of speech, weights and order.
        num_clips: Strings of words, about 4 s each.
        steps: Optimiser steps, half of them on frames.
        batch_size: Clips of 2 s in a step on frames, and half as many whole clips in one by CTC.

    Returns:
        ``frame_accuracy`` after the first half, ``ctc_loss`` at the end and ``seconds`` it took.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    rng = random.Random(seed)
    extractor: Any = SeamlessM4TFeatureExtractor()  # type: ignore[no-untyped-call]
    words = sorted(word for word in world.words() if len(_tokens(word)) == 1)
    vocab = {token: index for index, token in enumerate([_BLANK, _GAP, _UNKNOWN, *words, *_sounds(world)])}
    clips = [_clip(words, world.syllables, extractor, vocab, rng) for _ in range(num_clips)]
    model = Wav2Vec2BertForCTC(_config(len(vocab)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    accuracy, ctc = 0.0, 0.0
    for step in range(steps):
        if step < steps // 2:
            features_NTD, targets_NT = _batch(rng.choices(clips, k=batch_size), rng)
            logits_NTV = model(input_features=features_NTD).logits
            loss = F.cross_entropy(logits_NTV.flatten(0, 1), targets_NT.flatten())
            accuracy = 0.95 * accuracy + 0.05 * float((logits_NTV.detach().argmax(-1) == targets_NT).float().mean())
        else:
            loss = _ctc_loss(model, rng.choices(clips, k=batch_size // 2))
            ctc = float(loss.detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.train(False)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    tokenizer: Any = Wav2Vec2CTCTokenizer(folder / "vocab.json")  # type: ignore[no-untyped-call]
    for part in (tokenizer, extractor, model):
        part.save_pretrained(folder)
    return {"frame_accuracy": accuracy, "ctc_loss": ctc, "seconds": time.perf_counter() - begin}


def _sounds(world: World) -> list[str]:
    """Consonants and vowels of the world's names."""
    return sorted({part for kind in world.syllables for name in kind for part in (name[:-2], name[-2:])})


def _tokens(unit: str) -> list[str]:
    """What is written for a timed unit: names by consonant and vowel, other words as a whole."""
    tokens: list[str] = []
    for word in re.findall(r"[a-z]+", unit.lower()):
        syllables = _SYLLABLE.findall(word)
        if "".join(syllables) == word and len(syllables) > 1:
            tokens += [piece for syllable in syllables for piece in (syllable[:-2], syllable[-2:])]
        else:
            tokens.append(word)
        tokens.append(_GAP)
    return tokens[:-1]


def _clip(
    words: Sequence[str],
    syllables: Sequence[Sequence[str]],
    extractor: Any,
    vocab: dict[str, int],
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """``[T, D]`` features and ``[T]`` tokens of names and other words, half and half, in one of the training voices."""
    first, inner = syllables
    said = [
        rng.choice(words) if rng.random() < 0.5 else rng.choice(first) + rng.choice(inner)
        for _ in range(rng.randint(6, 9))
    ]
    setting = draw_voice("train", rng)
    synthesizer = EspeakSynthesizer(setting.voice, setting.rate_wpm, setting.pitch)
    speech = synthesizer.speak(" ".join(said) + ".")
    audio = resample(speech.audio, synthesizer.sample_rate_hz, SAMPLE_RATE_HZ)
    features_TD = extractor(audio, sampling_rate=SAMPLE_RATE_HZ, return_tensors="pt")["input_features"][0]
    targets_T = torch.zeros(len(features_TD), dtype=torch.long)
    for word, start_s, end_s in speech.words:
        tokens = _tokens(word)
        at = np.linspace(start_s, end_s, len(tokens) + 1) * _FRAME_RATE_HZ
        for token, begin, end in zip(tokens, at[:-1].round(), at[1:].round(), strict=True):
            targets_T[int(begin) : int(end)] = vocab[token]
        targets_T[int(at[-1].round()) - 1 : int(at[-1].round())] = vocab[_GAP]
    return features_TD, targets_T


def _batch(clips: Sequence[tuple[Tensor, Tensor]], rng: random.Random) -> tuple[Tensor, Tensor]:
    """``[N, T, D]`` features and ``[N, T]`` tokens of a stretch of each clip."""
    parts = []
    for features_TD, targets_T in clips:
        first = rng.randrange(max(len(targets_T) - _CHUNK, 0) + 1)
        missing = max(_CHUNK - len(targets_T), 0)
        part = slice(first, first + _CHUNK)
        parts.append((F.pad(features_TD[part], (0, 0, 0, missing)), F.pad(targets_T[part], (0, missing))))
    return torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])


def _ctc_loss(model: Wav2Vec2BertForCTC, clips: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean per token over whole clips."""
    features_NTD = nn.utils.rnn.pad_sequence([features_TD for features_TD, _ in clips], batch_first=True)
    lengths_N = torch.tensor([len(targets_T) for _, targets_T in clips])
    mask_NT = torch.arange(features_NTD.shape[1]) < lengths_N[:, None]
    logits_NTV = model(input_features=features_NTD, attention_mask=mask_NT.long()).logits
    written = [torch.unique_consecutive(targets_T) for _, targets_T in clips]
    written = [tokens[tokens != 0] for tokens in written]
    return F.ctc_loss(
        logits_NTV.log_softmax(-1).transpose(0, 1), torch.cat(written), lengths_N,
        torch.tensor([len(tokens) for tokens in written]), zero_infinity=True,
    )  # fmt: skip


def _config(vocab_size: int) -> Wav2Vec2BertConfig:
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "feature_projection_input_dim": 160,
        "conv_depthwise_kernel_size": 15,
        "position_embeddings_type": None,  # its convolutions tell it what is near
        "apply_spec_augment": False,
        "layerdrop": 0.0,
        "pad_token_id": 0,
    }
    dropouts = ("hidden", "attention", "feat_proj", "final", "activation", "conformer_conv")
    return Wav2Vec2BertConfig(**settings | {f"{name}_dropout": 0.0 for name in dropouts})
