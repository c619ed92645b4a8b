"""Numerical parity of every op x backend x dtype x layout against its reference in fp64, by one rule.

    error(ours) <= k * error(PyTorch's own op in that dtype) + 1 unit in the last place of the output's scale

k is 2 for outputs and 3 for gradients; error is the largest absolute difference to the fp64 reference; where the exact
result is zero everywhere, 32 units at scale 1 are allowed. `fastgpt parity` prints the table, worst ratio first, and
exits 1 on a ratio over 1 or a cell without a case. The tests run the same cases one by one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import backend, ops, parity_activations
from fastgpt.ops.adamw import join_remainder
from fastgpt.ops.bias_gelu import bias_gelu_ref, bias_gelu_torch
from fastgpt.ops.cross_entropy import cross_entropy_ref, cross_entropy_torch
from fastgpt.ops.layer_norm import layer_norm_ref, layer_norm_torch
from fastgpt.ops.rms_norm import rms_norm_ref, rms_norm_torch
from fastgpt.ops.swiglu import swiglu_ref, swiglu_torch
from fastgpt.optim import AdamW

FORWARD, BACKWARD = 2.0, 3.0
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "misaligned")
Outputs = dict[str, Tensor]  # names of gradients begin with "d"


@dataclass(frozen=True)
class Case:
    """One comparison; `shape` and `options` are the op's own."""

    op: str
    dtype: torch.dtype
    layout: str
    shape: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        opts = ",".join(f"{k}={v}" for k, v in self.options)
        shape = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.op, str(self.dtype).split(".")[1], self.layout, shape, opts)))


@dataclass
class Row:
    """One output of one case on one backend."""

    op: str
    backend: str
    dtype: str
    layout: str
    case: str
    output: str
    error: float
    torch_error: float
    allowed: float
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        self.ratio = math.inf if math.isnan(self.error) else self.error / self.allowed if self.allowed else self.error


def lay(t: Tensor, layout: str) -> Tensor:
    """A tensor of t's shape in this memory layout. Values are t's, except for 'expanded': its first row everywhere."""
    if layout == "transposed" and t.dim() >= 2:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "sliced":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), torch.nan, dtype=t.dtype, device=t.device)
        wide[..., 2:-3] = t
        return wide[..., 2:-3]
    if layout == "expanded" and t.numel():
        return (
            t[:1].expand(t.shape)
            if t.dim() == 1
            else t.reshape(-1, t.shape[-1])[:1].expand(t.shape[:-1].numel(), -1).view(t.shape)
        )
    if layout == "misaligned":
        return torch.cat((t.flatten()[:1], t.flatten()))[1:].view(t.shape)
    return t.clone()


def allowed_error(name: str, truth: Tensor, torch_error: float, dtype: torch.dtype) -> float:
    """The rule at this file's head for one output."""
    eps, scale = torch.finfo(dtype).eps, float(truth.detach().abs().max()) if truth.numel() else 0.0
    unit = 32 * eps if scale == 0 else eps * 2.0 ** math.floor(math.log2(scale))
    return (BACKWARD if name.startswith("d") else FORWARD) * torch_error + unit


