"""Word times from a CTC model that a test trains on synthetic speech, against the times the synthesiser tells."""

import io
import json
import random
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
)

from salad_lightning import cli
from salad_lightning.corpus.aligner import CtcAligner
from salad_lightning.corpus.encode import encode_shards
from salad_lightning.data.audio import encode_flac
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.testing.shards import save_speech_shards, save_text_shards, speak_tones

RATE = 8000
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"]
VOCABULARY = {name: n for n, name in enumerate(["<pad>", "|", "<unk>", *sorted(set("".join(WORDS)))])}


def _config(**changes):
    """20 ms a frame."""
    return Wav2Vec2Config(
        vocab_size=len(VOCABULARY), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        conv_dim=(32,) * 4, conv_stride=(5, 4, 4, 2), conv_kernel=(10, 8, 4, 4), conv_bias=True,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, pad_token_id=0, mask_time_prob=0.0,
        layerdrop=0.0, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
        final_dropout=0.0, ctc_zero_infinity=True, ctc_loss_reduction="mean",
        **{"feat_extract_norm": "layer", "do_stable_layer_norm": True, **changes},
    )  # fmt: skip


def _save(model, folder):
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    Wav2Vec2CTCTokenizer(
        folder / "vocab.json", unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|", bos_token=None,
        eos_token=None,
    ).save_pretrained(folder)  # fmt: skip
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save(Wav2Vec2ForCTC(_config()).eval(), tmp_path_factory.mktemp("untrained"))


def _speak(synthesizer, rng):
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 6)))
    speech = synthesizer.speak(text)
    audio = torchaudio.functional.resample(torch.from_numpy(speech.audio), synthesizer.sample_rate_hz, RATE)
    return text, audio.numpy(), speech.words


@pytest.fixture(scope="module")
def spoken():
    pytest.importorskip("espeakng_loader")
    from salad_lightning.synthesizers.espeak import EspeakSynthesizer

    synthesizer, rng = EspeakSynthesizer("en-us", 150, 50), random.Random(0)
    return [_speak(synthesizer, rng) for _ in range(260)]


@pytest.fixture(scope="module")
def trained(spoken, tmp_path_factory):
    """Trained by CTC on texts alone: it is never told when a word is spoken."""
    torch.manual_seed(0)
    model, rng, steps = Wav2Vec2ForCTC(_config()).train(), random.Random(1), 260
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.2)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=True)
    for _ in range(steps):
        rows = rng.sample(spoken[40:], 8)
        inputs = extractor([audio for _, audio, _ in rows], sampling_rate=RATE, padding=True, return_tensors="pt")
        ids = [torch.tensor([VOCABULARY[letter.replace(" ", "|")] for letter in text]) for text, _, _ in rows]
        labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _save(model.eval(), tmp_path_factory.mktemp("trained"))


@pytest.mark.slow
def test_word_times_of_held_out_speech(trained, spoken, tmp_path, capsys):
    held_out = spoken[:40]
    with ShardWriter(tmp_path / "shards", "x", 20) as writer:
        for number, (text, audio, _) in enumerate(held_out):
            written = text.capitalize() + "." if number % 2 else text.upper()
            writer.write(f"s{number:02d}", {"text": written, "speaker": "s"}, encode_flac(audio, RATE))
        for number, (_, audio, _) in enumerate(held_out[:10]):
            writer.write(f"wrong{number}", {"text": held_out[number + 10][0]}, encode_flac(audio, RATE))
        writer.write("digits", {"text": f"{held_out[0][0].split()[0]} 7 *"}, encode_flac(held_out[0][1], RATE))
    command = ["align", str(tmp_path / "shards"), "--model", str(trained), "--output", str(tmp_path / "out")]
    assert cli.main([*command, "--min-confidence", "0.4", "--batch-seconds", "20"]) == 0
    samples = {
        raw.key: decode(raw, source="", sample_rate_hz=0)
        for path in sorted((tmp_path / "out").glob("*.tar"))
        for raw in read_shard(path)
    }
    errors_ms = []
    for number, (_, audio, truth) in enumerate(held_out):
        sample = samples[f"s{number:02d}"]
        assert " ".join(word.word for word in sample.words) == sample.text  # the original words
        assert len(sample.words) == len(truth)
        assert sample.words[-1].end_s <= len(audio) / RATE + 1e-3
        for found, true in zip(sample.words, truth, strict=True):
            errors_ms += [abs(found.start_s - true.start_s) * 1000, abs(found.end_s - true.end_s) * 1000]
    print(f"median {np.median(errors_ms):.1f} ms, 90 % {np.percentile(errors_ms, 90):.1f} ms")
    assert np.median(errors_ms) <= 40
    right = [samples[f"s{number:02d}"].fields for number in range(40)]
    wrong = [samples[f"wrong{number}"].fields for number in range(10)]
    assert np.mean([f["confidence"] for f in wrong]) < np.mean([f["confidence"] for f in right]) - 0.2
    assert np.mean([f["low_confidence"] for f in right]) < 0.2
    assert np.mean([f["low_confidence"] for f in wrong]) > 0.6
    first, other = samples["digits"].words
    assert (first.word, other.word) == (held_out[0][0].split()[0], "7 *")
    assert samples["digits"].fields["word_confidence"][1] is None
    assert first.end_s == pytest.approx(held_out[0][2][0].end_s, abs=0.15)
    problems = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    flagged = {key for key, sample in samples.items() if sample.fields["low_confidence"]}
    assert {problem["key"] for problem in problems} == flagged


