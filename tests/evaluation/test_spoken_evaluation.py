"""The evaluation recipe from dataset files to the table, through the command line, against plain Hugging Face."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer

from salad_lightning.cli import main
from salad_lightning.data.audio import encode_flac
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.evaluation.question_templates import TEMPLATES
from salad_lightning.evaluation.recognizer import Recognizer
from salad_lightning.testing.runs import TinyRun, save_tiny_world
from salad_lightning.testing.shards import random_text, speak_tones
from salad_lightning.testing.tiny import SENTENCES
from salad_lightning.testing.tiny_ctc import save_tiny_ctc
from salad_lightning.training.speech_llm_module import SpeechLLMModule

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.yaml"
TONES = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"
NUM_ITEMS = 10
WORDS = [word.strip(".,:!") for sentence in SENTENCES for word in sentence.split()]


def rows(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        yield {
            "id": f"item{seed}-{number}",
            "question": random_text(rng, rng.randint(3, 5)).rstrip(".").lower(),
            "choices": {"text": [random_text(rng, 1 + c % 2) for c in range(4)], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
        }


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkpoint(world):
    rates = ["--model.llm_lr=3e-3", "--model.connector_lr=1e-2", "--model.context=256"]
    run = world.run("fit", "trained", "--trainer.max_steps=15", *rates, "--trainer.callbacks+=FinalCheckpoint")
    return run.folder / "checkpoints" / "final.ckpt"


@pytest.fixture(scope="module")
def questions(world):
    test, train = (write(world.folder / f"{n}.jsonl", rows(c, s)) for n, c, s in (("test", NUM_ITEMS, 1), ("tr", 6, 2)))
    output = world.folder / "arc"
    options = ["--task", "arc_challenge", "--shots", train, "--num-shots", "2", "--synthesizer", TONES]
    assert main(["questions", test, "--output", str(output), *options]) == 0
    return output


@pytest.fixture(scope="module")
def recognizer(world):
    return save_tiny_ctc(world.folder / "ctc", sorted(set(WORDS)), steps=60)


@pytest.fixture(scope="module")
def evaluated(world, checkpoint, questions, recognizer):
    overlay = world.folder / "evaluate.yaml"
    arc = next(s for s in recipe()["data"]["init_args"]["test"] if s["name"] == "arc_challenge")
    arc["shards"], arc["documents"]["init_args"]["shots"] = str(questions / "questions"), str(questions / "shots")
    bare = {"name": "bare", "shards": str(questions / "questions"), "documents": "ChoiceDocuments"}
    callback = {"class_path": "SpokenEvaluation", "init_args": {"recognizer": str(recognizer)}}
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "default_root_dir": str(world.folder / "evaluated"),
        "callbacks": [callback],
        "enable_progress_bar": False,
    }
    data = {"init_args": {"test": [arc, bare], "num_workers": 0}}
    model = {"init_args": {"checkpoint": str(checkpoint)}}
    overlay.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    arguments = ["test", "--config", str(RECIPE), "--config", str(overlay)]
    assert main(arguments) == 0
    return TinyRun(world.folder / "evaluated"), arguments


def recipe():
    return yaml.safe_load(RECIPE.read_text())


class Plain:
    """One option at a time, examples and question joined by hand: text through plain Hugging Face models."""

    def __init__(self, world, checkpoint):
        self.tokenizer = AutoTokenizer.from_pretrained(world.folder / "llm")
        self.models = {name: AutoModelForCausalLM.from_pretrained(world.folder / "llm").double() for name in "PQ"}
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        prefix = "model.llm.hf."
        self.models["P"].load_state_dict({n.removeprefix(prefix): v for n, v in saved.items() if prefix in n})

        module = SpeechLLMModule.load_from_checkpoint(checkpoint)
        module.configure_model()
        module.load_state_dict(saved, strict=False)
        self.encoder, self.connector = module.model.encoder, module.model.connector

    @torch.no_grad()
    def hears(self, parts, choices):
        """P, with the audio of each part spliced in by hand: ``(text before, transcript, audio, text behind)``."""
        scores = []
        before = "".join(a + b + d for a, b, _, d in parts)
        for choice in choices:
            encoding = self.tokenizer(before + choice, return_offsets_mapping=True)
            ids = torch.tensor(encoding["input_ids"])
            stops = [stop for _, stop in encoding["offset_mapping"]]
            pieces, at, token = [], 0, 0
            for ahead, transcript, audio, behind in parts:
                begin, end = at + len(ahead), at + len(ahead) + len(transcript)
                first, last = (sum(stop <= edge for stop in stops) for edge in (begin, end))
                frames = self.encoder(torch.from_numpy(audio)[None], torch.tensor([len(audio)])).frames[:, :, 0]
                speech = self.connector(frames, torch.tensor([frames.shape[1]])).embeddings.double()
                pieces += [self.models["P"].get_input_embeddings()(ids[token:first])[None], speech]
                at, token = end + len(behind), last
            pieces.append(self.models["P"].get_input_embeddings()(ids[token:])[None])
            logits = self.models["P"](inputs_embeds=torch.cat(pieces, 1)).logits[0].log_softmax(-1)
            answer = ids[sum(stop <= len(before) for stop in stops) :]
            scores.append(float(logits[-len(answer) - 1 : -1].gather(1, answer[:, None]).mean()))
        return scores.index(max(scores))

    @torch.no_grad()
    def best(self, name, before, choices):
        scores = []
        for choice in choices:
            encoding = self.tokenizer(before + choice, return_offsets_mapping=True)
            ids = torch.tensor([encoding["input_ids"]])
            answer = [index for index, (_, stop) in enumerate(encoding["offset_mapping"]) if stop > len(before)]
            log_probs = self.models[name](input_ids=ids).logits[0].log_softmax(-1)
            scores.append(float(np.mean([float(log_probs[i - 1, ids[0, i]]) for i in answer])))
        return scores.index(max(scores))


def samples(folder):
    return [
        decode(raw, source="", sample_rate_hz=16_000) for p in sorted(folder.glob("*.tar")) for raw in read_shard(p)
    ]


def put(text, answer=""):
    return f"Question: {text}\nAnswer: {answer}"


def test_answers_equal_plain_hugging_face(world, checkpoint, questions, recognizer, evaluated):
    plain, heard = Plain(world, checkpoint), Recognizer(str(recognizer))
    items, shots = samples(questions / "questions"), samples(questions / "shots")
    assert (len(items), len(shots)) == (NUM_ITEMS, 2)
    right = evaluated[0].results("items.json")
    rows = []
    for task, examples in (("arc_challenge", shots), ("bare", [])):
        told = [(shot, shot.fields["choices"][shot.fields["answer"]]) for shot in examples]
        for item in items:
            choices, answer = item.fields["choices"], item.fields["answer"]
            read = "".join(put(shot.text, answer) + "\n\n" for shot, answer in told) + put(item.text)
            recognized = [put(heard.transcribe([s.audio])[0], a) + "\n\n" for s, a in told]
            said = "".join(recognized) + put(heard.transcribe([item.audio])[0])
            parts = [("Question: ", s.text, s.audio, f"\nAnswer: {a}\n\n") for s, a in told]
            best = {
                (task, "base_text_accuracy"): plain.best("Q", read, choices),
                (task, "text_accuracy"): plain.best("P", read, choices),
                (task, "speech_accuracy"): plain.hears(
                    [*parts, ("Question: ", item.text, item.audio, "\nAnswer: ")], choices
                ),
                (f"{task} (cascade)", "base_text_accuracy"): plain.best("Q", said, choices),
            }
            for (name, figure), choice in best.items():
                assert right[name][figure][item.key] == (choice == answer), (name, figure, item.key)
            rows.append([choice == answer for choice in best.values()])
    assert len({tuple(column) for column in zip(*rows, strict=True)}) > 2, "the four would not be told apart"


def test_the_table_says_all_that_was_asked(evaluated):
    run, _ = evaluated
    content = run.results("evaluation.json")
    task = content["tasks"]["arc_challenge"]
    rows = task["rows"]
    assert set(rows) == {"base LLM, text", "adapted, text", "adapted, speech", "cascade, speech"}
    for row in rows.values():
        assert row["gap"] == pytest.approx(rows["base LLM, text"]["accuracy"] - row["accuracy"])
        assert row["gap_interval"][0] <= row["gap"] <= row["gap_interval"][1]
        p = row["accuracy"]
        # A second method: the resampled mean of 0 and 1 is binomial.
        exact = [binom.ppf(q, NUM_ITEMS, p) / NUM_ITEMS if 0 < p < 1 else p for q in (0.025, 0.975)]
        assert row["interval"] == pytest.approx(exact, abs=1 / NUM_ITEMS)
    assert task["misalignment"] > 0
    assert task["forgetting"] > 0
    assert 0 <= task["transcription"]["wer"] < 0.9
    text = (run.folder / "evaluation.md").read_text()
    for part in ("cascade, speech", "mean of tasks", task["fingerprint"]["audio"], "95 % interval"):
        assert part in text
    assert (run.folder / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_fingerprints_follow_what_they_are_of(evaluated):
    tasks = evaluated[0].results("evaluation.json")["tasks"]
    first, second = tasks["arc_challenge"]["fingerprint"], tasks["bare"]["fingerprint"]
    assert (first["items"], first["audio"]) == (second["items"], second["audio"])
    assert "shots" in first
    assert "shots" not in second


def test_a_second_run_hears_nothing_again(world, evaluated, monkeypatch):
    run, arguments = evaluated
    before = run.results("evaluation.json")
    monkeypatch.setattr(Recognizer, "transcribe", lambda *_: pytest.fail("it was heard before"))
    assert main(arguments) == 0
    assert run.results("evaluation.json") == before


def test_recordings_in_place_of_a_synthesizer(world, questions, tmp_path):
    items = samples(questions / "questions")
    lines = []
    for number, item in enumerate(items[:3]):
        soundfile.write(tmp_path / f"{number}.wav", item.audio, 16_000, subtype="PCM_16")
        lines.append({"question": item.text, "choices": ["yes", "no"], "answer": "no", "wav": f"{number}.wav"})
    rows_file = write(tmp_path / "own.jsonl", lines)
    output = tmp_path / "own"
    assert main(["questions", rows_file, "--task", "mine", "--audio-column", "wav", "--output", str(output)]) == 0
    found = samples(output / "questions")
    assert [item.text for item in found] == [item.text for item in items[:3]]
    assert all(np.abs(a.audio - b.audio).max() < 1e-3 for a, b in zip(found, items, strict=False))
    assert {(item.fields["answer"], item.fields["task"]) for item in found} == {(1, "mine")}


def test_two_processes_share_the_work(world, evaluated, tmp_path):
    """Nothing but the time may change: each transcribes half, and one writes."""
    _, arguments = evaluated
    options = [f"--trainer.default_root_dir={tmp_path / 'out'}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "salad_lightning", *arguments, *options]
    done = subprocess.run(command, check=False, timeout=300, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = evaluated[0].results("evaluation.json"), TinyRun(tmp_path / "out").results("evaluation.json")
    for name, task in one["tasks"].items():
        assert {k: v for k, v in two["tasks"][name].items() if isinstance(v, dict)} == {
            k: v for k, v in task.items() if isinstance(v, dict)
        }
        assert two["tasks"][name]["misalignment"] == pytest.approx(task["misalignment"], rel=1e-4)
    heard = {
        path.name: len(path.read_text().split("\n")) for path in (tmp_path / "out" / "transcripts").glob("*.jsonl")
    }
    assert heard["arc_challenge-0.jsonl"] == heard["arc_challenge-1.jsonl"] > 1


def test_the_recipe_names_every_task():
    assert [source["name"] for source in recipe()["data"]["init_args"]["test"]] == list(TEMPLATES)


def bad_questions(folder, kind):
    """Shards of one good question and one bad one."""
    audio = encode_flac(speak_tones("the cat sleeps")[0], 16_000)
    record = {"text": "the cat sleeps", "choices": ["yes", "no"], "answer": 0, "prompt": put("{speech}", "{answer}")}
    empty = io.BytesIO()
    soundfile.write(empty, np.zeros(0), 16_000, format="WAV")
    changes = {
        "unreadable audio": ({}, b"no audio at all", "cannot be decoded"),
        "empty audio": ({}, empty.getvalue(), "the audio is empty"),
        "an empty option": ({"choices": ["yes", ""]}, audio, "option 1 has no token"),
        "no such answer": ({"answer": 2}, audio, "`answer` is 2"),
        "unknown field": ({"prompt": "{speech} {foo} {answer}"}, audio, "asks for {foo}"),
    }
    fields, content, message = changes[kind]
    with ShardWriter(folder, "bad", 0) as writer:
        writer.write("good", record, audio)
        writer.write("bad", {**record, **fields}, content, "wav" if kind == "empty audio" else "flac")
    return message


@pytest.mark.parametrize(
    "kind", ["unreadable audio", "empty audio", "an empty option", "no such answer", "unknown field"]
)
def test_bad_questions_leave_no_result(world, checkpoint, tmp_path, capsys, kind):
    message = bad_questions(tmp_path / "bad", kind)
    overlay = tmp_path / "overlay.yaml"
    data = {
        "init_args": {"test": [{"shards": str(tmp_path / "bad"), "documents": "ChoiceDocuments"}], "num_workers": 0}
    }
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "default_root_dir": str(tmp_path / "out"),
        "callbacks": [{"class_path": "SpokenEvaluation"}],
    }
    model = {"init_args": {"checkpoint": str(checkpoint)}}
    overlay.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
    assert main(["test", "--config", str(RECIPE), "--config", str(overlay)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "bad" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_recognizer_that_is_none(world, evaluated, tmp_path, capsys):
    _, arguments = evaluated
    root = f"--trainer.default_root_dir={tmp_path / 'out'}"
    assert main([*arguments, root, f"--trainer.callbacks.recognizer={world.folder / 'llm'}"]) == 2
    assert "no speech recognizer can be loaded" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.json"))
