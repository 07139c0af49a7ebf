import collections
import dataclasses
import json
import tarfile

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.reader import ShuffledReader
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source, check_sources, shard_paths
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_choice_shards, save_speech_shards, save_text_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return {
        "speech": save_speech_shards(root / "speech", num_samples=40, samples_per_shard=5),
        "text": save_text_shards(root / "text", num_samples=30, samples_per_shard=10),
        "choice": save_choice_shards(root / "choice"),
    }


@pytest.fixture
def sources(shards):
    builder = InterleaveDocuments((1, 4), (2, 6))
    return [Source(str(shards["speech"]), builder, weight=2.0), Source(str(shards["text"]), builder, weight=1.0)]


def _stream(sources, spec, **changes):
    return TrainingStream(
        sources, spec, **{"rows_per_batch": 2, "shuffle_block": 7, "lookahead": 4, "seed": 3, **changes}
    )


def _take(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def _equal(one, two):
    for entry in dataclasses.fields(one):
        a, b = getattr(one, entry.name), getattr(two, entry.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 6, 1000])
@pytest.mark.parametrize(("num_parts", "samples_per_shard"), [(1, 5), (3, 5), (7, 5), (11, 5), (40, 20), (7, 1)])
def test_every_sample_once_an_epoch_over_all_readers(tmp_path_factory, num_parts, samples_per_shard, block):
    folder = tmp_path_factory.getbasetemp() / f"once{samples_per_shard}"
    if not folder.exists():
        with ShardWriter(folder, "t", samples_per_shard) as writer:
            for number in range(31):
                writer.write(f"k{number}", {"text": "x"})
    paths = shard_paths(Source(str(folder), InterleaveDocuments()))
    seen = collections.defaultdict(list)
    for part in range(num_parts):
        reader = ShuffledReader("t", paths, 0, part, num_parts, block)
        raw, epoch = reader.next()
        while epoch < 2:
            seen[epoch].append(raw.key)
            raw, epoch = reader.next()
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == sorted(f"k{number}" for number in range(31))
    assert num_parts > 4 or seen[0] != seen[1]


def test_order_depends_on_the_seed_and_blocks_mix_shards(shards):
    paths = shard_paths(Source(str(shards["speech"]), InterleaveDocuments()))
    orders = []
    for seed in (0, 0, 1):
        reader = ShuffledReader("s", paths, seed, 0, 1, 20)
        orders.append([reader.next()[0].key for _ in range(40)])
    assert orders[0] == orders[1] != orders[2]
    assert len({key[:-1] for key in orders[0][:5]}) > 1


@pytest.mark.parametrize("num_parts", [1, 3, 12])
def test_a_reader_goes_on_from_any_cursor(shards, num_parts):
    paths = shard_paths(Source(str(shards["speech"]), InterleaveDocuments()))
    reader = ShuffledReader("s", paths, 0, num_parts - 1, num_parts, 6)
    cursors, drawn = [], []
    for _ in range(60):
        cursors.append(json.loads(json.dumps(reader.cursor())))
        drawn.append((reader.next()[0].key, reader.cursor()["epoch"]))
    for position in range(0, 50, 7):
        other = ShuffledReader("s", paths, 0, num_parts - 1, num_parts, 6)
        other.seek(cursors[position])
        assert [(other.next()[0].key, other.cursor()["epoch"]) for _ in range(10)] == drawn[position : position + 10]


# --- training -------------------------------------------------------------------------------------------------------


def test_the_mixture_is_by_positions(sources, make_spec):
    counts = collections.Counter()
    for batch in _take(_stream(sources, make_spec()), 60):
        owners = batch.document_ids_BS[batch.document_ids_BS >= 0].bincount(minlength=len(batch.documents))
        for info, count in zip(batch.documents, owners.tolist(), strict=True):
            counts[info.source] += count
    assert counts["speech"] / counts.total() == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("causal", [True, False])
