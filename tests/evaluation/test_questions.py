"""Rows written in the public datasets' own schemas, and the mistakes they come with."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from salad_lightning.cli import main
from salad_lightning.data.format import decode, read_shard
from salad_lightning.evaluation.question_templates import OWN, TEMPLATES, read_question

TONES = "salad_lightning.testing.tone_synthesizer.ToneSynthesizer"
AI2_CHOICES = {"text": ["dry palms", "wet palms", "oil", "lotion"], "label": ["A", "B", "C", "D"]}
# Task, row as published, what it becomes: text, options, right one.
PUBLISHED = {
    "story_cloze, Hugging Face": (
        "story_cloze",
        {
            "story_id": "138d5bfb",
            "input_sentence_1": "Rick grew up in a troubled house.",
            "input_sentence_2": "He never found good support.",
            "input_sentence_3": "It wasn't long before he got shot.",
            "input_sentence_4": "The incident made him change.",
            "sentence_quiz1": "He is happy now.",
            "sentence_quiz2": "He joined a gang.",
            "answer_right_ending": 1,
        },
        "Rick grew up in a troubled house. He never found good support. It wasn't long before he got shot. "
        "The incident made him change.",
        ["He is happy now.", "He joined a gang."],
        0,
    ),
    "story_cloze, CSV of 2016": (
        "story_cloze",
        {
            "InputStoryid": "x",
            "InputSentence1": "One.",
            "InputSentence2": "Two.",
            "InputSentence3": "Three.",
            "InputSentence4": "Four.",
            "RandomFifthSentenceQuiz1": "Five.",
            "RandomFifthSentenceQuiz2": "Six.",
            "AnswerRightEnding": "2",
        },
        "One. Two. Three. Four.",
        ["Five.", "Six."],
        1,
    ),
    "mmsu, VoiceBench": (
        "mmsu",
        {
            "question_id": "70",
            "category": "law",
            "prompt": "Which came first? \nA. A chicken. \nB. An egg, e.g. A. chick's. \nC. Both. \nD. None.",
            "reference": "B",
            "src": "x",
        },
        "Which came first? \nA. A chicken. \nB. An egg, e.g. A. chick's. \nC. Both. \nD. None.",
        ["A chicken.", "An egg, e.g. A. chick's.", "Both.", "None."],
        1,
    ),
    "mmsu, MMLU-Pro": (
        "mmsu",
        {
            "question_id": 1,
            "question": "Two and two?",
            "options": ["3", "4", "5"],
            "answer": "B",
            "answer_index": 1,
            "category": "math",
            "cot_content": "",
            "src": "ori_mmlu",
        },
        "Two and two?",
        ["3", "4", "5"],
        1,
    ),
    "mmsu, choice fields": (
        "mmsu",
        {
            "id": "a",
            "question": "Which?",
            "choice_a": "one",
            "choice_b": "two",
            "choice_c": "three",
            "choice_d": "four",
            "answer_gt": "three",
        },
        "Which?",
        ["one", "two", "three", "four"],
        2,
    ),
    "openbookqa, Hugging Face": (
        "openbookqa",
        {"id": "7-980", "question_stem": "The sun is responsible for", "choices": AI2_CHOICES, "answerKey": "D"},
        "The sun is responsible for",
        AI2_CHOICES["text"],
        3,
    ),
    "openbookqa, as first published": (
        "openbookqa",
        {
            "id": "7-980",
            "question": {
                "stem": "The sun is responsible for",
                "choices": [{"text": "puppies", "label": "A"}, {"text": "plants", "label": "B"}],
            },
            "answerKey": "B",
        },
        "The sun is responsible for",
        ["puppies", "plants"],
        1,
    ),
    "hellaswag": (
        "hellaswag",
        {
            "ind": 24,
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "ctx": "A man is sitting on a roof. he",
            "endings": ["is using wrap.", "is [step] ripping  tiles.", "holds a cube.", "starts pulling."],
            "source_id": "activitynet~v_-JhWjGDPHMY",
            "split": "val",
            "split_type": "indomain",
            "label": "3",
        },
        "Roof shingle removal: A man is sitting on a roof. he",
        ["is using wrap.", "is ripping tiles.", "holds a cube.", "starts pulling."],
        3,
    ),
    "arc_challenge, Hugging Face": (
        "arc_challenge",
        {"id": "Mercury_1", "question": "Which rubs most?", "choices": AI2_CHOICES, "answerKey": "A"},
        "Which rubs most?",
        AI2_CHOICES["text"],
        0,
    ),
    "arc_challenge, labels from 1": (
        "arc_challenge",
        {
            "id": "NYSEDREGENTS_1",
            "question": {"stem": "Which?", "choices": [{"text": t, "label": str(n + 1)} for n, t in enumerate("xyzw")]},
            "answerKey": "4",
        },
        "Which?",
        ["x", "y", "z", "w"],
        3,
    ),
    "piqa": (
        "piqa",
        {"goal": "When boiling butter, when it's ready, you can", "sol1": "Pour it.", "sol2": "Freeze it.", "label": 1},
        "When boiling butter, when it's ready, you can",
        ["Pour it.", "Freeze it."],
        1,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows(name):
    task, row, text, choices, answer = PUBLISHED[name]
    question = read_question(row, task, TEMPLATES[task], name)
    assert (question.text, question.choices, question.answer) == (text, choices, answer)
    assert question.category == (row.get("category") or row.get("split_type") or task)
    assert question.prompt == TEMPLATES[task].prompt


def test_every_task_is_tried():
    assert {task for task, *_ in PUBLISHED.values()} == set(TEMPLATES)


def test_rows_of_ones_own():
    row = {"context": "It rains.", "question": "What falls?", "choices": ["water", "sun"], "answer": "water"}
    question = read_question(row, "mine", OWN, "")
    assert question[:3] == ("It rains. What falls?", ["water", "sun"], 0)
    assert read_question(row | {"answer": 1, "prompt": "{speech}: {answer}"}, "mine", OWN, "")[2:4] == (
        1,
        "{speech}: {answer}",
    )
    assert read_question({"context": "So", "choices": ["1", "0"], "answer": "0"}, "mine", OWN, "").answer == 1


def run(tmp_path, lines, *options, task="mine", name="rows.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    head = ["questions", str(tmp_path / name), "--task", task, "--output", str(output), "--synthesizer", TONES]
    return main([*head, *options]), output


def samples(folder):
    return [
        decode(raw, source="", sample_rate_hz=16_000) for p in sorted(folder.glob("*.tar")) for raw in read_shard(p)
    ]


FINE = {"question": "the quick brown fox", "choices": ["yes", "no"], "answer": 0}


def test_examples_of_rows_and_of_a_file(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(FINE) + "\n" + json.dumps(FINE | {"question": "so what"}) + "\n")
    own = [FINE | {"question": "the cat"}, FINE | {"question": "the sun", "answer": 1}]
    code, output = run(
        tmp_path, [FINE | {"shots": own}, FINE], "--shots", str(tmp_path / "train.jsonl"), "--num-shots=1"
    )
    assert code == 0
    first, second = samples(output / "questions")
    assert first.fields["shots"] == ["000000000-shot0", "000000000-shot1"]
    assert "shots" not in second.fields
    assert first.words is not None
    assert {shot.key: shot.text for shot in samples(output / "shots")} == {
        "000000000": FINE["question"],
        "000000000-shot0": "the cat",
        "000000000-shot1": "the sun",
    }


def test_piqas_labels_lie_in_a_file_of_their_own(tmp_path):
    rows = [{"goal": f"do {number}", "sol1": "so", "sol2": "not so"} for number in ("one", "two")]
    (tmp_path / "labels.lst").write_text("1\n0\n")
    code, output = run(tmp_path, rows, "--labels", str(tmp_path / "labels.lst"), task="piqa")
    assert code == 0
    assert [item.fields["answer"] for item in samples(output / "questions")] == [1, 0]


@pytest.mark.parametrize("labels", ["1\n", "1\n0\n1\n"])
@pytest.mark.parametrize("options", [(), ("--limit=1",)])
def test_labels_of_another_number_of_rows_are_refused(tmp_path, capsys, labels, options):
    rows = [{"goal": f"do {number}", "sol1": "so", "sol2": "not so"} for number in ("one", "two")]
    (tmp_path / "labels.lst").write_text(labels)
    code, output = run(tmp_path, rows, "--labels", str(tmp_path / "labels.lst"), *options, task="piqa")
    assert code == 2
    error = capsys.readouterr().err
    assert "labels for 2 rows" in error
    assert "labels.lst" in error
    assert not output.exists()


def test_recordings_inside_parquet(tmp_path):
    _, output = run(tmp_path, [FINE])
    raw = next(iter(read_shard(sorted((output / "questions").glob("*.tar"))[0])))
    audio = {"bytes": raw.members["flac"], "path": "a.flac"}
    prompt = "Which? A. the sun B. the cat"
    table = pyarrow.Table.from_pylist([{"audio": audio, "prompt": prompt, "reference": "B"}])
    pyarrow.parquet.write_table(table, tmp_path / "bench.parquet")
    arguments = ["questions", str(tmp_path / "bench.parquet"), "--task", "openbookqa", "--audio-column", "audio"]
    assert main([*arguments, "--output", str(tmp_path / "new")]) == 0
    (item,) = samples(tmp_path / "new" / "questions")
    (before,) = samples(output / "questions")
    assert (item.text, item.fields["answer"], item.fields["choices"]) == (prompt, 1, ["the sun", "the cat"])
    assert (item.audio == before.audio).all()


BAD = {
    "other fields": ({"goal": "x"}, "mine", (), "the row has not the fields of mine"),
    "wrong task": (FINE, "piqa", (), "it takes goal, sol1, sol2, label"),
    "empty option": (FINE | {"choices": ["yes", " "]}, "mine", (), "choice 1 is empty"),
    "one option": (FINE | {"choices": ["yes"]}, "mine", (), "there are 1 choices"),
    "no question": (FINE | {"question": " "}, "mine", (), "the question is empty"),
    "no such answer": (FINE | {"answer": 2}, "mine", (), "`answer` is 2"),
    "answer is no option": (FINE | {"answer": "maybe"}, "mine", (), "none of the 2 choices"),
    "no label": ({"goal": "x", "sol1": "a", "sol2": "b", "label": -1}, "piqa", (), "published without"),
    "unknown field": (FINE, "mine", ("--prompt={speech} {foo} {answer}",), "asks for {foo}"),
    "no place": (FINE, "mine", ("--prompt={speech}",), "has no {answer}"),
    "no parse": (FINE, "mine", ("--prompt={speech} {answer",), "does not parse"),
    "no shots": (FINE, "mine", ("--num-shots=0",), "--num-shots is 0"),
    "bad shots": (FINE | {"shots": "x"}, "mine", (), "no list of questions"),
    "no recording": (FINE | {"wav": "no.wav"}, "mine", ("--audio-column=wav",), "there is no recording"),
    "a voice that does not parse": (FINE, "mine", ("--voice={voice: ",), "not a mapping"),
    "no such file of shots": (FINE, "mine", ("--shots=none.jsonl",), "the file does not exist"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_write_nothing(tmp_path, capsys, kind):
    row, task, options, message = BAD[kind]
    code, output = run(tmp_path, [FINE if task == "mine" else row, row], *options, task=task)
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(output.glob("**/*.tar"))
    assert not list(output.glob("*.jsonl"))


def test_a_folder_with_shards_is_kept(tmp_path, capsys):
    assert run(tmp_path, [FINE])[0] == 0
    assert run(tmp_path, [FINE])[0] == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(tmp_path, [FINE | {"question": "the sun"}], "--overwrite")[0] == 0
    assert samples(tmp_path / "out" / "questions")[0].text == "the sun"
