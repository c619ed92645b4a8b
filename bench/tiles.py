"""Launch shapes of attention's Triton kernels by time: `python -m fastgpt.bench.tiles [--json FILE]`.

SHAPES of each of the three kernels at GPT-2's size, interleaved: forward, and backward with one of its two kernels
changed. The first of each is the entry of kernels/_attention_tiles.py for this chip. A shape whose results differ from
the first one's by more than NEAR, in the norm, is red.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fastgpt.bench._harness import (
    Job,
    Setting,
    append_rows,
    gpu_state,
    provenance,
    time_cpu,
    time_gpu,
    where,
)
from fastgpt.bench._op import Provider, chosen
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.attention import BENCH
from fastgpt.core.command import run_command
from fastgpt.kernels import attention as kernels

NEAR = 5e-3
# BLOCK_M queries, BLOCK_N keys, warps, stages, and, where it lets one more program fit a multiprocessor, registers a
# thread
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "fwd": [(), (64, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 64, 8, 2, 128), (64, 128, 4, 2)],
    "dkdv": [(), (64, 64, 4, 2), (32, 128, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 128, 4, 2)],
    "dq": [(), (64, 64, 4, 2), (128, 64, 4, 2), (64, 128, 8, 2), (128, 32, 8, 2), (64, 64, 4, 3)],
}


@contextlib.contextmanager
def launched(kernel: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Launch a kernel in this shape within the context; () is the shape in use."""
    usual: Any = kernels.tile
    keys = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")

    def tile(which: str, *rest: Any) -> dict[str, Any]:
        return dict(zip(keys, shape)) if shape and which == kernel else usual(which, *rest)

    kernels.tile = tile  # type: ignore[assignment]
    try:
        with chosen("attention", PROVIDER):
            yield
    finally:
        kernels.tile = usual


PROVIDER = Provider("triton", BENCH.public, "triton")


def results(kernel: str, shape: tuple[int, ...], setting: Setting) -> list[torch.Tensor]:
    """Return the results of forward, or of backward, with this shape."""
    with launched(kernel, shape):
        out = BENCH.job(PROVIDER, setting, "forward" if kernel == "fwd" else "backward", 1).run()
    return [t.detach().float() for t in (out if isinstance(out, tuple) else (out,))]


def wrong(kernel: str, shape: tuple[int, ...], setting: Setting, right: list[torch.Tensor]) -> str:
    """Return why a shape must not be timed; empty if it may be."""
    try:
        found = results(kernel, shape, setting)
    except Exception as e:  # too much shared memory or too many registers: other shapes keep their figures
        return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
    return "" if worst <= NEAR else f"results differ by {worst:.1e} from those of the shape in use, {NEAR:g} allowed"


def measure(kernel: str, setting: Setting, seconds: float) -> list[dict[str, Any]]:
    """Return one row per shape: its time, or why it has none."""
    phase = "forward" if kernel == "fwd" else "backward"
    named = {"x".join(map(str, shape)) or "in use": shape for shape in SHAPES[kernel]}
    right = results(kernel, (), setting)
    red = {name: why for name, shape in named.items() if (why := wrong(kernel, shape, setting, right))}

    def make() -> list[Job]:
        return [BENCH.job(PROVIDER, setting, phase, 1)]

    timer = time_gpu if setting.device.type == "cuda" else time_cpu
    jobs = {name: make for name in named if name not in red}
    samples, errors = timer(jobs, lambda name: launched(kernel, named[name]), seconds)
    about: dict[str, Any] = {
        "bench": "tiles",
        "kernel": kernel,
        "shape": setting.shape,
        "dtype": str(setting.dtype).split(".")[1],
    }
    about |= {"gpu": gpu_state(setting.device), "machine": provenance(setting.device)}
    rows = [{**about, "mode": name, "in_use": not named[name], **s.figures()} for name, s in samples.items()]
    return rows + [{**about, "mode": name, "red": why} for name, why in {**red, **errors}.items()]


def main(argv: list[str] | None = None) -> int:
    """Return 0: a shape that does not run is a result."""
    parser = command_line("tiles", __doc__)
    parser.add_argument("--shape", default="64x1024x12x12x64", metavar=BENCH.dims)
    parser.add_argument("--seconds", type=float, default=0.5, help="seconds of samples per kernel")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    setting = Setting(tuple(map(int, args.shape.split("x"))), torch.bfloat16, device)
    for kernel in SHAPES:
        rows = measure(kernel, setting, args.seconds)
        if args.json:
            append_rows(args.json, rows)
        phase = "forward" if kernel == "fwd" else "backward"
        print(f"{kernel} at {args.shape}, ms of {phase}, {where(rows[0]['machine'])}")
        for r in sorted(rows, key=lambda r: r.get("ms", float("inf"))):
            print(f"  {r['mode']:<18}{r.get('red') or format(r['ms'], '.4f')}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