def _shards(folder):
    with ShardWriter(folder, "x", 3) as writer:
        for number, text in enumerate(["One two.", "three", "four five six", "seven"]):
            writer.write(f"k{number}", {"text": text, "n": number}, encode_flac(speak_tones(text)[0], 16_000))
        short = encode_flac(np.full(300, 0.1, dtype=np.float32), RATE)
        writer.write("short", {"text": "one two three", "words": [["one two three", 0, 0.03]]}, short)
        writer.write("shorter", {"text": "one"}, encode_flac(np.full(3, 0.1, dtype=np.float32), RATE))
        writer.write("unspoken", {"text": "…"}, encode_flac(speak_tones("x")[0], RATE))
        writer.write("broken", {"text": "one"}, b"no audio")
        writer.write("text", {"text": "plain text"})
    return folder


def test_samples_that_cannot_be_aligned_are_flagged_and_listed(untrained, tmp_path, capsys):
    _shards(tmp_path / "in")
    command = ["align", str(tmp_path / "in"), "--model", str(untrained), "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert "8 samples in 3 shards" in capsys.readouterr().out
    before = {raw.key: raw for path in sorted((tmp_path / "in").glob("*.tar")) for raw in read_shard(path)}
    after = {raw.key: raw for path in sorted((tmp_path / "out").glob("*.tar")) for raw in read_shard(path)}
    assert list(after) == [key for key in before if key != "broken"]
    assert after["text"] == before["text"].__class__("text", after["text"].shard, before["text"].members)
    for key, raw in after.items():
        assert raw.members.get("flac") == before[key].members.get("flac")  # the audio is untouched
        record = json.loads(raw.members["json"])
        assert record["text"] == json.loads(before[key].members["json"])["text"]
        if key.startswith("k"):
            assert [word for word, _, _ in record["words"]] == record["text"].split()
            assert len(record["word_confidence"]) == len(record["words"])
            assert record["n"] == int(key[1:])
    problems = {
        row["key"]: row["problem"] for row in map(json.loads, (tmp_path / "out" / "problems.jsonl").open())
    }  # fmt: skip
    assert problems["short"] == problems["shorter"] == "too short for its text"
    assert problems["unspoken"] == "nothing in the text is spoken"
    assert "cannot be decoded" in problems["broken"]
    record = json.loads(after["short"].members["json"])
    assert "words" not in record
    assert record["low_confidence"] is True
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["not_aligned"], index["broken"], index["num_samples"]) == (3, 1, 8)
    spoken = [raw.members["flac"] for key, raw in before.items() if key not in ("broken", "text")]
    seconds = sum(soundfile.info(io.BytesIO(flac)).duration for flac in spoken)
    assert index["seconds"] == pytest.approx(seconds, abs=0.01) == sum(shard["seconds"] for shard in index["shards"])


