"""What fits a card: `python -m fastgpt.bench.memory [--model gpt2-774m] [--gb 80] [--measure] [--json FILE]`.

The largest batch at the model's T, and the longest sequence at B 1 (in steps of 256 tokens; the position table, where
the model has one, grows with it), by level of recomputation, bf16 with fp32 masters. planned: the figures of
fastgpt/training/memory.py against 92 % of the card, on any machine. measured, with --measure and a GPU: two real
training steps at each size that a bisection tries, on this GPU, with the allocator limited to the same 92 % of the
largest card that is no larger than this one (--gb names others).
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fastgpt.bench import variants
from fastgpt.bench._harness import (
    append_rows,
    gpu_state,
    provenance,
    where,
)
from fastgpt.bench._options import command_line, device_of
from fastgpt.core.command import number, run_command
from fastgpt.core.device import total_memory
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.models.recompute import Level
from fastgpt.training.config import TrainConfig
from fastgpt.training.memory import LEVELS, Shape, Target, plan, shape_of
from fastgpt.training.plan import explain_out_of_memory

MODELS = tuple(variants.GPU_SHAPES)
CARDS_GB = (24, 40, 80, 141)
UNIT = 256  # tokens: the resolution of a sequence's length


def card(gb: float) -> Target:
    """Return a card with this much memory, in 10^9 bytes."""
    return Target(f"{gb:g} GB", "cuda", int(gb * 1e9))


def config_of(model: str, level: Level) -> TrainConfig:
    """Return the settings of one model in bf16; allocates nothing and needs no GPU."""
    return replace(variants.settings(variants.GPU_SHAPES[model], torch.device("cuda")), recompute=level)


def sized(cfg: TrainConfig, batch: int, block: int) -> TrainConfig:
    """Return the settings at B x T in one micro-batch."""
    model = replace(cfg.model, block_size=block)
    return replace(cfg, model=model, block_size=block, micro_batch=batch, batch_tokens=batch * block)


@functools.cache
def _shapes(model: ModelConfig) -> tuple[Shape, Shape]:
    """Return a model's shapes at 1 and at 2 UNIT tokens."""
    blocks = (UNIT, 2 * UNIT)
    sized = (TrainConfig(replace(model, block_size=t), block_size=t, micro_batch=1, batch_tokens=t) for t in blocks)
    first, second = (shape_of(cfg) for cfg in sized)
    return first, second


def shape_at(cfg: TrainConfig) -> Shape:
    """Return memory.shape_of quickly: position tables are linear in T, and nothing else depends on it."""
    first, second = _shapes(replace(cfg.model, block_size=UNIT))
    units = cfg.block_size / UNIT - 1
    return Shape._make(type(a)(a + units * (b - a)) for a, b in zip(first, second))


def planned_peak(cfg: TrainConfig, target: Target) -> int:
    """Return the planned peak in bytes."""
    return plan(cfg, shape_at(cfg), target).peak


def largest(fits: Callable[[int], bool], guess: int = 1) -> int:
    """Return the largest n >= 1 that fits, 0 if none does; assumes that nothing fits beyond one that does not."""
    low, high = 0, max(1, guess)
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def planned(model: str, level: Level, gb: float) -> dict[str, Any]:
    """Return the largest batch and the longest sequence by plan, and the bytes that they take."""
    cfg, target = config_of(model, level), card(gb)
    batch = largest(lambda b: planned_peak(sized(cfg, b, cfg.block_size), target) <= target.usable)
    units = largest(lambda n: planned_peak(sized(cfg, 1, n * UNIT), target) <= target.usable)
    peaks = {}
    if batch:
        peaks["largest_batch_peak_gb"] = planned_peak(sized(cfg, batch, cfg.block_size), target) / 1e9
    if units:
        peaks["longest_context_peak_gb"] = planned_peak(sized(cfg, 1, units * UNIT), target) / 1e9
    return {"figure": "planned", "largest_batch": batch, "longest_context": units * UNIT, **peaks}


