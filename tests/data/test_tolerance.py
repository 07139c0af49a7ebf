"""Every kind of fault, injected into real shards: skipped, counted, listed; over budget, the run stops."""

import collections
import io
import itertools
import json
import tarfile

import numpy as np
import pytest
import soundfile
from torch.utils.data import DataLoader

from salad_lightning.data.audio import encode_flac
from salad_lightning.data.datamodule import SpeechDataModule
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.sources import Source
from salad_lightning.data.stream import EvaluationStream, TrainingStream
from salad_lightning.data.tolerance import FORGIVEN, Tolerance
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards, speak_tones

TEXT = "One two three four five six."
AUDIO, WORDS = speak_tones(TEXT)
RECORD = {"text": TEXT, "words": WORDS}


def _json(**changes):
    return json.dumps({**RECORD, **changes}).encode()


def _wav(audio, rate=16_000, subtype="FLOAT"):
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


FLAC = encode_flac(AUDIO, 16_000)
with_nan = AUDIO.copy()
with_nan[100] = np.nan
header_without_samples = encode_flac(AUDIO, 16_000)[:90]

BAD_SAMPLES = {
    "corrupt audio": ({"json": _json(), "flac": b"fLaC" + bytes(200)}, "cannot be decoded"),
    "audio of no bytes": ({"json": _json(), "flac": b""}, "cannot be decoded"),
    "audio of no samples": ({"json": _json(), "wav": _wav(AUDIO[:0])}, "empty"),
    "no JSON": ({"flac": FLAC}, r"no \.json"),
    "broken JSON": ({"json": b'{"text": ', "flac": FLAC}, "does not parse"),
    "nested without end": ({"json": b"[" * 100_000, "flac": FLAC}, "does not parse"),
    "times outside the audio": (
        {"json": _json(words=[[w, s + 60, e + 60] for w, s, e in WORDS]), "flac": FLAC},
        "the last word ends at",
    ),
    "times without end": ({"json": _json(words=[["One", 0, 10**400]]), "flac": FLAC}, "must be a list"),
    "NaN times": ({"json": b'{"text": "a", "words": [["a", NaN, 1]]}', "flac": FLAC}, "backwards"),
    "NaN samples": ({"json": _json(), "wav": _wav(with_nan)}, "NaN or infinite"),
    "other words": ({"json": _json(words=[["wrong", 0.0, 0.2]]), "flac": FLAC}, "do not spell"),
    "no UTF-8": ({"json": '{"text": "Füße"}'.encode("latin-1"), "flac": FLAC}, "does not parse"),
    "half a character": ({"json": b'{"text": "a\\ud800"}', "flac": FLAC}, "does not parse"),
    "an odd sample rate": ({"json": _json(), "wav": _wav(AUDIO, 44_101)}, "no usual sample rate"),
    "frames that are a zip": (
        {"json": _json(encoded={"by": "x", "num_samples": 5}), "frames.npy": b"PK\x03\x04" + bytes(30)},
        "not what an encoder stored",
    ),
    "frames with an absurd shape": (
        {
            "json": _json(encoded={"by": "x", "num_samples": 5}),
            "frames.npy": b"\x93NUMPY\x01\x00\x46\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000000, 9)}\n",
        },
        "not what an encoder stored",
    ),
}


@pytest.fixture
def folder(tmp_path):
    return save_speech_shards(tmp_path / "speech", num_samples=40, samples_per_shard=10)


def _source(folder, **changes):
    return Source(str(folder), InterleaveDocuments((1, 4), (2, 6)), **changes)


def _stream(source, spec, **changes):
    return TrainingStream([source], spec, rows_per_batch=2, shuffle_block=7, lookahead=4, **changes)


def _keys(batches):
    return [info.key for batch in batches for info in batch.documents]


