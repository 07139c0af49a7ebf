"""Recognizers of both kinds against their own models, asked without a pipeline."""

from __future__ import annotations

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.testing.shards import speak_tones
from salad_lightning.testing.tiny_whisper import save_tiny_whisper_recognizer


def test_whisper(tmp_path):
    folder = save_tiny_whisper_recognizer(tmp_path / "whisper")
    short, _ = speak_tones("seven bright stars")
    long = np.tile(short, 1 + 31 * 16_000 // len(short))
    recognizer = Recognizer(str(folder))
    assert recognizer.sample_rate_hz == 16_000
    texts = recognizer.transcribe([short, long, short])
    model, processor = WhisperForConditionalGeneration.from_pretrained(folder), WhisperProcessor.from_pretrained(folder)
    features = processor(short, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        (ids,) = model.generate(features, num_beams=5)  # as many as the pipeline takes, after OpenAI
    expected = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert texts[0] == texts[2] == expected
    assert texts[1]  # longer than the window: piece by piece, which needs time stamps
