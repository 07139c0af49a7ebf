import itertools
import json
import subprocess
import sys

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_choice_shards, save_speech_shards, save_text_shards


class _Recorder(LightningModule):
    """Trains one number and notes which documents it saw."""

    def __init__(self, spec):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.spec, self.seen, self.evaluated = spec, [], {}

    def sequence_spec(self):
        return self.spec

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append((batch.labels_M.sum().item(), [info.key for info in batch.documents]))
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.datamodule.note_trained(batch.stream_state)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.setdefault(dataloader_idx, []).append([info.key for info in batch.documents])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return {
        "speech": str(save_speech_shards(root / "speech", num_samples=20, samples_per_shard=5)),
        "text": str(save_text_shards(root / "text", num_samples=12)),
        "choice": str(save_choice_shards(root / "choice", num_samples=5)),
    }


def _module(folders, **changes):
    builder = InterleaveDocuments((1, 4), (2, 6))
    settings = {
        "train": [Source(folders["speech"], builder, 2.0), Source(folders["text"], builder)],
        "val": [Source(folders["speech"], builder), Source(folders["choice"], TemplateDocuments(all_choices=True))],
        "rows_per_batch": 2,
        "eval_rows_per_batch": 2,
        "shuffle_block": 6,
        **changes,
    }
    return SpeechDataModule(**settings)


def _trainer(tmp_path, **changes):
    return Trainer(
        **{
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            "limit_train_batches": 4,
            "max_epochs": -1,
            **changes,
        }
    )


# A recorder logs nothing, so Lightning's remarks on workers and logging do not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_through_epochs_and_checkpoints_without_repeating(folders, make_spec, tmp_path, num_workers):
    """Lightning iterates the loader anew every ``limit_train_batches``; and a checkpoint resumes in mid-stream."""
    whole = _Recorder(make_spec())
    _trainer(tmp_path, max_steps=14).fit(whole, datamodule=_module(folders, num_workers=num_workers))
    first = _Recorder(make_spec())
    trainer = _trainer(tmp_path, max_steps=6)
    trainer.fit(first, datamodule=_module(folders, num_workers=num_workers))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second = _Recorder(make_spec())
    _trainer(tmp_path, max_steps=14).fit(
        second, datamodule=_module(folders, num_workers=num_workers), ckpt_path=tmp_path / "x.ckpt", weights_only=True
    )
    assert len(whole.seen) == 14
    assert first.seen + second.seen == whole.seen
    assert len({str(seen) for seen in whole.seen}) == 14


@pytest.mark.parametrize(
    ("changes", "message"), [({"num_workers": 2}, "num_workers 1"), ({"seed": 5}, "fingerprint"), ({}, None)]
)
def test_another_stream_is_not_resumed(folders, make_spec, changes, message):
    one = _module(folders)
    one.spec = make_spec()
    batch = next(iter(one.train_dataloader()))
    one.note_trained(batch.stream_state)
    other = _module(folders, **changes)
    other.spec = make_spec()
    other.load_state_dict(one.state_dict())
    if message is None:
        assert other.state_dict()["ranks"] == {0: {"last_worker": -1, "workers": {}}}
        other.train_dataloader()
        assert other.state_dict() == one.state_dict()
    else:
        with pytest.raises(UserError, match=message):
            other.train_dataloader()


def test_a_stream_with_other_epochs_is_not_resumed(folders, make_spec):
    """They decide which source each document is drawn from."""

    def made(max_epochs):
        data = _module(folders, train=[Source(folders["speech"], InterleaveDocuments(), max_epochs=max_epochs)])
        data.spec = make_spec()
        return data

    one = made(5)
    one.note_trained(next(iter(one.train_dataloader())).stream_state)
    for other, is_same in ((made(5), True), (made(6), False), (made(None), False)):
        other.load_state_dict(one.state_dict())
        if is_same:
            other.train_dataloader()
        else:
            with pytest.raises(UserError, match="fingerprint"):
                other.train_dataloader()


def test_evaluation_sets_come_in_order_with_names(folders, make_spec, tmp_path):
    module, data = _Recorder(make_spec()), _module(folders)
    _trainer(tmp_path, limit_val_batches=1.0).validate(module, datamodule=data, verbose=False)
    assert data.val_names == ["speech", "choice"]
    keys = {number: sorted(itertools.chain(*batches)) for number, batches in module.evaluated.items()}
    assert keys[0] == [f"speech{number:06d}" for number in range(20)]
    assert keys[1] == sorted([f"choice{number:06d}" for number in range(5)] * 4)