def _listed(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("fault", BAD_SAMPLES)
def test_a_bad_sample_is_skipped_and_listed(folder, tmp_path, make_spec, fault):
    members, reason = BAD_SAMPLES[fault]
    bad = _tar(folder / "bad.tar", [(f"bad.{extension}", content) for extension, content in members.items()])
    skipped = tmp_path / "run" / "skipped.jsonl"
    keys = _keys(itertools.islice(_stream(_source(folder), make_spec(), skipped=skipped), 40))
    assert set(keys) == {f"speech{number:06d}" for number in range(40)}
    (entry,) = _listed(skipped)  # once, though it was met in every epoch
    assert (entry["source"], entry["shard"], entry["key"]) == ("speech", str(bad), "bad")
    with pytest.raises(UserError, match=reason) as caught:
        _keys(itertools.islice(_stream(_source(folder, max_bad_fraction=0.0), make_spec()), 40))
    assert caught.value.where.startswith(f"{bad}: bad")
    assert entry["reason"] == caught.value.what
    assert " at 0x" not in entry["reason"]
    with pytest.raises(UserError, match=reason):  # what is left out would change the result
        list(EvaluationStream(_source(folder), make_spec(), rows_per_batch=2))
    keys = _keys(EvaluationStream(_source(folder, max_bad_fraction=0.1), make_spec(), rows_per_batch=2))
    assert sorted(keys) == [f"speech{number:06d}" for number in range(40)]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-30_000])
    return "cut off|unexpected end"


def _damage_header(path):
    with tarfile.open(path) as tar:
        at = tar.getmembers()[12].offset
    content = bytearray(path.read_bytes())
    content[at + 148 : at + 156] = b"junkjunk"  # the checksum
    path.write_bytes(content)
    return "damaged"


def _vanish(path):
    path.unlink()
    return "No such file"


def _empty(path):
    path.write_bytes(b"")
    return "empty"


@pytest.mark.parametrize("fault", [_truncate, _damage_header, _vanish, _empty])
def test_a_bad_shard_is_skipped_from_where_it_breaks(folder, tmp_path, make_spec, fault):
    spec, skipped = make_spec(), tmp_path / "skipped.jsonl"
    streams = [_stream(_source(folder), spec, skipped=skipped)]
    streams.append(_stream(_source(folder, max_bad_fraction=0.0), spec))
    reason = fault(folder / "speech-000002.tar")
    keys = set(_keys(itertools.islice(streams[0], 40)))
    assert {f"speech{number:06d}" for number in range(40) if not 20 <= number < 30} <= keys
    assert len(keys) < 40
    (entry,) = _listed(skipped)
    assert (entry["shard"], entry["key"]) == (str(folder / "speech-000002.tar"), "")
    with pytest.raises(UserError, match=reason):
        _keys(itertools.islice(streams[1], 40))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_does_not_change_where_a_run_goes_on(folder, make_spec, num_workers):
    _tar(
        folder / "bad.tar", [(f"bad{n}.{e}", c) for n, (m, _) in enumerate(BAD_SAMPLES.values()) for e, c in m.items()]
    )
    _truncate(folder / "speech-000001.tar")
    spec, source = make_spec(), _source(folder, max_bad_fraction=1.0)
    kwargs = {"batch_size": None, "num_workers": num_workers}
    batches = list(itertools.islice(DataLoader(_stream(source, spec), **kwargs), 30))
    for stop in (1, 7, 16, 23):
        states, last = {}, -1
        for batch in batches[:stop]:
            last = batch.stream_state["worker"]
            states[last] = json.loads(json.dumps(batch.stream_state))
        resumed = _stream(source, spec, states=states, first_worker=(last + 1) % max(num_workers, 1))
        again = list(itertools.islice(DataLoader(resumed, **kwargs), 6))
        assert [_keys([batch]) for batch in again] == [_keys([batch]) for batch in batches[stop : stop + 6]]


