"""A small training step with the encoder in it, and the same step on what the encoder would have left in the shards."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.step import MINI_CONNECTOR, SIZES, config, ours
from salad_lightning.batch import SpeechBatch
from salad_lightning.connectors.causal_transformer import CausalTransformerConnector
from salad_lightning.data.interleave import InterleaveDocuments
from salad_lightning.data.sources import Source
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.stream import TrainingStream
from salad_lightning.encoders.causal_conv import CausalConvEncoder
from salad_lightning.model.llm import LanguageModel, build_language_model
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.training.speed_monitor import count_parameters

__all__ = ["step_times"]

_CONTEXT, _ROWS = 512, 4


def step_times(folder: Path, tokenizer: PreTrainedTokenizerFast, steps: int) -> dict[str, Any]:
    """Processor seconds a step, from audio and from stored frames, in turns; the losses must agree.

    Args:
        folder: Shards of audio.
        tokenizer: Of the documents.
        steps: Of each kind, after one that warms up.
    """
    model, teacher = _build()
    spec = SequenceSpec.of_parts(
        tokenizer, _CONTEXT, encoder=model.encoder, connector=model.connector, switch_embeddings=True, identity=""
    )
    stream = TrainingStream([Source(str(folder), InterleaveDocuments())], spec, rows_per_batch=_ROWS, shuffle_block=64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    seconds, differ = {"audio": 0.0, "stored frames": 0.0}, 0.0
    for number, batch in enumerate(itertools.islice(stream, steps + 1)):
        losses = []
        for kind, given in (("audio", batch), ("stored frames", _stored(model, batch))):
            begin = time.process_time()
            loss = ours(model, teacher, given)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            losses.append(float(loss.detach()))
            spent = time.process_time() - begin
            if kind == "stored frames":  # one update for both, in neither's time: both see the same weights
                optimizer.step()
            optimizer.zero_grad()
            if number:
                seconds[kind] += spent
        differ = max(differ, abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-9))
    sizes = {"encoder": model.encoder, "connector": model.connector, "llm": model.llm}
    return {
        **{f"core_s_from_{kind.replace(' ', '_')}": round(spent / steps, 3) for kind, spent in seconds.items()},
        "audio_over_stored": round(seconds["audio"] / seconds["stored frames"], 3),
        "losses_differ": differ,
        "positions": _ROWS * _CONTEXT,
        "parameters": {name: count_parameters(part) for name, part in sizes.items()},
    }


def _build() -> tuple[SpeechLLM, LanguageModel]:
    torch.manual_seed(0)
    encoder = CausalConvEncoder.from_config().requires_grad_(False)
    llm, teacher = (build_language_model(config("mini"), SIZES["mini"][5], "sdpa") for _ in range(2))
    teacher.load_state_dict(llm.state_dict())
    teacher.requires_grad_(False)
    connector = CausalTransformerConnector(encoder_dim=encoder.output_dim, llm_dim=llm.dim, **MINI_CONNECTOR)
    model = SpeechLLM(llm=llm, encoder=encoder, connector=connector, switch_embeddings=True)
    return model.train(), teacher.eval()


@torch.no_grad()
def _stored(model: SpeechLLM, batch: SpeechBatch) -> SpeechBatch:
    """The batch with its clips encoded, as a stream over encoded shards would have made it."""
    data, lengths = model.encoder.encode(batch.audio_NL, batch.clip_lengths_N)
    return dataclasses.replace(
        batch,
        clips_NL=batch.clips_NL.new_zeros(0, 0),
        clip_lengths_N=batch.clip_lengths_N.new_zeros(0),
        stored_NT=data,
        stored_lengths_N=lengths,
    )
