"""Training the miniature's speech encoder: frame-wise phonemes of spoken pseudo-words."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from salad_lightning.data.audio import resample
from salad_lightning.demo.speech import SAMPLE_RATE_HZ, draw_voice
from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.synthesizers.espeak import EspeakSynthesizer, TimedPhoneme

__all__ = ["EncoderReport", "pseudo_word_speech", "train_encoder"]

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "sh", "ch", "j", "h", "w", "st", "tr")
_NUCLEI = ("ee", "oh", "ay", "oy", "oo", "ah", "a", "i", "e", "o", "u", "ow", "ar", "or")
_CODAS = ("", "", "", "", "n", "k", "l", "t", "m", "p", "st", "nd")
_CHUNK_S = 2.4  # all training clips are cut to this length: one shape, no padding


class _Clip(NamedTuple):
    audio: NDArray[np.float32]
    phonemes: list[TimedPhoneme]


class EncoderReport(NamedTuple):
    """What came of it.

    Attributes:
        frame_accuracy: Share of held-out frames whose phoneme is told right, 0 to 1.
        audio_seconds: Speech it was trained on.
        train_seconds: Time it took, synthesis included.
        num_phonemes: Classes.
    """

    frame_accuracy: float
    audio_seconds: float
    train_seconds: float
    num_phonemes: int


def pseudo_word_speech(num_clips: int, *, seed: int) -> list[_Clip]:
    """Random syllables in the training voices, with their phonemes; no sentence of the world among them."""
    rng = random.Random(f"pseudo-words/{seed}")
    clips = []
    for _ in range(num_clips):
        setting = draw_voice("train", rng)
        synthesizer = EspeakSynthesizer(setting.voice, setting.rate_wpm, setting.pitch)
        text = " ".join(_pseudo_word(rng) for _ in range(rng.randint(10, 14)))
        speech, phonemes = synthesizer.speak_with_phonemes(text)
        clips.append(_Clip(resample(speech.audio, synthesizer.sample_rate_hz, SAMPLE_RATE_HZ), phonemes))
    return clips


def train_encoder(
    folder: str | Path,
    *,
    seed: int = 0,
    num_clips: int = 2400,
    steps: int = 1400,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    max_seconds: float | None = None,
) -> EncoderReport:
    """Train a `CausalConvEncoder` to tell the phonemes spoken before and during each frame, and save it.

    Each frame has two targets, the phonemes spoken in its halves, because 80 ms hold one or two.

    Args:
        folder: Where to save; made where missing.
        seed: Of speech, weights and order.
        num_clips: Spoken pseudo-word strings, about 5 s each.
        steps: Optimiser steps.
        batch_size: Clips of 2.4 s in a step.
        learning_rate: Peak; rises over 5 % of the steps and falls to 0 as a cosine.
        max_seconds: Stop early after this time; None never does.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    encoder = CausalConvEncoder.from_config(sample_rate_hz=16_000)
    clips = pseudo_word_speech(num_clips, seed=seed)
    names = sorted({phoneme.name for clip in clips for phoneme in clip.phonemes})
    audio, targets = _cut(clips, names, encoder)
    lengths_N = torch.full((len(audio),), audio.shape[1])
    parts = (slice(first, first + batch_size) for first in range(0, len(audio), batch_size))
    # Half of a step, if it were done in each.
    mel = torch.cat([encoder.log_mel(audio[part], lengths_N[part]) for part in parts])
    num_held_out = max(len(mel) // 20, 1)
    heads = nn.Linear(encoder.output_dim, _TARGETS * len(names))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(num_held_out, len(mel), (batch_size,), generator=order)
        loss = F.cross_entropy(_logits(encoder, heads, mel[rows], len(names)), targets[rows].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if max_seconds is not None and time.perf_counter() - begin > max_seconds:
            break
    with torch.no_grad():
        guesses = _logits(encoder, heads, mel[:num_held_out], len(names)).argmax(-1)
    accuracy = (guesses == targets[:num_held_out].flatten()).float().mean().item()
    encoder.save_pretrained(folder)
    seconds = audio.numel() / encoder.sample_rate_hz
    return EncoderReport(accuracy, seconds, time.perf_counter() - begin, len(names))


_TARGETS = 2


def _pseudo_word(rng: random.Random) -> str:
    syllables = (
        rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
    )
    return "".join(syllables)


def _logits(encoder: CausalConvEncoder, heads: nn.Linear, mel_NTD: Tensor, num_phonemes: int) -> Tensor:
    """``[N * T * targets, phonemes]``."""
    logits: Tensor = heads(encoder.blocks(mel_NTD))
    return logits.reshape(-1, num_phonemes)


def _cut(clips: Sequence[_Clip], names: Sequence[str], encoder: CausalConvEncoder) -> tuple[Tensor, Tensor]:
    """``[N, L]`` audio and ``[N, T, targets]`` phonemes.

    A frame is labelled by what sounded a little earlier: its last sound has only begun.
    """
    index = {name: i for i, name in enumerate(names)}
    num_samples = round(_CHUNK_S * encoder.sample_rate_hz)
    num_frames = num_samples // round(encoder.sample_rate_hz / encoder.frame_rate_hz)
    frame_s = 1 / encoder.frame_rate_hz
    audio, targets = [], []
    for clip in clips:
        starts = np.array([phoneme.start_s for phoneme in clip.phonemes])
        labels = np.array([index[phoneme.name] for phoneme in clip.phonemes])
        for first in range(0, len(clip.audio) - num_samples + 1, num_samples):
            offset_s = first / encoder.sample_rate_hz
            # Middles of the frame's parts, shifted back by half a part.
            steps = (np.arange(num_frames * _TARGETS) / _TARGETS) * frame_s + offset_s
            at = np.maximum(np.searchsorted(starts, steps, side="right") - 1, 0)
            audio.append(torch.from_numpy(clip.audio[first : first + num_samples]))
            targets.append(torch.from_numpy(labels[at]).view(num_frames, _TARGETS))
    return torch.stack(audio), torch.stack(targets)
