"""Error rates against an edit distance by hand, and the command on real shards."""

from __future__ import annotations

import argparse
import json

import pytest
from safetensors.torch import load_file, save_file

from salad_lightning.cli import main
from salad_lightning.commands import transcribe
from salad_lightning.corpus import align
from salad_lightning.evaluation.transcription import ErrorRates, normalise
from salad_lightning.testing.shards import save_speech_shards
from salad_lightning.testing.tiny import SENTENCES
from salad_lightning.testing.tiny_ctc import save_tiny_ctc


def edits(first, second):
    """Levenshtein distance of two sequences, the textbook table."""
    table = [[i + j if not i * j else 0 for j in range(len(second) + 1)] for i in range(len(first) + 1)]
    for i, a in enumerate(first, 1):
        for j, b in enumerate(second, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b))
    return table[-1][-1]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("It's 5 o’clock—now!", "its 5 oclock now"),
        ("  STRASSE,  Straße ", "strasse strasse"),
        ("Été…\nfini", "été fini"),
        ("…", ""),
    ],
)
def test_normaliser(text, plain):
    assert normalise(text) == plain


PAIRS = [
    ("The cat sat.", "the cat sat", "ann", "book"),
    ("On the mat it sat", "on a mat sat", "bob", "book"),
    ("A quick fox!", "quick brown fox ran", "ann", "web"),
    ("…", "noise", "ann", "web"),
]


def test_rates_are_edits_over_the_length_of_the_reference():
    rates = ErrorRates()
    for text, heard, speaker, source in PAIRS:
        rates.update(text, heard, speaker=speaker, source=source)
    found = rates.results()
    assert found["empty_references"] == 1
    groups = {("all", None): PAIRS[:3], ("speaker", "ann"): [PAIRS[0], PAIRS[2]], ("source", "book"): PAIRS[:2]}
    for (kind, name), pairs in groups.items():
        figures = found[kind] if name is None else found[kind][name]
        plain = [(normalise(text), normalise(heard)) for text, heard, *_ in pairs]
        wer = sum(edits(a.split(), b.split()) for a, b in plain) / sum(len(a.split()) for a, _ in plain)
        cer = sum(edits(a, b) for a, b in plain) / sum(len(a) for a, _ in plain)
        assert figures == pytest.approx({"wer": wer, "cer": cer, "texts": len(pairs)})


def test_a_device_is_found_as_by_align():
    for module, model in ((transcribe, "--recognizer"), (align, "--model")):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        assert parser.parse_args(["shards", model, "m", "--output", "o"]).device == "auto"


@pytest.mark.slow
def test_command(tmp_path, capsys, monkeypatch):
    words = sorted({word.strip(".,:!") for sentence in SENTENCES for word in sentence.split()})
    words += [word.capitalize() for word in words]
    recognizer = save_tiny_ctc(tmp_path / "ctc", words, steps=60)
    for name in ("one", "two"):
        save_speech_shards(tmp_path / name, num_samples=5, samples_per_shard=3, seed=ord(name[0]))
    output = tmp_path / "out"
    arguments = ["transcribe", str(tmp_path / "one"), str(tmp_path / "two"), "--recognizer", str(recognizer)]
    assert main([*arguments, "--output", str(output)]) == 0
    assert "speaker s0" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "transcripts.jsonl").read_text().splitlines()]
    figures = json.loads((output / "transcription.json").read_text())
    assert len(rows) == 10
    assert set(figures["source"]) == {"one", "two"}
    assert set(figures["speaker"]) == {"s0", "s1", "s2"}
    mine = [(normalise(r["text"]).split(), normalise(r["heard"]).split()) for r in rows if r["source"] == "two"]
    assert figures["source"]["two"]["wer"] == pytest.approx(sum(edits(*p) for p in mine) / sum(len(a) for a, _ in mine))
    assert 0 < figures["all"]["wer"] < 1
    # Killed in the middle of a line: what was heard before is not heard again.
    heard = sorted((output / "heard").glob("*.jsonl"))[0]
    lines = heard.read_text().splitlines(keepends=True)
    heard.write_text("".join(lines[:-1]) + lines[-1][:20])
    assert main([*arguments, "--output", str(output)]) == 0
    assert json.loads((output / "transcription.json").read_text()) == figures
    assert main([*arguments[:-1], str(tmp_path / "other"), "--output", str(output)]) == 2
    # Other weights at the same path.
    weights = load_file(recognizer / "model.safetensors")
    save_file(
        {name: value + 0.1 for name, value in weights.items()}, recognizer / "model.safetensors", {"format": "pt"}
    )
    capsys.readouterr()
    assert main([*arguments, "--output", str(output)]) == 2
    assert "name another folder" in capsys.readouterr().err
    assert main(["transcribe", str(tmp_path / "none"), "--recognizer", "x", "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()
