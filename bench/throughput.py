"""The trainer's step against the same model in plain PyTorch: `python -m fastgpt.bench.throughput --device cpu`.

fastgpt: the trainer's own build_model, build_optimizer, forward_backward and optimizer_step. torch: a nanoGPT-class
model in fastgpt/bench/plain.py (nn.LayerNorm, F.gelu, SDPA, F.cross_entropy over padded logits, clip_grad_norm_,
AdamW(fused=True); on a GPU fp32 weights under bf16 autocast), eager and, with --compile, under torch.compile. All
variants have the same weights, tokens, seed and schedule, and their steps are interleaved. Speeds are shown only if
every op passes its parity check, and a variant's only if its losses of the first AGREE_STEPS steps agree with torch's
within TOLERANCE. A variant that fails has a row that says why; each row is written as soon as it is final. Tokens are
synthetic (rank r with probability ~ 1/(r+1), so losses fall) and are on the device before a step. --ablation adds
fastgpt with one op at a time on PyTorch. On a GPU `fastgpt graphs` replays steps from CUDA graphs, as the trainer does
there. Where `auto` prefers PyTorch's op to a kernel (attention on sm_90), or a table of `fastgpt tune` does, a row
`fastgpt own` has fastgpt's kernels for all ops: CUDA or Triton on a GPU, also from graphs; those of the CPU on a CPU.
--variant "fastgpt own" times them anywhere.

small: 4 layers, width 128, T 64, B 12, 65 characters; medium: 6 layers, width 384, T 256, B 16, 65 characters;
llama-small: small as a Llama; gpt2-124m: 12 layers, width 768, vocabulary 50304, B 4 of T 64 on a CPU, B 64 of T 1024
on a GPU; only on a GPU: gpt2-350m, 774m, 1.5b and llama-125m. --sweep doubles B until memory runs out.

On a CPU every variant runs in its own process, as its user would run it: the trainer with its settings of malloc, the
others with their defaults; one waits while another runs. On a GPU they share this process.

Joules per token: of the GPU, from NVML's energy counter over seconds of one variant alone (those of ENERGY_OF; '-' for
the others and where there is no counter), in separate rows after the speeds.

torchrun --nproc-per-node N -m fastgpt.bench.throughput measures fastgpt's steps in 1 to N processes instead, under DDP
or with --parallel fsdp: fastgpt/bench/processes.py says what.

--llmc DIR and --nanogpt DIR run those trainers themselves (fastgpt/bench/rivals.py): their own code, data in their
format, the same sizes and batch; their initial weights differ, so their losses are not compared.

Peak memory: on a GPU of the allocator during a step, other variants' tensors excluded; for `fastgpt graphs` what it
keeps reserved, since a replay allocates nothing and works in the graphs' own pool; on a CPU the peak resident memory of
the variant's process beyond what it had before it built the model, warm-up excluded.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench import processes, rivals
from fastgpt.bench._harness import (
    Samples,
    Setting,
    append_rows,
    gpu_state,
    provenance,
    turns,
    where,
)
from fastgpt.bench._op import Provider, every, gate
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.variants import (
    GPU_SHAPES,
    OWN,
    SHAPES,
    Shape,
    default_shape,
    own_kernels,
    prepare,
    reason,
    settings,
    shapes_on,
)
from fastgpt.core import backend
from fastgpt.core.command import number, run_command
from fastgpt.core.device import energy_joules, peak_flops
from fastgpt.distributed.mesh import find_mesh
from fastgpt.models.config import ModelConfig
from fastgpt.training.config import TrainConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # relative difference of a step's loss
# Steps that must agree. Later ones are chaotic: at `small`, plain PyTorch with initial weights moved by one unit in the
# last place differs from itself by 1e-7 up to step 48 and by 2e-4 at step 60.
AGREE_STEPS = 40
ENERGY_SECONDS = 3.0  # the meter updates some ten times a second
ENERGY_OF = ("fastgpt graphs", "torch compile")
ONE_PROCESS = ("batch", "sweep", "compile", "ablation", "variant", "llmc", "nanogpt")  # options


def kernels(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Return which backend serves each op."""
    return {op: backend.explain(op, device.type, dtype)[0] for op in backend.ops()}


