"""Add an evaluation to a training run.

Shows: `train.EVALUATIONS`. Each function gets the run and returns numbers by name; the trainer calls it at every
validation, prints the numbers and writes them to metrics.jsonl as "name.number". This one measures how often the most
likely next token is the right one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastgpt import train
from fastgpt.data import sequential

SETTINGS = (
    "--model.n-layers 2 --model.n-heads 2 --model.width 64 --block-size 32 --micro-batch 4 --batch-tokens 128 "
    "--vocab-size 300 --max-steps 12 --eval-every 6 --eval-batches 2 --sample-tokens 8 --log-every 6 --device cpu"
).split()


def accuracy(run: Any) -> dict[str, float]:
    """Return the share of validation tokens predicted correctly. The model is in training mode before and after the
    call."""
    model, cfg = run.model, run.cfg
    hits, tokens = 0, 0
    model.eval()
    with torch.no_grad():
        batches = sequential(run.data.val, cfg.sequences, cfg.block_size, max_batches=4, device=run.device)
        for ids, targets in batches:
            hits += int((model(ids).argmax(-1) == targets).sum())
            tokens += targets.numel()
    model.train()
    return {"top1": hits / tokens}


def main(out: str = "runs/evaluation", data: str | None = None) -> list[float]:
    """Train on the json package of the standard library; return the accuracy at each validation."""
    train.EVALUATIONS["accuracy"] = accuracy
    try:
        code = train.main([*SETTINGS, "--data", data or str(Path(json.__file__).parent), "--out", out])
    finally:
        del train.EVALUATIONS["accuracy"]  # only needed if the process continues with other runs
    if code:
        sys.exit(code)
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row["accuracy.top1"] for row in rows if "accuracy.top1" in row]


if __name__ == "__main__":
    print(main())
