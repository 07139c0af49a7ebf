"""The shards of `benchmarks.stream` as other packages read them: decoded, tokenised, in padded batches.

Each generator is endless and yields, for every batch, its samples, the positions counted (none) and the share of the
token ids that is not padding. All work in this process and thread. lhotse decodes to floats; the others keep 16 bits.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset
from numpy.typing import NDArray

from salad_lightning.data.format import read_shard
from salad_lightning.data.packing import pad
from salad_lightning.data.spec import SequenceSpec

__all__ = ["hugging_face", "lhotse_shar", "missing", "plain_webdataset", "write_shar"]

_SHUFFLED = 512  # samples, as in our own stream
_BATCH = 96  # utterances, about as many as fill our rows

Made = tuple[int, int, float]


def missing(package: str) -> bool:
    """Whether a peer is not installed."""
    return importlib.util.find_spec(package) is None


def plain_webdataset(folder: Path, spec: SequenceSpec) -> Iterator[Made]:
    """What WebDataset's own pages show: shuffle, decode, batch, pad; token ids and audio, no spans and no packing."""

    def load(sample: dict[str, Any]) -> tuple[Any, Any]:
        return _audio(sample["flac"]), _ids(json.loads(sample["json"])["text"], spec)

    paths = [str(path) for path in sorted(folder.iterdir())]
    dataset = webdataset.WebDataset(paths, shardshuffle=False).repeat().shuffle(_SHUFFLED).map(load)
    yield from dataset.batched(_BATCH, collation_fn=_padded)


def write_shar(folder: Path, audio_shards: Path, samples_per_shard: int) -> None:
    """The utterances of our shards as a lhotse Shar: cuts in JSON lines, FLAC in tars."""
    # Optional, and slow to import.
    from lhotse import CutSet, Recording, SupervisionSegment

    def cuts() -> Iterator[Any]:
        for path in sorted(audio_shards.iterdir()):
            for raw in read_shard(path):
                cut = Recording.from_bytes(raw.members["flac"], raw.key).to_cut()
                text = json.loads(raw.members["json"])["text"]
                cut.supervisions = [SupervisionSegment(raw.key, raw.key, 0.0, cut.duration, text=text)]
                yield cut

    folder.mkdir(parents=True)
    CutSet(cuts()).to_shar(folder, fields={"recording": "flac"}, shard_size=samples_per_shard)


def lhotse_shar(folder: Path, spec: SequenceSpec) -> Iterator[Made]:
    """A Shar under lhotse's sampler of buckets by duration; audio as its unsupervised dataset collates it."""
    # As above.
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.collation import collate_audio

    cuts = CutSet.from_shar(in_dir=folder, shuffle_shards=True, seed=0).repeat()
    sampler = DynamicBucketingSampler(
        cuts,
        max_duration=_BATCH * 12.0,
        num_buckets=8,
        shuffle=True,
        buffer_size=_SHUFFLED,
        num_cuts_for_bins_estimate=_SHUFFLED,
        rank=0,
        world_size=1,
    )
    for batch in sampler:
        collate_audio(batch)
        ids, lengths = pad([_ids(cut.supervisions[0].text, spec) for cut in batch])
        yield len(lengths), 0, float(lengths.sum()) / ids.numel()


def hugging_face(folder: Path, spec: SequenceSpec) -> Iterator[Made]:
    """`datasets` streaming the same tars; its own decoder needs torchcodec, so soundfile decodes here as well."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    # Optional, and reads the variables when it is imported.
    from datasets import Features, Json, Value, load_dataset

    names = {name: Value("string") for name in ("__key__", "__url__")}
    features = Features(names | {"json": Json(), "flac": Value("binary")})
    paths = [str(path) for path in sorted(folder.iterdir())]
    rows = load_dataset("webdataset", data_files=paths, split="train", streaming=True, features=features)
    epoch, batch = 0, []
    while True:
        for row in rows.shuffle(seed=epoch, buffer_size=_SHUFFLED):
            text = row["json"]["text"]
            batch.append((_audio(row["flac"]), _ids(text, spec)))
            if len(batch) == _BATCH:
                yield _padded(batch)
                batch = []
        epoch += 1


def _audio(content: bytes) -> NDArray[np.int16]:
    """16 bits as they are stored, which is how our own stream keeps them."""
    audio, _ = soundfile.read(io.BytesIO(content), dtype="int16")
    return np.asarray(audio, dtype=np.int16)


def _ids(text: str, spec: SequenceSpec) -> NDArray[np.int64]:
    """Without the places of tokens in the text, which a peer has no use for."""
    return np.asarray(spec.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _padded(samples: list[tuple[Any, Any]]) -> Made:
    audio, ids = zip(*samples, strict=True)
    pad(list(audio))
    tokens, lengths = pad(list(ids))
    return len(lengths), 0, float(lengths.sum()) / tokens.numel()
