"""An export against the module it was made of, and what is wrong with folders."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, pipeline

from salad_lightning import __version__
from salad_lightning.cli import main
from salad_lightning.connectors.causal_transformer import CausalTransformerConnector
from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.connectors.qformer import QFormerConnector
from salad_lightning.data.packing import collate
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.encoders.mimi import MimiEncoder
from salad_lightning.encoders.ssl import SelfSupervisedEncoder
from salad_lightning.encoders.whisper import WhisperEncoder
from salad_lightning.errors import UserError
from salad_lightning.export import SaladForConditionalGeneration, SaladProcessor, load_pretrained, save_speech_llm
from salad_lightning.export.parts import copy_folders
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.testing.tiny_encoders import save_tiny_mimi, save_tiny_wavlm, save_tiny_whisper
from salad_lightning.training.from_checkpoint import trained_module

_NARROW = {"num_layers": 1, "dim": 16, "mlp_dim": 32, "num_heads": 2, "num_kv_heads": 1}

# What a user's process does that has only transformers and this package.
FRESH = """
import sys, torch
import salad_lightning.export
from transformers import AutoConfig, AutoModel, AutoProcessor
from salad_lightning.data.packing import collate
from salad_lightning.export import SpeechLanguageModel
folder, audio, out = sys.argv[1:]
model = AutoModel.from_pretrained(folder)
ready = SpeechLanguageModel(model, AutoProcessor.from_pretrained(folder))
document = ready.prepare("say {speech} again", audio)
with torch.no_grad():
    logits = model(collate([[document]], context=128, rows_per_batch=1, trim=True)).logits