def red_ops(cfg: TrainConfig, dtype: torch.dtype) -> list[str]:
    """Return why each wrong kernel in use fails its parity check at the model's widths."""
    device, found = torch.device(cfg.device), []
    for bench in every():
        picked = backend.explain(bench.op, device.type, dtype)[0]
        used = bench.of_model(cfg.model, 1, min(64, cfg.block_size))
        if picked == "torch" or used is None:
            continue
        if why := gate(bench, Provider(picked, bench.public, picked), Setting(used[0], dtype, device)):
            found.append(f"{bench.op} on {picked}: {why}")
    return found


def disagreement(v: Any, reference: Any, tolerance: float) -> tuple[float, str]:
    """Return the largest relative difference of a step's loss from the reference's, and a sentence if it is too
    large."""
    losses, truth = (torch.stack(x.losses[:AGREE_STEPS]).double().cpu() for x in (v, reference))
    gaps = torch.nan_to_num((losses - truth).abs() / truth.abs(), nan=math.inf)
    step = int(gaps.argmax())
    gap = float(gaps[step])
    told = f"loss of {v.name} at step {step} is {losses[step]:.6f}, of {reference.name} {truth[step]:.6f}"
    return gap, f"{told}: more than {tolerance:g} apart" if gap > tolerance else ""