class Inputs:
    """Seeded tensors of one case: the same values, rounded to their dtype, in its layout; for the truth in fp64."""

    def __init__(self, case: Case, device: str, wide: bool) -> None:
        self.case, self.device, self.wide, self.seed = case, device, wide, 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """The next random tensor."""
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        t = (torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype).to(self.device)
        t = lay(t, self.case.layout)
        return t.double() if self.wide else t

    def leaf(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """The next random tensor, as a leaf that requires grad."""
        return self.tensor(shape, dtype, scale, shift).detach().requires_grad_()


def run_norm(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Outputs and gradients of LayerNorm, or of RMSNorm (no bias, but a weight offset), by `fn`."""
    o = dict(case.options)
    width = case.shape[-1:]
    param = torch.float32 if o.get("fp32_weight") else case.dtype
    x = inputs.leaf(case.shape, case.dtype, o.get("scale", 1.0), o.get("mean", 0.0))
    residual = inputs.leaf(case.shape, case.dtype) if o.get("residual") else None
    weight = inputs.leaf(width, param) if o.get("weight", True) else None
    bias = inputs.leaf(width, param) if o.get("bias", case.op == "layer_norm") else None
    params = (weight, bias) if case.op == "layer_norm" else (weight,)
    offset = {"weight_offset": o["weight_offset"]} if "weight_offset" in o else {}
    out = fn(x, *params, o.get("eps", 1e-5), residual=residual, **offset)
    y, s = out if residual is not None else (out, None)
    outputs = {n: t for n, t in (("y", y), ("sum", s)) if t is not None}
    grads = [inputs.tensor(case.shape, case.dtype) for _ in outputs]
    torch.autograd.backward(list(outputs.values()), grads)
    leaves = {"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias}
    return {**outputs, **{n: t.grad for n, t in leaves.items() if t is not None and t.grad is not None}}


def run_cross_entropy(case: Case, fn: Callable[..., Any], inputs: Inputs) -> Outputs:
    """Loss and gradient of the logits by `fn`; targets hit the first and last class and, every third row, none."""
    o = dict(case.options)
    n, columns = case.shape
    k = o.get("vocab_size", columns)
    logits = inputs.leaf(case.shape, case.dtype, o.pop("scale", 1.0), o.pop("mean", 0.0))
    target = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(7))
    target[:1], target[-1:] = k - 1, 0
    target[2::3] = o.get("ignore_index", -100)
    if o.pop("weighted", False):
        o["weight"] = inputs.tensor((k,), torch.float32).abs() + 0.1
    inplace = o.pop("inplace", False) and not inputs.wide
    values = torch.nn.functional.pad(logits, (1, 3))[:, 1:-3] if inplace else logits  # rows apart, memory of its own
    loss = fn(values, target.to(inputs.device), **({**o, "inplace": True} if inplace else o))
    loss.backward(inputs.tensor(tuple(loss.shape), torch.float32).to(loss.dtype) if loss.dim() else None)
    assert logits.grad is not None
    return {"loss": loss, "dlogits": logits.grad}


class TorchAdamW(torch.optim.AdamW):
    """The baseline: clip, torch.optim.AdamW on fp32 masters, moments rounded where ours are kept in 16 bits."""

    def __init__(self, groups: Any, max_norm: float | None = None, moment_dtype: torch.dtype = torch.float32, **_: Any):
        super().__init__(groups)
        self.max_norm, self.moment_dtype = max_norm, moment_dtype

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for g in self.param_groups for p in g["params"]]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        super().step()
        for p in params:
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[p][name] = self.state[p][name].to(self.moment_dtype).to(p.dtype)


def run_adamw(case: Case, make: Callable[..., torch.optim.Optimizer], inputs: Inputs) -> Outputs:
    """Parameters, masters and moments after some steps of the optimizer that `make(groups, **settings)` gives."""
    settings = dict(case.options)
    masters = make is TorchAdamW and settings.get("master", "fp32") is not None
    params = [inputs.tensor(shape, case.dtype) for shape in (case.shape, (7,), (3, 5))]
    params = [torch.nn.Parameter(p.float() if masters else p) for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3}]
    steps = settings.pop("steps", 4)
    optimizer = make(groups, **settings)
    for _ in range(steps):
        for p in params:
            p.grad = inputs.tensor(tuple(p.shape), case.dtype).to(p.dtype)
        optimizer.step()
    out: Outputs = {}
    for i, p in enumerate(params):
        state, value = optimizer.state[p], p.detach()
        master = state.get("master", value)
        out[f"master{i}"] = join_remainder(value, master) if master.dtype == torch.int16 else master
        out[f"param{i}"] = value if inputs.wide else value.to(case.dtype)
        out[f"exp_avg{i}"], out[f"exp_avg_sq{i}"] = state["exp_avg"], state["exp_avg_sq"]
    return out


def _torch_cross_entropy(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    options.pop("inplace", None)
    names = ("weight", "ignore_index", "label_smoothing", "z_loss", "softcap", "vocab_size", "reduction")
    defaults = (None, -100, 0.0, 0.0, 0.0, None, "mean")
    return cross_entropy_torch(logits, target, {n: options.get(n, d) for n, d in zip(names, defaults)})


@dataclass(frozen=True)
class Subject:
    """How to run one op: as fastgpt's public function, as PyTorch's own, and as the reference."""

    run: Callable[..., Outputs]
    ours: Callable[..., Any]
    torch: Callable[..., Any]
    reference: Callable[..., Any]
    layouts: tuple[str, ...] = LAYOUTS


SUBJECTS = {
    "layer_norm": Subject(run_norm, ops.layer_norm, layer_norm_torch, layer_norm_ref),
    "cross_entropy": Subject(run_cross_entropy, ops.cross_entropy, _torch_cross_entropy, cross_entropy_ref),
    "bias_gelu": Subject(parity_activations.run_bias_gelu, ops.bias_gelu, bias_gelu_torch, bias_gelu_ref),
    "swiglu": Subject(parity_activations.run_swiglu, ops.swiglu, swiglu_torch, swiglu_ref),
    "adamw": Subject(run_adamw, AdamW, TorchAdamW, AdamW, ("contiguous", "transposed", "misaligned")),
    "rms_norm": Subject(run_norm, ops.rms_norm, rms_norm_torch, rms_norm_ref),
}


def check(case: Case, name: str, device: str = "cpu") -> list[Row]:
    """Run one case on one backend; one row per output.

    Raises:
        AssertionError: an output's shape or dtype is not the baseline's.
    """
    subject = SUBJECTS[case.op]
    choice: dict[str, Any] = {case.op: name}
    with backend.use(strict=True, **choice):
        ours = subject.run(case, subject.ours, Inputs(case, device, wide=False))
    baseline = subject.run(case, subject.torch, Inputs(case, device, wide=False))
    choice[case.op] = "torch"
    with backend.use(**choice):
        truth = subject.run(case, subject.reference, Inputs(case, device, wide=True))
    assert ours.keys() == truth.keys() == baseline.keys(), (ours.keys(), baseline.keys(), truth.keys())
    rows = []
    for output, exact in truth.items():
        got = ours[output]
        assert got.shape == exact.shape, f"{case} {output}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
        error, torch_error = _error(got, exact), _error(baseline[output], exact)
        limit = allowed_error(output, exact, torch_error, got.dtype)
        dtype = str(case.dtype).split(".")[1]
        rows.append(Row(case.op, name, dtype, case.layout, str(case), output, error, torch_error, limit))
    return rows


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest absolute difference; equal infinities and NaN in both places count as equal, NaN in one as NaN."""
    if not exact.numel():
        return 0.0
    wide, exact = got.detach().double(), exact.detach()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, (wide - exact).abs()).max())


