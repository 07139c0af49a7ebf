"""Another number of readers goes on: nothing is left out, and no more than a block of each reader is read again."""

import collections
import itertools
import json

import pytest

from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.reader import PastReaders, ShuffledReader
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source, shard_paths
from salad_lightning.errors import UserError

BLOCK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    with ShardWriter(folder, "t", 11) as writer:
        for number in range(60):
            writer.write(f"k{number:02d}", {"text": "One two three four five."})
    return folder


def _readers(paths, count, past=()):
    return [ShuffledReader("t", paths, 0, part, count, BLOCK, past=past) for part in range(count)]


def _cursor(reader):
    cursor = reader.cursor()
    return cursor["epoch"], cursor["shard"], cursor["sample"]


@pytest.mark.parametrize("steps", [(3, 1, 30), (25, 40, 0)])
@pytest.mark.parametrize("counts", [(1, 2, 5), (4, 1, 3), (2, 6, 3), (7, 10, 1)])
def test_each_epoch_is_read_whole_and_nothing_twice_but_a_block_of_each_reader(folder, counts, steps):
    """6 shards, so that some numbers of readers share shards out, and others samples."""
    paths = shard_paths(Source(str(folder), InterleaveDocuments()))
    read, past, again = collections.Counter(), [], 0
    for count, step in zip(counts, steps, strict=True):
        readers = _readers(paths, count, past)
        for part, reader in enumerate(readers):
            for _ in range(step + part % 3):  # readers are not equally far
                raw, epoch = reader.next()
                read[epoch, raw.key] += 1
            again += reader.cursor()["taken"]
        past = [*past, PastReaders([_cursor(reader) for reader in readers])]
    last = past[-1].last_epoch
    for reader in _readers(paths, 3, past):
        while True:
            raw, epoch = reader.next()
            if epoch > last + 1:
                break
            read[epoch, raw.key] += 1
    keys = {f"k{number:02d}" for number in range(60)}
    for epoch in range(last + 2):
        assert {key for number, key in read if number == epoch} == keys
    assert max(read.values()) <= 1 + len(counts)
    assert sum(count - 1 for count in read.values()) <= again


def _data(folder, spec, **changes):
    data = SpeechDataModule(
        **{
            "train": [Source(str(folder), InterleaveDocuments())],
            "rows_per_batch": 1,
            "shuffle_block": BLOCK,
            "lookahead": 2,
            "seed": 2,
            **changes,
        }
    )
    data.spec = spec
    return data


def _train(data, steps):
    keys = []
    for batch in itertools.islice(data.train_dataloader(), steps):
        data.note_trained(batch.stream_state)
        keys += [info.key for info in batch.documents]
    data.teardown()
    return keys


def test_a_checkpoint_goes_on_with_other_workers_where_it_may(folder, make_spec, caplog):
    spec = make_spec(64)
    first = _data(folder, spec, num_workers=2)
    keys = _train(first, 8)
    assert 20 < len(keys) < 60
    state = first.state_dict()
    refusing = _data(folder, spec)
    refusing.load_state_dict(state)
    with pytest.raises(UserError, match="allow_reshard"):
        refusing.train_dataloader()
    for change in ({"seed": 9}, {"shuffle_block": BLOCK + 1}):
        other = _data(folder, spec, allow_reshard=True, **change)
        other.load_state_dict(state)
        with pytest.raises(UserError, match="fingerprint"):
            other.train_dataloader()
    second = _data(folder, spec, allow_reshard=True)
    second.load_state_dict(state)
    rest = _train(second, 30)
    assert "1 × 1 readers" in caplog.text
    needed = [key for key in {f"k{n:02d}" for n in range(60)} if key not in keys]
    assert set(needed) <= set(rest[: len(needed) + 2 * (2 * BLOCK + 2)])
    # What was resharded resumes exactly, and can be resharded again.
    third, fourth = _data(folder, spec, allow_reshard=True), _data(folder, spec, allow_reshard=True)
    third.load_state_dict(state)
    third_keys = _train(third, 5)
    fourth.load_state_dict(json.loads(json.dumps(third.state_dict()), object_hook=_int_keys))
    assert third_keys + _train(fourth, 6) == rest[: len(third_keys)] + _next(rest, third_keys, 6, spec, folder, state)
    fifth = _data(folder, spec, allow_reshard=True, num_workers=3)
    fifth.load_state_dict(third.state_dict())
    assert len(_train(fifth, 6)) > 6


def _next(rest, before, steps, spec, folder, state):
    whole = _data(folder, spec, allow_reshard=True)
    whole.load_state_dict(state)
    return _train(whole, 5 + steps)[len(before) :]


def _int_keys(entries):
    return {int(key) if key.isdigit() else key: value for key, value in entries.items()}


def test_the_state_of_many_readers_stays_small(folder, make_spec):
    data = _data(folder, make_spec(64), allow_reshard=True, num_workers=1)
    _train(data, 3)
    state = data.state_dict()
    (position,) = state["ranks"][0]["workers"].values()
    ranks = {rank: {"last_worker": 7, "workers": dict.fromkeys(range(8), position)} for rank in range(64)}
    data = _data(folder, make_spec(64), allow_reshard=True)
    data.load_state_dict({**state, "world_size": 64, "num_workers": 8, "ranks": ranks})
    data.train_dataloader()
    assert len(json.dumps(data.state_dict()["past"])) < 20_000