def time_steps(
    variants: list[Any], cfg: TrainConfig | None, rounds: int, block: int
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Return seconds per step, one sample a round (`block` steps of each variant in turn), and why any variant was
    dropped."""
    by_name, failed = {v.name: v for v in variants}, {}
    samples = {name: Samples() for name in by_name}
    for turn in range(rounds):
        for name in turns(list(by_name), turn):
            try:
                samples[name].seconds.append(by_name[name].train(cfg, block) / block)
            except Exception as e:  # as in prepare
                failed[name] = reason(e)
                del by_name[name], samples[name]
    return samples, failed


def compare(names: list[str], shape_name: str, shape: Shape, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield one row per variant as soon as it is final: figures, or why there are none; then, on a GPU, rows of energy.

    Yields a single row if a fastgpt op is wrong. The first name's losses are the reference: without them no speed is
    shown.
    """
    cfg = settings(shape, device)
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    about = {"bench": "throughput", "shape": shape_name, "batch": shape.batch, "block": shape.block, "dtype": cfg.dtype}
    about |= {"model": vars(cfg.model), "kernels": kernels(device, dtype), "machine": provenance(device)}
    if red := red_ops(cfg, dtype):
        yield {**about, "red": "; ".join(red)}
        return
    variants, failed = prepare(names, cfg, shape)
    block = 1 if device.type == "cpu" else min(8, max(1, 64 // shape.batch))
    samples: dict[str, Samples] = {}
    if names[0] not in failed:
        samples, late = time_steps(variants, cfg, shape.steps, block)
        failed |= late
    if why := failed.get(names[0]):
        failed = {name: f"{why} ({names[0]} is the reference for the losses)" for name in names} | failed
    about |= {"loss_tolerance": TOLERANCE[cfg.dtype], "steps_per_sample": block, "gpu": gpu_state(device)}
    gaps = judge(variants, names[0], TOLERANCE[cfg.dtype], failed)
    right = [v for v in variants if v.name in gaps]
    flops: dict[str, float] = next((v.flops for v in right if v.flops), {})
    peak = peak_flops(device, dtype) if right else (0.0, "")
    for v in right:
        yield {**about, "loss_gap": gaps[v.name], **figures(v, right, samples, shape, flops, peak)}
    yield from ({**about, "variant": name, "red": why} for name, why in failed.items())
    for v in right:
        if v.name in ENERGY_OF and (joules := joules_per_token(v, cfg, device, shape.batch * shape.block)) is not None:
            yield {**about, "bench": "energy", "variant": v.name, "joules_per_token": joules}


def judge(variants: list[Any], reference: str, tolerance: float, failed: dict[str, str]) -> dict[str, float]:
    """Close the variants; return the loss gap of the correct ones, and add to `failed` why the others are not."""
    gaps, by_name = {}, {v.name: v for v in variants}
    for v in variants:
        try:
            v.close()
            if v.name not in failed:
                gaps[v.name], why = disagreement(v, by_name[reference], tolerance)
        except Exception as e:  # as in prepare
            why = reason(e)
        if v.name not in failed and why:
            gaps.pop(v.name, None)
            failed[v.name] = why
    return gaps


def joules_per_token(v: Any, cfg: TrainConfig, device: torch.device, tokens: int) -> float | None:
    """Return the GPU's joules over ENERGY_SECONDS of this variant alone; None if there is no meter or a step fails."""
    before, end, steps = energy_joules(device), time.perf_counter() + ENERGY_SECONDS, 0
    if before is None:
        return None
    try:
        while time.perf_counter() < end:
            v.train(cfg, 1)
            steps += 1
    except Exception as e:  # as in prepare; its speed is already known
        print(f"{v.name}: no energy: {reason(e)}", file=sys.stderr)
        return None
    after = energy_joules(device)
    return None if after is None else (after - before) / (steps * tokens)


def figures(
    v: Any,
    variants: list[Any],
    samples: dict[str, Samples],
    shape: Shape,
    flops: dict[str, float],
    peak: tuple[float, str],
) -> dict[str, Any]:
    """Return one variant's time, speed, both MFUs and memory; ratios are medians over the rounds, above 1 is faster."""
    mine, tokens = samples[v.name], shape.batch * shape.block
    middle = mine.quantile(0.5)
    row: dict[str, Any] = {"variant": v.name, **mine.figures(), "tokens_per_s": tokens / middle, "peak_mb": v.peak_mb}
    if v is not variants[0]:
        row |= mine.against(samples[variants[0].name], variants[0].name)
    row |= {f"mfu_{name}": per_token * tokens / middle / peak[0] for name, per_token in flops.items()}
    row |= {"peak_flops": peak[0], "peak_flops_from": peak[1], "losses": torch.stack(v.losses).tolist()}
    for other in variants:
        if other.name.startswith("torch") and other is not v:
            paired = samples[other.name].shares(mine)
            row[f"speed_vs_{other.name}"] = [paired.quantile(q) for q in (0.5, 0.2, 0.8)]
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, or the reason why there is none."""
    good = [r for r in rows if "tokens_per_s" in r]
    energy = {r["variant"]: f"{1e3 * r['joules_per_token']:.3f}" for r in rows if r.get("joules_per_token") is not None}
    lines = []
    if good:
        first = good[0]
        served = ", ".join(f"{op} {b}" for op, b in first["kernels"].items() if b != "torch") or "all torch"
        lines.append(f"kernels: {served}; peak {first['peak_flops'] / 1e12:.3g} TFLOP/s ({first['peak_flops_from']})")
        gap = max(r.get("loss_gap", 0.0) for r in good)
        lines.append(f"losses agree: {gap:.1e} apart, {first['loss_tolerance']:g} allowed")
        lines.append(
            f"{'variant':<24}{'ms/step (20 .. 80 %)':<28}{'tokens/s':>10}{'MFU full':>10}{'causal':>8}{'peak MB':>10}"
            f"{'mJ/token':>10}"
            "  speed (20 .. 80 %) against"
        )
    if any(max(r.get("mfu_full", 0), r.get("mfu_causal", 0)) > 1 for r in good):
        lines.insert(1, "the measured peak is below the steps' rate (a busy machine?), so MFU is meaningless here")
    for r in good:
        times = f"{r['ms']:.1f} ({r['ms_q20']:.1f} .. {r['ms_q80']:.1f})"
        peak = "-" if r["peak_mb"] is None else f"{r['peak_mb']:,.0f}"
        against = [
            f"{key[9:]} {m:.3f} ({low:.3f} .. {high:.3f})"
            for key, (m, low, high) in ((k, v) for k, v in r.items() if k.startswith("speed_vs_"))
        ]
        mfu = f"{r['mfu_full']:>10.1%}{r['mfu_causal']:>8.1%}" if "mfu_full" in r else f"{'-':>10}{'-':>8}"
        joules = energy.get(r["variant"], "-")
        start = f"{r['variant']:<24}{times:<28}{r['tokens_per_s']:>10,.0f}{mfu}{peak:>10}{joules:>10}"
        lines.append(f"{start}  {', '.join(against)}")
    return "\n".join(lines + [f"{r.get('variant', 'no speed is shown')}: {r['red']}" for r in rows if "red" in r])


def variant_names(args: argparse.Namespace, shape: Shape, device: torch.device) -> list[str]:
    """Return the variants' names; the losses of the others are compared with the first one's."""
    if args.variant:
        return ["torch", *(name for name in args.variant if name != "torch")]
    names = ["torch", "fastgpt"] + (["fastgpt graphs"] if device.type == "cuda" else [])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    served, called = kernels(device, dtype), called_ops(settings(shape, device).model)
    if any(served[op] != own for op, own in own_kernels(device, dtype).items() if op in called):
        names.append(f"{OWN} graphs" if device.type == "cuda" else OWN)
    names += ["torch compile", "fastgpt compile"] if args.compile else []
    if args.ablation:
        names += [f"fastgpt -{op}" for op, picked in served.items() if picked != "torch" and op in called]
    return names


def called_ops(model: ModelConfig) -> set[str]:
    """Return the ops whose backend a training step chooses: without it, their ablation would repeat the whole step."""
    return {b.op for b in every() if not b.within and b.of_model(model, 1, 1) is not None}


def sweep(shape: Shape, batches: list[int] | None, grow: bool) -> Iterator[Shape]:
    """Yield the shape at each batch; `grow`: at powers of two, for as long as the caller asks for more."""
    yield from (dataclasses.replace(shape, batch=b) for b in batches or ([] if grow else [shape.batch]))
    if grow:
        yield from (dataclasses.replace(shape, batch=2**i) for i in itertools.count())


def main(argv: list[str] | None = None) -> int:
    """Return 1 if losses or an op were wrong, so no speed was shown."""
    parser = command_line("throughput", __doc__)
    names = sorted(SHAPES | GPU_SHAPES)
    parser.add_argument("--shape", action="append", choices=names, help="default: small on a CPU, gpt2-124m on a GPU")
    parser.add_argument("--batch", action="append", type=number(int, 1), help="number of sequences; may be repeated")
    parser.add_argument("--sweep", action="store_true", help="time batches 1, 2, 4, ... until memory runs out (GPU)")
    parser.add_argument("--steps", type=number(int, 1), help="number of timed rounds")
    parser.add_argument("--compile", action="store_true", help="also time both under torch.compile")
    parser.add_argument("--ablation", action="store_true", help="also time fastgpt with one op at a time on PyTorch")
    parser.add_argument("--variant", action="append", metavar="NAME", help="time only torch and these; may be repeated")
    parser.add_argument("--llmc", type=Path, metavar="DIR", help="also time a built checkout of llm.c (train_gpt2cu)")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="also time a checkout of nanoGPT (train.py)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), help="of several processes (torchrun); default: ddp")
    args = parser.parse_args(argv)
    device, mesh = device_of(parser, args.device), find_mesh()
    shapes, status = shapes_on(device), 0
    if absent := set(args.shape or []) - set(shapes):
        parser.error(f"--shape {', '.join(sorted(absent))} needs a GPU")
    if args.sweep and device.type != "cuda":
        parser.error("--sweep needs a GPU, where running out of memory is an error; on a CPU pass each --batch")
    if mesh.world > 1:
        if other := next((n for n in ONE_PROCESS if getattr(args, n)), None):
            parser.error(f"--{other} works in one process only")
        chosen = {
            name: dataclasses.replace(shapes[name], steps=args.steps or shapes[name].steps)
            for name in args.shape or [default_shape(device)]
        }
        return processes.main(mesh, device, chosen, args.parallel or "ddp", args.json)
    if args.parallel:
        parser.error("--parallel needs several processes: torchrun --nproc-per-node N -m fastgpt.bench.throughput")
    for name in args.shape or [default_shape(device)]:
        for shape in sweep(shapes[name], args.batch, args.sweep):
            shape = dataclasses.replace(shape, steps=args.steps or shape.steps)
            rows = []
            for row in compare(variant_names(args, shape, device), name, shape, device):
                rows.append(row)
                keep(args.json, [row])
            rival = rivals.rows(rows[0], shape, device, llmc=args.llmc, nanogpt=args.nanogpt)
            keep(args.json, rival)
            rows += rival
            about = f"{name}: {shape.layers} layers, width {shape.width}, vocabulary {shape.vocab}"
            print(f"{about}, B {shape.batch} x T {shape.block}, {rows[0]['dtype']}, {where(rows[0]['machine'])}")
            print(show(rows), flush=True)
            status |= any("red" in r and not r.get("rival") and not out_of_memory(r) for r in rows)
            if args.sweep and any(map(out_of_memory, rows)):
                break
    return status


def keep(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Append rows to the file of --json."""
    if path is not None:
        append_rows(path, rows)


def out_of_memory(row: dict[str, Any]) -> bool:
    """Return whether memory ran out, which is the end of a sweep and not a failure."""
    return str(row.get("red")).startswith("out of memory")


if __name__ == "__main__":
    sys.exit(run_command(main))
