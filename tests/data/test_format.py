import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from salad_lightning.data.audio import Recording, as_float, decode_audio, encode_flac, open_audio
from salad_lightning.data.format import AUDIO_EXTENSIONS, decode, read_shard
from salad_lightning.data.shard_writer import ShardWriter
from salad_lightning.data.tars import read_members
from salad_lightning.errors import UserError
from salad_lightning.testing.shards import save_speech_shards, speak_tones


def _encoded(extension, audio, rate):
    kinds = {"flac": ("FLAC", None), "wav": ("WAV", None), "ogg": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"),
             "mp3": ("MP3", None)}  # fmt: skip
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=kinds[extension][0], subtype=kinds[extension][1])
    return buffer.getvalue()


def test_round_trip_keeps_text_words_fields_and_audio(tmp_path):
    audio, words = speak_tones("Hello, brave new world!")
    with ShardWriter(tmp_path, "a", 2) as writer:
        writer.write(
            "k1", {"text": "Hello, brave new world!", "words": words, "domain": "x"}, encode_flac(audio, 16_000)
        )
        writer.write("k2", {"text": "plain"})
        writer.write("k3", {"text": "third"})
    assert [path.name for path in writer.paths] == ["a-000000.tar", "a-000001.tar"]
    first, second = [decode(raw, source="s", sample_rate_hz=16_000) for raw in read_shard(writer.paths[0])]
    assert (first.key, first.source, first.text, first.fields) == (
        "k1",
        "s",
        "Hello, brave new world!",
        {"domain": "x"},
    )
    assert [tuple(word) for word in first.words] == words
    np.testing.assert_allclose(first.audio, audio, atol=1 / 2**15)
    assert second.audio is None
    assert second.words is None


@pytest.mark.parametrize("extension", AUDIO_EXTENSIONS)
def test_every_listed_extension_decodes_and_stereo_is_mixed_and_resampled(tmp_path, extension):
    rate = 24_000
    tone = 0.4 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    stereo = np.stack([tone, 0.5 * tone], axis=1).astype(np.float32)
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("k", {"text": "x"}, _encoded(extension, stereo, rate), extension)
    (raw,) = read_shard(writer.paths[0])
    audio = decode(raw, source="s", sample_rate_hz=16_000).audio
    assert audio.dtype == np.float32
    assert abs(len(audio) - 16_000) < 1600
    spectrum = np.abs(np.fft.rfft(audio[2000:14_000]))
    assert abs(np.argmax(spectrum) * 16_000 / 12_000 - 440) < 2
    assert abs(np.sqrt(np.mean(audio[2000:14_000] ** 2)) - 0.3 / np.sqrt(2)) < 0.02


def test_same_samples_give_same_bytes_and_an_unfinished_shard_leaves_nothing(tmp_path):
    for name in ("one", "two"):
        save_speech_shards(tmp_path / name, num_samples=3)
    one, two = [(tmp_path / name / "speech-000000.tar").read_bytes() for name in ("one", "two")]
    assert one == two
    with pytest.raises(ValueError, match="keys"), ShardWriter(tmp_path / "three", "a") as writer:
        [writer.write("same", {"text": "x"}) for _ in range(2)]
    assert list((tmp_path / "three").iterdir()) == []


@pytest.mark.parametrize(("key", "extension"), [("a.b", "flac"), ("", "flac"), ("k", "flac"), ("n", "npy")])
def test_writer_refuses_what_could_not_be_read_back(tmp_path, key, extension):
    with ShardWriter(tmp_path, "a") as writer:
        writer.write("k", {"text": "x"})
        with pytest.raises(ValueError, match=r"key|extension"):
            writer.write(key, {"text": "x"}, b"", extension)


def _shard_with(tmp_path, members):
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"k.flac": b"x"}, "no .json"),
        ({"k.json": b"{"}, "does not parse"),
        ({"k.json": b"[]"}, "not an object"),
        ({"k.json": b'{"text": " "}'}, "no `text`"),
        ({"k.json": b'{"text": "a", "words": [["a", 0]]}'}, "list of"),
        ({"k.json": b'{"text": "a b", "words": [["a", 0.5, 0.6], ["b", 0.4, 0.7]]}'}, "backwards"),
        ({"k.json": b'{"text": "a", "words": [["a", 0.5, 0.4]]}'}, "backwards"),
        ({"k.json": b'{"text": "a"}', "k.wav": b"not audio"}, "cannot be decoded"),
        ({"k.json": b'{"text": "a"}', "k.flac": encode_flac(np.zeros(9, np.float32), 8000)[:60]}, "decoded|empty"),
    ],
)
def test_bad_samples_name_shard_and_key(tmp_path, members, message):
    path = _shard_with(tmp_path, members)
    with pytest.raises(UserError, match=message) as caught:
        [decode(raw, source="s", sample_rate_hz=16_000) for raw in read_shard(path)]
    assert "bad.tar: k" in str(caught.value)


