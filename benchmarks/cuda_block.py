"""What runs on a GPU for one Transformer block, read off the compiled code on a machine without one.

A block of Qwen2.5's shape is prepared as for training (bf16 weights, as FSDP2 gathers them, under autocast), traced
with its mask of packed documents, and lowered by Inductor for an H200 that this process only pretends to have; its
attention kernels are compiled for compute capability 9.0. The teacher's block has no backward pass, and is compiled for
any number of rows. Printed are graph breaks, kernels, bytes that wait for the backward pass, what is computed again
there, operations of the products and bytes that the other kernels move (forward + backward), and what attention takes
of a multiprocessor. No time here is measured: that takes a GPU.

It uses internals of torch 2.11, and patches torch for the rest of the process.

Run by: python -m benchmarks.cuda_block --json cuda_block.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from benchmarks.cuda_code import compile_kernel, kernels_of, load_kernel, lower, pretend
from benchmarks.step import SIZES, config
from salad_lightning.model.execution import _ATTENTIONS, _PRODUCTS, Execution, prepare_blocks
from salad_lightning.model.llm import build_language_model

# The gradients of seven products: two products each.
_GRADIENT_PRODUCTS = 14


@dataclass
class Graphs:
    """What Inductor is given: a graph, its inputs, and whether it is of a backward pass or without one."""

    breaks: int
    parts: list[tuple[Any, list[Any], bool, bool]] = field(default_factory=list)


def attend_as_on_gpu() -> None:
    """Let attention be traced on a CPU as a GPU does it."""
    import torch._functorch.partitioners as partitioners
    import torch.nn.attention.flex_attention as flex

    options = flex._apply_kernel_options

    def with_logsumexp(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**options(*args, **kwargs), "OUTPUT_LOGSUMEXP": True}  # Hugging Face asks for it off the CPU

    def nothing(*_: Any) -> None:
        return

    def efficient(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float | None = None, **_: Any
    ) -> Tensor:
        """What torch takes for a dense mask, where cuDNN's attention is off."""
        bias = attn_mask.expand(*query.shape[:3], key.shape[2])
        result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), scale=scale
        )[0]
        return result

    def parts(joint: Any, forward: Any, backward: Any, _: int) -> tuple[Any, Any]:
        return forward, backward

    # What is drawn at random anew needs the state of a GPU's generator; without dropout nothing is.
    partitioners.functionalize_rng_ops = parts  # type: ignore[assignment]
    flex._apply_kernel_options = with_logsumexp
    flex._validate_device = nothing  # type: ignore[assignment] # no backward pass on a CPU
    nn.functional.scaled_dot_product_attention = efficient  # type: ignore[assignment]


def trace(settings: Qwen2Config, attention: str, checkpointing: str, shapes: list[tuple[int, int]]) -> Graphs:
    """The graphs of a block; before `pretend`.

    Args:
        settings: Of the model, of which one block is taken.
        attention: ``sdpa`` or ``flex``.
        checkpointing: Of `Execution`, or ``teacher`` for a frozen block.
        shapes: Rows and positions of one batch after the other; the last one's graphs are given.
    """
    import torch._dynamo as dynamo
    from torch._functorch.aot_autograd import make_boxed_func  # type: ignore[attr-defined]
    from torch._inductor.compile_fx import compile_fx
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    trained = checkpointing != "teacher"
    settings.num_hidden_layers, settings.layer_types, settings.vocab_size = 1, ["full_attention"], 1024
    dynamo.reset()
    dynamo.utils.counters.clear()
    graphs = Graphs(0)

    def capture(graph: Any, inputs: list[Any], **options: Any) -> Any:
        backward = bool(options.get("is_backward"))
        graphs.parts.append((copy.deepcopy(graph), list(inputs), backward, bool(options.get("is_inference"))))
        return make_boxed_func(graph.forward)

    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        torch.set_default_dtype(torch.bfloat16)
        llm = build_language_model(settings, settings.vocab_size, attention)
        torch.set_default_dtype(torch.float32)
        llm.train(trained).requires_grad_(trained)
        kind: Any = checkpointing if trained else "none"
        prepare_blocks(llm.blocks, Execution(kind, False, attention), trained=trained)  # type: ignore[arg-type]
        block = llm.blocks[0]
        block.forward = torch.compile(
            block.forward, backend=lambda graph, inputs: compile_fx(graph, inputs, inner_compile=capture)
        )
        for shape in shapes:
            graphs.parts.clear()
            ids = torch.zeros(shape, dtype=torch.long)
            with torch.set_grad_enabled(trained), torch.autocast("cpu", torch.bfloat16):
                hidden = llm(ids, ids, ids[0], input_ids_BS=ids).hidden
            if trained:
                hidden.float().sum().backward()
    graphs.breaks = sum(dynamo.utils.counters["graph_break"].values())
    return graphs


def saved(graph: Any) -> list[Tensor]:
    """Tensors that a block keeps from its forward pass, with its input, without weights and what all blocks share."""
    holes = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    hidden = next(
        value for value in holes if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
    )
    result, *others = graph.graph.find_nodes(op="output")[0].args[0]
    kept = {hidden.untyped_storage()._cdata: hidden}
    for node in others:
        value = node.meta["val"]
        if node.op != "placeholder" and isinstance(value, Tensor):
            kept[value.untyped_storage()._cdata] = value
    kept.pop(result.meta["val"].untyped_storage()._cdata, None)  # the next block's input
    return list(kept.values())


