"""Other trainers, run by their own code from a folder that the user names: llm.c's train_gpt2cu, nanoGPT's train.py.

`rows(about, shape, device, llmc=DIR, nanogpt=DIR)` writes tokens in the format of each (uint16; for llm.c after a
header of 256 int32), runs a few steps at the same sizes, batch and length, and reads the milliseconds that each prints
per step. The first WARM steps, which compile and allocate, are left out. A trainer that fails has a row with the
reason.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgpt.bench._harness import Samples, Setting
from fastgpt.bench.variants import Shape

WARM = 5
LIMIT = 600  # seconds; torch.compile in nanoGPT takes one or two minutes
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER = 20240520, 1, 256
# step    4/20 | loss 7.519217 (+1.52z)| norm 2.3212 (-0.06z)| lr 1.00e-04 | 139.82 ms | 37.9% bf16 MFU | 468712 tok/s
LLMC_LINE = re.compile(r"^step\s+\d+/\d+ \|.*\|\s*([\d.]+) ms \|", re.M)
# iter 10: loss 8.2331, time 150.32ms, mfu 25.61%
NANOGPT_LINE = re.compile(r"^iter \d+: loss .*, time ([\d.]+)ms", re.M)


def tokens(shape: Shape, count: int) -> np.ndarray:
    """Return uint16 token ids with the distribution of the other variants' tokens."""
    setting = Setting((), torch.float32, torch.device("cpu"))
    ids = setting.tokens(min(shape.vocab, 50257), count, seed=1)
    return ids.numpy().astype(np.uint16)


def llmc_command(folder: Path, work: Path, shape: Shape, steps: int) -> list[str]:
    """Return train_gpt2cu's command on tokens in its format, steps alone: no validation, no samples, no checkpoints."""
    ids = tokens(shape, 8 * shape.batch * (shape.block + 1))
    header = np.zeros(LLMC_HEADER, np.int32)
    header[:3] = LLMC_MAGIC, LLMC_VERSION, ids.size
    data = work / "tokens.bin"
    data.write_bytes(header.tobytes() + ids.tobytes())
    options: dict[str, Any] = {"-i": data, "-j": data, "-e": f"d{shape.layers}", "-b": shape.batch, "-t": shape.block}
    options |= {"-d": shape.batch * shape.block, "-x": steps, "-v": 0, "-s": 0, "-h": 0, "-n": 0, "-l": 1e-3, "-u": 10}
    return [str(folder / "train_gpt2cu"), *(str(x) for pair in options.items() for x in pair)]


def nanogpt_command(folder: Path, work: Path, shape: Shape, steps: int, device: torch.device) -> list[str]:
    """Return train.py's command on tokens in its format; it requires one validation batch before the first step."""
    ids = tokens(shape, 8 * shape.batch * (shape.block + 1))
    for split in ("train", "val"):
        ids.tofile(work / f"{split}.bin")
    options: dict[str, Any] = {"dataset": work, "out_dir": work / "out", "device": device, "dtype": "bfloat16"}
    options |= {"n_layer": shape.layers, "n_head": shape.heads, "n_embd": shape.width, "block_size": shape.block}
    options |= {"batch_size": shape.batch, "gradient_accumulation_steps": 1, "max_iters": steps, "log_interval": 1}
    options |= {"eval_iters": 1, "eval_interval": 10**6, "learning_rate": 1e-3, "warmup_iters": 10, "bias": True}
    options |= {"wandb_log": False, "compile": device.type == "cuda"}
    if device.type == "cpu":
        options["dtype"] = "float32"
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in options.items())]


def milliseconds(pattern: re.Pattern[str], text: str) -> list[float]:
    """Return the milliseconds of each step that a trainer printed, without the first WARM."""
    return [float(found) for found in pattern.findall(text)][WARM:]


def cannot(name: str, folder: Path, shape: Shape, device: torch.device) -> str | None:
    """Return why a trainer cannot run this shape; None if it can."""
    file = "train_gpt2cu" if name == "llm.c" else "train.py"
    if not (folder / file).is_file():
        return f"{folder} has no {file}" + (", which `make train_gpt2cu` builds" if name == "llm.c" else "")
    if shape.llama:
        return "it trains GPT-2 only"
    if name == "llm.c" and (device.type != "cuda" or shape.width != 64 * shape.heads or shape.vocab != 50304):
        return "it trains GPT-2 124M, 350M, 774M and 1.5B, on a GPU"
    return None


def measure(name: str, folder: Path, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return time and speed of one trainer, or why there is none."""
    if why := cannot(name, folder, shape, device):
        return {"red": why}
    steps = WARM + shape.steps
    with tempfile.TemporaryDirectory(prefix="fastgpt-rival-") as work:
        if name == "llm.c":
            pattern, command = LLMC_LINE, llmc_command(folder, Path(work), shape, steps)
        else:
            pattern, command = NANOGPT_LINE, nanogpt_command(folder, Path(work), shape, steps, device)
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT)
        except (OSError, subprocess.TimeoutExpired) as e:
            return {"red": f"{type(e).__name__}: {e}"}
    found = milliseconds(pattern, done.stdout)
    if done.returncode != 0 or not found:
        last = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        return {"red": f"exit code {done.returncode}, {len(found)} steps: {last[-1][:200]}"}
    low, middle, high = (Samples(found).quantile(q) for q in (0.2, 0.5, 0.8))
    speed = shape.batch * shape.block / middle * 1e3
    return {"ms": middle, "ms_q20": low, "ms_q80": high, "samples": len(found), "tokens_per_s": speed}


def rows(
    about: dict[str, Any], shape: Shape, device: torch.device, *, llmc: Path | None = None, nanogpt: Path | None = None
) -> list[dict[str, Any]]:
    """Return a row for each trainer that has a folder; `about`: a row of fastgpt's at this shape."""
    keep = ("bench", "shape", "batch", "block", "dtype", "machine", "gpu", "peak_flops", "peak_flops_from")
    same = {key: about[key] for key in keep if key in about} | {"rival": True}
    found = []
    for name, folder in (("llm.c", llmc), ("nanoGPT", nanogpt)):
        if folder is not None:
            row = {**same, "variant": name, **measure(name, folder.resolve(), shape, device)}
            if "red" not in row:
                row |= {"peak_mb": None, "joules_per_token": None}
                mfu = ("mfu_full", "mfu_causal")  # the same model and peak
                row |= {key: about[key] * row["tokens_per_s"] / about["tokens_per_s"] for key in mfu if key in about}
            found.append(row)
    return found
