"""A whole training step at true shapes, random weights: this package's against the same step written plainly.

Student and teacher, connector, KL, backward, clipping, AdamW. `plain` reads the same packed rows with Hugging Face's
own forward pass: logits of all positions, log-softmax, `torch.nn.functional.kl_div`. Then the same documents padded,
bucketed and packed, with the share of positions that is padding.

Run by: python -m benchmarks.step --size mini                        # any machine
        python -m benchmarks.step --size 3B --rows 4 --json step.json   # a GPU
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config

from salad_lightning.batch import DocumentInfo, SpeechBatch
from salad_lightning.connectors.causal_transformer import CausalTransformerConnector
from salad_lightning.data.packing import collate, pack
from salad_lightning.data.segments import Document, SpeechSpan
from salad_lightning.encoders.log_mel import LogMelEncoder
from salad_lightning.model.execution import Execution, prepare_blocks, prepare_process
from salad_lightning.model.llm import LanguageModel, build_language_model
from salad_lightning.model.speech_llm import SpeechLLM, predict_transcripts
from salad_lightning.objectives.forward_kl import ForwardKLObjective
from salad_lightning.training.cost import GIB, model_flops_utilisation, speech_flops, step_flops
from salad_lightning.training.speed_monitor import Work, count_parameters, peak_flops_per_second, size_of

# hidden_size, intermediate_size, layers, heads, key-value heads, vocabulary, tied; Qwen2.5's config.json
SIZES = {
    "mini": (128, 256, 4, 4, 2, 4096, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "3B": (2048, 11_008, 36, 16, 2, 151_936, True),
    "7B": (3584, 18_944, 28, 28, 4, 152_064, False),
}
MINI_CONNECTOR = {"num_layers": 2, "dim": 128, "mlp_dim": 256, "num_heads": 4, "num_kv_heads": 2}
STACK = 8  # log-mel frames a position: 12.5 positions a second, as with Mimi


def config(size: str) -> Qwen2Config:
    dim, mlp, layers, heads, kv_heads, vocab, tied = SIZES[size]
    return Qwen2Config(
        hidden_size=dim, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied, max_position_embeddings=32_768,
    )  # fmt: skip


def documents(count: int, context: int, vocab: int, encoder_dim: int, seed: int = 0) -> list[Document]:
    """Interleaved documents: text of 13–39 tokens and speech of 7–20 tokens, 1.6–5 s, by turns (about 1.3 a word).

    Their lengths are log-normal, as those of utterances and web texts are, a quarter of the context at the median.
    """
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        wanted = min(context, max(16, round(context / 4 * float(random.lognormal(0, 0.7)))))
        spans: list[SpeechSpan] = []
        clips: list[Any] = []
        tokens = positions = 0
        predicted: list[bool] = []
        heard = False
        while positions < wanted:
            words = int(random.integers(5, 16) if heard else random.integers(10, 31))
            size = round(1.3 * words)
            width = round(0.32 * words * 12.5) if heard else size
            if positions + width > wanted:
                heard, size, width = False, wanted - positions, wanted - positions
            if heard:
                spans.append(
                    SpeechSpan(tokens, tokens + size, len(clips), 0, width * STACK, words, width, 0.32 * words)
                )
                clips.append(random.standard_normal((width * STACK, encoder_dim)).astype(np.float32))
            predicted += [not heard] * size
            tokens, positions, heard = tokens + size, positions + width, not heard
        predicted[0] = False
        ids = random.integers(0, vocab, tokens)
        made.append(Document(ids, np.array(predicted), DocumentInfo(str(number), "random"), spans, clips, True))
    return made


def build(args: argparse.Namespace, attention: str) -> tuple[SpeechLLM, LanguageModel]:
    """Student in fp32, teacher in the compute dtype."""
    torch.manual_seed(0)
    encoder = LogMelEncoder()
    with torch.device(args.device):
        llm = build_language_model(config(args.size), SIZES[args.size][5], attention)
        teacher = build_language_model(config(args.size), SIZES[args.size][5], attention)
        settings = MINI_CONNECTOR if args.size == "mini" else {}
        connector = CausalTransformerConnector(encoder_dim=encoder.output_dim, llm_dim=llm.dim, stack=STACK, **settings)
    teacher.load_state_dict(llm.state_dict())
    teacher.requires_grad_(False).to(compute_dtype(args))
    model = SpeechLLM(llm=llm, encoder=encoder.to(args.device), connector=connector)
    return model.train(), teacher.eval()


def compute_dtype(args: argparse.Namespace) -> torch.dtype:
    return torch.bfloat16 if args.device == "cuda" else torch.float32


def ours(model: SpeechLLM, teacher: LanguageModel, batch: SpeechBatch) -> Tensor:
    """The step's loss as `SpeechLLMModule` computes it."""
    with torch.no_grad():
        target = predict_transcripts(teacher, batch)
    output = model(batch, ForwardKLObjective(), target)
    loss: Tensor = output.sum / max(batch.num_predicted, 1)
    return loss