def test_over_budget_the_run_stops_with_a_summary(tmp_path, make_spec):
    folder = tmp_path / "speech"
    with ShardWriter(folder, "x", 50) as writer:
        for number in range(100):
            record = {**RECORD, "words": []} if number % 10 == 3 else RECORD
            writer.write(f"k{number:03d}", record, FLAC)
    skipped = tmp_path / "skipped.jsonl"
    with pytest.raises(UserError, match=r"do not spell.*: 6 of \d+ samples cannot be used, listed in .*skipped\.jsonl"):
        _keys(itertools.islice(_stream(_source(folder), make_spec(), skipped=skipped), 200))
    assert len(_listed(skipped)) == FORGIVEN + 1
    (tmp_path / "more").mkdir()
    stream = _stream(_source(folder, max_bad_fraction=0.2), make_spec(), skipped=tmp_path / "more" / "skipped.jsonl")
    counts = collections.Counter(_keys(itertools.islice(stream, 200)))
    assert len(counts) == 90
    assert len(_listed(tmp_path / "more" / "skipped.jsonl")) == 10


def test_shards_have_a_budget_of_their_own(tmp_path, make_spec):
    folder = save_speech_shards(tmp_path / "s", num_samples=60, samples_per_shard=5)
    stream = _stream(_source(folder), make_spec())
    for number in range(FORGIVEN + 1):
        (folder / f"speech-{number:06d}.tar").unlink()
    with pytest.raises(UserError, match=rf"{FORGIVEN + 1} of \d+ shards cannot be used"):
        list(itertools.islice(stream, 200))


def test_nothing_but_bad_shards_is_said_at_once(tmp_path, make_spec):
    folder = save_speech_shards(tmp_path / "s", num_samples=4, samples_per_shard=4)
    stream = _stream(_source(folder), make_spec())
    (folder / "speech-000000.tar").unlink()
    with pytest.raises(UserError, match="No such file"):
        next(iter(stream))


def test_the_listing_is_in_the_folder_of_the_run(folder, tmp_path, make_spec):
    class _Trainer:
        default_root_dir = str(tmp_path / "run")
        distributed_sampler_kwargs = None

    _tar(folder / "bad.tar", [("bad.json", b"{}")])
    data = SpeechDataModule(train=[_source(folder)], rows_per_batch=2, num_workers=2)
    data.spec, data.trainer = make_spec(), _Trainer()
    list(itertools.islice(data.train_dataloader(), 40))
    data.teardown()
    assert {entry["key"] for entry in _listed(tmp_path / "run" / "skipped.jsonl")} == {"bad"}


def test_a_listing_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    """A folder in its place stands for a full disk: both raise an OSError."""
    (tmp_path / "skipped.jsonl").mkdir()
    tolerance = Tolerance("s", 0.5, tmp_path / "skipped.jsonl")
    for _ in range(3):
        tolerance.skip("sample", UserError("bad", where="x"), "x", "k")
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("fraction", [-0.1, 1.5])
def test_a_fraction_is_one(folder, fraction):
    with pytest.raises(UserError, match="max_bad_fraction"):
        SpeechDataModule(train=[_source(folder, max_bad_fraction=fraction)])


@pytest.mark.parametrize("fault", ["broken", "empty"])
def test_one_bad_shard_of_as_many_as_readers(tmp_path, make_spec, fault):
    """A reader that has no other in an epoch waits for the next."""
    shards = save_speech_shards(tmp_path / "shards", num_samples=16, samples_per_shard=2)
    bad = sorted(shards.glob("*.tar"))[3]
    if fault == "broken":
        bad.write_bytes(b"no tar at all" * 100)
    else:
        _tar(bad, [])
    good = {f"speech{number:06d}" for number in range(16)} - {"speech000006", "speech000007"}
    for rank in range(8):
        source = Source(str(shards), InterleaveDocuments(), max_bad_fraction=0.5)
        stream = TrainingStream([source], make_spec(), rows_per_batch=1, seed=0, rank=rank, world_size=8)
        batches = itertools.islice(stream, 30)
        assert {info.key for batch in batches for info in batch.documents} == good


def test_nothing_but_empty_shards(tmp_path, make_spec):
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(8):
        _tar(shards / f"{number}.tar", [])
    stream = TrainingStream([Source(str(shards), InterleaveDocuments())], make_spec(), rows_per_batch=1, seed=0,
                            rank=3, world_size=8)  # fmt: skip
    with pytest.raises(UserError, match="the shards hold no sample"):
        next(iter(stream))