def test_pickles_are_never_opened(tmp_path):
    path = _shard_with(tmp_path, {"k.json": json.dumps({"text": "a"}).encode(), "k.pyd": b"cos\nsystem\n."})
    (raw,) = read_shard(path)
    assert decode(raw, source="s", sample_rate_hz=16_000).audio is None


@pytest.mark.parametrize("content", [b"no tar at all" * 100, None])
def test_unreadable_shards_are_named(tmp_path, content):
    path = tmp_path / "x.tar"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.tar"):
        list(read_shard(path))


def test_truncated_shards_are_named(tmp_path):
    path = save_speech_shards(tmp_path, num_samples=3) / "speech-000000.tar"
    path.write_bytes(path.read_bytes()[:-20_000])
    with pytest.raises(UserError, match=r"speech-000000\.tar"):
        list(read_shard(path))


def test_a_tar_cut_between_two_members_is_not_whole(tmp_path):
    save_speech_shards(tmp_path, num_samples=4)
    (path,) = tmp_path.glob("*.tar")
    with tarfile.open(path) as tar:
        third = next(member for member in tar.getmembers() if member.name.startswith("speech000002"))
    path.write_bytes(path.read_bytes()[: third.offset])
    read = []
    with pytest.raises(UserError, match="cut off"):
        read.extend(raw.key for raw in read_shard(path))
    assert read == ["speech000000"]  # of the second, a member may be missing


@pytest.mark.parametrize("name", ["/etc/harm.json", "../harm.json", "a/../../harm.json", "a\\..\\harm.json"])
def test_a_path_out_of_the_archive_is_refused(tmp_path, name):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(UserError, match="outside of it") as error:
        list(read_shard(tmp_path / "x.tar"))
    assert "x.tar" in str(error.value)


def test_only_what_is_listed_is_taken_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("k.json", b'{"text": "t"}'), ("k.pkl", b"x"), ("k.py", b"x"), ("k.pyd", b"x")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("k.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (raw,) = read_shard(tmp_path / "x.tar")
    assert set(raw.members) == {"json"}


class OnlyReads:
    """A file that cannot seek, as from a network."""

    def __init__(self, content):
        self.read = io.BytesIO(content).read


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_contents_are_where_tarfile_finds_them(tar_format):
    """After headers of several blocks, too, and with contents that fill their blocks."""
    buffer = io.BytesIO()
    expected = []
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for number, name in enumerate(["short", "l" * 300, "Füße/" + "ü" * 120, "last"]):
            for extension, content in (("json", b"x" * 512 * number), ("other", b"y" * 700), ("txt", name.encode())):
                member = tarfile.TarInfo(f"{name}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                if extension != "other":
                    expected.append((member.name, content))
    for file in (io.BytesIO(buffer.getvalue()), OnlyReads(buffer.getvalue())):
        assert list(read_members(file, lambda name: not name.endswith(".other"))) == expected


def test_values_that_are_no_numbers_are_refused():
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0.0, np.nan, 0.1], np.float32), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(UserError, match="NaN or infinite"):
        decode_audio(buffer.getvalue(), 16_000, "here")


@pytest.mark.parametrize(
    ("name", "subtype", "rate_hz", "channels", "kept"),
    [
        ("FLAC", "PCM_16", 16_000, 1, True),
        ("WAV", "PCM_16", 16_000, 1, True),
        ("FLAC", "PCM_24", 16_000, 1, False),
        ("OGG", "VORBIS", 16_000, 1, False),
        ("FLAC", "PCM_16", 8_000, 1, False),
        ("FLAC", "PCM_16", 16_000, 2, False),
    ],
)
def test_16_bit_audio_is_kept_as_it_is_stored(name, subtype, rate_hz, channels, kept):
    buffer = io.BytesIO()
    audio = np.random.default_rng(0).uniform(-1, 1, (4000, channels))
    audio[:2] = [[-1.0] * channels, [1.0] * channels]
    soundfile.write(buffer, audio, rate_hz, format=name, subtype=subtype)
    floats, _ = decode_audio(buffer.getvalue(), 16_000, "here")
    found, _ = decode_audio(buffer.getvalue(), 16_000, "here", keep_int16=True)
    assert floats.dtype == np.float32
    assert found.dtype == (np.int16 if kept else np.float32)
    np.testing.assert_array_equal(as_float(found), floats)


NOISE = np.random.default_rng(0).uniform(-0.1, 0.1, 60_000).astype(np.float32)