def test_batches_give_what_single_clips_give(untrained):
    clips = [speak_tones(text, sample_rate_hz=RATE)[0] for text in ("one two", "three four five six", "seven")]
    texts = ["one two", "three four five six", "seven"]
    batched = CtcAligner(str(untrained), batch_seconds=60).align(clips, texts)
    for clip, text, together in zip(clips, texts, batched, strict=True):
        (alone,) = CtcAligner(str(untrained), batch_seconds=0.01).align([clip], [text])
        assert together.words == alone.words
        assert together.confidences == pytest.approx(alone.confidences, abs=1e-4)


def test_models_with_group_norm_take_clips_one_by_one(tmp_path):
    torch.manual_seed(0)
    config = _config(feat_extract_norm="group", do_stable_layer_norm=False)
    aligner = CtcAligner(str(_save(Wav2Vec2ForCTC(config).eval(), tmp_path / "model")))
    clips = [speak_tones(text, sample_rate_hz=RATE)[0] for text in ("one", "three four five")]
    long_first = aligner.align(clips[::-1], ["three four five", "one"])[::-1]
    alone = [aligner.align([clip], [text])[0] for clip, text in zip(clips, ["one", "three four five"], strict=True)]
    assert long_first == alone


def test_a_killed_run_goes_on(untrained, tmp_path, monkeypatch):
    _shards(tmp_path / "in")
    command = ["align", str(tmp_path / "in"), "--model", str(untrained)]
    assert cli.main([*command, "--output", str(tmp_path / "whole")]) == 0
    align = CtcAligner.align
    calls = []

    def interrupted(self, clips, texts):
        calls.append(len(clips))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return align(self, clips, texts)

    monkeypatch.setattr(CtcAligner, "align", interrupted)
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 130
    assert not list((tmp_path / "out").glob("*.tar"))
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 0
    assert len(calls) == 4  # the first shard was not aligned again
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_a_text_corrected_while_files_move_is_not_lost(untrained, tmp_path, monkeypatch):
    """The shard keeps its path and, as tars are padded, its size."""
    command = ["align", str(tmp_path / "in"), "--model", str(untrained), "--output", str(tmp_path / "out")]
    for text in ("One two.", "ONE TWO."):
        with ShardWriter(tmp_path / "in", "x", 0) as writer:
            writer.write("k", {"text": text}, encode_flac(speak_tones(text)[0], 16_000))
        if text == "One two.":
            with monkeypatch.context() as patch:
                patch.setattr("salad_lightning.corpus.workspace._publish", Mock(side_effect=KeyboardInterrupt))
                assert cli.main(command) == 130
    assert cli.main([*command, "--overwrite"]) == 0
    (raw,) = read_shard(tmp_path / "out" / "x.tar")
    assert json.loads(raw.members["json"])["text"] == "ONE TWO."


def test_bad_input(untrained, tmp_path, capsys):
    save_speech_shards(tmp_path / "a", num_samples=2)
    save_speech_shards(tmp_path / "b", num_samples=2)
    save_text_shards(tmp_path / "text")
    encode_shards(str(tmp_path / "a"), tmp_path / "encoded", LogMelEncoder())
    Wav2Vec2Model(_config()).save_pretrained(tmp_path / "no_head")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    shards = str(tmp_path / "a")
    for arguments, words in (
        (["nowhere", "--model", str(untrained)], "nowhere"),
        ([shards, str(tmp_path / "b"), "--model", str(untrained)], "one name"),
        ([shards, "--model", str(untrained), "--device", "nonsense"], "--device"),
        ([shards, "--model", str(untrained), "--batch-seconds", "0"], "--batch-seconds"),
        ([shards, "--model", str(untrained), "--batch-seconds", "inf"], "--batch-seconds"),
        ([shards, "--model", str(untrained), "--min-confidence", "50"], "--min-confidence: 50.0 is out of range"),
        ([str(tmp_path / "text"), "--model", str(untrained)], "no sample has audio"),
        ([str(tmp_path / "encoded"), "--model", str(untrained)], "already encoded"),
        ([shards, "--model", str(tmp_path / "no_model")], "not there"),
        ([shards, "--model", str(tmp_path / "no_head")], "lm_head"),
        ([shards, "--model", str(untrained), "--output", str(tmp_path / "full")], "not empty"),
    ):
        output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
        assert cli.main(["align", *arguments, *output]) == 2, arguments
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