def test_what_is_heard_is_what_the_whole_recording_holds(sources, make_spec, causal):
    """The stream decodes no further than the last span; builders get the whole elsewhere."""
    spec, builder = make_spec(causal=causal), sources[0].documents
    raws = {raw.key: raw for path in shard_paths(sources[0]) for raw in read_shard(path)}
    shorter = compared = 0
    for batch in _take(_stream(sources, spec), 20):
        owners, clips = batch.document_ids_BS.flatten()[batch.span_at_K], collections.defaultdict(dict)
        for owner, clip in zip(owners.tolist(), batch.span_clip_K.tolist(), strict=True):
            clips[owner][clip] = None  # once, in order
        for number, found in clips.items():
            info = batch.documents[number]
            whole = decode(raws[info.key], source=info.source, sample_rate_hz=spec.sample_rate_hz, keep_int16=True)
            candidates = [
                [clip.tolist() for clip in document.clips]
                for epoch in range(4)
                for document in builder.build(whole, spec, seed=3, epoch=epoch)
            ]
            heard = [batch.clips_NL[clip, : batch.clip_lengths_N[clip]].tolist() for clip in found]
            assert heard in candidates
            compared += 1
            shorter += sum(map(len, heard)) < len(whole.audio)
    assert compared > 40
    assert shorter > 10