def test_a_recording_is_decoded_as_far_as_it_is_cut():
    content = encode_flac(NOISE, 16_000)
    whole, _ = decode_audio(content, 16_000, "here", keep_int16=True)
    damaged = content[: len(content) // 2] + bytes(2000) + content[len(content) // 2 + 2000 :]
    for file in (content, damaged):
        recording = open_audio(file, 16_000, "here")
        assert len(recording) == len(whole)
        early, late = recording.cut(100, 3000), recording.cut(2000, 20_000)
        assert (len(early), len(late)) == (2900, 18_000)
        np.testing.assert_array_equal(early.audio, whole[100:3000])
        np.testing.assert_array_equal(late.audio, whole[2000:20_000])
        assert late.audio is late.audio
    broken = open_audio(damaged, 16_000, "here")
    stretch = broken.cut(0, 40_000)
    for _ in range(2):
        with pytest.raises(UserError, match="the audio cannot be decoded"):
            _ = stretch.audio
    recording = open_audio(content, 16_000, "here")
    for stop in (5000, 4000, 50_000, 70_000):  # each time further than it was decoded, or not
        np.testing.assert_array_equal(recording.cut(1000, stop).audio, whole[1000:stop])


def test_what_has_to_be_changed_is_decoded_at_once():
    stored = encode_flac(NOISE, 8_000)
    assert not isinstance(open_audio(stored, 16_000, "here"), Recording)
    np.testing.assert_array_equal(open_audio(stored, 16_000, "here"), decode_audio(stored, 16_000, "here")[0])
    assert isinstance(open_audio(stored, 8_000, "here"), Recording)


def test_a_header_that_claims_more_than_there_is(monkeypatch):
    content = bytearray(encode_flac(NOISE, 16_000))
    content[8 + 17] += 1  # the last byte of the stream's length (RFC 9639, section 8.2)
    recording = open_audio(bytes(content), 16_000, "here")
    assert len(recording) == len(NOISE) + 1
    with pytest.raises(UserError, match="the audio cannot be decoded"):
        _ = recording.cut(0, len(NOISE) + 1).audio
    # Of FLAC, libsndfile tells; of another format it may give less.
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, frames, **_: np.zeros((frames - 1, 1), np.int16))
    with pytest.raises(UserError, match="the audio is shorter than its header says"):
        _ = open_audio(bytes(content), 16_000, "here").cut(0, 1000).audio


def test_absurd_lengths_are_refused_before_they_are_decoded():
    """A header that claims years: nothing is allocated for it."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(4096, np.float32), 8_000, format="FLAC", subtype="PCM_16")
    content = bytearray(buffer.getvalue())
    # The last 36 bits of the stream's length field in STREAMINFO (RFC 9639, section 8.2).
    content[8 + 13] |= 0x0F
    content[8 + 14 : 8 + 18] = b"\xff\xff\xff\xff"
    with pytest.raises(UserError, match=r"the audio claims \d{6,} s"):
        decode_audio(bytes(content), None, "here")


def test_the_same_message_for_the_same_fault():
    messages = set()
    for _ in range(3):
        with pytest.raises(UserError) as error:
            decode_audio(b"no audio", 16_000, "here")
        messages.add(str(error.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a" * 5000 + ".json"}, "a name of 5005 bytes"),
        ({"name": "k\udcff.json"}, "not UTF-8"),
        ({"type": tarfile.GNUTYPE_SPARSE}, "sparse|damaged"),
        ({"pax_headers": {"size": str(2**40)}}, "claims 1099511627776 bytes"),
        ({"pax_headers": {"size": "-1024"}}, "claims -1024 bytes|damaged|backwards|not a readable"),
    ],
)
def test_absurd_members_are_refused(tmp_path, changes, message):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        member = tarfile.TarInfo(changes.pop("name", "k.json"))
        member.size = 2
        for name, value in changes.items():
            setattr(member, name, value)
        tar.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(UserError, match=message) as error:
        list(read_shard(tmp_path / "x.tar"))
    assert error.value.where == str(tmp_path / "x.tar")


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    """Python's own reader, and WebDataset with it, gives the samples before it and says nothing."""
    save_speech_shards(tmp_path, num_samples=4)
    (path,) = tmp_path.glob("*.tar")
    with tarfile.open(path) as tar:
        third = next(member for member in tar.getmembers() if member.name.startswith("speech000002"))
    content = bytearray(path.read_bytes())
    content[third.offset] ^= 1
    path.write_bytes(content)
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 4
    with pytest.raises(UserError, match="damaged"):
        list(read_shard(path))


def test_pickled_frames_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    record = json.dumps({"text": "a", "encoded": {"by": "x", "num_samples": 3}}).encode()
    path = _shard_with(tmp_path, {"k.json": record, "k.codes.npy": buffer.getvalue()})
    with pytest.raises(UserError, match="a pickle"):
        [decode(raw, source="s", sample_rate_hz=16_000) for raw in read_shard(path)]
