"""The contract of every connector, the paper's loop over frames, and runs of the command line."""

from __future__ import annotations

import pytest
import torch
from salad_cif.connector import CIFConnector, integrate_and_fire

from salad_lightning.cli import main
from salad_lightning.errors import UserError
from salad_lightning.export.pretrained import load_pretrained
from salad_lightning.model.generation import Decoding
from salad_lightning.testing.contracts.connector import ConnectorContract
from salad_lightning.testing.runs import save_tiny_world
from salad_lightning.testing.shards import speak_tones


class TestCIFConnector(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return CIFConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, hidden_dim=16)


class TestCIFConnectorInEvaluation(ConnectorContract):
    def make_connector(self, encoder_dim, llm_dim):
        return CIFConnector(encoder_dim=encoder_dim, llm_dim=llm_dim, hidden_dim=16).eval()


def one_by_one(frames, weights, count):
    """The paper's algorithm: accumulate until the threshold, give the rest of the frame's weight to the next vector."""
    weights = weights.double() * count / weights.double().sum()
    vectors, filled, vector = [], 0.0, torch.zeros(frames.shape[1], dtype=torch.float64)
    for frame, weight in zip(frames.double(), weights.tolist(), strict=True):
        while filled + weight >= 1 - 1e-9:
            vectors.append(vector + (1 - filled) * frame)
            weight, filled, vector = weight - (1 - filled), 0.0, torch.zeros_like(vector)
        filled, vector = filled + weight, vector + weight * frame
    return torch.stack(vectors)


@pytest.mark.parametrize("count", [1, 2, 5, 11, 17])
def test_against_the_loop_over_frames(count):
    frames, weights = torch.randn(2, 11, 3), torch.rand(2, 11)
    counts = torch.tensor([count, 1])
    vectors = integrate_and_fire(frames, weights, counts, 17)
    torch.testing.assert_close(vectors[0, :count].double(), one_by_one(frames[0], weights[0], count), atol=1e-5, rtol=0)
    assert (vectors[0, count:] == 0).all()
    assert (vectors[1, 1:] == 0).all()


def test_as_many_vectors_as_words_in_training_and_as_many_as_are_heard_in_evaluation():
    connector = CIFConnector(encoder_dim=4, llm_dim=6, hidden_dim=8, frames_per_word=4.0)
    torch.nn.init.zeros_(connector.weight.weight)  # every frame weighs a quarter
    frames, lengths, words = torch.randn(4, 40, 4), torch.tensor([40, 22, 8, 2]), torch.tensor([7, 9, 30, 0])
    trained = connector(frames, lengths, num_words_N=words)
    assert trained.lengths.tolist() == [7, 9, 8, 1]  # never more than frames
    # |10 - 7| + |5.5 - 9| + |2 - 30|, and nothing for words that are not known
    assert trained.losses["quantity"].item() == pytest.approx(3 + 3.5 + 28)
    heard = connector.eval()(frames, lengths, num_words_N=words)
    assert heard.lengths.tolist() == [10, 6, 2, 1]
    assert connector(frames, lengths).lengths.tolist() == [10, 6, 2, 1]
    few = connector(frames, lengths, num_words_N=torch.tensor([2, 1, 1, 1]))
    assert few.lengths.tolist() == [4, 2, 2, 1]  # the bound that the data was told


def test_the_quantity_loss_teaches_to_count():
    """Frames that begin a word look different; after a few steps their number is heard in evaluation."""
    generator = torch.Generator().manual_seed(0)
    connector = CIFConnector(encoder_dim=4, llm_dim=4, hidden_dim=16, frames_per_word=3.0)
    optimizer = torch.optim.Adam(connector.parameters(), lr=1e-2)

    def spans():
        begins = torch.rand(16, 30, generator=generator) < 0.25
        begins[:, 0] = True
        frames = 0.1 * torch.randn(16, 30, 4, generator=generator)
        frames[..., 0] += 2.0 * begins
        return frames, torch.full((16,), 30), begins.sum(1)

    for _ in range(150):
        frames, lengths, words = spans()
        optimizer.zero_grad()
        connector(frames, lengths, num_words_N=words).losses["quantity"].backward()
        optimizer.step()
    frames, lengths, words = spans()
    heard = connector.eval()(frames, lengths).lengths
    assert (heard - words).abs().float().mean() < 0.5
    assert len(set(heard.tolist())) > 3


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"frames_per_word": 1.0}, "frames_per_word is 1.0"),
        ({"kernel_size": 4}, "kernel_size is 4"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"quantity_weight": 0.0}, "quantity_weight"),
    ],
)
def test_values_out_of_range(settings, word):
    with pytest.raises(UserError, match=word):
        CIFConnector(encoder_dim=4, llm_dim=4, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_tiny_world(tmp_path_factory.mktemp("cif"))


@pytest.fixture(scope="module")
def run(world):
    connector = ["--model.connector=CIFConnector", "--model.connector.hidden_dim=32"]
    # Log-mel gives 100 frames a second and words last 0.2 s: it has to learn that 8 is too few.
    frames = ["--model.connector.frames_per_word=8", "--model.connector_lr=3e-3"]
    return world.run(
        "fit",
        "cif",
        *connector,
        *frames,
        "--trainer.max_steps=50",
        "--trainer.callbacks+=FinalCheckpoint",
        "--trainer.val_check_interval=50",
    )


@pytest.mark.slow
def test_fifty_steps_of_a_recipe(run):
    quantity, loss = run.column("train/quantity"), run.column("train/loss")
    assert len(loss) == 50
    assert sum(quantity[-10:]) < 0.5 * sum(quantity[:10])
    assert run.column("val/speech/misalignment")


@pytest.mark.slow
def test_what_is_exported_generates_alike_alone_and_in_a_batch(run, tmp_path):
    assert main(["export", str(run.folder / "checkpoints" / "final.ckpt"), str(tmp_path / "out")]) == 0
    model = load_pretrained(tmp_path / "out")
    clips = [
        speak_tones(text, seed=3)[0] for text in ("the cat", "a dog jumps over the brown fox", "it is all we need")
    ]
    documents = [model.prepare("so {speech} then", clip, sampling_rate=16_000, max_new_tokens=8) for clip in clips]
    assert [document.spans[0].num_words for document in documents] == [0, 0, 0]  # not known
    alone = [model.complete([document], Decoding(max_new_tokens=8))[0] for document in documents]
    assert model.complete(documents, Decoding(max_new_tokens=8)) == alone
