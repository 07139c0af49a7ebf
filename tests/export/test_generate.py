"""Generation against a loop without cache and against single prompts; the command; audio that cannot be used."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    AutoModel,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from salad_lightning.cli import main
from salad_lightning.connectors.mlp import MLPConnector
from salad_lightning.data.packing import collate
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.errors import UserError
from salad_lightning.export import load_pretrained, save_speech_llm
from salad_lightning.model.generation import Decoding, generate
from salad_lightning.model.llm import load_language_model, load_tokenizer
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.testing.shards import speak_tones
from salad_lightning.testing.tiny import SENTENCES, save_tiny_llm

WORDS = SENTENCES[0].split()


def documents(model, count, max_new_tokens):
    """Prompts of mixed lengths, every third without audio."""
    made = []
    for number in range(count):
        text = " ".join(WORDS[: 1 + number % 9])
        audio = (
            None if number % 3 == 2 else speak_tones(" ".join(WORDS[number % 5 :][: 1 + number % 7]), seed=number)[0]
        )
        prompt = f"{text} {{speech}}" + " again:" * (number % 2)
        fields = {"text": WORDS[number % 16]}
        made.append(model.prepare(prompt, audio, sampling_rate=16_000, fields=fields, max_new_tokens=max_new_tokens))
    return made


def run(model, prompts, **decoding):
    return generate(model.model.speech_llm, prompts, Decoding(**decoding), tokenizer=model.processor.tokenizer)


def test_a_batch_gives_every_prompt_its_own_tokens(model):
    prompts = documents(model, 20, 10)
    assert len({document.num_positions for document in prompts}) > 8
    single = [run(model, [document], max_new_tokens=10)[0] for document in prompts]
    assert len({tuple(tokens) for tokens in single}) >= 10
    for size in (3, 20):
        batched = [row for at in range(0, 20, size) for row in run(model, prompts[at : at + size], max_new_tokens=10)]
        assert batched == single


@torch.no_grad()
def slow_loop(model, document, steps):
    """Everything anew for each token, by the model's own logits; no cache, no padding."""
    llm = model.model.speech_llm.llm
    embeddings = model.model.speech_llm.embed(collate([[document]], context=128, rows_per_batch=1, trim=True))
    tokens = []
    for _ in range(steps):
        logits = llm.hf(inputs_embeds=embeddings, use_cache=False).logits[0, -1, : llm.vocab_size]
        token = int(logits.argmax())
        if token == model.processor.tokenizer.eos_token_id:
            break
        tokens.append(token)
        embeddings = torch.cat([embeddings, llm.embed(torch.tensor([[token]]))], 1)
    return tokens


def test_the_cache_changes_nothing(model):
    for document in documents(model, 3, 12):
        assert run(model, [document], max_new_tokens=12) == [slow_loop(model, document, 12)]


def test_speech_is_heard(model):
    told = [model.prepare("say {speech} again", speak_tones(text)[0], sampling_rate=16_000) for text in WORDS[:6]]
    batch = collate([[document] for document in told], context=128, rows_per_batch=6)
    with torch.no_grad():
        logits = model.model(batch).logits
    last = [logits[row, document.num_positions - 1] for row, document in enumerate(told)]
    assert min(float((last[0] - other).abs().max()) for other in last[1:]) > 1e-3


def test_a_models_own_generation_config_does_not_interfere(model):
    prompts = documents(model, 3, 10)
    plain = run(model, prompts, max_new_tokens=10)
    hf = model.model.speech_llm.llm.hf
    before = hf.generation_config
    # Qwen2.5-Instruct's.
    hf.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=5.0, eos_token_id=before.eos_token_id
    )
    try:
        assert run(model, prompts, max_new_tokens=10) == plain
    finally:
        hf.generation_config = before


def test_padding_rows_of_the_head_are_never_chosen(model):
    llm, prompts = model.model.speech_llm.llm, documents(model, 6, 10)
    assert max(token for row in run(model, prompts, max_new_tokens=10) for token in row) >= 150
    before, llm.vocab_size = llm.vocab_size, 150
    try:
        assert run(model, prompts, max_new_tokens=10) == [slow_loop(model, document, 10) for document in prompts]
    finally:
        llm.vocab_size = before


