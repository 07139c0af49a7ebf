"""Damaged shards: whatever the bytes, the reader gives samples or a `UserError`; it ends, and runs nothing."""

import collections
import pickle
import random
import time

import numpy as np
import pytest

from salad_lightning.corpus.readers import read_tars
from salad_lightning.data.arrays import encode_array
from salad_lightning.data.audio import decode_audio, encode_flac
from salad_lightning.data.format import decode, read_shard
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import speak_tones


class _Harm:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def _shard(folder, harm):
    text = "One two."
    audio, words = speak_tones(text)
    with ShardWriter(folder, "x", 0) as writer:
        writer.write("a", {"text": text, "words": words}, encode_flac(audio[:2000], 16_000))
        frames = np.ones((4, 3), np.float16)
        writer.write("b", {"text": text, "encoded": {"by": "x", "num_samples": 9}}, encode_array(frames), "frames.npy")
        writer.write("c", {"text": text})
        bomb = np.array([_Harm(harm)], dtype=object)
        content = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(118)
        writer.write("d", {"text": text, "encoded": {}}, content + pickle.dumps(bomb), "codes.npy")
    return writer.paths[0].read_bytes()


def _mutated(content, rng):
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        at, kind = rng.randrange(len(data)), rng.random()
        if kind < 0.4:  # where headers are, most of them
            at = at // 512 * 512 + rng.randrange(512)
            data[min(at, len(data) - 1)] = rng.randrange(256)
        elif kind < 0.55:
            data[at] ^= 1 << rng.randrange(8)
        elif kind < 0.7:
            del data[at : at + rng.choice((1, 17, 512, 5000))]
        elif kind < 0.8:
            data[at:at] = rng.randbytes(rng.choice((1, 511, 512)))
        elif kind < 0.9:
            other = rng.randrange(len(data)) // 512 * 512
            data[at // 512 * 512 : at // 512 * 512 + 512] = data[other : other + 512]
        else:
            data = data[: max(at, 1)]
        data = data or bytearray(b"x")
    if rng.random() < 0.7:
        _mend_checksums(data)
    return bytes(data)


def _mend_checksums(data):
    """So that damage reaches what is behind the checksum."""
    for at in range(0, len(data) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 2000), pytest.param(1, 10_000, marks=pytest.mark.slow)], ids=["2000", "10000"]
)
def test_damaged_shards_end_in_samples_or_a_user_error(tmp_path, seed, count):
    harm, path = tmp_path / "harm", tmp_path / "fuzz.tar"
    content, rng = _shard(tmp_path / "shard", harm), random.Random(seed)
    outcomes = {"whole": 0, "shard": 0, "sample": 0}
    for _ in range(count):
        path.write_bytes(_mutated(content, rng))
        begin, outcome = time.process_time(), "whole"
        try:
            for raw in read_shard(path):
                try:
                    decode(raw, source="s", sample_rate_hz=16_000)
                except UserError:
                    outcome = "sample"
        except UserError as error:
            outcome = "shard" if error.where == str(path) else error.where
        outcomes[outcome] += 1
        assert time.process_time() - begin < 5
    assert not harm.exists()
    assert outcomes["shard"] > count / 10
    assert outcomes["sample"] > count / 10


@pytest.mark.parametrize("behind", ["tar", "far", "junk"])
def test_what_follows_a_tar_is_not_passed_over(tmp_path, behind):
    """`cat a.tar b.tar` is one tar to the standard reader, and its rest is lost."""
    content, path = _shard(tmp_path / "shard", tmp_path / "harm"), tmp_path / "x.tar"
    path.write_bytes(content + bytes(200_000))  # zeros are what a tar ends with
    whole = [raw.key for raw in read_shard(path)]
    assert whole == ["a", "b", "c", "d"]
    assert len(list(read_tars(str(path)))) == 4
    path.write_bytes(content + {"tar": content, "far": bytes(200_000) + content, "junk": b"x"}[behind])
    for read in (lambda: list(read_shard(path)), lambda: list(read_tars(str(path)))):
        with pytest.raises(UserError, match="a second tar follows") as caught:
            read()
        assert caught.value.where == str(path)
        assert "one by one" in caught.value.cure


def test_damaged_tars_end_the_same_way_in_prepare(tmp_path):
    """Its reader of tars notes where the audio is and leaves it there."""
    harm, path = tmp_path / "harm", tmp_path / "fuzz.tar"
    content, rng = _shard(tmp_path / "shard", harm), random.Random(2)
    outcomes = collections.Counter()
    for _ in range(1000):
        path.write_bytes(_mutated(content, rng))
        begin = time.process_time()
        try:
            for row in read_tars(str(path)):
                outcomes["problem" if row.problem else "row"] += 1
                if row.audio is not None:
                    decode_audio(row.audio.read(), 16_000, "")
        except UserError as error:
            outcomes["shard" if error.where == str(path) else "audio"] += 1
        assert time.process_time() - begin < 5
    assert not harm.exists()
    assert min(outcomes[kind] for kind in ("row", "problem", "shard", "audio")) > 20
