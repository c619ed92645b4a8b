"""`fastgpt train --plan`: print a run's memory, whether it fits, the largest micro-batch that fits, hours and cost.

fastgpt/training/memory.py computes the bytes. `settle` resolves `micro_batch: auto`, and `explain_out_of_memory` turns
an out-of-memory error into advice on which setting to change. Hours and cost are an estimate: tokens * FLOP per token /
(peak * MFU), over the share of time that interruptions leave (fastgpt/training/interruptions.py).
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch

from fastgpt.core import backend
from fastgpt.core.cards import CARDS, datasheet_peak
from fastgpt.core.device import DTYPES, default_device, dtype_of, total_memory
from fastgpt.core.errors import UserError
from fastgpt.training import initial
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.interruptions import FAILURES_PER_GPU_DAY, RECLAIMS_PER_DAY, Interruptions
from fastgpt.training.memory import LEVELS, SPARE, Shape, Target, plan, shape_of

log = logging.getLogger("fastgpt")

MFU = 0.4
# Settings that a plan depends on, in addition to the model's settings
PLANNED = {"model", "out", "device", "dtype", "kernels", "compile", "graphs", "recompute", "optimizer", "master"}
PLANNED |= {"epilogues", "init", "vocab_size", "block_size", "micro_batch", "batch_tokens"}
DEVICES = "auto, cpu, cuda, cuda:N or a card"


def micro_batches(cfg: TrainConfig, gpus: int = 1) -> list[int]:
    """Return the micro-batches that divide a step's sequences on each device, largest first.

    Raises:
        UserError: the step cannot be divided among the devices.
    """
    rows = cfg.block_size * gpus * (1 if cfg.micro_batch == "auto" else cfg.sequences)
    if cfg.batch_tokens % rows:
        raise UserError(f"batch_tokens is {cfg.batch_tokens}, expected a multiple of {rows}, one micro-batch per GPU")
    n = cfg.batch_tokens // (cfg.block_size * gpus)
    return [d for d in range(n, 0, -1) if n % d == 0]


def largest_micro_batch(cfg: TrainConfig, shape: Shape, target: Target, gpus: int = 1) -> int:
    """Return the largest micro-batch whose peak fits; 0 if not even one sequence fits."""
    for size in micro_batches(cfg, gpus):
        if plan(replace(cfg, micro_batch=size), shape, target, gpus).needed <= target.usable:
            return size
    return 0


def with_vocabulary(cfg: TrainConfig, vocab_size: int | None = None) -> TrainConfig:
    """Return the settings with model.vocab_size: the argument, else as configured, else the tokenizer size to train."""
    size = vocab_size or cfg.model.vocab_size or cfg.vocab_size
    return replace(cfg, model=replace(cfg.model, vocab_size=size))


def target_of(device: torch.device) -> Target:
    """Describe a device of this machine."""
    if device.type != "cuda":
        return Target("this machine's CPU", "cpu", total_memory(device))
    name = torch.cuda.get_device_name(device)
    return Target(name, "cuda", total_memory(device), peak=datasheet_peak(name))


def settle(cfg: TrainConfig, vocab_size: int, device: torch.device) -> TrainConfig:
    """Return the settings with a number for micro_batch: auto becomes the largest that fits `device`.

    Raises:
        UserError: none fits, or the device's memory is unknown.
    """
    if cfg.micro_batch != "auto":
        return cfg
    target = target_of(device)
    if target.memory <= 0:
        raise UserError("micro_batch is 'auto', expected a number: the memory size of this system is unknown")
    full = with_vocabulary(cfg, vocab_size)
    size = largest_micro_batch(full, shape_of(full), target)
    if not size:
        raise UserError(f"micro_batch is 'auto', but not one sequence fits; {remedy(full, target)}")
    return replace(cfg, micro_batch=size)


def _changes(cfg: TrainConfig, small: list[int], state_first: bool) -> Iterator[dict[str, Any]]:
    """Yield changes of settings that need less memory, the cheapest first."""
    masters = [s for s in ("remainder", "stochastic") if cfg.master == "fp32"]
    if state_first:
        yield from ({"master": s} for s in masters)
    yield from ({"micro_batch": size} for size in small)
    least: dict[str, Any] = {"micro_batch": 1}
    for level in LEVELS[LEVELS.index(cfg.recompute) + 1 :]:
        if not (cfg.compile and level == "norms"):
            least = {**least, "recompute": level}
            yield least
    for s in masters:
        least = {**least, "master": s}
        yield least
    size = cfg.block_size
    while size % 2 == 0 and size > 64:
        size //= 2
        yield {**least, "block_size": size}


def remedy(cfg: TrainConfig, target: Target, room: float | None = None, gpus: int = 1) -> str:
    """Say which setting to change to which value: the first change that fits `room` bytes (default: the usable memory)
    and needs less than these settings, whose micro_batch may be auto."""
    shape, room = shape_of(cfg), target.usable if room is None else room
    now = replace(cfg, micro_batch=1) if cfg.micro_batch == "auto" else cfg
    here = plan(now, shape, target, gpus)
    small = [d for d in micro_batches(now, gpus) if d < now.sequences]
    state_first = here.largest()[0] == "the optimizer's state" and dtype_of(now.dtype, target.kind).itemsize == 2
    for change in _changes(now, small, state_first):
        needed = plan(replace(now, **change), shape, target, gpus).needed
        if needed <= min(room, 0.95 * here.needed):
            knobs = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in change.items())
            return f"{knobs} needs {_size(needed)} of {_size(room)}"
    return f"no micro_batch, recompute, master or block_size fits {_size(room)}: use a smaller model or a larger device"


@contextlib.contextmanager
def explain_out_of_memory(cfg: TrainConfig, vocab_size: int, device: torch.device) -> Iterator[None]:
    """Turn an out-of-memory error inside into a UserError: the plan's largest part, and the setting to change."""
    try:
        yield
    except RuntimeError as e:
        # aoti_torch_empty: an allocation in fastgpt's C++, whose cause the stable ABI does not pass on
        words = ("DefaultCPUAllocator", "aoti_torch_empty", "CUBLAS_STATUS_ALLOC_FAILED")
        if not isinstance(e, torch.OutOfMemoryError) and not any(word in str(e) for word in words):
            raise
        target, full, room = target_of(device), with_vocabulary(cfg, vocab_size), None
        if device.type == "cuda":  # other processes may use it: what is free, and what this one holds
            room = (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) * (1 - SPARE["cuda"])
        here = plan(full, shape_of(full), target)
        name, size = here.largest()
        raise UserError(
            f"out of memory on {device}: the largest part of the plan is {name}, {_size(size)} of "
            f"{_size(here.needed)}; {remedy(full, target, room)}"
        ) from e


