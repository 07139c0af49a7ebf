"""Every command of README and guides is run, page by page in its order, in a folder with what the page takes as given.

That folder has small things under the names that the pages use: models with random weights at ``Qwen/Qwen2.5-3B`` and
the like, corpora of a few utterances in the form in which they are published, a Stage I of two steps, the demo's
results, and the project's own recipes with sizes cut (`SIZES`). A command that fails on them fails the test.

Not run as they stand:

* ``make demo`` and ``make test``: the first takes a quarter of an hour and has a test of its own, at the end, for
  whoever sets ``SALAD_TEST_DEMO=1``; the second runs this.
* ``make check`` is ``make lint``, which is run, and ``make test``.
* ``hf download``: no network; that the command exists is not ours to test.
* ``srun``, ``sbatch`` and ``torchrun``: one node of one process.
* ``python -m benchmarks…``: with ``--help``, which checks the options; benchmarks have tests of their own.
* ``pip install``: without dependencies, and into a folder of the test.
* Kokoro's voices are in the tests of its package, a new connector and the module of the subclassing guide in
  ``test_documents.py``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import wave
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from document_blocks import DOCUMENTS, ROOT, blocks, command_lines, shown_files, words_of
from transformers import BertConfig, BertModel

from salad_lightning.cli import main
from salad_lightning.data.audio import encode_flac
from salad_lightning.testing.shards import (
    random_text,
    save_choice_shards,
    save_speech_shards,
    save_text_shards,
    speak_tones,
)
from salad_lightning.testing.tiny import SENTENCES, save_tiny_llm, save_tiny_tokenizer
from salad_lightning.testing.tiny_ctc import save_tiny_ctc
from salad_lightning.testing.tiny_encoders import save_tiny_causal_conv, save_tiny_mimi, save_tiny_wavlm
from salad_lightning.testing.tiny_whisper import save_tiny_whisper_recognizer

pytestmark = pytest.mark.slow

# What is put in place of a recipe's value, wherever the key stands.
SIZES = {
    "accelerator": "cpu",
    "accumulate_grad_batches": 1,
    "batch_size": 8,
    "compile": False,
    "context": 192,
    "data_parallel_size": 1,
    "devices": 1,
    "eval_rows_per_batch": 2,
    "limit_val_batches": 1,
    "max_cluster_cer": 100.0,  # the small recognizer understands tones, not voices
    "max_share": 1.0,
    "max_steps": 2,
    "max_text_cer": 100.0,
    "num_clusters": 2,
    "num_nodes": 1,
    "num_workers": 0,
    "rollout_tokens": 4,
    "rollouts_per_batch": 2,
    "rows": 4,
    "rows_per_batch": 2,
    "share": 0.5,
    "speech_words": [2, 5],  # so that every text of 10 words is heard and predicted
    "text_words": [1, 4],
    "texts_per_cluster": 2,
    "val_check_interval": 2,
    "workers": 1,
}
CONNECTOR = {"num_layers": 1, "dim": 32, "mlp_dim": 32, "num_heads": 4, "num_kv_heads": 2}
# Every half hour in a recipe, every step here: there is something to go on from.
LAST = {"filename": "last", "every_n_train_steps": 1, "enable_version_counter": False}


def smaller(recipe):
    """A recipe with its sizes cut."""
    if isinstance(recipe, list):
        return [smaller(item) for item in recipe]
    if not isinstance(recipe, dict):
        return recipe
    if recipe.get("class_path") == "CausalTransformerConnector":
        return {**recipe, "init_args": CONNECTOR}
    if "train_time_interval" in recipe:
        return LAST
    kept = {key: SIZES[key] if key in SIZES and value != 0 else smaller(value) for key, value in recipe.items()}
    return kept | ({"num_sanity_val_steps": 0, "accelerator": "cpu"} if "default_root_dir" in kept else {})


def run(*words):
    assert main([str(word) for word in words]) == 0, " ".join(map(str, words))


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_models(folder):
    save_tiny_llm(folder / "Qwen" / "Qwen2.5-3B")
    save_tiny_mimi(folder / "kyutai" / "mimi")
    save_tiny_wavlm(folder / "microsoft" / "wavlm-base-plus")
    for size in ("small", "large-v3"):
        save_tiny_whisper_recognizer(folder / "openai" / f"whisper-{size}")
    words = sorted({word.strip(".,:!") for sentence in SENTENCES for word in sentence.split()})
    save_tiny_ctc(folder / "facebook" / "wav2vec2-base-960h", words, steps=20)
    embeddings = folder / "BAAI" / "bge-large-en-v1.5"
    save_tiny_tokenizer(embeddings)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=300, **small)).save_pretrained(embeddings)


def save_libriheavy(folder):
    """One long recording, and cuts of it with the two texts of ``custom.texts``."""
    folder.mkdir(parents=True)
    audio, words = speak_tones("the quick brown fox jumps over the lazy dog")
    (folder / "book.flac").write_bytes(encode_flac(audio, 16_000))
    source = {"type": "file", "channels": [0], "source": "book.flac"}
    seconds = len(audio) / 16_000
    recording = {"id": "book", "sources": [source], "sampling_rate": 16_000, "num_samples": len(audio),
                 "duration": seconds, "channel_ids": [0]}  # fmt: skip
    cuts = []
    for number, (first, stop) in enumerate(((0, 4), (4, 9))):
        start, text = words[first][1], " ".join(word[0] for word in words[first:stop])
        length = words[stop - 1][2] - start
        custom = {"texts": [text.capitalize() + ".", text.upper()]}
        supervision = {"id": f"cut{number}", "recording_id": "book", "start": 0.0, "duration": length, "channel": 0,
                       "speaker": "1", "custom": custom}  # fmt: skip
        cuts.append({"id": f"cut{number}", "start": start, "duration": length, "channel": 0, "type": "MonoCut",
                     "supervisions": [supervision], "recording": recording})  # fmt: skip
    with gzip.open(folder / "libriheavy_cuts_small.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(cut) + "\n" for cut in cuts)


def save_emilia(folder):
    import soundfile  # here: it writes MP3, which is what Emilia has

    folder.mkdir(parents=True)
    with tarfile.open(folder / "EN-B000000.tar", "w") as tar:
        for number, text in enumerate(["the cat sleeps in the warm sun", "nobody is awake to count them"]):
            key, mp3 = f"EN_B00000_S00000_W{number:06d}", io.BytesIO()
            soundfile.write(mp3, speak_tones(text, sample_rate_hz=24_000)[0], 24_000, format="MP3")
            record = {"id": key, "wav": f"{key}.mp3", "text": text, "speaker": "EN_B00000_S00000", "language": "en",
                      "dnsmos": 3.3}  # fmt: skip
            for extension, content in (("mp3", mp3.getvalue()), ("json", json.dumps(record).encode())):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def save_parquet(folder, **columns):
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "000_00000.parquet")


def save_downloads(folder):
    texts = ["A page about boats.", "A page about stars."]
    save_libriheavy(folder / "libriheavy")
    save_emilia(folder / "emilia" / "Emilia-YODAS" / "EN")
    save_parquet(folder / "smollm" / "cosmopedia-v2", prompt=["x", "y"], text=texts, token_length=[5, 5])
    save_parquet(folder / "fineweb_edu" / "sample" / "10BT", text=texts, url=["a", "b"], int_score=[3, 4])


def save_recordings(manifest, audio):
    """FLAC files in the folder ``audio`` beside the manifest, which has their word times."""
    rows = []
    for name, text in (("one", "the quick brown fox"), ("two", "seven bright stars")):
        samples, words = speak_tones(text)
        path = manifest.parent / audio / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_flac(samples, 16_000))
        rows.append({"audio": str(Path(audio) / path.name), "text": text, "words": words})
    write_lines(manifest, rows)


def save_corpora(folder):
    data = folder / "data"
    for number, name in enumerate(("libriheavy", "yodas", "heldout", "active", "mine")):
        save_speech_shards(folder / "tars" / name, num_samples=6, seed=number)
        run("prepare", "--tars", folder / "tars" / name, "--output", data / name)
    save_speech_shards(data / "raw" / "libriheavy", num_samples=4, timed=False)
    for number, name in enumerate(("smollm_corpus", "fineweb_edu")):
        save_text_shards(data / name, num_words=(10, 16), seed=number)
    save_choice_shards(data / "my_questions")
    choices = {"text": ["dry palms", "wet palms", "oil", "lotion"], "label": ["A", "B", "C", "D"]}
    for part, questions in (("train", ["Which is best?", "Which is worst?"]), ("test", ["Which is warm?"])):
        rows = [{"id": str(i), "question": q, "choices": choices, "answerKey": "A"} for i, q in enumerate(questions)]
        write_lines(folder / "arc" / f"{part}.jsonl", rows)
    save_recordings(folder / "libriheavy.jsonl", "libriheavy")
    save_recordings(folder / "recordings" / "manifest.jsonl", ".")
    with wave.open(str(folder / "question.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes((speak_tones("seven bright stars")[0] * 32767).astype("<i2").tobytes())


def save_demo(folder):
    """What `make demo` leaves and the recipes in ``scale/`` name, but for checkpoints."""
    save_tiny_llm(folder / "teacher")
    save_tiny_causal_conv(folder / "encoder")
    shutil.copytree(folder.parents[1] / "facebook" / "wav2vec2-base-960h", folder / "recognizer")
    shards = folder / "shards"
    for number, name in enumerate(("speech_train", "speech_train_encoded", "active_encoded")):
        save_speech_shards(folder / "tars" / name, num_samples=8, seed=10 + number)
        run("prepare", "--tars", folder / "tars" / name, "--output", shards / name)
    for name in ("speech_val", "speech_test"):
        save_choice_shards(shards / name)
    for name in ("text_mix", "text_broad"):
        save_text_shards(shards / name)
    save_recordings(folder / "speech" / "train" / "manifest.jsonl", ".")
    rng = random.Random(0)
    write_lines(folder / "world" / "pool.jsonl", [{"text": random_text(rng, 6)} for _ in range(40)])
    write_lines(folder / "world" / "text_mix.jsonl", [{"text": random_text(rng, 9)} for _ in range(8)])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What the pages take as given."""
    folder = tmp_path_factory.mktemp("given")
    for name in ("recipes", "plugins"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
        for path in (folder / name).glob("**/*.yaml"):
            path.write_text(yaml.safe_dump(smaller(yaml.safe_load(path.read_text())), sort_keys=False))
    evaluation = folder / "recipes" / "evaluate.yaml"
    content = yaml.safe_load(evaluation.read_text())
    tests = content["data"]["init_args"]["test"]  # "comment out what you do not have"
    content["data"]["init_args"]["test"] = [test for test in tests if test["name"] == "arc_challenge"]
    evaluation.write_text(yaml.safe_dump(content))
    save_models(folder)
    save_corpora(folder)
    save_downloads(folder / "downloads")
    save_demo(folder / "outputs" / "demo")
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    try:
        for stage in ("stage1", "stage2"):
            run("fit", "--config", f"recipes/{stage}.yaml")
        demo = Path("outputs/demo")
        own = f"--trainer.default_root_dir={demo / 'stage1_kl-0'}"
        run("fit", "--config", "recipes/stage1.yaml", "--config", "recipes/scale/mini.yaml", own)
        for name in ("warmup", "stage2_active-0"):
            shutil.copytree(demo / "stage1_kl-0", demo / name)
        for steps in (Path("outputs/selection"), demo / "selection"):
            texts = [{"id": str(number), "text": text} for number, text in enumerate(("a small boat", "the warm sun"))]
            write_lines(steps / "manifest.jsonl", texts)
        run("export", "outputs/stage1/checkpoints/final.ckpt", "my-model")
        questions = ("arc/test.jsonl", "--shots", "arc/train.jsonl", "--task", "arc_challenge")
        run("questions", *questions, "--output", "data/evaluation/arc_challenge")
    finally:
        os.chdir(before)
        # A sharded run leaves its port there, which processes of later tests would try to take.
        os.environ.clear()
        os.environ.update(environment)
    return folder


@pytest.fixture
def folder(document, given, tmp_path, monkeypatch):
    """A copy of it with the files that the page shows, in which the test runs."""
    folder = shutil.copytree(given, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(folder)
    with shown_files(document, folder):
        yield folder


def without_results(words):
    """Take away what the command says it will write and an earlier one left, unless it asks to replace it."""
    results = [words[index + 1] for index, word in enumerate(words) if word == "--output"]
    results += words[3:4] if words[1] in ("export", "consolidate") else []
    for path in map(Path, results):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    return [Path(path) for path in results]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if command_lines(document)])