def computed(graph: Any, operations: Any) -> int:
    """How often the operations are in a graph."""
    return sum(node.target in operations for node in graph.graph.nodes)


def product_flops(graph: Any) -> int:
    """Operations of the products of matrices in a graph."""
    total = 0
    for node in graph.graph.nodes:
        if node.target in _PRODUCTS:
            left, right = (argument.meta["val"].shape for argument in node.args[-2:])
            total += 2 * int(left[0]) * int(left[1]) * int(right[1])
    return total


def calls(source: str) -> tuple[int, int]:
    """Triton kernels that a compiled graph starts, and calls of libraries."""
    body = source[source.index("def call") : source.index("def get_args")]
    return len(re.findall(r"\w+\.run\(", body)), len(re.findall(r"extern_kernels\.\w+\(|= torch\.ops\.", body))


def attention_kernels(source: str) -> list[dict[str, Any]]:
    """Registers, spills, shared memory and tensor-core instructions of kernels from FlexAttention's templates."""
    found = []
    for name, code in kernels_of(source):
        if not name.startswith("triton_tem_"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            kernel, asked = load_kernel(name, code, "template", Path(folder))
            options = {key: asked[key] for key in ("num_warps", "num_stages")}
            meta = asked["triton_meta"]
            figures, _, sass = compile_kernel(kernel, meta, meta["constants"], options, Path(folder))
        found.append(figures | {"warps": options["num_warps"], "wgmma": len(re.findall(r"\bHGMMA", sass))})
    return found


def look(size: str, attention: str, checkpointing: str, graphs: Graphs, positions: int) -> dict[str, Any]:
    """Everything about one configuration; after `pretend`."""
    row: dict[str, Any] = {"size": size, "attention": attention, "checkpointing": checkpointing}
    row["graph_breaks"] = graphs.breaks
    for graph, inputs, is_backward, is_inference in graphs.parts:
        if is_backward:
            row["products_again"] = computed(graph, _PRODUCTS) - _GRADIENT_PRODUCTS
            row["attention_again"] = computed(graph, _ATTENTIONS)
        elif not is_inference:
            row["saved_bytes"] = sum(value.untyped_storage().nbytes() for value in saved(graph)) / positions
        part = "backward" if is_backward else "forward"
        row[part] = {} if is_inference else {"product_flops": product_flops(graph) / positions}
        source, moved_bytes = lower(graph, inputs, {}, is_inference=is_inference, is_backward=is_backward)
        row[part] |= dict(zip(("triton", "library"), calls(source), strict=True))
        row[part] |= {"moved_bytes": moved_bytes / positions, "attention": attention_kernels(source)}
    return row


def cells(row: dict[str, Any]) -> list[str]:
    def part(name: str) -> list[str]:
        if name not in row:
            return ["", ""]
        kernels = ", ".join(
            f"{one['registers']} / {one['spilled_bytes']} / {one['shared_bytes'] // 1024}"
            for one in row[name]["attention"]
        )
        return [f"{row[name]['triton']} + {row[name]['library']}", kernels or "library"]

    again = f"{row['products_again']} + {row['attention_again']}" if "backward" in row else ""
    kept = f"{row['saved_bytes']:,.0f}" if "saved_bytes" in row else ""
    both = [row[name] for name in ("forward", "backward") if "product_flops" in row.get(name, {})]
    products = " + ".join(f"{one['product_flops'] / 1e6:.0f}" for one in both)
    moved = " + ".join(f"{one['moved_bytes'] / 1e3:.0f}" for one in both)
    names = [row["size"], row["attention"], row["checkpointing"], str(row["graph_breaks"])]
    return [*names, kept, again, products, moved, *part("forward"), *part("backward")]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["none", "selective", "full", "teacher"]
    parser.add_argument("--sizes", nargs="+", default=["0.5B", "3B"], choices=list(SIZES))
    parser.add_argument("--attention", nargs="+", default=["sdpa", "flex"], choices=["sdpa", "flex"])
    parser.add_argument("--checkpointing", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    attend_as_on_gpu()
    # The rows of a teacher's batch are as many as its transcripts fill.
    shapes = [(args.rows + 1, args.context), (args.rows, args.context)]
    traced = [
        (size, attention, kind, trace(config(size), attention, kind, shapes[kind != "teacher" :]))
        for size, attention, kind in itertools.product(args.sizes, args.attention, args.checkpointing)
    ]
    pretend()
    table = [look(*part, args.rows * args.context) for part in traced]
    print(f"torch {torch.__version__}, {args.rows} × {args.context:,} positions, bf16\n")
    head = ["size", "attention", "checkpointing", "graph breaks", "saved bytes a position"]
    head += ["again in backward: products + attention", "products, MFLOP a position", "other kernels, KB a position"]
    head += ["forward: Triton + library calls", "its attention"]
    head += ["backward: Triton + library calls", "its attention"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in table:
        print("| " + " | ".join(cells(row)) + " |")
    print("\nOf attention: registers / spilled bytes / KiB of shared memory.")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