def plain(model: SpeechLLM, teacher: LanguageModel, batch: SpeechBatch) -> Tensor:
    """The same loss from the logits of all positions."""
    mask = (batch.document_ids_BS[:, None, :, None] == batch.document_ids_BS[:, None, None, :]).tril()
    taught = (batch.teacher_document_ids_RU[:, None, :, None] == batch.teacher_document_ids_RU[:, None, None, :]).tril()
    with torch.no_grad():
        ids, places = batch.teacher_input_ids_RU, batch.teacher_position_ids_RU
        target = teacher.hf(input_ids=ids, attention_mask=taught, position_ids=places, use_cache=False).logits
        target = target.flatten(0, 1).float().log_softmax(-1)[batch.teacher_predict_at_M]
    logits = model.llm.hf(
        inputs_embeds=model.embed(batch), attention_mask=mask, position_ids=batch.position_ids_BS, use_cache=False
    ).logits
    log_probs = logits.flatten(0, 1).float().log_softmax(-1)[batch.predict_at_M]
    return F.kl_div(log_probs, target, reduction="sum", log_target=True) / max(batch.num_predicted, 1)


STEPS: dict[str, Callable[[SpeechLLM, LanguageModel, SpeechBatch], Tensor]] = {"ours": ours, "plain": plain}


def measure(args: argparse.Namespace, kind: str, batches: list[SpeechBatch]) -> dict[str, Any]:
    """Seconds a step (the median), peak memory, MFU; losses of the first steps, to compare."""
    try:
        row = measure_steps(args, kind, batches)
    except torch.OutOfMemoryError:
        row = {"failed": "out of memory"}
    print(json.dumps({"step": kind, **row}), file=sys.stderr, flush=True)
    gc.collect()  # a model in cycles would stand beside the next one
    torch.cuda.empty_cache()
    return row


