"""`validate`, `test` and `predict` through the command line, against plain Hugging Face one item at a time."""

from __future__ import annotations

import json
import math
import tarfile

import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from salad_lightning.cli import main
from salad_lightning.testing.runs import TinyRun, save_tiny_world
from salad_lightning.training.speech_llm_module import SpeechLLMModule

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def checkpoint(world):
    """Far enough from the teacher that all three accuracies can differ."""
    rates = ["--model.llm_lr=3e-3", "--model.connector_lr=1e-2"]
    save = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    run = world.run("fit", "trained", "--trainer.max_steps=15", *rates, *save)
    return run.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def tested(world, checkpoint):
    return world.run("test", "tested", f"--ckpt_path={checkpoint}", "--data.eval_rows_per_batch=2")


def items(world):
    for path in sorted(world.folder.glob("choice/*.tar")):
        with tarfile.open(path) as tar:
            for name in sorted(tar.getnames()):
                if name.endswith(".json"):
                    record = json.load(tar.extractfile(name))
                    audio, rate = soundfile.read(tar.extractfile(name.replace(".json", ".flac")), dtype="float32")
                    assert rate == 16_000
                    yield name.removesuffix(".json"), record, torch.from_numpy(audio)


class Plain:
    """One option at a time: no packing, no masks, no code of the package but the encoder and the connector."""

    def __init__(self, world, checkpoint):
        self.tokenizer = AutoTokenizer.from_pretrained(world.folder / "llm")
        self.base = AutoModelForCausalLM.from_pretrained(world.folder / "llm").double()
        self.adapted = AutoModelForCausalLM.from_pretrained(world.folder / "llm").double()
        saved = torch.load(checkpoint, weights_only=True)["state_dict"]
        prefix = "model.llm.hf."
        self.adapted.load_state_dict({n.removeprefix(prefix): v for n, v in saved.items() if n.startswith(prefix)})
        module = SpeechLLMModule.load_from_checkpoint(checkpoint)
        module.configure_model()
        module.load_state_dict(saved, strict=False)
        self.encoder, self.connector = module.model.encoder, module.model.connector

    @torch.no_grad()
    def log_probs(self, record, audio, choice):
        """Log-probabilities of an option's tokens: speech, text, original model."""
        text = record["text"]
        encoding = self.tokenizer(f"{text} {record['choices'][choice]}", return_offsets_mapping=True)
        ids = torch.tensor(encoding["input_ids"])
        stops = [stop for _, stop in encoding["offset_mapping"]]
        heard = sum(stop <= len(text) for stop in stops)
        first = sum(stop <= len(text) + 1 for stop in stops)  # a token that is the space alone is read, not scored
        answer = ids[first:]
        frames = self.encoder(audio[None], torch.tensor([len(audio)])).frames[:, :, 0]
        speech = self.connector(frames, torch.tensor([frames.shape[1]])).embeddings.double()
        inputs = torch.cat([speech, self.adapted.get_input_embeddings()(ids[heard:])[None]], 1)
        by_speech = self.adapted(inputs_embeds=inputs).logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
        by_text, by_base = (
            model(input_ids=ids[None]).logits[0].log_softmax(-1)[first - 1 : -1] for model in (self.adapted, self.base)
        )
        rows = {"speech": by_speech, "text": by_text, "base_text": by_base}
        return answer.tolist(), {name: row.gather(1, answer[:, None])[:, 0] for name, row in rows.items()}, rows


@pytest.fixture(scope="module")
def plain(world, checkpoint):
    return Plain(world, checkpoint)


def test_accuracies_equal_plain_hugging_face(world, plain, tested):
    right = {"speech": [], "text": [], "base_text": []}
    domains = []
    for _, record, audio in items(world):
        options = [plain.log_probs(record, audio, choice)[1] for choice in range(len(record["choices"]))]
        for name, flags in right.items():
            scores = [float(option[name].mean()) for option in options]
            flags.append(scores.index(max(scores)) == record["answer"])
        domains.append(record["domain"])
    result = tested.results()["choice"]
    assert len(domains) == 12
    for name, flags in right.items():
        assert result["all"][f"{name}_accuracy"] == pytest.approx(sum(flags) / 12), name
        for domain in ("d0", "d1"):
            mine = [flag for flag, where in zip(flags, domains, strict=True) if where == domain]
            assert result["groups"][f"{name}_accuracy"][domain] == pytest.approx(sum(mine) / len(mine)), (name, domain)
    # Three different rows of flags, or the comparison would not tell the three apart.
    assert len({tuple(flags) for flags in right.values()}) == 3
    assert result["all"]["gap"] == pytest.approx(result["all"]["base_text_accuracy"] - result["all"]["speech_accuracy"])


