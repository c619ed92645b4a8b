"""Launches of a training step, counted without a GPU: `python -m fastgpt.bench.launches [--accumulation N] [--json
FILE]`.

It runs steps of a narrow GPT-2 with one and two layers in bf16 on the CPU and counts what a GPU would launch: kernels
of fastgpt, by the number that each raw op launches on CUDA (OWN; the emulation checks it), and calls of PyTorch ops
that compute. A call of PyTorch is counted as one, although some of them launch more (a sort, a sum over many blocks, a
product that is split along its inner dimension). The difference of the two models is a layer; the rest is the ends of
the step: counting tokens, embedding, last norm, head, loss, spike guard, clipping and update. Copies into the inputs of
CUDA graphs, one for each input of each recorded part, are not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.bench import variants
from fastgpt.bench._harness import append_rows, provenance
from fastgpt.bench._options import command_line
from fastgpt.core import backend
from fastgpt.core.command import number, run_command
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.stability import SpikeGuard

CPU = torch.device("cpu")
SHAPE = variants.Shape(layers=1, heads=8, width=512, vocab=512, block=16, batch=1, steps=1)  # matrices keep gradients
TOKENS = 65536  # of a micro-batch at GPT-2's shape
LAYERS = 12
PHASES = ("start", "forward", "backward", "optimizer")


def levels(tokens: int) -> int:
    """Return the launches that add up the gradient of an embedding table: csrc/embedding/cuda.cu."""
    n, found = -(-tokens // 32), 1
    while n > 1:
        n, found = -(-2 * n // 32), found + 1
    return found


# raw op -> kernels that it launches on CUDA at GPT-2's shapes; embedding_bwd and embedding_bwd_add: `own_kernels`
OWN = {
    "adamw_prepare": 1,
    "adamw_update": 1,
    "attention_fwd": 1,
    "attention_qkv_bwd": 3,
    "bias_gelu_bwd": 2,
    "bias_gelu_fwd": 1,
    "cross_entropy_fwd_bwd": 1,
    "embedding_fwd": 1,
    "layer_norm_bwd": 2,
    "layer_norm_fwd": 1,
    "scale_rows": 1,
}
# operators that allocate or inspect but compute nothing
FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::_local_scalar_dense", "aten::item", "aten::set_")
HOST = ("aminmax", "promote_types", "_record_function_enter_new", "_record_function_exit")  # or checks of a CPU alone
LIBRARY = {"embedding_bwd": ("sort", "zero_"), "embedding_bwd_add": ("sort",)}  # what their C++ calls

Calls = Counter[tuple[str, str]]  # (phase, name) -> calls; the names of PyTorch ops start with "aten::"


def own_kernels(name: str, tokens: int = TOKENS) -> int:
    """Return the kernels that a raw op launches on CUDA; tokens: of a micro-batch.

    Raises:
        KeyError: it is not in OWN.
    """
    if name in ("embedding_bwd", "embedding_bwd_add"):
        return 1 + levels(tokens)  # the keys of the sort first
    return OWN[name]


def computes(func: Any) -> bool:
    """Return whether a PyTorch operator computes something: it returns no view and no empty tensor."""
    schema = func._schema
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not view and not schema.name.startswith(FREE)


class Counted(TorchDispatchMode):
    """Counts the calls that launch something."""

    phase = ""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "fastgpt":
            self.calls[self.phase, name] += 1
            self.calls.update((self.phase, f"aten::{called}") for called in LIBRARY.get(name, ()))
        elif computes(func) and name not in HOST:
            self.calls[self.phase, f"aten::{name}"] += 1
        return func(*args, **(kwargs or {}))


class Trace(Counted):
    """Counts them by phase. It has the calls of training.graphs.Graphs, by which a step names its parts."""

    enabled = False
    part = ""

    def begin(self, optimizer: Any) -> None:
        """Begin a step, as a run with graphs does."""
        optimizer.refresh_lr()

    def __call__(self, name: str, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Call a part of the step."""
        self.part = name
        out = function(*inputs)
        self.part = ""
        return out

    @property
    def phase(self) -> str:  # type: ignore[override]
        """The phase of a call that is made now."""
        if self.part == "optimizer_step":
            return "optimizer"
        if torch._C._current_graph_task_id() >= 0:  # type: ignore[attr-defined]
            return "backward"
        return "forward" if self.part else "start"


