"""What runs on a GPU in a chunk of the vocabulary kernel, read off the compiled code on a machine without one.

`salad_lightning.projection.rows` is traced, lowered by Inductor for an H200 that this process only pretends to have,
and its Triton kernels are compiled for compute capability 9.0 by the compiler in Triton's wheel. Printed are kernels
and tensors of [chunk, V] besides the gradient, passes over the rows, bytes moved, registers, spills, and instructions a
logit, with the times that bytes and instructions take at an H200's peaks. No time here is measured: that takes a GPU.

It uses internals of torch 2.11, and patches torch for the rest of the process.

Run by: python -m benchmarks.cuda_code --json cuda_code.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch._inductor.config as inductor_config
from torch import Tensor

from salad_lightning.projection import LossTerms, rows

OBJECTIVES = {
    "nll": LossTerms(nll=1.0),
    "kl": LossTerms(kl=1.0),
    "mixture": LossTerms(nll=0.75, kl=0.25),
    "mixture, T = 2": LossTerms(nll=0.75, kl=0.25, temperature=2.0),
    "reverse kl": LossTerms(reverse_kl=1.0),
    "jsd": LossTerms(jsd=1.0),
}
# An H200: multiprocessors, schedulers in each, clock, and the bandwidth of its data sheet.
_PROCESSORS, _SCHEDULERS, _HERTZ, _BYTES_PER_SECOND = 132, 4, 1.75e9, 4.8e12
_H200 = SimpleNamespace(
    name="NVIDIA H200", type="cuda", index=0, major=9, minor=0, multi_processor_count=_PROCESSORS, warp_size=32,
    total_memory=141 * 10**9, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65_536,
    shared_memory_per_block=49_152, shared_memory_per_block_optin=232_448, shared_memory_per_multiprocessor=233_472,
    max_threads_per_block=1024, L2_cache_size=50 * 2**20, gcnArchName="", is_integrated=0,
)  # fmt: skip


class Lowered(NamedTuple):
    """Of a graph.

    Attributes:
        source: Python and Triton.
        moved_bytes: That its kernels read and write, without those of libraries and templates.
    """

    source: str
    moved_bytes: int


def pretend() -> None:
    """Make Inductor and Triton believe in a GPU, as far as lowering and compiling ask."""
    import torch._inductor.scheduler as scheduler
    import torch._subclasses.fake_tensor as fake_tensor
    import triton  # type: ignore[import-untyped]
    from torch._dynamo.device_interface import CudaInterface
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_: value

    device = torch.device("cuda:0")
    patches: list[tuple[Any, dict[str, Any]]] = [
        (torch.cuda, {"is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None,
                      "get_device_properties": _H200, "_get_device_properties": _H200,
                      "get_device_capability": (9, 0)}),
        (fake_tensor, {"init_gpu_context": None}),
        (scheduler, {"has_triton": True}),
    ]  # fmt: skip
    for owner, values in patches:
        for name, value in values.items():
            setattr(owner, name, always(value))
    static: dict[str, Any] = {"get_device_properties": _H200, "get_compute_capability": 90, "is_triton_capable": True,
                              "raise_if_triton_unavailable": None}  # fmt: skip
    for name, value in static.items():
        setattr(CudaInterface, name, staticmethod(always(value)))
    CudaInterface.Worker.get_device_properties = staticmethod(always(_H200))  # type: ignore[method-assign]
    driver = SimpleNamespace(
        get_current_target=always(GPUTarget("cuda", 90, 32)),
        get_current_device=always(0),
        get_active_torch_device=always(device),
    )
    triton.runtime.driver.set_active(driver)


def trace(terms: LossTerms, *, chunk: int, vocab: int, teacher_vocab: int, real: int) -> tuple[Any, list[Any]]:
    """The graph of `rows._block` that Inductor is given, and its inputs; before `pretend`."""
    import torch._dynamo as dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[tuple[Any, list[Any]]] = []

    def capture(graph: Any, inputs: list[Any], **_: Any) -> Any:
        graphs.append((graph, inputs))
        return graph.forward

    def block(raw: Tensor, teacher_raw: Tensor | None, labels: Tensor) -> Any:
        plain = rows.Settings()
        return rows._block(raw, teacher_raw, labels, None, real, plain, plain, terms, True)

    teaches = bool(terms.kl or terms.reverse_kl or terms.jsd)
    raw = torch.zeros(chunk, vocab, dtype=torch.bfloat16)
    teacher_raw = torch.zeros(chunk, teacher_vocab, dtype=torch.bfloat16) if teaches else None
    labels = torch.zeros(chunk, dtype=torch.long)
    for tensor in (raw, teacher_raw, labels):
        if tensor is not None:
            dynamo.maybe_mark_dynamic(tensor, 0)
        if tensor is not None and tensor.ndim > 1:
            dynamo.mark_static(tensor, 1)
    backend = aot_autograd(
        fw_compiler=capture, inference_compiler=capture, decompositions=select_decomp_table(),
        keep_inference_input_mutations=True,
    )  # fmt: skip
    dynamo.reset()
    with torch.no_grad():
        torch.compile(block, backend=backend)(raw, teacher_raw, labels)
    return graphs[0]


def lower(
    graph: Any, inputs: list[Any], options: dict[str, Any], *, is_inference: bool = True, is_backward: bool = False
) -> Lowered:
    """What Inductor makes of a graph for a GPU; after `pretend`. The graph is changed."""
    import torch._inductor.compile_fx as compile_fx
    from torch._guards import TracingContext, tracing
    from torch._inductor.debug import DebugContext
    from torch._inductor.fx_passes.post_grad import view_to_reshape
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    mode = next(value for value in inputs if isinstance(value, Tensor)).fake_mode  # type: ignore[attr-defined]
    device = torch.device("cuda:0")

    def on_gpu(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    moved = [on_gpu(value) for value in inputs]
    holes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(holes, moved, strict=True):
        node.meta["val"] = value
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
    graph.recompile()
    view_to_reshape(graph)  # type: ignore[no-untyped-call]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*moved)  # type: ignore[no-untyped-call]
    compile_fx.record_original_output_strides(graph)
    with inductor_config.patch(options), V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        lowering = GraphLowering(
            graph, example_inputs=moved, shape_env=mode.shape_env, is_inference=is_inference, is_backward=is_backward
        )
        with DebugContext(), V.set_graph_handler(lowering), tracing(TracingContext(mode)):
            lowering.run(*moved)  # type: ignore[no-untyped-call]
            source = str(lowering.codegen()[0].value)
            moved_bytes = sum(
                node.get_read_write_buffers_sizes()
                for node in lowering.scheduler.nodes
                if not (node.is_extern() or node.is_template())
            )
    return Lowered(source, moved_bytes)


def kernels_of(source: str) -> list[tuple[str, str]]:
    """Names and sources of the Triton kernels."""
    return re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", source, re.DOTALL)


def load_kernel(name: str, code: str, heuristic: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A Triton kernel, and the settings that Inductor's decorator ``heuristic`` is given for it."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    asked: dict[str, Any] = {}

    def keep(**settings: Any) -> Callable[[Any], Any]:
        asked.update(settings)
        return lambda kernel: kernel

    setattr(triton_heuristics, heuristic, keep)
    triton_helpers.set_driver_to_gpu = lambda: None
    path = folder / f"{name[:40]}.py"
    path.write_text(code)
    return getattr(_import(path), name), asked


def compile_kernel(
    kernel: Any, meta: dict[str, Any], constants: dict[str, Any], options: dict[str, int], folder: Path
) -> tuple[dict[str, Any], str, str]:
    """Registers, spilled bytes and bytes of shared memory of a kernel on an H200; its PTX; its instructions."""
    import triton
    import triton.backends.nvidia as nvidia  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    source = ASTSource(kernel, signature=meta["signature"], constexprs=constants, attrs=meta["configs"][0])
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"

    def dump(what: str) -> str:
        return subprocess.run([tool, what, binary], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage"))
    assert usage is not None
    figures = {"registers": int(usage[1]), "spilled_bytes": int(usage[2]), "shared_bytes": compiled.metadata.shared}
    return figures, compiled.asm["ptx"], dump("--dump-sass")


def compile_reduction(name: str, code: str, folder: Path) -> dict[str, Any]:
    """Compile as Inductor would choose to; registers, spills, widths of loads, and instructions in each loop."""
    from torch._inductor.runtime import triton_heuristics

    kernel, asked = load_kernel(name, code, "reduction", folder)
    meta, sizes = asked["triton_meta"], asked["size_hints"]
    choice = triton_heuristics._reduction_configs(
        size_hints=sizes, inductor_meta=asked["inductor_meta"], triton_meta=meta, num_dynamic=0
    )[0]
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages}
    figures, ptx, sass = compile_kernel(kernel, meta, choice.kwargs, options, folder)
    elements = choice.kwargs["R0_BLOCK"] * choice.kwargs["XBLOCK"] // (32 * choice.num_warps)
    widths = re.findall(r"ld\.global[\w:.]*\.v(\d)\.b32", ptx)
    return {
        "block": choice.kwargs["R0_BLOCK"],
        "warps": choice.num_warps,
        **figures,
        "bytes_per_load": 4 * max((int(width) for width in widths), default=0),
        "instructions_per_column": [round(count / elements, 1) for count in _loops(sass)],
    }


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loops(sass: str) -> list[int]:
    """Instructions between a backward branch and where it goes, for each."""
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)]
    found = []
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            found.append(sum(int(target[1], 16) <= place <= at for place, _ in lines))
    return found


def look(name: str, source: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything about one objective."""
    kernels = kernels_of(source)
    call = source[source.index("def call") :]
    whole = re.findall(rf"empty_strided_cuda\(\(\w+, {args.vocab}\), \([^)]*\), torch\.(\w+)\)", call)
    reads = sum(len(re.findall(r"tl\.load\([^)]*r0_1\b", code)) for _, code in kernels)
    writes = sum(len(re.findall(r"tl\.store\([^)]*r0_1\b", code)) for _, code in kernels)
    row: dict[str, Any] = {"objective": name, "kernels": len(kernels), "whole_tensors": whole}
    row |= {"reads": reads, "writes": writes}
    with tempfile.TemporaryDirectory() as folder:
        row |= compile_reduction(*kernels[0], Path(folder))
    columns = args.chunk * args.vocab
    row["bytes_ms"] = (reads + writes) * 2 * columns / _BYTES_PER_SECOND * 1e3
    issued = columns / 32 * sum(row["instructions_per_column"])
    row["instructions_ms"] = issued / (_PROCESSORS * _SCHEDULERS * _HERTZ) * 1e3
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=151_936, help="rows of the student's head; Qwen2.5-3B's")
    parser.add_argument("--teacher-vocab", type=int, default=152_064, help="of the teacher's; Qwen2.5-7B's")
    parser.add_argument("--real", type=int, default=151_665, help="tokens")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    sizes = {"chunk": args.chunk, "vocab": args.vocab, "teacher_vocab": args.teacher_vocab, "real": args.real}
    graphs = {name: trace(OBJECTIVES[name], **sizes) for name in args.objectives}
    pretend()
    table = [look(name, lower(*graph, rows._COMPILER_OPTIONS).source, args) for name, graph in graphs.items()]
    print(f"torch {torch.__version__}, {args.chunk:,} × {args.vocab:,} bf16 logits, {args.real:,} tokens\n")
    head = ["objective", "kernels", "whole tensors", "reads + writes of a row", "registers", "spilled", "bytes a load"]
    head += ["instructions a column, by pass", "ms by bytes", "ms by instructions"]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in table:
        cells = [row["objective"], row["kernels"], ", ".join(row["whole_tensors"]), f"{row['reads']} + {row['writes']}"]
        cells += [row["registers"], row["spilled_bytes"], row["bytes_per_load"]]
        cells += [" + ".join(map(str, row["instructions_per_column"]))]
        cells += [f"{row['bytes_ms']:.2f}", f"{row['instructions_ms']:.2f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
