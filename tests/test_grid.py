"""Every encoder with every connector and every objective takes one step: finite gradients for all that is trained."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch import Trainer

from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.packing import collate
from salad_lightning.registry import load_all
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.tiny_encoders import (
    save_tiny_causal_conv,
    save_tiny_hubert,
    save_tiny_mimi,
    save_tiny_whisper,
)
from salad_lightning.training.speech_llm_module import SpeechLLMModule

pytestmark = pytest.mark.slow
OURS = [part for part in load_all().parts if part.package == "salad-lightning"]
PARTS = {kind: [p.cls for p in OURS if p.kind == kind] for kind in ("encoder", "connector", "objective")}
# What an encoder cannot do without; a new built-in with needs of its own is asked to say them here.
SAVED = {
    "CausalConvEncoder": save_tiny_causal_conv,
    "MimiEncoder": save_tiny_mimi,
    "SelfSupervisedEncoder": lambda folder: save_tiny_hubert(folder, norm="layer"),
    "WhisperEncoder": save_tiny_whisper,
}
SMALL = {"CausalTransformerConnector": {"num_layers": 1, "dim": 16, "mlp_dim": 16, "num_heads": 2, "num_kv_heads": 1}}
GRID = list(itertools.product(*PARTS.values()))


def test_the_grid_is_whole():
    assert [part.name for part in OURS if part.state != "ok"] == []
    assert {kind: len(classes) for kind, classes in PARTS.items()} == {"encoder": 5, "connector": 4, "objective": 5}
    assert len(GRID) == 100


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("grid"))


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    made = {}

    def build(cls):
        if cls not in made:
            folder = tmp_path_factory.mktemp(cls.__name__)
            made[cls] = cls(SAVED[cls.__name__](folder)) if cls.__name__ in SAVED else cls()
        return made[cls]

    return build


@pytest.fixture(scope="module")
def raw(world):
    first = sorted(world.folder.glob("speech/*.tar"))[0]
    return list(read_shard(str(first)))[:2]


@pytest.mark.parametrize(("encoder", "connector", "objective"), GRID, ids=lambda cls: cls.__name__)
def test_one_step(world, encoder_of, raw, encoder, connector, objective):
    module = SpeechLLMModule(
        llm=str(world.folder / "llm"),
        encoder=encoder_of(encoder),
        connector=lambda **widths: connector(**widths, **SMALL.get(connector.__name__, {})),
        objective=objective(),
        context=512,
        switch_embeddings=True,
    )
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    with torch.no_grad():  # a student equal to its teacher has no gradient on text
        for parameter in module.model.llm.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    spec = module.sequence_spec()
    builder = InterleaveDocuments(text_words=(1, 3), speech_words=(2, 4))
    utterances = [decode(sample, source="speech", sample_rate_hz=spec.sample_rate_hz) for sample in raw]
    documents = [document for u in utterances for document in builder.build(u, spec)]
    batch = collate([[document] for document in documents], context=512, rows_per_batch=len(documents), trim=True)
    assert batch.span_at_K.numel() > 0
    output = module.compute_loss(batch)
    (output.sum / output.count).backward()
    assert torch.isfinite(output.sum)
    trained = {name: p for name, p in module.model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if name.startswith("encoder.")]
    for name, parameter in trained.items():
        assert parameter.grad is not None, f"no gradient for {name}"
        assert parameter.grad.isfinite().all(), name
    silent = [name for name, p in trained.items() if name.startswith("connector.") and not p.grad.any()]
    assert silent == []