def card(name: str) -> Target | None:
    """Return the known card of this name ("a100", "h100-80gb", "rtx4090"), the smallest if several match."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    keys = {key: key.lower().split() for key in CARDS}
    found = [k for k, parts in keys.items() if words and set(words) <= set(parts)]
    found = found or [k for k, parts in keys.items() if words and "".join(parts).startswith("".join(words))]
    return _card(min(found, key=lambda k: CARDS[k].memory)) if found else None


def _card(key: str) -> Target:
    known = CARDS[key]
    return Target(key, "cuda", int(known.memory), known.bandwidth, known.peak)


def holding(cfg: TrainConfig, shape: Shape, gpus: int) -> list[Target]:
    """Return the known cards that the settings fit on, smallest first."""
    least = replace(cfg, micro_batch=1) if cfg.micro_batch == "auto" else cfg
    cards = sorted((_card(key) for key in CARDS), key=lambda c: c.memory)
    return [c for c in cards if plan(least, shape, c, gpus).needed <= c.usable]


def find_target(name: str, cards: list[Target]) -> tuple[Target, str]:
    """Return the device that --device means, and its name for the report. Without --device and without a GPU, it is the
    smallest of `cards`, or the largest known card if there are none.

    Raises:
        UserError: no such device, or one of unknown memory.
    """
    if name == "auto" and not torch.cuda.is_available():
        if cards:
            return cards[0], f"{cards[0].name}, the smallest card that holds it (no GPU here, no --device)"
        largest = _card(max(CARDS, key=lambda k: CARDS[k].memory))
        return largest, f"{largest.name}, the largest card known (no GPU here, no --device)"
    if known := card(name):
        return known, known.name
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UserError(f"device is {name!r}, expected {DEVICES}: {', '.join(CARDS)}")
    try:
        device = default_device(name)
    except UserError as e:
        raise UserError(f"{e}; to plan for a card elsewhere, name it: {', '.join(CARDS)}") from e
    target = target_of(device)
    if target.memory <= 0:
        raise UserError(f"device is {name!r}, but its memory size is unknown, expected a card to plan for")
    return target, target.name


def _size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def table(cfg: TrainConfig, shape: Shape, target: Target, gpus: int) -> list[str]:
    """Format the bytes by part and recompute level as aligned lines."""
    levels = [level for level in LEVELS if not (cfg.compile and level == "norms")]
    configs = [replace(cfg, recompute=level) for level in levels]
    plans = [plan(c, shape, target, gpus) for c in configs]
    unit, scale = ("GB", 1e9) if max(p.peak for p in plans) >= 1e9 else ("MB", 1e6)
    rows = {
        "parameters and token ids": [p.parameters for p in plans],
        "gradients": [p.gradients for p in plans],
        f"master copies ({cfg.master})": [p.masters for p in plans],
        "AdamW's moments": [p.moments for p in plans],
        "activations": [p.activations for p in plans],
        "either: head and loss": [p.loss for p in plans],
        "    or: a block's backward": [p.block for p in plans],
        "peak": [p.peak for p in plans],
        "validation with graphs": [p.validation for p in plans],
    }
    lines = [f"{unit + ', recompute':<28}" + "".join(f"{level:>10}" for level in levels)]
    lines += [f"{name:<28}" + "".join(f"{v / scale:>10.2f}" for v in values) for name, values in rows.items()]
    most = [largest_micro_batch(c, shape, target, gpus) for c in configs]
    return [*lines, f"{'largest micro_batch':<28}" + "".join(f"{size or 'none':>10}" for size in most)]


def _served_by_torch(cfg: TrainConfig, kind: str, dtype: torch.dtype) -> list[str]:
    """Return the ops without a kernel on this machine's device."""
    with backend.use(**backend.parse_choices(cfg.kernels)):
        return [op for op in backend.ops() if backend.explain(op, kind, dtype)[0] == "torch"]