def trace(layers: int, accumulation: int, kernels: str = "cpu") -> Calls:
    """Return the calls of the second step of a model with so many layers, on a backend; the first step allocates the
    state."""
    shape = dataclasses.replace(SHAPE, layers=layers)
    cfg = variants.settings(shape, CPU)
    cfg = dataclasses.replace(cfg, dtype="bf16", batch_tokens=accumulation * cfg.batch_tokens)
    model = build_model(cfg, shape.vocab, CPU)
    optimizer, guard = build_optimizer(cfg, model), SpikeGuard(10.0, CPU)
    loader, found = itertools.cycle(variants.batches(shape, CPU)), Trace()
    for mode in (contextlib.nullcontext(), found):
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # the schedule changes it in every step
        with backend.use(all=kernels, strict=True), mode:
            variants.train_step(model, optimizer, loader, accumulation, guard, graphs=found)  # type: ignore[arg-type]
    return found.calls


def launches(calls: Calls, phase: str = "", tokens: int = TOKENS) -> tuple[int, int]:
    """Return the kernels of fastgpt and the calls of PyTorch in a phase; tokens: of a micro-batch.

    Raises:
        KeyError: a raw op is not in OWN.
    """
    names = {name: n for (where, name), n in calls.items() if where == phase}
    library = sum(n for name, n in names.items() if name.startswith("aten::"))
    return sum(n * own_kernels(name, tokens) for name, n in names.items() if not name.startswith("aten::")), library


def launch_rows(accumulation: int) -> list[dict[str, Any]]:
    """Return a row for each part of a step of LAYERS layers (one layer, the ends, the whole step) and phase."""
    one, two = trace(1, accumulation), trace(2, accumulation)
    layer, ends = Counter(two), Counter(one)
    layer.subtract(one), ends.subtract(layer)
    step = Counter({call: ends[call] + LAYERS * layer[call] for call in two})
    about = {"bench": "launches", "accumulation": accumulation, "machine": provenance(CPU)}
    rows = []
    for part, calls in (("layer", layer), ("ends", ends), ("step", step)):
        for phase in PHASES:
            own, library = launches(calls, phase)
            names = {name: n for (where, name), n in sorted(calls.items()) if where == phase and n}
            rows.append({**about, "part": part, "phase": phase, "own": own, "library": library, "calls": names})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, then the calls behind it."""
    lines = [f"{'part':<8}{'phase':<12}{'own':>6}{'library':>9}{'both':>7}"]
    for part in dict.fromkeys(r["part"] for r in rows):
        mine = [r for r in rows if r["part"] == part]
        total = {"phase": "all", "own": sum(r["own"] for r in mine), "library": sum(r["library"] for r in mine)}
        for r in (*mine, total):
            lines.append(f"{part:<8}{r['phase']:<12}{r['own']:>6}{r['library']:>9}{r['own'] + r['library']:>7}")
    for r in rows:
        if r["part"] != "step" and r["calls"]:
            calls = ", ".join(name if n == 1 else f"{n} {name}" for name, n in r["calls"].items())
            lines.append(f"{r['part']} {r['phase']}: {calls}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and append the rows."""
    parser = command_line("launches", __doc__)
    parser.add_argument("--accumulation", type=number(int, 1), default=1, help="micro-batches of a step; default: 1")
    args = parser.parse_args(argv)
    rows = launch_rows(args.accumulation)
    print(f"launches of a step of GPT-2 ({LAYERS} layers, {args.accumulation} micro-batches), counted on the CPU")
    print(show(rows), flush=True)
    if args.json:
        append_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
