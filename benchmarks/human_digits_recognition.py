"""Training the benchmark's encoder: digits of the speakers that may be heard, and synthetic ones, as CTC."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from human_digits_encoder import ClipConvEncoder, filter_bank, power_frames
from human_digits_tasks import DIGITS
from numpy.typing import NDArray
from torch import Tensor, nn

from salad_lightning.data.audio import resample
from salad_lightning.demo.speech import draw_voice
from salad_lightning.synthesizers.espeak import EspeakSynthesizer

__all__ = ["Recognition", "Spoken", "share_recognized", "synthetic_digits", "train_recognition", "trimmed"]

Spoken = tuple[NDArray[np.float32], int]
"""``[L]`` audio at 16 kHz and the digit it says."""

_WARPS = torch.linspace(0.75, 1.28, 21).tolist()
_GAP_FRAMES = (2, 20)
_SAMPLE_RATE_HZ = 16_000


def synthetic_digits(count: int, *, seed: int) -> list[list[Spoken]]:
    """Digits by espeak-ng in its many voices; all ten of each voice, and of one at least."""
    rng = random.Random(f"digits/{seed}")
    voices = []
    for _ in range(max(count // 10, 1)):
        synthesizer = EspeakSynthesizer(draw_voice("train", rng).voice, rng.randint(110, 230), rng.randint(10, 90))
        clips = [
            resample(synthesizer.speak(word).audio, synthesizer.sample_rate_hz, _SAMPLE_RATE_HZ) for word in DIGITS
        ]
        voices.append([(trimmed(clip), digit) for digit, clip in enumerate(clips) if len(clip)])
    return voices


class Recognition(NamedTuple):
    """A trained encoder with the head it was trained by."""

    encoder: ClipConvEncoder
    head: nn.Linear
    loss: float


def train_recognition(
    human: Sequence[Sequence[Spoken]],
    synthetic: Sequence[Sequence[Spoken]],
    *,
    steps: int,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
) -> Recognition:
    """Train a `ClipConvEncoder` to tell strings of one to three digits of one voice.

    Args:
        human: Clips by speaker; may be none.
        synthetic: Clips by voice.
        steps: Optimiser steps.
        seed: Of weights and order.
        batch_size: Strings in a step, a quarter of them human: the synthetic voices are many, the human ones few.
        learning_rate: Peak.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder, head = ClipConvEncoder(), nn.Linear(ClipConvEncoder.output_dim, len(DIGITS) + 1)
    encoder.train()
    spectra = [
        [[(power_frames(torch.from_numpy(clip)[None])[0], digit) for clip, digit in voice] for voice in kind]
        for kind in (human, synthetic)
    ]
    banks = torch.stack([filter_bank(warp) for warp in _WARPS])
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    loss = torch.zeros(())
    for _ in range(steps):
        strings = [_string(spectra[int(row % 4 > 0 or not human)], rng) for row in range(batch_size)]
        frames, lengths = _batch([spectrum for spectrum, _ in strings], banks, rng)
        hidden = encoder.frames(frames, lengths)
        log_probabilities = head(F.dropout(hidden, 0.3)).log_softmax(-1).transpose(0, 1)
        targets = torch.tensor([digit for _, digits in strings for digit in digits]) + 1
        loss = F.ctc_loss(
            log_probabilities, targets, (lengths + 7) // 8, torch.tensor([len(digits) for _, digits in strings]),
            zero_infinity=True,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
    return Recognition(encoder, head, loss.item())


@torch.no_grad()
def share_recognized(recognition: Recognition, clips: Sequence[Spoken]) -> float:
    """Share of single digits that the head gives the highest CTC likelihood."""
    recognition.encoder.eval()
    spectra = [power_frames(torch.from_numpy(clip)[None])[0] for clip, _ in clips]
    lengths = torch.tensor([len(spectrum) for spectrum in spectra])
    mel = nn.utils.rnn.pad_sequence(spectra, batch_first=True) @ filter_bank()
    hidden = recognition.encoder.frames(ClipConvEncoder.normalise(mel, lengths), lengths)
    scores = recognition.head(hidden).log_softmax(-1).transpose(0, 1)
    ones = torch.ones(len(clips), dtype=torch.long)
    losses = [
        F.ctc_loss(scores, ones[:, None] * (digit + 1), (lengths + 7) // 8, ones, reduction="none")
        for digit in range(len(DIGITS))
    ]
    found = torch.stack(losses).argmin(0)
    return (found == torch.tensor([digit for _, digit in clips])).float().mean().item()


def trimmed(clip: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without the silence at either end, at full scale."""
    energy = np.convolve(clip**2, np.ones(400, dtype=np.float32) / 400, "same")
    loud = np.flatnonzero(energy > 1e-5 * energy.max())
    return clip[loud[0] : loud[-1] + 1] / np.abs(clip).max() if len(loud) else clip


def _string(voices: Sequence[Sequence[tuple[Tensor, int]]], rng: np.random.Generator) -> tuple[Tensor, list[int]]:
    """Power spectra of one to three digits of a voice, one after the other at their own tempo, and the digits."""
    voice = voices[rng.integers(len(voices))]
    pieces, digits = [], []
    for _ in range(rng.integers(1, 4)):
        spectrum, digit = voice[rng.integers(len(voice))]
        pieces.append(torch.zeros(int(rng.integers(*_GAP_FRAMES)), spectrum.shape[1]))
        pieces.append(_warped(spectrum, rng))
        digits.append(digit)
    pieces.append(torch.zeros(int(rng.integers(*_GAP_FRAMES)), pieces[0].shape[1]))
    return torch.cat(pieces), digits


def _warped(spectrum_TF: Tensor, rng: np.random.Generator) -> Tensor:
    """At a random tempo, which changes within the clip."""
    size = max(round(len(spectrum_TF) * float(rng.uniform(0.75, 1.35))), 4)
    at = torch.linspace(0, 1, size)
    for waves, most in ((1, 0.1), (2, 0.05)):
        at = at + float(rng.uniform(-most, most)) * torch.sin(torch.pi * waves * torch.linspace(0, 1, size))
    at = at.clamp(0, 1) * (len(spectrum_TF) - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=len(spectrum_TF) - 1)
    share = (at - low).unsqueeze(1)
    return spectrum_TF[low] * (1 - share) + spectrum_TF[high] * share


def _batch(spectra: Sequence[Tensor], banks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pad, read through a warped filter bank each (another vocal tract), add coloured noise, and mask."""
    count = len(spectra)
    lengths = torch.tensor([len(spectrum) for spectrum in spectra])
    power = nn.utils.rnn.pad_sequence(list(spectra), batch_first=True)
    mel = power @ banks[rng.integers(len(banks), size=count)]
    level = torch.from_numpy(10 ** rng.uniform(-8, -3, size=(count, 1, 1))).float() * mel.amax((1, 2), keepdim=True)
    colour = torch.exp(
        torch.from_numpy(rng.normal(0, 0.8, size=(count, 1, 1))).float() * torch.linspace(-1, 1, mel.shape[2])
    )
    mel = mel + level * colour * -torch.log(torch.rand_like(mel) + 1e-9)
    frames = ClipConvEncoder.normalise(mel, lengths)
    for row in range(count):
        band, width = rng.integers(0, mel.shape[2] - 8), rng.integers(0, 8)
        frames[row, :, band : band + width] = 0
    return frames, lengths
