"""An exported model as a recognizer: what `transcribe` writes is what `generate` says."""

from __future__ import annotations

import json

from salad_lightning.cli import main
from salad_lightning.data.format import decode, read_shard
from salad_lightning.testing.shards import save_speech_shards


def test_transcripts_are_what_the_model_generates(model, exported, tmp_path):
    shards = save_speech_shards(tmp_path / "book", num_samples=3, samples_per_shard=3)
    options = ["--model", str(exported), "--prompt", "{speech} again:", "--max-new-tokens", "6"]
    assert main(["transcribe", str(shards), *options, "--output", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    samples = [decode(raw, source="", sample_rate_hz=16_000) for raw in read_shard(next(shards.glob("*.tar")))]
    for row, sample in zip(rows, samples, strict=True):
        told = model.generate(sample.audio, "{speech} again:", sampling_rate=16_000, max_new_tokens=6)
        assert row["heard"] == told.strip().partition("\n")[0]
        assert (row["text"], row["source"]) == (sample.text, "book")
    assert json.loads((tmp_path / "out" / "transcription.json").read_text())["all"]["texts"] == 3