def estimate(shape: Shape, target: Target, dtype: torch.dtype, state: int, args: argparse.Namespace) -> list[str]:
    """Estimate hours and cost, in sentences that state the assumptions. state: bytes of a checkpoint."""
    if target.peak is None or dtype.itemsize != 2:
        return ["hours: not estimated, since only bf16 peaks of cards are known"]
    gpu_hours = args.tokens * shape.flops / (target.peak * args.mfu) / 3600
    cost = f", cost {gpu_hours * args.price:,.2f} at {args.price:g} a GPU-hour" if args.price is not None else ""
    plain = (
        f"estimate, not measured: {_hours(gpu_hours / args.gpus)} hours ({_hours(gpu_hours)} GPU-hours{cost}) for "
        f"{args.tokens:,.0f} tokens at {args.mfu:.0%} MFU (--mfu) of {target.peak / 1e12:g} TFLOP/s (datasheet), "
        f"{shape.flops / 1e9:.3f} GFLOP a token (6 N + 12 L A T)"
    )
    return [plain, *interrupted(state, gpu_hours / args.gpus, args)]


def interrupted(state: int, hours: float, args: argparse.Namespace) -> list[str]:
    """Say how often to write a checkpoint of `state` bytes, and what interruptions add to a run of `hours`, on demand
    and on spot instances. These are estimates as well."""
    failures, assumed = args.failures_per_day, ""
    if failures is None:
        failures, assumed = args.gpus * FAILURES_PER_GPU_DAY, " (the rate of Llama 3's pretraining)"
    runs = {"on demand": (args.price, Interruptions.of(state, failures))}
    if args.spot_price is not None:
        reclaims = RECLAIMS_PER_DAY if args.reclaims_per_day is None else args.reclaims_per_day
        runs["on spot"] = args.spot_price, Interruptions.of(state, failures, reclaims)
    plain = runs["on demand"][1]
    save = f"--save-minutes {max(1, round(plain.interval / 60))}, by Young and Daly," if failures else "--save-every 0"
    lines = [
        f"checkpoints of {_size(state)}: {save} for {failures:.2g} failures a day{assumed}; one takes "
        f"{plain.write:.1f} s in the background, a restart {plain.restart:g} s (assumed)"
    ]
    for name, (price, kind) in runs.items():
        share = kind.goodput()
        if not share:
            lines.append(f"{name}: the run never ends, because interruptions take all of its time")
            continue
        total = hours / share
        cost = "" if price is None else f", cost {total * args.gpus * price:,.2f} at {price:g} a GPU-hour"
        often = f", with {kind.reclaims:g} reclaims a day" if kind.reclaims else ""
        lines.append(f"{name}{often}: {total:,.1f} hours, {total - hours:.2f} of them lost ({share:.1%} goodput){cost}")
    return lines


def _hours(n: float) -> str:
    return f"{n:,.1f}" if n >= 10 else f"{n:.3g}"