def _variants(op: str) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shapes and options beside the small base shape that goes through every layout."""
    if op in ("layer_norm", "rms_norm"):
        for shape in ((1, 1), (1, 7), (2, 3, 770), (67, 128), (3, 1024), (2, 5000), (2, 9001)):
            yield shape, {"residual": True}
        own: list[dict[str, Any]] = [{"weight": False, "bias": False}, {"bias": False}]
        if op == "rms_norm":
            own = [{"weight_offset": 1.0}, {"weight_offset": 1.0, "fp32_weight": True, "residual": True}]
        for o in ({}, *own, {"weight": False}, {"fp32_weight": True, "residual": True}, {"eps": 1e-2}):
            yield (6, 33), o
        yield (5, 96), {"mean": 300.0, "scale": 0.5}
        yield (5, 96), {"scale": 1e-4, "residual": False}
        yield (0, 16), {"residual": True}
    elif op == "cross_entropy":
        for shape in ((1, 1), (1, 2), (3, 1000), (2, 50257), (0, 16)):
            for inplace in (False, True):
                yield shape, {"reduction": "sum", "inplace": inplace}
        single: list[dict[str, Any]] = [
            {"reduction": "none"},
            {"reduction": "sum"},
            {"label_smoothing": 0.1},
            {"z_loss": 1e-2},
            {"softcap": 4.0},
            {"weighted": True},
            {"ignore_index": 3},
            {"vocab_size": 40},
        ]
        pairs = [{**a, **b} for i, a in enumerate(single) for b in single[i + 1 :]]
        everything = {k: v for o in single[2:] for k, v in o.items()}
        for o in (*single, *pairs, everything, {"mean": 1e4}, {"scale": 1e4}):
            for inplace in (False, True):
                yield (7, 61), {**o, "inplace": inplace}
    elif op == "adamw":
        yield (33, 17), {"max_norm": 0.5}
        yield (33, 17), {"max_norm": 1e9, "moment_dtype": torch.bfloat16}
        yield (70001,), {"max_norm": 1.0, "steps": 2}
        yield (0,), {}
    else:
        yield from parity_activations.variants(op)


def cases(op: str) -> Iterator[Case]:
    """Every case of an op, for all kernel dtypes: the base shape in every layout, then variants one at a time."""
    base: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
        "layer_norm": ((6, 33), {"residual": True}),
        "cross_entropy": ((7, 61), {}),
        "adamw": ((33, 17), {}),
        "rms_norm": ((6, 33), {"residual": True}),
        **parity_activations.BASE,
    }
    shape, options = base[op]
    for dtype in backend.KERNEL_DTYPES:
        for layout in SUBJECTS[op].layouts:
            yield Case(op, dtype, layout, shape, tuple(options.items()))
        for variant, o in _variants(op):
            if not (o.get("fp32_weight") and dtype == torch.float32):
                yield Case(op, dtype, "contiguous", variant, tuple(o.items()))
        if op == "swiglu":
            for layout in SUBJECTS[op].layouts:
                yield Case(op, dtype, layout, (6, 66), (("packed", True),))
        if op == "adamw" and dtype == torch.bfloat16:
            for master in ("remainder", None):
                for layout in SUBJECTS[op].layouts:
                    yield Case(op, dtype, layout, shape, (("master", master), ("max_norm", 0.5)))


def backends_here(op: str) -> list[str]:
    """Kernel backends of `op` that run on this machine (Triton on a CPU: in its interpreter)."""
    on_gpu = torch.cuda.is_available()
    names = [b for b in backend.ops()[op] if b != "torch" and backend.missing(b) is None]
    return [
        b for b in names if (backend.DEVICE_OF[b] == "cuda") == on_gpu or (b == "triton" and backend.interpreting())
    ]


def run_all(only: list[str]) -> list[Row]:
    """All cases of the ops and backends in `only` (empty: all) that run here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = [op for op in SUBJECTS if op in only] or list(SUBJECTS)
    names = [b for b in backend.BACKENDS if b in only] or list(backend.BACKENDS)
    pairs = [(op, name) for op in wanted for name in backends_here(op) if name in names]
    return [row for op, name in pairs for case in cases(op) for row in check(case, name, device)]