def test_commands_run(document, folder):
    for line in command_lines(document):
        words = words_of(line)
        if "KokoroSynthesizer" not in words:
            assert KNOWN[words[0]](words) == 0, line
    for block in blocks(document):
        if block.language == "python" and not block.title:
            exec(compile(block.text, document, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("document", ["README.md"])
def test_a_wrong_command_is_found(folder):
    stage1 = ["salad-lightning", "fit", "--config", "recipes/stage1.yaml"]
    assert salad_lightning([*stage1, "--model.init_args.connector=NoConnector"])
    assert salad_lightning([*stage1, "--data.init_args.train.0.shards=data/none"])
    assert salad_lightning(["salad-lightning", "prepare", "--nonsense"])
    with pytest.raises(AssertionError):
        make(["make", "nothing"])


def salad_lightning(words):
    results = without_results(words)
    try:
        code = main(words[1:])
    except SystemExit as stop:  # of --help
        code = stop.code
    return code or sum(not path.exists() for path in results)


def torchrun(words):
    """One process on one node, started as the real thing."""
    one = {"--nproc-per-node": "1", "--nnodes": "1", "--rdzv-endpoint": "localhost:0"}
    words = [part for word in words for part in (word.split("=") if word.split("=")[0] in one else [word])]
    words = [one.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stderr[-3000:] if done.returncode else 0


def make(words):
    targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[1] in " ".join(targets).split()
    # In another environment than its own, `make` would install everything.
    if (words[1] != "lint" and len(words) == 2) or not (ROOT / ".venv").is_dir():
        return 0
    command = ["make", *words[1:]]
    files = {"COVERAGE_FILE": str(Path.cwd() / "coverage")}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | files, capture_output=True, text=True, timeout=300)
    return done.stdout[-3000:] + done.stderr[-3000:] if done.returncode else 0


def pip(words):
    command = [sys.executable, "-m", *words, "--no-deps", "--no-index", "--no-build-isolation", "--target", "installed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stderr[-3000:] if done.returncode else len(list(Path("installed").glob("salad_*/py.typed"))) - 1


def hf(words):
    return words[1] != "download"


def python(words):
    """Measuring takes its time, and a GPU: here only the options must be right. Benchmarks have tests of their own."""
    command = [sys.executable, *words[1:], "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stderr[-3000:] if done.returncode else 0


KNOWN = {"salad-lightning": salad_lightning, "torchrun": torchrun, "make": make, "pip": pip, "hf": hf, "python": python}


@pytest.mark.skipif("SALAD_TEST_DEMO" not in os.environ, reason="a quarter of an hour: SALAD_TEST_DEMO=1 runs it")
def test_make_demo(tmp_path):
    """The whole demo in an empty folder, and the figures that it is there to show."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    subprocess.run([sys.executable, "-m", "salad_lightning", "demo"], cwd=tmp_path, check=True)
    report = json.loads((tmp_path / "outputs" / "demo" / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert set(arms) == {"stage1_kl", "stage1_nll", "stage1_more", "stage2_active", "stage2_uniform"}
    kl = arms["stage1_kl"]
    assert kl["speech_accuracy"]["heard"] >= 0.90
    assert kl["text_accuracy"]["heard"] - kl["speech_accuracy"]["heard"] <= 0.10
    assert kl["text_accuracy"]["unheard"] >= 0.97
    assert kl["forgetting"]["unheard"] <= arms["stage1_nll"]["forgetting"]["unheard"] / 5
    assert arms["stage2_active"]["misalignment"]["unheard"] < arms["stage2_uniform"]["misalignment"]["unheard"]
