"""Folders of runs as fastgpt train leaves them, with chosen figures."""

from __future__ import annotations

import json
from pathlib import Path

# a step of 1,000 tokens and half a second
STEP = {"tokens": 1000, "lr": 1e-3, "memory_gb": 2.0, "loss": 3.0, "grad_norm": 1.0, "seconds": 0.5}
STEP |= {"tokens_per_second": 2000.0, "mfu_full": 0.3, "mfu_causal": 0.25}


def write_run(folder: Path, steps: int = 20, lr: float = 1e-3, text: str = "a sample", ended: bool = True) -> None:
    """Write a run whose loss is 2 + 1/step, with a validation every ten steps and one skipped step, the third."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"fastgpt": "0.1.0", "commit": "abc", "device": "cpu"}
    settings = {"model": {"width": 64}, "data": "my.txt", "out": str(folder), "max_steps": steps, "lr": lr}
    header = {"config": settings, "machine": machine, "data": "my.txt: 10 tokens", "licences": "MIT"}
    header["kernels"] = {"adamw": ["cpu", "prior"]}
    (folder / "run.json").write_text(json.dumps(header))
    rows: list[dict[str, object]] = []
    for i in range(1, steps + 1):
        skipped = {"skipped": 1} if i == 3 else {}
        rows.append({"step": i, **STEP, "tokens": 1000 * i, "seconds": i * i / 2, "loss": 2 + 1 / i, **skipped})
        if i % 10 == 0:
            rows.append({"step": i, "val_loss": 2 + 1 / i, "val_loss.web": 3.0})
            evaluation = {"base.task.acc": 0.5, "base.task/part.acc": 0.1, "base.seconds": 1.0}
            rows.append({"step": i, **evaluation, "base.share_of_time": 0.1})
    rows += [{"step": steps, "joules": 3.6e6, "watts": 50.0}] if ended and steps else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [{"step": step, "text": text} for step in (10, 20)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (folder / "samples.txt").write_text("the end")
    progress = {"last_step": steps, "ended": ended, "process": 1, "host": "elsewhere"}
    (folder / "progress.json").write_text(json.dumps(progress))
    (folder / f"step_{steps:08d}").mkdir(exist_ok=True)
