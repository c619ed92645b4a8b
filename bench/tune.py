"""Which backend serves each op fastest on this machine: `fastgpt tune` measures it and saves the answer.

For every op that a model's training step calls, every backend that runs here is timed in forward and backward (adamw:
its step) at the model's shape, interleaved round by round on rotating inputs (bench/_harness.py). A backend that fails
its parity check first is not timed. The prior's choice is kept unless another is at least 3 % faster in the median of
the paired rounds: less than that is noise. Answers go to a file in the user's cache folder, one per device, driver and
versions (backend.write_tuned); `auto` then tries the measured backend first, and every refusal still applies.

One answer per op and dtype, not per shape: only the same backend's backward can read what its forward saves, so a step
chooses once for both; a training step has few shapes per op, and they grow together with the model; and a choice by
size would make compiled code with dynamic shapes recompile. Tune again for another model: the last answer counts.

On a CPU the ops see at most CPU_TOKENS tokens unless told otherwise, so the command takes about a minute. Triton
kernels are timed on a GPU only, never in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.bench._harness import (
    Samples,
    Setting,
    append_rows,
    count_sets,
    provenance,
    time_cpu,
    time_gpu,
)
from fastgpt.bench._op import Bench, Provider, Shape, bench_of, chosen, every, gate, jobs
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.variants import GPU_SHAPES, SHAPES, default_shape, settings, shapes_on
from fastgpt.core import backend
from fastgpt.core.command import run_command
from fastgpt.core.device import cpu_name, default_device, dtype_of, keep_freed_memory
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.training.config import TrainConfig, load_config
from fastgpt.training.plan import settle

LEAST_GAIN = 1.03  # how much faster than the prior's choice a backend must be to replace it
CPU_TOKENS = 1024


@dataclass(frozen=True)
class Task:
    """One op to measure: its shape and options in the model, the backends to time (in the prior's order), and the
    refused ones."""

    op: str
    shape: Shape
    options: dict[str, Any]
    backends: list[str]
    refused: dict[str, str]


@dataclass
class Result:
    """The measurements of a task; `chosen` is None if no backend returned a correct result."""

    task: Task
    chosen: str | None = None
    note: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def plan(
    model: ModelConfig, batch: int, block: int, device: str, dtype: torch.dtype, only: Iterable[str] = ()
) -> tuple[list[Task], dict[str, str]]:
    """Return the tasks, and the ops that are skipped with the reason."""
    tasks, skipped = [], {}
    for bench in every():
        if only and bench.op not in only:
            continue
        used, cells = bench.of_model(model, batch, block), backend.ops()[bench.op]
        order = backend.prior(bench.op, device, dtype)
        here = [b for b in order if b in cells and backend.DEVICE_OF.get(b, device) == device]
        refused = {b: why for b in here if (why := backend.refusal(bench.op, b, device, dtype))}
        runs = [b for b in here if b not in refused]
        if used is None:
            skipped[bench.op] = "this model does not use it"
        elif runs == ["torch"]:
            skipped[bench.op] = "only torch: " + ("; ".join(refused.values()) or f"no kernel for {device} yet")
        else:
            shape, options = used
            tasks.append(Task(bench.op, shape, options, runs, refused))
    return tasks, skipped


def measure(task: Task, device: torch.device, dtype: torch.dtype, seconds: float) -> Result:
    """Check parity, then time the task's backends for `seconds` (seven rounds at least), and choose one."""
    bench, setting = bench_of(task.op), Setting(task.shape, dtype, device)
    fn = functools.partial(bench.in_step[1] if bench.in_step else bench.public, **task.options)
    ours = {b: Provider(b, fn, b, in_step=bench.in_step is not None) for b in task.backends}
    wrong = {b: f"wrong: {why}" for b, p in ours.items() if b != "torch" and (why := gate(bench, p, setting))}
    samples, errors = _time(bench, setting, [p for b, p in ours.items() if b not in wrong], seconds)
    result = Result(task, refused={**task.refused, **wrong, **errors})
    result.ms = {b: s.quantile(0.5) * 1e3 for b, s in samples.items()}
    if samples:
        result.chosen = choose(samples)
        result.note = compare(samples, result.chosen)
    return result


def _time(
    bench: Bench, setting: Setting, providers: list[Provider], seconds: float
) -> tuple[dict[str, Samples], dict[str, str]]:
    phase, by_name = bench.phases[-1], {p.name: p for p in providers}  # forward and backward, or the step
    sets = range(1, 1 + count_sets(bench.bytes_moved(setting.shape, setting.dtype, phase), setting.device))
    make = {p.name: functools.partial(jobs, bench, p, setting, phase, sets) for p in providers}
    timer = time_gpu if setting.device.type == "cuda" else time_cpu
    samples, errors = timer(make, lambda name: chosen(bench.op, by_name[name]), seconds)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()  # the next op's inputs need the memory
    return samples, {name: f"does not run: {why}" for name, why in errors.items()}


def speedup(samples: dict[str, Samples], name: str, over: str) -> float:
    """Return how much faster `name` is than `over`: the median over the rounds of their ratio."""
    return samples[over].shares(samples[name]).quantile(0.5)


def choose(samples: dict[str, Samples]) -> str:
    """Return the first one (the prior's choice) unless another is faster by LEAST_GAIN."""
    first = next(iter(samples))
    gains = {name: speedup(samples, name, first) for name in samples}
    best = max(gains, key=lambda name: gains[name])
    return best if gains[best] >= LEAST_GAIN else first


def compare(samples: dict[str, Samples], name: str) -> str:
    """Compare the choice with torch, or with the next best if torch itself was chosen: '1.31x torch'."""
    others = {o: speedup(samples, name, o) for o in samples if o != name}
    if not others:
        return "the only correct one"
    other = "torch" if "torch" in others else min(others, key=lambda o: others[o])
    return f"{others[other]:.2f}x {other}"


def entries(results: list[Result], dtype: torch.dtype, model: str) -> dict[str, dict[str, Any]]:
    """Return the results as backend.write_tuned accepts them."""
    today = datetime.date.today().isoformat()
    return {
        f"{r.task.op}.{str(dtype).split('.')[1]}": {
            "backend": r.chosen,
            "date": today,
            "note": r.note,
            "model": model,
            "shape": r.task.shape,
            "ms": r.ms,
            "refused": r.refused,
        }
        for r in results
        if r.chosen is not None
    }


def line(r: Result) -> str:
    """Return one op's line of the table, then one for each backend that was refused."""
    times = "  ".join(f"{b} {ms:.4g}" for b, ms in r.ms.items())
    picked = f"{r.chosen} ({r.note})" if r.chosen else "nothing: the prior is kept"
    shape = "x".join(map(str, r.task.shape))
    lines = [f"{r.task.op:<22}{shape:<20}{times:<44}{picked}"]
    return "\n".join([*lines, *(f"{'':<22}{b} is left out: {why}" for b, why in r.refused.items())])


def _setting_of(args: argparse.Namespace) -> tuple[TrainConfig, torch.device, torch.dtype]:
    device = default_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    usual = "gpt2-124m-demo" if device.type == "cuda" else "tiny"
    cfg = load_config(["--config", usual if args.config is None else args.config])
    return cfg, device, dtype_of(args.dtype or cfg.dtype, device.type)


def _batch_of(cfg: TrainConfig, args: argparse.Namespace, device: torch.device) -> tuple[int, int]:
    """Return B and T: as requested, else the configuration's, on a CPU at most CPU_TOKENS tokens."""
    cfg = settle(cfg, cfg.model.vocab_size or cfg.vocab_size, device)
    most = CPU_TOKENS if device.type == "cpu" else cfg.sequences * cfg.block_size
    block = args.block or min(cfg.block_size, most)
    return args.batch or max(1, min(cfg.sequences, most // block)), block


def run(args: argparse.Namespace) -> int:
    """Run `fastgpt tune` with parsed options; return 1 if a backend returned a wrong result."""
    if unknown := [op for op in args.ops or () if op not in backend.ops()]:
        raise UserError(f"tune: there is no op {unknown[0]!r}; expected some of {', '.join(backend.ops())}")
    cfg, device, dtype = _setting_of(args)
    batch, block = _batch_of(cfg, args, device)
    model = replace(cfg.model, vocab_size=cfg.model.vocab_size or cfg.vocab_size)
    tasks, skipped = plan(model, batch, block, device.type, dtype, args.ops or ())
    name = args.config or cfg.out.removeprefix("runs/")
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    )
    print(f"{name}: B {batch} x T {block}, {str(dtype).split('.')[1]}, on {where}")
    print(f"{'op':<22}{'shape':<20}{'ms of forward + backward, or of a step':<44}chosen")
    for op, why in skipped.items():
        print(f"{op:<22}skipped: {why}")
    if args.dry_run:
        for t in tasks:
            print(f"{t.op:<22}{'x'.join(map(str, t.shape)):<20}would time {', '.join(t.backends)}")
        return 0
    wrong = [remember(task, device, dtype, args.seconds, name) for task in tasks]
    print("`fastgpt doctor` shows the backends in use")
    return int(any(wrong))


def remember(
    task: Task, device: torch.device, dtype: torch.dtype, seconds: float, model: str, json: Path | None = None
) -> bool:
    """Measure a task, print its line and save the answer at once; return whether a backend returned a wrong result."""
    keep_freed_memory()  # as the trainer does
    result = measure(task, device, dtype, seconds)
    wrong = "; ".join(f"{b} is {why}" for b, why in result.refused.items() if why.startswith("wrong"))
    print(line(result), flush=True)
    if found := entries([result], dtype, model):
        try:
            path = backend.write_tuned(device.type, found)
            print(f"{'':<22}written to {path}", flush=True)
        except OSError as e:
            raise UserError(f"tune: the table cannot be written ({e}); set XDG_CACHE_HOME to another folder") from e
    if json is not None:
        row: dict[str, Any] = {
            "bench": "tune",
            "op": task.op,
            "shape": task.shape,
            "dtype": str(dtype).split(".")[1],
            "model": model,
        }
        row |= {"chosen": result.chosen, "note": result.note, "times_ms": result.ms, "refused": result.refused}
        row |= {"red": wrong} if wrong else {}
        append_rows(json, [{**row, "machine": provenance(device)}])
    return bool(wrong)


def main(argv: list[str] | None = None) -> int:
    """Tune at a shape of throughput, without a configuration file; return 1 if a result was wrong."""
    parser = command_line("tune", main.__doc__)
    parser.prog = "python -m fastgpt.bench.tune"  # `fastgpt tune` is a different command
    parser.add_argument("--shape", choices=sorted(SHAPES | GPU_SHAPES), help="default: small, on a GPU gpt2-124m")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of samples per op")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    name = args.shape or default_shape(device)
    shape = shapes_on(device)[name]
    cfg = settings(shape, device)
    dtype = dtype_of(cfg.dtype, device.type)
    tasks, _ = plan(cfg.model, shape.batch, shape.block, device.type, dtype)
    status = 0
    for task in tasks:
        try:
            status |= remember(task, device, dtype, args.seconds, name, args.json)
        except UserError:
            raise
        except Exception as e:  # one op that fails must not prevent the answers of the others
            print(f"{task.op:<22}failed: {type(e).__name__}: {e}", flush=True)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