RANK = """
import json, sys
import torch
from transformers import PreTrainedTokenizerFast
from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.template import TemplateDocuments

rank, folder, speech, text, choice = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
interleave = InterleaveDocuments((1, 4), (2, 6))
data = SpeechDataModule(
    train=[Source(speech, interleave, 2.0), Source(text, interleave)],
    val=[Source(speech, interleave), Source(choice, TemplateDocuments(all_choices=True))],
    rows_per_batch=2, eval_rows_per_batch=2, shuffle_block=6,
)
data.spec = SequenceSpec.text_only(PreTrainedTokenizerFast.from_pretrained(folder), 128)
data._rank = lambda: (rank, 2)
keys = [[[info.key for info in batch.documents] for batch in loader] for loader in data.val_dataloader()]
data.note_trained(next(iter(data.train_dataloader())).stream_state)
print(json.dumps([keys, data.state_dict()]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_evaluate_everything_once_in_equal_steps_and_gather_positions(folders, byte_tokenizer, tmp_path):
    """In processes of their own: a fork of this one would inherit its threads' locks."""
    byte_tokenizer.save_pretrained(tmp_path)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), *folders.values()], stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    results = [json.loads(process.communicate(timeout=240)[0]) for process in processes]
    for number, expected in enumerate([20, 5 * 4]):
        assert len(results[0][0][number]) == len(results[1][0][number])
        keys = [key for keys, _ in results for batch in keys[number] for key in batch]
        assert len(keys) == expected
        assert len(set(keys)) == (20, 5)[number]
    assert results[0][1] == results[1][1]
    ranks = results[0][1]["ranks"]
    assert sorted(ranks) == ["0", "1"]
    assert ranks["0"]["workers"]["0"]["rank"] == 0
    assert ranks["1"]["workers"]["0"]["rank"] == 1


def test_yaml_builds_it(folders):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(SpeechDataModule, "data")
    config = parser.parse_string(f"""
data:
  class_path: SpeechDataModule
  init_args:
    train:
      - shards: {folders["speech"]}
        weight: 2
        documents:
          class_path: InterleaveDocuments
          init_args: {{text_words: [0, 4], speech_words: [2, 8]}}
      - shards: [{folders["text"]}]
        documents: InterleaveDocuments
        max_epochs: 3
        max_bad_fraction: 0.01
      - shards: "pipe:cat x.tar"
        allow_pipe: true
        name: piped
        documents: InterleaveDocuments
    val:
      - shards: {folders["choice"]}
        name: questions
        documents:
          class_path: TemplateDocuments
          init_args: {{template: "Q: {{speech}}\\nA: {{answer}}", all_choices: true, control: muted}}
    rows_per_batch: 4
""")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    data = instantiate(config).data
    assert data.train[0].documents.text_words == (0, 4)
    assert data.train[0].weight == 2.0
    assert data.train[1].name == "text"
    assert (data.train[1].max_epochs, data.train[1].max_bad_fraction) == (3, 0.01)
    assert [source.allow_pipe for source in data.train] == [False, False, True]
    assert data.val_names == ["questions"]
    assert data.val[0].documents.control == "muted"
    assert data.val[0].documents.template == "Q: {speech}\nA: {answer}"
    reparsed = parser.parse_string(parser.dump(config))  # what SaveConfigCallback writes can be read again
    assert instantiate(reparsed).data.train[0].documents.speech_words == (2, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": []}, "data.train"),
        ({"rows_per_batch": 0}, "data.rows_per_batch"),
        ({"train": [Source("a", TemplateDocuments(control="shuffled"))]}, "for evaluation"),
    ],
)
def test_unusable_settings_are_named(folders, changes, message):
    with pytest.raises(UserError, match=message):
        _module(folders, **changes)


def test_missing_sets_are_named(make_spec):
    data = SpeechDataModule()
    data.spec = make_spec()
    assert data.val_dataloader() == []
    assert data.state_dict() == {}
    for loader, key in ((data.train_dataloader, "data.train"), (data.predict_dataloader, "data.test")):
        with pytest.raises(UserError, match=key):
            loader()
    with pytest.raises(ValueError, match="setup"):
        SpeechDataModule(train=[Source("a", InterleaveDocuments())])._spec()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_mistake_found_by_a_worker_arrives_as_it_was(tmp_path, make_spec, num_workers):
    folder = save_speech_shards(tmp_path / "s", num_samples=4, timed=False)
    source = Source(str(folder), InterleaveDocuments())
    data = SpeechDataModule(train=[source], val=[source], num_workers=num_workers)
    data.spec = make_spec()
    for loader in (data.train_dataloader(), *data.val_dataloader()):
        with pytest.raises(UserError) as caught:
            next(iter(loader))
        assert str(caught.value).startswith(f"{folder}/speech-000000.tar: speech00000")
        assert caught.value.cure
        assert "Traceback" not in str(caught.value)
    data.teardown()


def test_a_second_run_begins_at_the_beginning(folders, make_spec, tmp_path):
    """Arms of a comparison in one process see the same data; so does one that was measured before."""
    data, seen = _module(folders), []
    for _ in range(2):
        recorder = _Recorder(make_spec())
        trainer = _trainer(tmp_path, max_steps=6)
        trainer.fit(recorder, datamodule=data)
        seen.append(recorder.seen)
    assert seen[0] == seen[1]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    measured = _trainer(tmp_path, limit_val_batches=1.0)
    measured.validate(_Recorder(make_spec()), datamodule=data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    recorder = _Recorder(make_spec())
    trainer = _trainer(tmp_path, max_steps=3)
    trainer.fit(recorder, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 6  # the same run goes on
    trainer.fit(recorder, datamodule=data)
    assert recorder.seen == seen[0]
