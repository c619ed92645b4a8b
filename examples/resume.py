"""Stop a training run and resume it bit for bit.

Shows: a run of 12 steps, and one that ends after 6 and is started again. Checkpoints hold weights, optimizer, random
states, data order and schedule, so both runs have the same losses. Ctrl-C ends a run in the same way, and a run that
was killed resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastgpt import train

SETTINGS = (
    "--model.n-layers 2 --model.n-heads 2 --model.width 64 --block-size 32 --micro-batch 4 --batch-tokens 128 "
    "--vocab-size 300 --eval-every 0 --save-every 6 --eval-batches 2 --sample-tokens 8 --log-every 6 "
    "--schedule constant --device cpu"
).split()


def run(out: str, steps: int) -> None:
    """Train or resume; the same command does both."""
    data = str(Path(json.__file__).parent)  # the json package of the standard library, as text
    if code := train.main([*SETTINGS, "--data", data, "--out", out, "--max-steps", str(steps)]):
        sys.exit(code)


def losses(out: str) -> list[float]:
    """Return the loss of every step, from the run's metrics.jsonl."""
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main(out: str = "runs/resume") -> tuple[list[float], list[float]]:
    """Return the losses of the uninterrupted run and of the run in two parts."""
    run(f"{out}-whole", 12)
    run(f"{out}-parts", 6)
    run(f"{out}-parts", 12)  # resumes at step 6
    whole, parts = losses(f"{out}-whole"), losses(f"{out}-parts")
    print("the same losses" if whole == parts else "the losses differ")
    return whole, parts


if __name__ == "__main__":
    main()