def missing_cells(rows: list[Row]) -> list[str]:
    """Cells of the registry (op x backend x dtype x layout) that run here and that no row covers."""
    seen = {(r.op, r.backend, r.dtype, r.layout) for r in rows}
    wanted = {
        (op, name, str(dtype).split(".")[1], layout)
        for op in backend.ops()
        if len(backend.ops()[op]) > 1
        for name in backends_here(op)
        for dtype in backend.ops()[op][name].dtypes
        for layout in (SUBJECTS[op].layouts if op in SUBJECTS else LAYOUTS)
    }
    return sorted(" ".join(cell) for cell in wanted - seen)


def main(argv: list[str] | None = None) -> int:
    """`fastgpt parity`: run the cases, print the table; 1 if a ratio is over 1 or a cell is missing."""
    parser = argparse.ArgumentParser(prog="fastgpt parity", description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("only", nargs="*", help="ops or backends; default: all that run here")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    parser.add_argument("--top", type=int, default=20, help="rows to print")
    args = parser.parse_args(argv)
    if unknown := [o for o in args.only if o not in SUBJECTS and o not in backend.BACKENDS]:
        parser.error(f"{unknown[0]} is neither an op with kernels ({', '.join(SUBJECTS)}) nor a backend")
    if not torch.cuda.is_available() and not backend.interpreting():
        again = [sys.executable, "-m", "fastgpt.parity", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.call(again, env={**os.environ, "TRITON_INTERPRET": "1"})  # must be set before Triton's import
    rows = sorted(run_all(args.only), key=lambda r: -r.ratio)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")
    for r in rows[: args.top]:
        print(f"{r.ratio:6.3f}  {r.backend:<7} {r.output:<12} error {r.error:.2e}  allowed {r.allowed:.2e}  {r.case}")
    over, missing = [r for r in rows if not r.ratio <= 1], [] if args.only else missing_cells(rows)
    for cell in missing:
        print(f"missing: {cell}")
    print(f"{len(rows)} figures, {len(over)} over the bound, {len(missing)} cells missing")
    return 1 if over or missing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