def test_bf16(exported):
    model = load_pretrained(exported, dtype=torch.bfloat16)
    assert model.model.speech_llm.llm.hf.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in model.model.speech_llm.connector.parameters()} == {torch.float32}
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        assert AutoModel.from_pretrained(exported, dtype=name).speech_llm.llm.hf.dtype == dtype
    assert all(run(model, documents(model, 4, 4), max_new_tokens=4))


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
    "max_position_embeddings": 256,
}
WINDOW = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
LLMS = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
    "gemma2": Gemma2Config(**SMALL, **WINDOW),
    "gemma3": Gemma3TextConfig(**SMALL, **WINDOW, layer_types=["sliding_attention"] * 2 + ["full_attention"]),
    "mistral": MistralConfig(**SMALL, sliding_window=6),
}


@pytest.mark.parametrize("kind", LLMS)
def test_other_language_models(kind, tmp_path):
    path = str(save_tiny_llm(tmp_path / "llm", config=LLMS[kind]))
    tokenizer = load_tokenizer(path, LLMS[kind])
    encoder, connector = LogMelEncoder(), MLPConnector(encoder_dim=80, llm_dim=32, stack=8)
    llm = SpeechLLM(llm=load_language_model(path, len(tokenizer)), encoder=encoder, connector=connector).eval()
    spec = SequenceSpec.of_parts(
        tokenizer, 128, encoder=encoder, connector=connector, switch_embeddings=False, identity=encoder.identity()
    )
    nodes = [
        {"class_path": f"{type(part).__module__}.{type(part).__name__}", "init_args": arguments}
        for part, arguments in ((encoder, {}), (connector, {"stack": 8}))
    ]
    save_speech_llm(llm, tmp_path / "out", spec=spec, encoder=nodes[0], connector=nodes[1], card="")
    model = load_pretrained(tmp_path / "out")
    prompts = documents(model, 6, 8)
    single = [run(model, [document], max_new_tokens=8)[0] for document in prompts]
    assert run(model, prompts, max_new_tokens=8) == single == [slow_loop(model, document, 8) for document in prompts]


def test_an_end_token_ends_the_row_alone(model):
    prompts = documents(model, 4, 8)
    free = run(model, prompts, max_new_tokens=8)
    config = model.model.speech_llm.llm.hf.generation_config
    before, stop = config.eos_token_id, free[0][3]
    config.eos_token_id = [stop]
    try:
        stopped = run(model, prompts, max_new_tokens=8)
    finally:
        config.eos_token_id = before
    assert stopped == [row[: row.index(stop)] if stop in row else row for row in free]


def test_drawing(model):
    (document,) = documents(model, 1, 16)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(run(model, [document], max_new_tokens=16, temperature=3.0)[0])
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = run(model, [document], max_new_tokens=16)[0]
    assert run(model, [document], max_new_tokens=16, temperature=1.0, top_p=1e-6)[0] == greedy


def test_audio_of_any_kind_is_heard_alike(model, tmp_path):
    time = np.arange(48_000) / 48_000
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    half = 0.3 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    soundfile.write(tmp_path / "a.flac", half, 16_000)
    soundfile.write(tmp_path / "b.wav", np.stack([2 * tone, 0 * tone], 1), 48_000, subtype="FLOAT")
    soundfile.write(tmp_path / "c.ogg", tone, 48_000)
    plain, stereo, ogg = (model.processor(tmp_path / name).audio for name in ("a.flac", "b.wav", "c.ogg"))
    samples = model.processor(np.stack([tone, tone], 1), sampling_rate=48_000).audio
    for audio, tolerance in ((stereo, 2e-3), (samples, 2e-3), (ogg, 0.1)):
        assert audio.dtype == np.float32
        assert len(audio) == len(plain) == 16_000
        assert np.abs(audio - plain)[200:-200].max() < tolerance
    with pytest.raises(ValueError, match="sampling_rate"):
        model.processor(tone)


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", speak_tones(" ".join(WORDS[number : number + 3]))[0], 16_000)
    return folder


def test_one_prompt_is_streamed(model, exported, recordings, capsys):
    path = recordings / "0.wav"
    options = ["--model", str(exported), "--device", "cpu", "--max-new-tokens", "8", "--prompt", "say {speech} again"]
    assert main(["generate", str(path), *options]) == 0
    assert capsys.readouterr().out == model.generate(path, "say {speech} again", max_new_tokens=8) + "\n"
    assert main(["generate", *options[:-1], "the cat"]) == 0
    assert capsys.readouterr().out == model.generate(prompt="the cat", max_new_tokens=8) + "\n"


