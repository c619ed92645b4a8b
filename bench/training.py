"""A run of the trainer that is stopped and resumed: `python -m fastgpt.bench.training [--shape gpt2-124m] [--json
FILE]`.

STEPS steps on synthetic tokens in .bin shards, with everything that a user's run has: CUDA graphs on a GPU, the threads
of the loader and of the checkpoint writer, max_minutes set, one evaluation. At the evaluation the run gets SIGTERM,
writes its checkpoint and ends; a second one resumes and continues to the last step. The row is red unless every step is
in the log once, no step was skipped, the loss fell and graphs were not given up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastgpt import train
from fastgpt.bench._harness import (
    append_rows,
    gpu_state,
    provenance,
    where,
)
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.variants import GPU_SHAPES, SHAPES, Shape, batches, default_shape, settings, shapes_on
from fastgpt.core.command import run_command
from fastgpt.data.shards import ShardWriter
from fastgpt.training.config import TrainConfig
from fastgpt.training.run import Run

STEPS, STOP_AT = 60, 30
FELL = 0.1  # minimum fall in nats between the first and the last ten steps


def write_tokens(folder: Path, shape: Shape) -> None:
    """Write train.bin and val.bin: eight batches of eight times the length."""
    longer = dataclasses.replace(shape, block=8 * shape.block)
    ids = torch.cat([batch for batch, _ in batches(longer, torch.device("cpu"))]).flatten().numpy()
    cut = len(ids) // 20
    for name, part in (("train.bin", ids[cut:]), ("val.bin", ids[:cut])):
        with ShardWriter(folder / name, 1 << 17) as shard:  # 32-bit ids: 16-bit ones would imply GPT-2's vocabulary
            shard.write(part)


def config(shape: Shape, device: torch.device, folder: Path) -> TrainConfig:
    """Return the trainer's settings."""
    return dataclasses.replace(
        settings(shape, device),
        data=str(folder / "train.bin"),
        val_data=str(folder / "val.bin"),
        out=str(folder / "run"),
        max_steps=STEPS,
        max_minutes=10.0,
        eval_every=STOP_AT,
        eval_batches=2,
        log_every=10,
    )


def stop(run: Run, recorded: list[bool]) -> dict[str, float]:
    """Stop the first run by an evaluation, as a preempted machine would, and note whether CUDA graphs could be
    recorded."""
    recorded.append(not run.graphs.failure)
    if run.progress.step == STOP_AT:
        os.kill(os.getpid(), signal.SIGTERM)
    return {}


def judge(rows: list[dict[str, Any]], codes: list[int], graphs: bool) -> str:
    """Return what is wrong with a run, judged by its log; empty if nothing."""
    steps = [r for r in rows if "loss" in r]
    numbers, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    if codes != [0, 0]:
        return f"exit codes {codes}, expected 0 and 0"
    if numbers != list(range(1, STEPS + 1)):
        return f"{len(numbers)} steps in the log, the last {numbers[-1:]}, expected 1 to {STEPS}"
    if not all(map(math.isfinite, losses)) or statistics.mean(losses[:10]) - statistics.mean(losses[-10:]) < FELL:
        return f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}, expected a fall of at least {FELL}"
    if [r["step"] for r in rows if "val_loss" in r] != [STOP_AT, STEPS]:
        return "validations are not at the expected steps"
    return "" if graphs else "a step could not be recorded as a CUDA graph"


def measure(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return the figures of the run, or why it is red."""
    recorded: list[bool] = []
    train.EVALUATIONS["stop"] = partial(stop, recorded=recorded)
    with tempfile.TemporaryDirectory(prefix="fastgpt-training-") as work:
        write_tokens(Path(work), shape)
        cfg, start = config(shape, device, Path(work)), time.perf_counter()
        codes = [train.train(cfg) for _ in range(2)]
        log = (Path(work) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in log]
    if why := judge(rows, codes, all(recorded)):
        return {"red": why}
    steps = [r for r in rows if "loss" in r]
    speed = statistics.median(r["tokens_per_second"] for r in steps[-20:])
    val = next(r["val_loss"] for r in reversed(rows) if "val_loss" in r)
    note = f"{STEPS} steps with a resume at {STOP_AT}, {speed:,.0f} tokens/s, loss {steps[0]['loss']:.3f} to "
    note += f"{steps[-1]['loss']:.3f}, validation {val:.3f}, {time.perf_counter() - start:.0f} s in all"
    row = {"tokens_per_s": speed, "losses": [r["loss"] for r in steps], "val_loss": val, "note": note}
    return row | {"memory_gb": steps[-1]["memory_gb"]}


def main(argv: list[str] | None = None) -> int:
    """Return 1 if the run was red."""
    parser = command_line("training", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES | GPU_SHAPES), help="default: small, on a GPU gpt2-124m")
    parser.add_argument("--batch", type=int, help="number of sequences")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    name = args.shape or default_shape(device)
    shape = shapes_on(device)[name]
    shape = dataclasses.replace(shape, batch=args.batch or shape.batch)
    about = {"bench": "training", "shape": name, "batch": shape.batch, "block": shape.block}
    try:
        found = measure(shape, device)
    except Exception as e:  # in the row: the stage's output may be long
        found = {"red": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    row = {**about, **found, "gpu": gpu_state(device), "machine": provenance(device)}
    if args.json:
        append_rows(args.json, [row])
    print(f"{name}, B {shape.batch} x T {shape.block}, {where(row['machine'])}\n{row.get('red') or row['note']}")
    return int("red" in row)


if __name__ == "__main__":
    sys.exit(run_command(main))