def report(cfg: TrainConfig, args: argparse.Namespace) -> tuple[list[str], bool]:
    """Return the lines to print, the verdict last, and whether the run fits."""
    cfg = with_vocabulary(cfg)
    shape = shape_of(cfg)
    cards = holding(cfg, shape, args.gpus)
    target, called = find_target(cfg.device if args.device is None else args.device, cards)
    dtype, auto = dtype_of(cfg.dtype, target.kind), cfg.micro_batch == "auto"
    size = largest_micro_batch(cfg, shape, target, args.gpus) if auto else cfg.sequences
    now = replace(cfg, micro_batch=size or 1)
    speed = f" at {target.bandwidth / 1e9:,.0f} GB/s" if target.bandwidth else ""
    micro = f"{now.accumulation // args.gpus} x micro_batch {now.sequences}{' (auto)' if auto and size else ''}"
    named = {known: name for name, known in DTYPES.items()}
    lines = [
        f"{cfg.out.removeprefix('runs/')}: {shape.parameters:,} parameters in {named[dtype]}, "
        f"{micro} x block_size {cfg.block_size} a step",
        f"{args.gpus} x {called}: {_size(target.memory)}{speed}, {SPARE[target.kind]:.0%} of it left free",
        "",
        *table(now, shape, target, args.gpus),
        "",
    ]
    if cfg.compile:
        lines.append("compile: these figures are for the eager model; what the compiler keeps is unknown")
    if target.bandwidth is None and (ops := _served_by_torch(cfg, target.kind, dtype)):
        lines.append(f"figures are for fastgpt's kernels; PyTorch, which may keep more, serves here: {', '.join(ops)}")
    if args.tokens is not None:
        held = plan(now, shape, target, args.gpus)
        state = shape.parameters * dtype.itemsize + held.masters + held.moments
        lines += estimate(shape, target, dtype, state, args)
    names = ", ".join(c.name for c in cards[:4]) or "none of the known ones"
    lines.append(f"smallest cards that hold it (recompute {cfg.recompute}, micro_batch {cfg.micro_batch}): {names}")
    fits = (needed := plan(now, shape, target, args.gpus).needed) <= target.usable
    lines.append(f"{'fits' if fits else 'does not fit'}: {_size(needed)} of {_size(target.usable)}")
    lines[-1] += "" if fits else f"; {remedy(now, target, gpus=args.gpus)}"
    return lines, fits


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of --plan; return them and the rest of the command line, which holds the settings.

    Raises:
        UserError: an invalid value.
    """
    from fastgpt.core.command import Parser, number

    about = "Print the memory that a run needs, before anything is allocated. Settings are those of fastgpt train."
    parser = Parser(prog="fastgpt train --plan", description=about, allow_abbrev=False, usage="%(prog)s [options]")
    parser.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=f"{DEVICES}: {', '.join(CARDS)}")
    parser.add_argument(
        "--gpus", type=number(int, 1), default=1, help="number of such devices, each of which holds the whole model"
    )
    parser.add_argument("--tokens", type=number(float, 0, open_least=True), help="tokens to train on: prints hours")
    parser.add_argument("--price", type=number(float, 0), help="price of a GPU-hour: prints the cost (with --tokens)")
    share = number(float, 0, 1, open_least=True)
    parser.add_argument(
        "--mfu", type=share, help=f"share of the peak assumed for the hours (with --tokens) (default: {MFU})"
    )
    parser.add_argument(
        "--spot-price", type=number(float, 0), help="price of a GPU-hour on spot instances (with --tokens)"
    )
    parser.add_argument(
        "--failures-per-day",
        type=number(float, 0),
        help="interruptions of the run a day without notice (with --tokens) (default: a published rate per GPU)",
    )
    parser.add_argument(
        "--reclaims-per-day",
        type=number(float, 0),
        help=f"interruptions a day with notice (with --spot-price) (default: {RECLAIMS_PER_DAY:g}, assumed)",
    )
    args, rest = parser.parse_known_args(argv)
    for name in ("price", "mfu", "spot_price", "failures_per_day"):
        if getattr(args, name) is not None and args.tokens is None:
            raise UserError(f"{name} is {getattr(args, name):g}, but it only applies with --tokens")
    if args.reclaims_per_day is not None and args.spot_price is None:
        raise UserError(f"reclaims_per_day is {args.reclaims_per_day:g}, but it only applies with --spot-price")
    args.mfu = MFU if args.mfu is None else args.mfu
    return args, rest


def main(argv: Sequence[str], default: str) -> int:
    """Run `fastgpt train --plan`; return 1 if the run does not fit. `default`: configuration if argv names none."""
    args, rest = arguments(argv)
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    if idle := sorted(typed & ({f.name for f in fields(TrainConfig)} - PLANNED)):
        log.warning("no effect on a plan: --%s", ", --".join(idle))
    lines, fits = report(initial.settle(load_config(rest, default)), args)
    print("\n".join(lines))
    return 0 if fits else 1