def measure_steps(args: argparse.Namespace, kind: str, batches: list[SpeechBatch]) -> dict[str, Any]:
    """`measure`, where memory is enough."""
    attention = args.attention if kind == "ours" else "sdpa"
    model, teacher = build(args, attention)
    # Both alike: the ratio is not to credit us with what torch.compile does for anybody.
    execution = Execution(args.checkpointing, args.compile, attention)
    prepare_process(torch.device(args.device), execution)
    prepare_blocks(model.llm.blocks, execution)
    prepare_blocks(teacher.blocks, execution, trained=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=args.device == "cuda")
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, seconds, graphs = [], [], [num_graphs()]
    for batch in batches:
        on_device = batch.to(args.device)
        synchronize(args.device)
        began = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = STEPS[kind](model, teacher, on_device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(args.device)
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        graphs.append(num_graphs())
    # A step in which something was compiled tells nothing of the others.
    steps = [at for at in range(args.warmup, len(batches)) if graphs[at] == graphs[at + 1]]
    timed, work = [seconds[at] for at in steps], [Work.of(batches[at]) for at in steps]
    if not timed:
        return {"failed": "something was compiled in every step: take more of them"}
    # The rows of a batch differ: a median of rates, not the rate at the median time.
    rates = [part.positions / time for part, time in zip(work, timed, strict=True)]
    row: dict[str, Any] = {"seconds": statistics.median(timed), "steps": len(timed), "losses": losses}
    row |= {"seconds_least": min(timed), "seconds_most": max(timed)}
    row["positions_per_second"] = statistics.median(rates)
    if args.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    if peak := peak_flops_per_second(torch.device(args.device)):
        row["mfu"] = statistics.median(
            model_flops_utilisation(flops(model, part), time, peak) for part, time in zip(work, timed, strict=True)
        )
    return row


def flops(model: SpeechLLM, work: Work) -> float:
    """As `SpeechLLMModule.flops` counts them; the speech comes pre-encoded."""
    size = size_of(model.llm)
    llms = step_flops(
        size, size, positions=work.positions, teacher_positions=work.teacher_positions, predicted=work.predicted,
        mean_context=work.context / work.positions, teacher_mean_context=work.teacher_context / work.teacher_positions,
    )  # fmt: skip
    connector = count_parameters(model.connector)
    return llms + speech_flops(
        encoder_parameters=0, frames=0, connector_parameters=connector, positions=work.speech_positions
    )


def num_graphs() -> int:
    """How many torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rows_of(kind: str, made: list[Document], args: argparse.Namespace) -> Iterator[list[list[Document]]]:
    """Batches of rows: one document a row in order (padded) or by length (bucketed), or packed.

    A batch of padded rows may fill as many positions as one of packed rows.
    """
    if kind == "packed":
        yield from (packed.rows for packed in pack(made, args.context, args.rows, lookahead=args.lookahead))
        return
    order = sorted(made, key=lambda document: document.num_positions) if kind == "bucketed" else made
    rows: list[list[Document]] = []
    for document in order:
        longest = max(len_of(rows), document.num_positions)
        if rows and longest * (len(rows) + 1) > args.rows * args.context:
            yield rows
            rows = []
        rows.append([document])
    yield rows


def len_of(rows: list[list[Document]]) -> int:
    return max((row[0].num_positions for row in rows), default=0)


def padding(args: argparse.Namespace, made: list[Document]) -> dict[str, dict[str, Any]]:
    """Padding share over all batches, and seconds over the first of them."""
    table = {}
    for kind in ("padded", "bucketed", "packed"):
        grouped = list(rows_of(kind, made, args))
        grouped = grouped[:-1] if len(grouped) > 1 else grouped  # the last may be part of one
        real = sum(document.num_positions for rows in grouped for row in rows for document in row)
        width = [args.context if kind == "packed" else len_of(rows) for rows in grouped]
        room = sum(len(rows) * wide for rows, wide in zip(grouped, width, strict=True))
        # Bucketed batches go by length: measured are some of all lengths.
        chosen = grouped[:: max(1, len(grouped) // args.steps)][: args.steps]
        batches = [
            collate(rows, context=args.context, rows_per_batch=len(rows), trim=kind != "packed") for rows in chosen
        ]
        row = measure(args, "ours", [*batches[: args.warmup], *batches])
        table[kind] = {"padding_share": 1 - real / room, "positions_per_second": row.get("positions_per_second", 0.0)}
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--size", default="3B" if cuda else "mini", choices=list(SIZES))
    parser.add_argument("--context", type=int, default=2048 if cuda else 512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--lookahead", type=int, default=32, help="of the packer; the data module's default")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "flex"])
    parser.add_argument("--checkpointing", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--table", action=argparse.BooleanOptionalAction, default=True, help="compare kinds of rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = documents(args.documents, args.context, SIZES[args.size][5], LogMelEncoder().output_dim)
    packed = [rows for rows in rows_of("packed", made, args) if len(rows) == args.rows][: args.steps + args.warmup]
    batches = [collate(rows, context=args.context, rows_per_batch=args.rows) for rows in packed]
    result: dict[str, Any] = {kind: measure(args, kind, batches) for kind in STEPS}
    if not any("failed" in row for row in result.values()):
        result["ratio"] = result["plain"]["seconds"] / result["ours"]["seconds"]
        pairs = zip(result["ours"]["losses"], result["plain"]["losses"], strict=True)
        result["losses_differ"] = max(abs(mine - theirs) / max(abs(theirs), 1e-9) for mine, theirs in list(pairs)[1:])
    result["rows"] = padding(args, made) if args.table else {}
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} threads"
    print(f"{machine}, torch {torch.__version__}, {args.size}, {args.rows} × {args.context} positions\n")
    print("| step | s | positions/s | peak GiB | MFU |\n|---|---|---|---|---|")
    for kind in STEPS:
        row = result[kind]
        if "failed" in row:
            print(f"| {kind} | {row['failed']} | | | |")
            continue
        memory, mfu = (f"{row[key]:.3g}" if key in row else "–" for key in ("peak_gib", "mfu"))
        print(f"| {kind} | {row['seconds']:.3f} | {row['positions_per_second']:,.0f} | {memory} | {mfu} |")
    if "ratio" in result:
        print(f"\nplain ÷ ours: {result['ratio']:.2f}; losses differ by up to {result['losses_differ']:.0e}")
    print()
    if args.table:
        print("| rows | padding | positions/s |\n|---|---|---|")
    for kind, row in result["rows"].items():
        print(f"| {kind} | {row['padding_share']:.1%} | {row['positions_per_second']:,.0f} |")
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, **settings, **result}, indent=1)
        )


if __name__ == "__main__":
    main()
