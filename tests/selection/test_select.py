"""The whole selection through the command line, and every mistake that can be made with it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml

from salad_lightning.cli import main
from salad_lightning.testing.shards import save_text_shards

pytestmark = pytest.mark.slow


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def select(path, *options):
    assert main(["select", "--config", str(path), *options]) == 0


def only(output, step):
    (folder,) = Path(output).glob(f"{step}-*")
    return folder


def test_from_text_to_manifest_and_on_to_speech(settings, write, tmp_path):
    output = Path(settings["output"])
    select(write(settings))
    rows = read_jsonl(output / "manifest.jsonl")
    shares = json.loads((output / "selection.json").read_text())
    # The mumbled topic has a cluster of its own, is not understood, and gets nothing.
    labels = {row["cluster"]: row["topic"] for row in rows}
    (broken,) = (cluster for cluster, share in shares.items() if share["target"] == 0)
    assert "broken" not in labels.values()
    dropped = read_jsonl(only(output, "score") / "dropped.jsonl")
    (entry,) = (row for row in dropped if row["what"] == "cluster")
    assert entry["cluster"] == int(broken)
    assert entry["cer"] > 0.5
    # What is left is understood.
    scores = json.loads((only(output, "score") / "scores.json").read_text())
    assert all(score["cer"] < 0.15 and score["misalignment"] > 0 for score in scores if not score["dropped"])
    # The manifest: no text twice, columns kept, the budget met and hardly exceeded.
    assert len({row["text"] for row in rows}) == len(rows)
    seconds = sum(row["estimated_seconds"] for row in rows)
    assert 60 <= seconds < 60 + max(row["estimated_seconds"] for row in rows)
    for row in rows:
        share = shares[str(row["cluster"])]
        assert row["misalignment"] == share["misalignment"]
        assert row["probability"] == pytest.approx(share["target"] / 60)
    assert sum(share["target"] for share in shares.values()) == pytest.approx(1)
    assert Counter(row["cluster"] for row in rows) == {int(c): s["texts"] for c, s in shares.items() if s["texts"]}
    assert sum(share["seconds"] for share in shares.values()) == pytest.approx(seconds, abs=0.01)
    report = (output / "report.md").read_text()
    assert f"cluster {broken}: character error rate" in report
    assert (output / "report.png").stat().st_size > 10_000
    # And it can be spoken as it is, for about as long as was estimated.
    command = ["synthesize", "--manifest", str(output / "manifest.jsonl"), "--output", str(tmp_path / "active")]
    assert main([*command, "--synthesizer", settings["probe"]["synthesizer"]]) == 0
    index = json.loads((tmp_path / "active" / "index.json").read_text())
    assert index["seconds"] == pytest.approx(seconds, rel=0.1)


def test_without_the_filter_the_broken_topic_is_chosen(settings, write):
    settings["score"] |= {"intelligibility": False, "recognizer": None}
    select(write(settings))
    assert "broken" in {row["topic"] for row in read_jsonl(Path(settings["output"]) / "manifest.jsonl")}


def test_only_what_has_changed_runs_again(settings, write, capsys):
    output = Path(settings["output"])
    path = write(settings)
    select(path)
    first = (output / "manifest.jsonl").read_bytes()
    times = {folder.name: folder.stat().st_mtime_ns for folder in output.glob("*-*") if folder.is_dir()}
    assert len(times) == 6
    select(path, "--probe.workers=2", "--draw.gamma=0", "--draw.seconds=90")
    again = {folder.name: folder.stat().st_mtime_ns for folder in output.glob("*-*") if folder.is_dir()}
    assert times.items() < again.items()
    assert [name[:4] for name in set(again) - set(times)] == ["draw"]
    assert (output / "manifest.jsonl").read_bytes() != first
    shares = [s for s in json.loads((output / "selection.json").read_text()).values() if s["misalignment"] is not None]
    assert {share["target"] for share in shares} == {0.5}  # γ = 0 is uniform
    # Another selection of the same steps, beside this one.
    uniform = (output / "manifest.jsonl").read_bytes()
    other = output.with_name("other")
    select(path, f"--output={other}", f"--steps={output}")
    assert (other / "manifest.jsonl").read_bytes() == first
    assert (output / "manifest.jsonl").read_bytes() == uniform
    assert {folder.name for folder in output.glob("*-*") if folder.is_dir()} == set(again)
    # The same seed chooses the same, whatever is still there.
    shutil.rmtree(output)
    select(path)
    assert (output / "manifest.jsonl").read_bytes() == first


def test_a_share_of_natural_speech_is_the_budget_and_text_shards_are_read(settings, write, tmp_path):
    save_text_shards(tmp_path / "shards", num_samples=60, num_words=(8, 12))
    natural = tmp_path / "natural"
    natural.mkdir()
    (natural / "index.json").write_text(json.dumps({"seconds": 3000.0}))
    settings["texts"]["paths"] = [str(tmp_path / "shards")]
    settings["draw"] = {"share": 0.01, "natural": [str(natural)], "max_share": 0.8, "gamma": 1}
    settings["score"] |= {"intelligibility": False}
    settings["embed"] = {"dim": 16}
    select(write(settings))
    rows = read_jsonl(Path(settings["output"]) / "manifest.jsonl")
    assert 30 <= sum(row["estimated_seconds"] for row in rows) < 36
    assert all(row["source_key"].startswith("text0") for row in rows)


def test_empty_repeated_and_gigantic_texts_are_skipped_counted_and_listed(settings, write, tmp_path):
    pool = Path(settings["texts"]["paths"][0])
    rows = read_jsonl(pool)
    bad = [{"text": ""}, {"text": " \n"}, {"topic": "none"}, {"text": rows[0]["text"] + " "}, {"text": "la " * 2000}]
    pool.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:50], *bad, *rows[50:]]))
    select(write(settings))
    texts = only(settings["output"], "texts")
    counts = json.loads((texts / "counts.json").read_text())
    assert counts["kept"] == len(rows)
    assert counts["skipped"] == {"empty": 3, "duplicate": 1, "longer than 5000 characters": 1}
    skipped = read_jsonl(texts / "skipped.jsonl")
    assert [row["where"].split(", ")[1] for row in skipped] == [f"line {n}" for n in range(51, 56)]


def test_a_cluster_that_cannot_be_spoken_is_dropped_and_listed(settings, write):
    settings["probe"]["voices"] = [{"raises_at": ["pond", "flute", "clay", "horn"]}]
    select(write(settings))
    output = Path(settings["output"])
    dropped = read_jsonl(only(output, "score") / "dropped.jsonl")
    assert [row["reason"] for row in dropped if row["what"] == "cluster"] == ["no text of it could be spoken"]
    spoken_badly = [row for row in dropped if row["what"] == "text"]
    assert len(spoken_badly) == 6
    assert {row["reason"] for row in spoken_badly} == {"the synthesizer failed"}
    assert "broken" not in {row["topic"] for row in read_jsonl(output / "manifest.jsonl")}


# Mistakes


@pytest.fixture
def refused(settings, write, capsys):
    def run(change, *options):
        changed = json.loads(json.dumps(settings))
        change(changed)
        path = write(changed)
        capsys.readouterr()
        assert main(["select", "--config", str(path), *options]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message[message.index("salad-lightning: ") :]

    return run


@pytest.mark.parametrize(
    ("step", "key", "value", "words"),
    [
        ("draw", "gamma", -1, ["draw.gamma", "gamma is -1", "0 samples uniformly"]),
        ("draw", "seconds", 0, ["draw.seconds", "buys nothing"]),
        ("draw", "share", 0.1, ["the budget must be given once"]),
        ("draw", "max_share", 1.5, ["draw.max_share"]),
        (
            "score",
            "recognizer",
            None,
            ["score.recognizer", "give any Hugging Face speech recognizer", "intelligibility: off"],
        ),
        ("score", "checkpoint", "none.ckpt", ["score.checkpoint", "no such checkpoint"]),
        ("probe", "texts_per_cluster", 0, ["probe.texts_per_cluster"]),
        ("score", "text_words", [4, 1], ["[4, 1] is not a range of words"]),
        ("draw", "max_share", 0.3, ["draw.max_share", "3 clusters of at most 0.3 each do not make 1"]),
        ("probe", "synthesizer", "Espeek", ["no installed package offers the synthesizer"]),
        ("probe", "voices", [{"mumble_at": []}], ["mumble_at", "it takes", "mumbles_at"]),
        ("cluster", "num_clusters", -4, ["cluster.num_clusters", "-4 is too small"]),
        ("embed", "dim", 0, ["embed.dim", "0 is too small"]),
        ("texts", "paths", ["nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        ("texts", "paths", [], ["texts.paths"]),
    ],
)
def test_settings_are_checked_before_any_work(refused, settings, step, key, value, words):
    message = refused(lambda changed: changed[step].update({key: value}))
    for part in words:
        assert part in message
    assert not Path(settings["output"]).exists()


def test_a_decayed_checkpoint(refused, settings, stage1, write):
    decayed = str(stage1 / "final.ckpt")
    message = refused(lambda changed: changed["score"].update(checkpoint=decayed))
    assert "the learning rate has decayed" in message
    assert "pre_decay.ckpt" in message
    assert not Path(settings["output"]).exists()
    settings["score"] |= {"checkpoint": decayed, "allow_decayed": True}
    select(write(settings))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s["cluster"].update(num_clusters=500), ["180 texts cannot make 500 clusters"]),
        (lambda s: s["draw"].update(seconds=1e6), ["the budget is 1000000 s", "all that can be chosen is about"]),
        (lambda s: s["draw"].update(max_share=0.4), ["do not add up to 1", "give 0.5 or more"]),
        (lambda s: s["texts"].update(column="body"), ["no text can be used (180 empty)", "texts.column"]),
        (lambda s: s["embed"].update(encoder="no/where"), ["embed.encoder: no/where"]),
        (lambda s: s["score"].update(recognizer="no/where"), ["score.recognizer: no/where"]),
        (lambda s: s["score"].update(max_cluster_cer=1e-9), ["none of 3 clusters is left", "dropped.jsonl"]),
        (lambda s: s["draw"].update(gama=5), ["gama", "did you mean 'gamma'?"]),
        (lambda s: s["draw"].update(gamma="much"), ["draw.gamma", "much"]),
        (lambda s: s.pop("texts"), ["texts"]),
    ],
)
def test_what_only_the_data_shows(refused, change, words):
    message = refused(change)
    for part in words:
        assert part in message


def test_the_recipe_runs_with_models_and_sizes_swapped(settings, write):
    """Every other key as written, among them the paper's values."""
    path = Path(__file__).parents[2] / "recipes" / "select.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert (recipe["cluster"]["num_clusters"], recipe["draw"]["gamma"], recipe["draw"]["share"]) == (128, 5, 0.01)
    assert (recipe["embed"]["encoder"], recipe["probe"]["texts_per_cluster"]) == ("BAAI/bge-large-en-v1.5", 48)
    natural = Path(settings["output"]).with_name("natural")
    natural.mkdir()
    (natural / "index.json").write_text(json.dumps({"seconds": 6000.0}))
    settings["embed"] |= {"encoder": "tfidf"}
    settings["probe"] |= {"workers": 1}
    settings["draw"] = {"natural": [str(natural)], "max_share": 0.8}
    assert main(["select", "--config", str(path), "--config", str(write(settings))]) == 0
    rows = read_jsonl(Path(settings["output"]) / "manifest.jsonl")
    assert sum(row["estimated_seconds"] for row in rows) >= 60
    texts = json.loads((only(settings["output"], "probe") / "shards" / "index.json").read_text())
    assert texts["num_samples"] == 3 * settings["probe"]["texts_per_cluster"]


def test_after_a_mistake_was_put_right_finished_steps_are_kept(settings, write):
    recognizer = settings["score"]["recognizer"]
    settings["score"]["recognizer"] = "no/where"
    assert main(["select", "--config", str(write(settings))]) == 2
    output = Path(settings["output"])
    probed = only(output, "probe").stat().st_mtime_ns
    settings["score"]["recognizer"] = recognizer
    select(write(settings))
    assert only(output, "probe").stat().st_mtime_ns == probed