def test_what_nobody_hears_may_be_damaged(sources, make_spec, tmp_path):
    """A sample is left out where its spans reach the damage, and used where they do not."""
    (tmp_path / "half").mkdir()
    with ShardWriter(tmp_path / "half", "half") as writer:
        for path in shard_paths(sources[0]):
            for raw in read_shard(path):
                flac = raw.members["flac"]
                writer.write(raw.key, json.loads(raw.members["json"]), flac[: len(flac) * 3 // 4])
    skipped = tmp_path / "skipped.jsonl"
    source = Source(str(tmp_path / "half"), sources[0].documents, max_bad_fraction=1.0)
    keys = {info.key for batch in _take(_stream([source], make_spec(), skipped=skipped), 5) for info in batch.documents}
    listed = {json.loads(line)["key"]: json.loads(line)["reason"] for line in skipped.read_text().splitlines()}
    assert keys
    assert listed
    assert all("the audio cannot be decoded" in reason for reason in listed.values())


def test_epochs_draw_new_spans(shards, make_spec):
    source = Source(str(shards["speech"]), InterleaveDocuments((1, 4), (2, 6)))
    spans = collections.defaultdict(set)
    for batch in _take(_stream([source], make_spec(), rows_per_batch=4), 30):
        first = batch.position_ids_BS.flatten()[batch.span_at_K]
        owner = batch.document_ids_BS.flatten()[batch.span_at_K]
        for number, info in enumerate(batch.documents):
            spans[info.key].add(str(first[owner == number].tolist()))
    assert np.mean([len(draws) for draws in spans.values()]) > 1.5


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create:UserWarning"
)  # more workers than some machine has cores
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("num_workers", [0, 1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resumes_exactly_after_the_batch_trained_on(sources, make_spec, num_workers, stop, rank, world_size):
    spec = make_spec()
    kwargs = {"batch_size": None, "num_workers": num_workers}
    place = {"rank": rank, "world_size": world_size}
    batches = _take(DataLoader(_stream(sources, spec, **place), **kwargs), stop + 6)
    states, last = {}, -1
    for batch in batches[:stop]:  # what SpeechDataModule.note_trained does
        last = batch.stream_state["worker"]
        states[last] = json.loads(json.dumps(batch.stream_state))
        assert len(json.dumps(batch.stream_state)) < 2000
    resumed = _stream(sources, spec, **place, states=states, first_worker=(last + 1) % max(num_workers, 1))
    for expected, batch in zip(batches[stop:], _take(DataLoader(resumed, **kwargs), 6), strict=True):
        assert _equal(expected, batch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_leaves_the_mixture_after_its_epochs(shards, make_spec, num_workers):
    builder = InterleaveDocuments((1, 4), (2, 6))
    text = Source(str(shards["text"]), builder, max_epochs=2)
    sources, spec = [Source(str(shards["speech"]), builder), text], make_spec()
    kwargs = {"batch_size": None, "num_workers": num_workers}
    batches = _take(DataLoader(_stream(sources, spec), **kwargs), 56)
    counts = collections.Counter(info.key for batch in batches for info in batch.documents)
    assert {count for key, count in counts.items() if key.startswith("text")} == {2}
    assert sum(key.startswith("text") for key in counts) == 30
    assert all(info.source == "speech" for batch in batches[-4:] for info in batch.documents)
    for stop in (14, 25, 45):  # before and after it leaves
        states = {batch.stream_state["worker"]: json.loads(json.dumps(batch.stream_state)) for batch in batches[:stop]}
        after = (batches[stop - 1].stream_state["worker"] + 1) % max(num_workers, 1)
        resumed = _stream(sources, spec, states=states, first_worker=after)
        for expected, batch in zip(batches[stop:], _take(DataLoader(resumed, **kwargs), 6), strict=False):
            assert _equal(expected, batch)
    with pytest.raises(UserError, match="as often as it may be") as caught:
        _take(_stream([text], spec), 40)
    assert "start afresh" in caught.value.cure  # with another number no checkpoint is resumed


def test_a_restore_reads_again_at_most_one_block_a_source(sources, make_spec, monkeypatch):
    """And what lies before the block in its shard, undecoded: a tar is read from its beginning."""
    batches = _take(_stream(sources, make_spec()), 40)
    for batch in batches:
        assert len(batch.stream_state["done"]) <= 40
        assert all(0 <= cursor["taken"] <= 7 for cursor in batch.stream_state["sources"].values())
    assert min(cursor["epoch"] for cursor in batches[-1].stream_state["sources"].values()) >= 1
    read, decoded = collections.Counter(), collections.Counter()

    def counted(path, **kwargs):
        for raw in read_shard(path, **kwargs):
            read[raw.key[:4]] += 1
            yield raw

    def counted_decode(raw, **kwargs):
        decoded[raw.key] += 1
        return decode(raw, **kwargs)

    monkeypatch.setattr("salad_lightning.data.reader.read_shard", counted)
    monkeypatch.setattr("salad_lightning.data.stream.decode", counted_decode)
    (batch,) = _take(_stream(sources, make_spec(), states={0: batches[-1].stream_state}), 1)
    # Beside what is drawn: a shard's beginning, and the rest of the first and of the last block.
    for source, count in read.items():
        assert count <= sum(decoded[key] for key in decoded if key.startswith(source)) + 10 + 2 * 7
    assert decoded.total() <= len(batch.documents) + 40 + 4  # documents done, of this batch, and waiting


def test_ranks_and_workers_read_different_samples(sources, make_spec):
    keys = []
    for rank in range(2):
        stream = _stream(sources[:1], make_spec(), rank=rank, world_size=2, rows_per_batch=1)  # less than an epoch
        loader = DataLoader(stream, batch_size=None, num_workers=2)
        keys += [[info.key for info in batch.documents] for batch in _take(loader, 2)]
    assert all(set(one).isdisjoint(two) for n, one in enumerate(keys) for two in keys[:n])


def test_a_model_without_audio_reads_the_transcripts(sources, byte_tokenizer):
    spec = SequenceSpec.text_only(byte_tokenizer, 128)
    batches = _take(_stream(sources, spec), 5)
    assert {info.source for batch in batches for info in batch.documents} == {"speech", "text"}
    for batch in batches:
        assert batch.clips_NL.shape[0] == batch.span_at_K.shape[0] == 0
        assert torch.equal(batch.input_ids_BS.flatten()[batch.predict_at_M + 1], batch.labels_M)


def test_training_rows_have_a_fixed_width_unless_trimmed(sources, make_spec):
    batches = _take(_stream(sources, make_spec(96)), 5)
    assert {batch.input_ids_BS.shape for batch in batches} == {(2, 96)}
    trimmed = _take(_stream(sources, make_spec(96), trim=True), 5)
    assert any(batch.input_ids_BS.shape[1] < 96 for batch in trimmed)


# --- evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (1, 2), (3, 0), (2, 2)])
def test_evaluation_reads_every_sample_once(shards, make_spec, world_size, num_workers):
    source = Source(str(shards["speech"]), InterleaveDocuments((1, 4), (2, 6)))
    keys = []
    for rank in range(world_size):
        stream = EvaluationStream(source, make_spec(), rows_per_batch=2, rank=rank, world_size=world_size)
        for batch in DataLoader(stream, batch_size=None, num_workers=num_workers):
            keys += [info.key for info in batch.documents]
    assert sorted(keys) == [f"speech{number:06d}" for number in range(40)]


def test_evaluation_is_the_same_each_time(shards, make_spec):
    source = Source(str(shards["speech"]), InterleaveDocuments((1, 4), (2, 6)))
    stream = EvaluationStream(source, make_spec(), rows_per_batch=3)
    assert all(_equal(one, two) for one, two in zip(stream, stream, strict=True))


def test_choices_come_complete(shards, make_spec):
    source = Source(str(shards["choice"]), TemplateDocuments(all_choices=True))
    documents = list(EvaluationStream(source, make_spec(), rows_per_batch=2).documents())
    assert collections.Counter(document.info.key for document in documents) == {f"choice{n:06d}": 4 for n in range(6)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_shuffled_gives_each_sample_another_ones_audio(shards, make_spec, world_size):
    spec = make_spec()
    plain = EvaluationStream(Source(str(shards["choice"]), TemplateDocuments()), spec, rows_per_batch=2)
    own = {document.info.key: document.clips[0] for document in plain.documents()}
    given = {}
    for rank in range(world_size):
        source = Source(str(shards["choice"]), TemplateDocuments(control="shuffled"))
        stream = EvaluationStream(source, spec, rows_per_batch=2, rank=rank, world_size=world_size)
        given |= {document.info.key: document.clips[0] for document in stream.documents()}
    keys = sorted(own)
    assert sorted(given) == keys
    for before, key in zip([keys[-1], *keys], keys, strict=False):
        np.testing.assert_array_equal(given[key], own[before])


# --- sources --------------------------------------------------------------------------------------------------------


def test_folders_globs_braces_and_lists_name_the_same_shards(shards):
    folder, builder = shards["text"], InterleaveDocuments()
    expected = sorted(str(path) for path in folder.glob("*.tar"))
    for shards_ in (
        str(folder),
        f"{folder}/*.tar",
        f"{folder}/text-00000{{0..2}}.tar",
        expected,
        [str(folder), expected[0]],
    ):
        source = Source(shards_, builder)
        assert shard_paths(source) == expected
        assert source.name == "text"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{tmp}/none", "does not exist"),
        ("{tmp}/x-*.tar", "no shard matches"),
        ("{tmp}", "holds no .tar"),
        ("pipe:cat x.tar", "pipe: is not read"),
        ("zip://x.tar::https://host/x.zip", "zip: is not read"),
        ("{tmp}/x-{{000..009.tar", "a brace has no partner"),
        ("https://host/x-000}}.tar", "a brace has no partner"),
    ],
)
def test_missing_shards_are_named(tmp_path, pattern, message):
    pattern = pattern.format(tmp=tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        shard_paths(Source(pattern, InterleaveDocuments()))
    assert pattern in str(caught.value)


def test_unusable_sources_are_refused(tmp_path, make_spec):
    builder = InterleaveDocuments()
    for sources, message in (
        ([], "no source"),
        ([Source("a", builder, weight=0.0)], "weight"),
        ([Source("a", builder, max_epochs=0)], "max_epochs"),
        ([Source("a", builder), Source("b/a", builder)], "two sources"),
    ):
        with pytest.raises(UserError, match=message):
            check_sources(sources, "data.train")
    with pytest.raises(UserError, match="lists no shards"):
        shard_paths(Source([], builder))
    (tmp_path / "e").mkdir()
    tarfile.open(tmp_path / "e" / "x.tar", "w").close()
    with pytest.raises(UserError, match="hold no sample"):
        next(iter(_stream([Source(str(tmp_path / "e"), builder)], make_spec())))
