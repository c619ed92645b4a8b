"""Where a training step's time goes: `python -m fastgpt.bench.roofline [--shape gpt2-350m] [--batch 16] [--compile]`.

Steps of the trainer and of plain PyTorch under torch.profiler; each kernel is assigned to a class by its name:
    gemm        matrix products: their ceiling is the peak FLOP/s
    attention   its products and softmax: the same peak
    memory      everything else, bound by bytes: norms, activations, loss, optimizer, copies
    idle        the rest of the step: on a GPU no kernel ran; on a CPU Python and the dispatcher did
Shares are of the step's time. tflop_s of the first two are the model's FLOP (forward and backward; attention's causal
half) over their time, so a chunk that is computed twice counts once. GPU: kernels, copies and fills of the device;
overlaps count once for idle. CPU: the operators' self time, which includes the profiler's cost, as does idle.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastgpt.bench import throughput, variants
from fastgpt.bench._harness import (
    append_rows,
    gpu_state,
    provenance,
    where,
)
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.variants import GPU_SHAPES, SHAPES, Shape, batches, build, default_shape, settings, shapes_on
from fastgpt.core.command import number, run_command
from fastgpt.core.device import peak_flops
from fastgpt.models.gpt import GPT
from fastgpt.training.config import TrainConfig

CLASSES = ("gemm", "attention", "memory", "idle")
SLOWEST = 12  # kernels listed in a row
# names in order of matching: attention's kernels contain the names of products ("fmha_cutlassF"), not vice versa
PATTERNS = {
    "attention": r"attention|flash|fmha|sdpa|cudnn_generated_fort",
    "gemm": r"gemm|gemv|cutlass|wgmma|nvjet|xmma|cublas|splitk|16816|1688"
    r"|^aten::(add|b|badd)?mm$|^aten::(addmv|mv)$|mkldnn",
}
OPERATOR = r"(?!autograd::|torch::)\w+::"  # not the scopes of autograd nodes and of the optimizer around operators


class Event(NamedTuple):
    """One kernel, copy or fill: microseconds."""

    name: str
    start: float
    end: float


def classify(name: str) -> str:
    """Return the class of a kernel or an operator."""
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name, re.I)), "memory")


def device_events(run: Callable[[], Any], device: torch.device) -> list[Event]:
    """Return what the GPU did during `run`, ordered by start."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watch:
        run()
        torch.cuda.synchronize(device)
    found = [e for e in watch.events() or [] if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return sorted((Event(e.name, e.time_range.start, e.time_range.end) for e in found), key=lambda e: e.start)


def host_operators(run: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """Return (name, microseconds of self time, calls) of each operator of the CPU."""
    with profile(activities=[ProfilerActivity.CPU]) as watch:
        run()
    every = watch.key_averages()
    return [(e.key, e.self_cpu_time_total, e.count) for e in every if re.match(OPERATOR, e.key)]


def busy(events: Iterable[Event]) -> float:
    """Return the microseconds during which at least one event ran."""
    total, until = 0.0, float("-inf")
    for e in sorted(events, key=lambda e: e.start):
        total += max(0.0, e.end - max(e.start, until))
        until = max(until, e.end)
    return total


def by_name(events: Iterable[Event]) -> list[tuple[str, float, int]]:
    """Return (name, microseconds, calls) of events."""
    found: dict[str, tuple[float, int]] = {}
    for e in events:
        time_of, calls = found.get(e.name, (0.0, 0))
        found[e.name] = (time_of + e.end - e.start, calls + 1)
    return [(name, *numbers) for name, numbers in found.items()]


def shares(names: list[tuple[str, float, int]], step_us: float, busy_us: float, steps: int) -> dict[str, Any]:
    """Return milliseconds per step and percent of it in each class, and the slowest names."""
    spent = dict.fromkeys(CLASSES, 0.0)
    for name, us, _ in names:
        spent[classify(name)] += us / steps
    spent["idle"] = max(0.0, step_us - busy_us / steps)
    row: dict[str, Any] = {"ms": step_us / 1e3}
    for kind, us in spent.items():
        row |= {f"{kind}_ms": us / 1e3, f"{kind}_pct": 100 * us / step_us}
    slowest = sorted(names, key=lambda n: -n[1])[:SLOWEST]
    told = [{"name": n[:120], "class": classify(n), "ms": us / steps / 1e3, "calls": c / steps} for n, us, c in slowest]
    return row | {"slowest": told, "kernels": own_kernels(names, steps)}


def own_kernels(names: list[tuple[str, float, int]], steps: int) -> list[dict[str, Any]]:
    """Return fastgpt's kernels of a GPU with their milliseconds and calls per step, all instances of one together."""
    found: dict[str, dict[str, Any]] = {}
    for name, us, calls in names:
        kernel = re.search(r"\w+_kernel\b", name)
        if kernel is None or "at::" in name:
            continue
        row = found.setdefault(kernel[0], {"name": kernel[0], "ms": 0.0, "calls": 0.0})
        row["ms"] += us / steps / 1e3
        row["calls"] += calls / steps
    return list(found.values())


def rates(row: dict[str, Any], flops: dict[str, float], tokens: int, peak: float) -> dict[str, Any]:
    """Return TFLOP/s of products and attention, and percent of the peak (FLOP/s). flops: per token, by class."""
    found: dict[str, Any] = {}
    for kind, per_token in flops.items():
        if row[f"{kind}_ms"] > 0:
            rate = per_token * tokens / (row[f"{kind}_ms"] / 1e3)
            found |= {f"{kind}_tflop_s": rate / 1e12, f"{kind}_pct_of_peak": 100 * rate / peak}
    return found


def measure(name: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the figures of one variant over shape.steps steps, after warm-up."""
    cfg = settings(shape, device)
    v = build(name, cfg, batches(shape, device))
    v.train(cfg, variants.GPU_WARM_STEPS if device.type == "cuda" else 2)
    seconds: list[float] = []
    if device.type == "cuda":
        seconds.append(v.train(cfg, shape.steps))  # without the profiler, whose cost would be idle time
        events = device_events(lambda: v.train(cfg, shape.steps), device)
        names, ran = by_name(events), busy(events)
    else:
        names = host_operators(lambda: seconds.append(v.train(cfg, shape.steps)))
        ran = sum(us for _, us, _ in names)
    row = shares(names, max(seconds[0] * 1e6, ran) / shape.steps, ran, shape.steps)
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    return row | rates(row, model_flops(cfg), shape.batch * shape.block, peak_flops(device, dtype)[0])


def model_flops(cfg: TrainConfig) -> dict[str, float]:
    """Return FLOP per token, forward and backward, of products and of causal attention; allocates nothing."""
    with torch.device("meta"):
        full = GPT(cfg.model).flops_per_token(cfg.block_size)["full"]
    pairs = 6.0 * cfg.model.n_layers * cfg.model.n_heads * cfg.model.d_head * cfg.block_size
    return {"gemm": full - 2 * pairs, "attention": pairs}


def rows_of(names: list[str], shape_name: str, shape: Shape, device: torch.device) -> list[dict[str, Any]]:
    """Return one row per variant; a single one with the reason if a fastgpt op is wrong."""
    cfg = settings(shape, device)
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    about = {"bench": "roofline", "shape": shape_name, "batch": shape.batch, "block": shape.block, "dtype": cfg.dtype}
    about |= {"steps": shape.steps, "kernels": throughput.kernels(device, dtype), "machine": provenance(device)}
    if red := throughput.red_ops(cfg, dtype):
        return [{**about, "variant": "fastgpt", "red": "; ".join(red)}]
    rows = []
    for name in names:
        try:
            rows.append({**about, "variant": name, **measure(name, shape, device), "gpu": gpu_state(device)})
        except Exception as e:  # from the compiler or the device: other variants keep their figures
            rows.append({**about, "variant": name, "red": variants.reason(e)})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return the shares of the step, followed by the slowest kernels."""
    lines = [f"{'variant':<18}{'ms a step':>10}" + "".join(f"{kind + ' %':>13}" for kind in CLASSES) + "  TFLOP/s"]
    for r in rows:
        if "red" in r:
            lines.append(f"{r['variant']:<18}no figure is shown: {r['red']}")
            continue
        kinds = "".join(f"{r[kind + '_pct']:>13.1f}" for kind in CLASSES)
        told = [(kind, r[f"{kind}_tflop_s"], r[f"{kind}_pct_of_peak"]) for kind in CLASSES if f"{kind}_tflop_s" in r]
        rated = ", ".join(f"{kind} {rate:.3g} ({share:.0f} % of peak)" for kind, rate, share in told)
        lines.append(f"{r['variant']:<18}{r['ms']:>10.2f}{kinds}  {rated}")
        lines += [f"    {k['ms']:>9.3f} ms {k['calls']:>7.1f} x  {k['class']:<10}{k['name']}" for k in r["slowest"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a fastgpt op was red."""
    parser = command_line(
        "roofline",
        __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = sorted(SHAPES | GPU_SHAPES)
    parser.add_argument("--shape", choices=names, help="default: small on a CPU, gpt2-124m on a GPU")
    parser.add_argument("--batch", type=number(int, 1), help="number of sequences")
    parser.add_argument("--steps", type=number(int, 1), default=5, help="number of profiled steps")
    parser.add_argument("--compile", action="store_true", help="also profile both under torch.compile")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    name = args.shape or default_shape(device)
    if name not in shapes_on(device):
        parser.error(f"--shape {name} needs a GPU")
    shape = shapes_on(device)[name]
    shape = dataclasses.replace(shape, batch=args.batch or shape.batch, steps=args.steps)
    named = ["torch", "fastgpt"] + (["fastgpt graphs"] if device.type == "cuda" else [])
    named += ["torch compile", "fastgpt compile"] if args.compile else []
    rows = rows_of(named, name, shape, device)
    print(f"{name}, B {shape.batch} x T {shape.block}, {rows[0]['dtype']}, {where(rows[0]['machine'])}")
    print(show(rows))
    if args.json:
        append_rows(args.json, rows)
    return int(any("red" in r and not throughput.out_of_memory(r) for r in rows))


if __name__ == "__main__":
    sys.exit(run_command(main))
