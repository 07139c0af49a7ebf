import json

import numpy as np
import pytest
import soundfile

from salad_lightning import cli
from salad_lightning.corpus.prepare import prepare
from salad_lightning.corpus.rules import Rules
from salad_lightning.corpus.sound import active_range, first_pause, level_dbfs, with_level
from salad_lightning.corpus.split import split_at_pauses
from salad_lightning.data.format import decode, read_shard
from salad_lightning.interfaces import TimedWord

RATE = 8000


def _tone(seconds, amplitude=0.3):
    return (amplitude * np.sin(2 * np.pi * 300 * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def _corpus(folder, rows):
    """Rows of audio, text and more in a manifest."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, (audio, fields) in enumerate(rows):
        soundfile.write(folder / f"{number}.wav", audio, RATE, subtype="FLOAT")
        lines.append(json.dumps({"audio": f"{number}.wav", "text": "some words", **fields}) + "\n")
    (folder / "m.jsonl").write_text("".join(lines))
    return folder / "m.jsonl"


def _samples(folder):
    paths = sorted(folder.glob("*.tar"))
    return [decode(raw, source="s", sample_rate_hz=RATE) for path in paths for raw in read_shard(path)]


def test_every_rule_leaves_out_its_own_and_says_why(tmp_path, capsys):
    clipped = np.clip(_tone(2, 5.0), -1, 1)
    manifest = _corpus(
        tmp_path / "c",
        [
            (_tone(2), {}),
            (_tone(0.3), {"text": "x"}),
            (_tone(9), {"text": "long" * 20}),
            (_tone(2, 1e-5), {}),
            (clipped, {}),
            (_tone(2), {"text": "many words " * 20}),
            (_tone(2), {"text": "a"}),
        ],
    )
    options = ["--min-seconds", 0.5, "--max-seconds", 8, "--min-level", -60, "--max-clipped", 0.01]
    options += ["--min-chars-per-second", 1, "--max-chars-per-second", 30]
    output = tmp_path / "out"
    assert cli.main(["prepare", "--manifest", str(manifest), "--output", str(output), *map(str, options)]) == 0
    reasons = ["too short", "too long", "too quiet", "clipped", "characters per second", "characters per second"]
    listed = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [(row["key"], row["reason"]) for row in listed] == [(str(n), r) for n, r in enumerate(reasons, 1)]
    assert [row["where"].split(", ")[-1] for row in listed] == [f"line {n}" for n in range(2, 8)]
    index = json.loads((output / "index.json").read_text())
    assert index["rejected"] == {
        "characters per second": 2,
        "clipped": 1,
        "too long": 1,
        "too quiet": 1,
        "too short": 1,
    }
    assert [sample.key for sample in _samples(output)] == ["0"]
    assert "left out, clipped: 1" in capsys.readouterr().out
    assert "| clipped | 1 |" in (output / "README.md").read_text()


def test_without_rules_everything_is_kept(tmp_path):
    rows = [(_tone(0.01), {}), (np.zeros(800), {}), (np.ones(800), {}), (_tone(30), {"text": "x"})]
    assert prepare(_corpus(tmp_path / "c", rows), tmp_path / "out")["num_samples"] == 4


def test_broken_rows_have_a_budget(tmp_path, capsys):
    nan = _tone(1)
    nan[5] = np.nan
    rows = [(_tone(1), {"key": f"k{n}"}) for n in range(8)] + [(nan, {}), (np.zeros(0), {})]
    manifest = _corpus(tmp_path / "c", rows)
    index = prepare(manifest, tmp_path / "out", max_bad_fraction=0.2)
    assert index["num_samples"] == 8
    assert index["rejected"] == {"unreadable audio": 2}
    assert cli.main(["prepare", "--manifest", str(manifest), "--output", str(tmp_path / "o2")]) == 2
    message = capsys.readouterr().err
    assert "2 broken rows" in message
    assert "line 9" in message
    assert "NaN" in message
    assert "--max-bad-fraction" in message
    assert not (tmp_path / "o2").exists()


def test_it_stops_early_where_too_much_is_broken(tmp_path, capsys):
    lines = ['{"text": "fine"}\n', '{"text": ""}\n'] * 300
    (tmp_path / "t.jsonl").write_text("".join(lines) + "never read: no JSON\n")
    command = [
        "prepare",
        "--text",
        str(tmp_path / "t.jsonl"),
        "--output",
        str(tmp_path / "o"),
        "--samples-per-shard",
        "20",
    ]
    assert cli.main(command) == 2
    message = capsys.readouterr().err
    assert "20 broken rows" in message  # 1 % of 1000 rows are 10, and shards are looked at whole
    assert "line 2: no text: there is no text" in message
    assert "and 15 more" in message
    assert cli.main([*command, "--max-bad-fraction", "0.9"]) == 2
    assert "line 601: not JSON" in capsys.readouterr().err


def test_when_nothing_is_left_it_says_why(tmp_path, capsys):
    manifest = _corpus(tmp_path / "c", [(_tone(1), {}), (_tone(1), {})])
    assert (
        cli.main(["prepare", "--manifest", str(manifest), "--output", str(tmp_path / "o"), "--min-seconds", "5"]) == 2
    )
    assert "no row is left (too short: 2)" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_trim_moves_word_times_and_keeps_words(tmp_path):
    rng = np.random.default_rng(0)
    room = (1e-4 * rng.standard_normal(RATE)).astype(np.float32)
    audio = np.concatenate([room, _tone(0.5), room])
    words = [["some", 1.0, 1.3], ["words", 1.3, 1.5]]
    rows = [
        (audio, {"words": words, "speech_end_s": 1.4}),
        (audio, {"words": [["some", 0.2, 1.3], ["words", 1.3, 2.0]]}),
    ]
    prepare(_corpus(tmp_path / "c", rows), tmp_path / "out", trim=True)
    first, second = _samples(tmp_path / "out")
    assert len(first.audio) / RATE == pytest.approx(0.7, abs=0.011)  # 0.1 s left at either end
    assert first.words[0].start_s == pytest.approx(0.1, abs=0.011)
    assert first.words[1].end_s - first.words[0].start_s == pytest.approx(0.5, abs=2e-3)
    assert first.fields["speech_end_s"] == pytest.approx(0.5, abs=0.011)
    # Words said in what looks like silence stay.
    assert len(second.audio) / RATE == pytest.approx(1.8, abs=0.01)
    assert second.words[0].start_s == pytest.approx(0, abs=2e-3)


def test_loudness(tmp_path):
    manifest = _corpus(tmp_path / "c", [(_tone(1, 0.01), {}), (_tone(1, 0.9), {}), (np.zeros(RATE), {})])
    prepare(manifest, tmp_path / "out", level_dbfs=-26.0)
    levels = [level_dbfs(sample.audio) for sample in _samples(tmp_path / "out")]
    assert levels == [pytest.approx(-26, abs=0.05), pytest.approx(-26, abs=0.05), -np.inf]
    assert np.abs(with_level(_tone(1), 6.0)).max() <= 1  # not beyond full scale


def test_the_active_range_of_silence_is_all_of_it():
    assert active_range(np.zeros(500, dtype=np.float32), RATE) == (0, 500)


def test_a_pause_is_found_and_a_plosive_is_not():
    gap = np.zeros(round(0.05 * RATE), dtype=np.float32)
    pause = np.zeros(round(0.2 * RATE), dtype=np.float32)
    audio = np.concatenate([_tone(0.3), gap, _tone(0.3), pause, _tone(0.3)])
    assert first_pause(audio, RATE, [(0.1, 1.15), (0.1, 0.6), (0.9, 1.15)]) == [
        pytest.approx(0.65, abs=0.011), 0.6, 1.15]  # fmt: skip


WORDS = [
    TimedWord("One", 0.0, 0.9), TimedWord("two", 1.0, 1.9), TimedWord("three", 2.5, 3.0), TimedWord("four", 3.1, 4.0),
    TimedWord("five", 4.1, 5.0),
]  # fmt: skip


def test_long_recordings_are_cut_in_the_longest_pause():
    segments = split_at_pauses('One, two. "Three, four" five!', WORDS, 5.2, 3.5)
    assert [segment.text for segment in segments] == ["One, two.", '"Three, four" five!']
    assert [(segment.start_s, segment.end_s) for segment in segments] == [(0.0, 2.2), (2.2, 5.2)]
    assert segments[1].words[0] == TimedWord("three", 0.3, 0.8)
    assert split_at_pauses("another text", WORDS, 5.2, 3.5) is None
    assert len(split_at_pauses("One two three four five", WORDS, 5.2, 0.1)) == 5  # a word is never cut


def test_segments_cover_the_recording_and_fit(tmp_path):
    rng = np.random.default_rng(1)
    for trial in range(50):
        count = int(rng.integers(2, 60))
        edges = np.cumsum(rng.uniform(0.01, 0.6, 2 * count))
        words = [TimedWord(f"w{n}", *map(float, edges[2 * n : 2 * n + 2])) for n in range(count)]
        text = ", ".join(f"W{n}" for n in range(count))
        end_s, limit_s = float(edges[-1]) + 0.2, 3.0
        segments = split_at_pauses(text, words, end_s, limit_s)
        assert [segment.start_s for segment in segments] == [0.0, *(segment.end_s for segment in segments[:-1])]
        assert segments[-1].end_s == end_s
        assert " ".join(segment.text for segment in segments) == text, trial
        assert all(segment.end_s - segment.start_s <= limit_s + 1e-9 for segment in segments)
        assert [word.word for segment in segments for word in segment.words] == [word.word for word in words]


def test_segments_become_samples_of_their_own(tmp_path):
    audio = np.concatenate([_tone(0.9 + 0.1 * n) for n in range(5)])
    rows = [
        (audio[: int(5.2 * RATE)], {"text": "One, two. Three, four five!", "words": WORDS, "key": "talk", "book": 7})
    ]
    manifest = _corpus(tmp_path / "c", rows)
    index = prepare(manifest, tmp_path / "out", rules=Rules(max_seconds=3.5))
    first, second = _samples(tmp_path / "out")
    assert (first.key, second.key) == ("talk_0000", "talk_0001")
    assert (first.text, second.text) == ("One, two.", "Three, four five!")
    assert second.fields == {"recording": "talk", "start_s": 2.2, "seconds": len(second.audio) / RATE, "book": 7}
    whole, _ = soundfile.read(tmp_path / "c" / "0.wav", dtype="float32")
    joined = np.concatenate([first.audio, second.audio])
    np.testing.assert_allclose(joined, whole, atol=1 / 32768)
    assert index["num_rows"] == 1
    assert index["num_samples"] == 2


def test_pieces_keep_how_sure_the_alignment_was_of_their_words(tmp_path):
    """A dash is no word of any piece."""
    audio = np.concatenate([_tone(0.9 + 0.1 * n) for n in range(5)])[: int(5.2 * RATE)]
    words = [*WORDS[:2], TimedWord("–", 2.0, 2.1), *WORDS[2:]]
    record = {
        "text": "One, two – three, four five!",
        "words": words,
        "word_confidence": [0.1, 0.2, None, 0.3, None, 0.5],
    }
    prepare(_corpus(tmp_path / "c", [(audio, record)]), tmp_path / "out", rules=Rules(max_seconds=3.5))
    pieces = _samples(tmp_path / "out")
    assert [len(piece.words) for piece in pieces] == [2, 3]
    assert [piece.fields["word_confidence"] for piece in pieces] == [[0.1, 0.2], [0.3, None, 0.5]]


def test_a_long_recording_without_word_times_is_too_long(tmp_path):
    rows = [(_tone(5), {}), (_tone(5), {"words": WORDS, "choices": ["a", "b"], "answer": 0}), (_tone(1), {})]
    index = prepare(_corpus(tmp_path / "c", rows), tmp_path / "out", rules=Rules(max_seconds=3.5))
    assert index["rejected"] == {"too long": 2}