text = ready.generate(audio, "say {speech} again", max_new_tokens=12)
from transformers import pipeline
piped = pipeline("speech-text-generation", model=folder)(audio, prompt="say {speech} again", max_new_tokens=12)
assert piped == {"generated_text": text}, piped
torch.save({"logits": logits, "text": text, "type": AutoConfig.from_pretrained(folder).model_type}, out)
"""


def audio_file(folder, seconds=0.7, rate=16_000, name="audio.wav"):
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    path = folder / name
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 300 * time * (1 + time)), rate)
    return path


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_logits_and_tokens(checkpoint, exported, world, model, tmp_path):
    audio = audio_file(tmp_path)
    trained = trained_module(str(checkpoint)).module
    document = model.prepare("say {speech} again", audio)
    assert len(document.spans) == 1
    batch = collate([[document]], context=128, rows_per_batch=1, trim=True)
    with torch.no_grad():
        hf = trained.model.llm.hf(inputs_embeds=trained.model.embed(batch), use_cache=False).logits
    # What the run was made of is gone: the folder stands for itself.
    for name in ("llm", "encoder"):
        (world.folder / name).rename(world.folder / f"{name}-away")
    try:
        command = [sys.executable, "-c", FRESH, str(exported), str(audio), str(tmp_path / "out.pt")]
        subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    finally:
        for name in ("llm", "encoder"):
            (world.folder / f"{name}-away").rename(world.folder / name)
    fresh = torch.load(tmp_path / "out.pt")
    assert fresh["type"] == "salad"
    torch.testing.assert_close(fresh["logits"], hf[..., : fresh["logits"].shape[-1]], rtol=1e-5, atol=1e-5)
    assert fresh["text"] == model.generate(audio, "say {speech} again", max_new_tokens=12)


def test_arguments_of_a_pipeline_hold_for_its_calls(exported, model, tmp_path):
    audio, prompt = audio_file(tmp_path), "say {speech} again"
    piped = pipeline("speech-text-generation", model=str(exported), prompt=prompt, max_new_tokens=3)
    assert piped(audio) == {"generated_text": model.generate(audio, prompt, max_new_tokens=3)}
    longer = model.generate(audio, prompt, max_new_tokens=12)
    assert piped(audio, max_new_tokens=12) == {"generated_text": longer}
    assert longer != model.generate(audio, max_new_tokens=12)  # the prompt says something
    with pytest.raises(UserError, match="temperature is -1"):
        pipeline("speech-text-generation", model=str(exported), temperature=-1)


def test_the_language_model_loads_alone(checkpoint, exported, world, tmp_path):
    assert main(["export", str(checkpoint), str(tmp_path / "text"), "--llm-only"]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trained_module(str(checkpoint)).module.model.llm.hf(ids).logits
        alone = [
            AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (exported / "llm", tmp_path / "text")
        ]
        base = AutoModelForCausalLM.from_pretrained(world.folder / "llm")(ids).logits
    for logits in alone:
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2  # three steps at a high rate
    assert not (tmp_path / "text" / "speech.safetensors").exists()
    assert (tmp_path / "text" / "tokenizer.json").is_file()


def test_what_is_in_the_folder(exported):
    config = json.loads((exported / "config.json").read_text())
    assert (config["model_type"], config["salad_version"], config["context"]) == ("salad", __version__, 128)
    assert config["encoder"]["init_args"]["path"] == {"folder": "encoder/path"}
    assert config["connector"]["class_path"].endswith("MLPConnector")
    assert config["text_config"]["hidden_size"] == 32
    texts = [path.read_text() for path in exported.rglob("*") if path.suffix in (".json", ".md")]
    assert not any("/world" in text for text in texts)  # where the parts lay
    names = set(load_file(exported / "speech.safetensors"))
    assert "switch" in names
    assert all(name == "switch" or name.startswith("connector.") for name in names)
    assert (exported / "encoder" / "path" / "model.safetensors").is_file()
    assert (exported / "llm" / "generation_config.json").is_file()
    assert not list(exported.parent.glob(".*"))


def test_local_folders_are_copied_and_hub_names_stay(tmp_path):
    (tmp_path / "local" / ".cache").mkdir(parents=True)
    (tmp_path / "local" / "config.json").write_text("{}")
    arguments = {"path": str(tmp_path / "local"), "input": "codes", "other": "kyutai/mimi"}
    second = {"class_path": "C", "init_args": {"path": str(tmp_path / "local")}}
    node = {"class_path": "a.B", "init_args": {**arguments, "second": [second]}}
    target = tmp_path / "out"
    copied = copy_folders(node, target)["init_args"]
    assert copied["path"] == {"folder": "encoder/path"}
    assert (copied["input"], copied["other"]) == ("codes", "kyutai/mimi")
    assert copied["second"][0]["init_args"]["path"] == {"folder": "encoder/path_"}
    assert [path.name for path in sorted(target.rglob("*")) if path.is_file()] == ["config.json"] * 2


@pytest.mark.parametrize("kind", ["mimi", "ssl", "whisper"])
def test_encoders_of_many_layers_and_other_connectors(kind, model, tmp_path):
    saved = {"mimi": save_tiny_mimi, "ssl": save_tiny_wavlm, "whisper": save_tiny_whisper}[kind](tmp_path / "encoder")
    arguments = {"path": saved, **{"mimi": {"input": "codes"}, "whisper": {"dtype": "bfloat16"}}.get(kind, {})}
    encoder_class, connector_class, settings = {
        "mimi": (MimiEncoder, CausalTransformerConnector, _NARROW),
        "ssl": (SelfSupervisedEncoder, QFormerConnector, {}),
        "whisper": (WhisperEncoder, MLPConnector, {"stack": 4}),
    }[kind]
    encoder = encoder_class(**arguments)
    connector = connector_class(encoder_dim=encoder.output_dim, llm_dim=32, **settings)
    ours = SpeechLLM(llm=model.model.speech_llm.llm, encoder=encoder, connector=connector).eval()
    if ours.layer_mix is not None:
        torch.nn.init.normal_(ours.layer_mix)
    spec = SequenceSpec.of_parts(
        model.processor.tokenizer, 128, encoder=encoder, connector=connector, switch_embeddings=False,
        identity=encoder.identity(),
    )  # fmt: skip
    nodes = [
        {"class_path": f"{part.__module__}.{part.__name__}", "init_args": values}
        for part, values in ((encoder_class, arguments), (connector_class, settings))
    ]
    save_speech_llm(ours, tmp_path / "out", spec=spec, encoder=nodes[0], connector=nodes[1], card="")
    shutil.rmtree(saved)
    loaded = load_pretrained(tmp_path / "out")
    document = loaded.prepare("say {speech} again", audio_file(tmp_path))
    batch = collate([[document]], context=128, rows_per_batch=1, trim=True)
    with torch.no_grad():
        expected = ours.llm.hf(inputs_embeds=ours.embed(batch), use_cache=False).logits
        torch.testing.assert_close(loaded.model(batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_card_says_what_the_run_says(checkpoint, tmp_path):
    figures = {"all": {"speech_accuracy": 0.625, "misalignment": 0.5}, "groups": {}}
    (checkpoint.parent / "test.json").write_text(json.dumps({"choice": figures}))
    try:
        assert main(["export", str(checkpoint), str(tmp_path / "out"), "--llm-only"]) == 0
    finally:
        (checkpoint.parent / "test.json").unlink()
    card = (tmp_path / "out" / "README.md").read_text()
    front = card.split("---")[1]
    assert "TODO" in front
    assert yaml.safe_load(front)["license"] == "other"
    fit = json.loads((checkpoint.parents[1] / "fit.json").read_text())
    data = "| data | speech (67% of the positions), text (33% of the positions) |"
    for expected in (data, "| steps | 3 |", f"{fit['tokens']:,.0f}", "CausalConvEncoder", "| choice | 0.625 | 0.500 |"):
        assert expected in card


def test_save_pretrained_and_options(model, tmp_path):
    model.model.save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "speech.safetensors")
    assert set(theirs) == {n for n in model.model.speech_llm.state_dict() if not n.startswith(("llm.", "encoder."))}
    with pytest.raises(ValueError, match="device_map"):
        SaladForConditionalGeneration.from_pretrained(tmp_path, device_map="auto")


def test_nothing_is_left_of_a_write_that_fails(checkpoint, tmp_path):
    module, settings, _ = trained_module(str(checkpoint))
    parts = {name: settings[name] for name in ("encoder", "connector")}
    with pytest.raises(TypeError):  # the card comes last
        save_speech_llm(module.model, tmp_path / "out", spec=module.sequence_spec(), **parts, card=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_not_touched(checkpoint, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert main(["export", str(checkpoint), str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_is_no_checkpoint(tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    for name in ("other.ckpt", "missing.ckpt"):
        assert main(["export", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_encoder(folder):
    path = folder / "encoder" / "path" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)


def drop_weight(folder):
    tensors = load_file(folder / "speech.safetensors")
    del tensors["switch"]
    save_file(tensors, folder / "speech.safetensors")


DAMAGE = {
    "newer": (lambda folder: change_config(folder, salad_version="99.0"), "written by salad-lightning 99.0"),
    "no tokenizer": (lambda folder: (folder / "llm" / "tokenizer.json").unlink(), "holds no llm/tokenizer.json"),
    "no weights": (lambda folder: (folder / "speech.safetensors").unlink(), "holds no speech.safetensors"),
    "no LLM weights": (lambda folder: (folder / "llm" / "model.safetensors").unlink(), "weights of a language model"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    "cut short": (lambda folder: os.truncate(folder / "speech.safetensors", 99), "cannot be read"),
    "a weight less": (drop_weight, "do not fit config.json: switch"),
    "another encoder": (change_encoder, "was trained on the encoder CausalConvEncoder-"),
    "no such class": (
        lambda folder: change_config(folder, connector={"class_path": "no_such.Thing"}),
        "cannot be built",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders_are_refused_in_words(exported, tmp_path, kind, capsys):
    damage, message = DAMAGE[kind]
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    damage(folder)
    output = tmp_path / "out.jsonl"
    assert main(["generate", "--model", str(folder), "--prompt", "the cat", "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("out*"))


def test_no_folder_at_all(tmp_path):
    for load in (load_pretrained, SaladProcessor.from_pretrained):
        with pytest.raises(UserError, match="no such folder"):
            load(tmp_path / "missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"connector": {"class_path": "gone_plugin.Connector"}}, ["No module named 'gone_plugin'", "install"]),
        ({"connector": "NoSuchConnector"}, ["unknown: NoSuchConnector", "install"]),
        ({"llm": "/nowhere/llm"}, ["/nowhere/llm: no such folder"]),
    ],
)
def test_what_a_checkpoint_was_made_of_is_gone(checkpoint, tmp_path, capsys, change, words):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"] |= change
    torch.save(content, tmp_path / "x.ckpt")
    assert main(["export", str(tmp_path / "x.ckpt"), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    for part in [*words, str(tmp_path / "x.ckpt")]:
        assert part in message
    assert len(message) < 700
    assert not (tmp_path / "out").exists()


def test_a_recipe_in_place_of_a_checkpoint(world, tmp_path, capsys):
    assert main(["export", str(world.config), str(tmp_path / "out")]) == 2
    assert "the checkpoint cannot be read" in capsys.readouterr().err