def test_figures_per_token_equal_plain_hugging_face(world, plain, tested):
    """M, F, KL and NLL count the right options alone."""
    sums = dict.fromkeys(("nll", "kl", "misalignment", "forgetting"), 0.0)
    count = 0
    for _, record, audio in items(world):
        answer, log_probs, rows = plain.log_probs(record, audio, record["answer"])
        sums["nll"] -= float(log_probs["speech"].sum())
        for name, first, second in (
            ("kl", "base_text", "speech"),
            ("misalignment", "text", "speech"),
            ("forgetting", "base_text", "text"),
        ):
            sums[name] += float((rows[first].exp() * (rows[first] - rows[second])).sum())
        count += len(answer)
    result = tested.results()["choice"]["all"]
    for name, total in sums.items():
        assert result[name] == pytest.approx(total / count, rel=1e-4), name


def test_figures_do_not_depend_on_the_batch_size(world, checkpoint, tested):
    alone = world.run("test", "alone", f"--ckpt_path={checkpoint}", "--data.eval_rows_per_batch=1")
    for name, value in tested.results()["choice"]["all"].items():
        assert alone.results()["choice"]["all"][name] == pytest.approx(value, rel=1e-4), name


def test_predict_writes_log_probabilities(world, checkpoint, plain):
    run = world.run("predict", "predicted", f"--ckpt_path={checkpoint}")
    rows = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 12 * 4
    by_key = {(row["key"], row["choice"]): row for row in rows}
    for key, record, audio in list(items(world))[:3]:
        for choice in range(4):
            answer, log_probs, _ = plain.log_probs(record, audio, choice)
            row = by_key[key, choice]
            assert row["tokens"] == answer
            for name in ("speech", "text", "base_text"):
                column = f"{name}_log_probs".replace("base_text", "base")
                assert row[column] == pytest.approx(log_probs[name].tolist(), rel=1e-4), name


def test_validate_logs_what_fit_would(world, checkpoint):
    run = world.run("validate", "validated", f"--ckpt_path={checkpoint}")
    for name in ("nll", "kl", "misalignment", "forgetting"):
        (value,) = run.column(f"val/speech/{name}")
        assert math.isfinite(value), name
        assert value > 0, name


def test_text_accuracy_of_a_text_model(world, plain):
    """`TextLMModule` on the same items: what the original model scores."""
    overlay = world.folder / "text.yaml"
    overlay.write_text(
        "model:\n  class_path: TextLMModule\n  init_args:\n"
        f"    llm: {world.folder / 'llm'}\n    objective: NLLObjective\n    context: 128\n"
        "data: {class_path: SpeechDataModule, init_args: {test: [{shards: "
        f"{world.folder / 'choice'}, documents: {{class_path: TemplateDocuments, init_args: "
        "{template: '{speech} {answer}', all_choices: true}}}]}}\n"
        f"trainer: {{accelerator: cpu, default_root_dir: {world.folder / 'text'}, enable_progress_bar: false}}\n"
    )
    assert main(["test", "--config", str(overlay)]) == 0
    right = []
    for _, record, audio in items(world):
        scores = [float(plain.log_probs(record, audio, choice)[1]["base_text"].mean()) for choice in range(4)]
        right.append(scores.index(max(scores)) == record["answer"])
    assert TinyRun(world.folder / "text").column("test/text_accuracy") == pytest.approx([sum(right) / 12])


def test_a_part_of_a_set(world, checkpoint, tested, caplog):
    """An item counts with all its options, or not at all."""
    options = [f"--ckpt_path={checkpoint}", "--data.eval_rows_per_batch=1", "--trainer.limit_test_batches=3"]
    with pytest.warns(UserWarning, match="items are not counted, as some of their options were not read"):
        part = world.run("test", "part", *options)
    found, whole = part.results("items.json")["choice"], tested.results("items.json")["choice"]
    for name, right in found.items():
        assert 0 < len(right) < len(whole[name])
        assert right == {key: whole[name][key] for key in right}
        assert part.results()["choice"]["all"][name] == pytest.approx(sum(right.values()) / len(right))
