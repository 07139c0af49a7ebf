"""From a prompt with speech in it to new tokens: spliced as in training, decoded with Hugging Face's own cache."""

from __future__ import annotations

import bisect
import dataclasses
import math
import string
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from salad_lightning.data.format import Utterance
from salad_lightning.data.packing import collate
from salad_lightning.data.segments import Document, SpeechSpan
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.data.template import TemplateDocuments
from salad_lightning.errors import UserError
from salad_lightning.model.speech_llm import SpeechLLM

__all__ = ["Decoding", "generate", "pad_left", "prompt_document"]

# Stands for the unknown transcript when the prompt is tokenised; the model hears speech in its place.
_HEARD = "a"


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Most tokens after the prompt; fewer where an end-of-sequence token comes.
        temperature: 0 takes the most probable token; above, tokens are drawn (seed torch for the same draw again).
        top_p: Draw from the most probable tokens that hold this much probability.

    Raises:
        UserError: If a value is out of range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, fine, cure in (
            ("max_new_tokens", self.max_new_tokens >= 1, "give 1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "give 0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "give a share above 0 and up to 1"),
        ):
            if not fine:
                raise UserError(f"{name} is {getattr(self, name)}", cure=cure)


def prompt_document(prompt: str, utterance: Utterance, spec: SequenceSpec, *, max_new_tokens: int) -> Document:
    """A prompt as the model reads it: `TemplateDocuments` without an answer.

    Args:
        prompt: A template with ``{speech}`` where the audio is heard; an utterance without audio is read there.
        utterance: Audio at ``spec.sample_rate_hz``, or text.
        spec: Of the model.
        max_new_tokens: Positions to leave free behind the prompt.

    Raises:
        UserError: If the prompt has no place for the audio, asks for what is not there, is empty, or is longer than
            the context; for audio with its seconds and the most that fit.
    """
    template = TemplateDocuments(prompt)  # refuses what does not parse
    names = {name for _, name, _, _ in string.Formatter().parse(prompt)}
    heard = utterance.num_samples > 0
    if heard and "speech" not in names:
        raise UserError(f"the prompt {prompt!r} has no {{speech}}", cure="put {speech} where the audio is to be heard")
    for name in {"answer", "text"} & names if heard else {"answer"} & names:
        raise UserError(f"the prompt asks for {{{name}}}, which is not known", cure="leave it out")
    if heard:
        utterance = dataclasses.replace(utterance, text=_HEARD)
    # Without a limit first, so that the message can name seconds.
    (document,) = template.build(utterance, dataclasses.replace(spec, context=sys.maxsize))
    # How many words are spoken is not known.
    spans = [_of_unknown_words(span, spec) for span in document.spans]
    document = dataclasses.replace(document, spans=spans)
    if heard and not document.spans:
        raise UserError(
            f"in the prompt {prompt!r} what follows {{speech}} is one token with it", cure="put a space behind {speech}"
        )
    if not document.num_positions:
        raise UserError("the prompt is empty", where=utterance.where, cure="give --prompt a text")
    if document.num_positions + max_new_tokens > spec.context:
        raise _too_long(document, utterance, spec, max_new_tokens)
    return document


def _of_unknown_words(span: SpeechSpan, spec: SequenceSpec) -> SpeechSpan:
    return dataclasses.replace(span, num_words=0, num_positions=spec.num_positions(span.num_frames, 0))


def _too_long(document: Document, utterance: Utterance, spec: SequenceSpec, max_new_tokens: int) -> UserError:
    if not document.spans:
        return UserError(
            f"the prompt fills {document.num_positions} positions; with {max_new_tokens} new tokens that is more than "
            f"the model's {spec.context}",
            where=utterance.where,
            cure="shorten the prompt, or ask for fewer new tokens",
        )
    (span,) = document.spans
    room = spec.context - max_new_tokens - (document.num_positions - span.num_positions)
    lengths = range(1, utterance.num_samples + 1)
    fit = bisect.bisect_right(lengths, room, key=lambda n: spec.num_positions(spec.num_frames(n), span.num_words))
    return UserError(
        f"the audio is {span.seconds:.1f} s long; beside the prompt and {max_new_tokens} new tokens, "
        f"{math.floor(10 * fit / spec.sample_rate_hz) / 10:.1f} s fit the model's {spec.context} positions",
        where=utterance.where,
        cure="cut the audio into pieces, or ask for fewer new tokens",
    )


@torch.no_grad()
def generate(
    model: SpeechLLM,
    prompts: Sequence[Document],
    decoding: Decoding,
    *,
    tokenizer: PreTrainedTokenizerFast,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Continue a batch of prompts; greedy tokens do not depend on what else is in the batch.

    Args:
        model: In eval mode.
        prompts: One row each.
        decoding: How tokens are chosen.
        tokenizer: Names the end-of-sequence token, beside the model's generation config.
        streamer: Is given every token as it comes; for a single prompt.

    Returns:
        New tokens of each prompt, up to and without the end-of-sequence token.
    """
    if not prompts:
        return []
    longest = max(max(document.num_positions, document.num_tokens) for document in prompts)
    batch = collate([[document] for document in prompts], context=longest, rows_per_batch=len(prompts), trim=True)
    hf: Any = model.llm.hf
    batch = batch.to(hf.device)
    spliced = model.splice(batch)
    embeddings_BSD, mask_BS = pad_left(spliced.embeddings_BSD, spliced.document_ids_BS >= 0)
    stop = _stop_ids(hf, tokenizer)
    # `generate` takes positions from the mask, so padding on the left changes none.
    new_BT: Tensor = hf.generate(
        inputs_embeds=embeddings_BSD,
        attention_mask=mask_BS.long(),
        generation_config=_config(decoding, stop, hf.get_output_embeddings().weight.shape[0], model.llm.vocab_size),
        streamer=streamer,
    )
    return [_until(row, stop) for row in new_BT.tolist()]


def pad_left(embeddings_BSD: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Rows moved to the right and without gaps, so that all of them end, and go on, at the same position.

    Args:
        embeddings_BSD: Of packed rows with one document each.
        mask_BS: True at its positions.

    Returns:
        Both, moved alike.
    """
    order_BS = mask_BS.long().argsort(dim=1, stable=True)  # what is masked first, the rest in its order
    rows_B1 = torch.arange(mask_BS.shape[0], device=mask_BS.device)[:, None]
    return embeddings_BSD[rows_B1, order_BS], mask_BS.gather(1, order_BS)


def _stop_ids(hf: Any, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    configured = hf.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(number) for number in [*ids, tokenizer.eos_token_id] if number is not None})


def _config(decoding: Decoding, stop: list[int], num_rows: int, vocab_size: int) -> GenerationConfig:
    """What a model's own generation config often brings along; what is None here, transformers takes from there."""
    sample = decoding.temperature > 0
    temperature, top_p = (decoding.temperature, decoding.top_p) if sample else (1.0, 1.0)
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=decoding.max_new_tokens,
        do_sample=sample,
        temperature=temperature,
        top_p=top_p,
        top_k=0 if sample else 50,  # 50 is "not set", about which nothing is warned
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        eos_token_id=stop or None,
        pad_token_id=stop[0] if stop else 0,
        # Rows of the head beyond the tokenizer are padding.
        suppress_tokens=list(range(vocab_size, num_rows)) or None,
    )


def _until(token_ids: list[int], stop: list[int]) -> list[int]:
    ends = [index for index, token in enumerate(token_ids) if token in stop]
    return token_ids[: ends[0]] if ends else token_ids