def step_fits(cfg: TrainConfig, device: torch.device) -> bool:
    """Return whether two training steps succeed: the second one has the optimizer's state from the first."""
    cfg = replace(cfg, device=str(device))
    shape = (cfg.sequences, cfg.block_size)
    assert cfg.model.vocab_size is not None
    try:
        with explain_out_of_memory(cfg, cfg.model.vocab_size, device):
            ids = torch.randint(cfg.model.vocab_size, shape, device=device)
            variants.build("fastgpt", cfg, [(ids, ids)]).train(cfg, 2)
        return True
    except UserError:
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measured(model: str, level: Level, gb: float, device: torch.device) -> dict[str, Any]:
    """Return the same from real steps, starting from the plan's answer."""
    cfg, guess = config_of(model, level), planned(model, level, gb)
    torch.cuda.set_per_process_memory_fraction(min(1.0, card(gb).usable / total_memory(device)), device)
    try:
        batch = largest(lambda b: step_fits(sized(cfg, b, cfg.block_size), device), guess["largest_batch"])
        units = largest(lambda n: step_fits(sized(cfg, 1, n * UNIT), device), guess["longest_context"] // UNIT)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return {"figure": "measured", "largest_batch": batch, "longest_context": units * UNIT, "gpu": gpu_state(device)}


def row(model: str, level: Level, gb: float, figures: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a row of figures."""
    about = {"bench": "memory", "model": model, "mode": level, "device": f"{gb:g} GB", "memory_gb": gb, "dtype": "bf16"}
    return {**about, "block": variants.GPU_SHAPES[model].block, **figures, "machine": provenance(device)}


def show(rows: list[dict[str, Any]]) -> str:
    """Return the largest batch and the longest sequence by card."""
    cards = sorted({r["memory_gb"] for r in rows})
    lines = [f"{'model':<12}{'recompute':<11}{'':<10}" + "".join(f"{f'{gb:g} GB: B, longest T':>24}" for gb in cards)]
    keys = dict.fromkeys((r["model"], r["mode"], r["figure"]) for r in rows)
    for key in keys:
        cells = {r["memory_gb"]: r for r in rows if (r["model"], r["mode"], r["figure"]) == key}
        told = (
            f"{cells[gb]['largest_batch']:,}, {cells[gb]['longest_context']:,}" if gb in cells else "-" for gb in cards
        )
        lines.append(f"{key[0]:<12}{key[1]:<11}{key[2]:<10}" + "".join(f"{cell:>24}" for cell in told))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 0; a card on which not even one sequence fits has batch 0."""
    parser = command_line("memory", __doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="model to plan; may be repeated; default: all")
    parser.add_argument(
        "--gb",
        action="append",
        type=number(float, 0, open_least=True),
        help=f"memory of a card; may be repeated; default: {CARDS_GB}",
    )
    parser.add_argument(
        "--recompute", action="append", choices=LEVELS, help="level to plan; may be repeated; default: all"
    )
    parser.add_argument(
        "--measure", action="store_true", help="also measure real steps on this GPU (default: gpt2-124m)"
    )
    args = parser.parse_args(argv)
    if args.measure and (device := device_of(parser, args.device)).type != "cuda":
        parser.error("--measure needs a GPU; leave it out for planned figures")
    levels, cards = args.recompute or LEVELS, args.gb or CARDS_GB
    rows = [
        row(model, level, gb, planned(model, level, gb), torch.device("cpu"))
        for model in args.model or MODELS
        for level in levels
        for gb in cards
    ]
    if args.measure:
        here = [gb for gb in cards if gb * 1e9 <= total_memory(device)]
        here = here if args.gb else here[-1:]
        for model in args.model or MODELS[:1]:
            for level in levels:
                rows += [row(model, level, gb, measured(model, level, gb, device), device) for gb in here]
    print(f"bf16, T {variants.GPU_SHAPES[MODELS[0]].block} for the batch, {where(rows[-1]['machine'])}")
    print(show(rows))
    if args.json:
        append_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