def test_folders_and_lines_go_to_a_file_in_order(model, exported, recordings, tmp_path):
    lines = [
        {"audio": "recordings/1.wav", "name": "fox", "id": 7},
        {"text": "a spoken text", "name": "dog"},
        {"audio": "recordings/2.wav", "prompt": "hear {speech}"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    inputs = [str(recordings), "--jsonl", str(tmp_path / "in.jsonl"), "--prompt", "{speech} again"]
    options = ["--device", "cpu", "--output", str(output), "--max-new-tokens", "6", "--batch-size", "4"]
    assert main(["generate", *inputs, "--model", str(exported), *options]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["audio"] and row["audio"][-5:] for row in rows] == ["0.wav", "1.wav", "2.wav", "1.wav", None, "2.wav"]
    assert (rows[3]["id"], rows[5]["prompt"]) == (7, "hear {speech}")
    for row in rows[:4]:
        assert row["output"] == model.generate(row["audio"], "{speech} again", max_new_tokens=6)
    assert rows[4]["output"] == model.generate(prompt="a spoken text again", max_new_tokens=6)
    assert not list(tmp_path.glob("*.part"))


def bad_audio(folder):
    (folder / "noise.wav").write_bytes(b"no audio at all")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "long.wav", np.zeros(16_000 * 60), 16_000)
    soundfile.write(folder / "fine.wav", speak_tones("the cat")[0], 16_000)
    (folder / "none").mkdir()
    (folder / "bad.jsonl").write_text('{"audio": "missing.wav"}\n')
    (folder / "nothing.jsonl").write_text('{"name": "x"}\n')


BAD = {
    "no device": (["fine.wav", "--device=abacus"], "abacus cannot be used"),
    "no folder": (["fine.wav", "--output=missing/out.jsonl"], "no file can be written there"),
    "unreadable": (["noise.wav"], "cannot be decoded"),
    "empty": (["empty.wav"], "the audio is empty"),
    "one of many": (["fine.wav", "fine.wav", "empty.wav", "--batch-size=1"], "empty.wav: the audio is empty"),
    "missing": (["missing.wav"], "no such audio file"),
    "folder of nothing": (["none"], "holds no audio"),
    "too long": (["long.wav"], "60.0 s long"),
    "no input": ([], "nothing to hear"),
    "no place": (["fine.wav", "--prompt=the cat"], "has no {speech}"),
    "an answer": (["fine.wav", "--prompt={speech} {answer}"], "{answer}"),
    "a transcript": (["fine.wav", "--prompt={speech} {text}"], "{text}"),
    "unknown field": (["fine.wav", "--prompt={speech} {name}"], "{name}"),
    "no parse": (["fine.wav", "--prompt={speech} {"], "does not parse"),
    "nothing said": (["--prompt="], "the prompt is empty"),
    "no tokens": (["fine.wav", "--max-new-tokens=0"], "max_new_tokens is 0"),
    "no batch": (["fine.wav", "--batch-size=0"], "--batch-size is 0"),
    "cold": (["fine.wav", "--temperature=-1"], "temperature is -1.0"),
    "line without file": (["--jsonl=bad.jsonl"], "bad.jsonl, line 1: there is no audio file missing.wav"),
    "line without input": (["--jsonl=nothing.jsonl"], "neither `audio` nor `text`"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_writes_nothing(exported, tmp_path, monkeypatch, capsys, kind):
    arguments, message = BAD[kind]
    monkeypatch.chdir(tmp_path)
    bad_audio(tmp_path)
    assert main(["generate", "--output=out.jsonl", "--device=cpu", *arguments, "--model", str(exported)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not list(tmp_path.glob("out*"))


def test_the_longest_audio_that_is_promised_fits(model):
    audio = np.zeros(16_000 * 60, dtype=np.float32)
    with pytest.raises(UserError) as refused:
        model.prepare("say {speech} again", audio, sampling_rate=16_000, max_new_tokens=16)
    limit = float(re.search(r"new tokens, ([\d.]+) s fit", str(refused.value)).group(1))
    document = model.prepare(
        "say {speech} again", audio[: int(limit * 16_000)], sampling_rate=16_000, max_new_tokens=16
    )
    assert document.num_positions + 16 <= 128
    with pytest.raises(UserError, match="s long"):
        model.prepare(
            "say {speech} again", audio[: int((limit + 0.3) * 16_000)], sampling_rate=16_000, max_new_tokens=16
        )
