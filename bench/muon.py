"""Muon's Newton-Schulz iteration against torch.optim.Muon's own: `fastgpt bench muon [--dtype bf16] [--json FILE]`.

The matrices that Muon updates in GPT-2 124M (in every layer 2304 x 768, 768 x 768, 3072 x 768 and 768 x 3072),
with random numbers. Three variants take turns within one process:

    torch     a loop over the function of torch.optim.Muon, matrix by matrix, in the dtype that is measured
    fastgpt   fastgpt.optim.newton_schulz, all matrices in one call
    matmul    the products of one step of torch's loop alone: X X^T, G G, P X

`relative` is the time over torch's, the median over the rounds. FLOP are counted (2 n m k for each product), and
pct_of_matmul is their rate as a share of matmul's. Unless --dtype says otherwise it is that of MuonAdamW: fp32 on
a CPU, bf16 on a GPU. No speed is shown if the error against fp64 is more than three times torch's.
--quick: tiny matrices, for trying this program.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import _muon
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.bench._harness import Samples, append_rows, provenance, turns, where
from fastgpt.bench._options import command_line, device_of
from fastgpt.core.command import number, run_command
from fastgpt.core.device import dtype_of
from fastgpt.data.tokenizer import available_cores
from fastgpt.optim.newton_schulz import EPS, STEPS, A, B, C, orthogonalise

WIDTH, LAYERS, TINY = 768, 12, 32
TORCH, FASTGPT, MATMUL = VARIANTS = "torch", "fastgpt", "matmul"
ALLOWED = 3.0  # times torch's error


class AsIs(Tensor):
    """A tensor that torch.optim.Muon's function, which asks for bf16, iterates in its own dtype."""

    def bfloat16(self, *args: Any, **options: Any) -> Tensor:
        return self.as_subclass(Tensor).clone()


def peer(matrix: Tensor) -> Tensor:
    """Return a matrix after torch.optim.Muon's own iteration, in the dtype of the matrix."""
    found: Tensor = _muon._zeropower_via_newtonschulz(matrix.as_subclass(AsIs), (A, B, C), len(STEPS), EPS)
    return found


def products(matrix: Tensor) -> Tensor:
    """Return the result of products as one step of the plain iteration has them."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    g = torch.mm(x, x.mT)
    return torch.mm(torch.mm(g, g), x)


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    """Return the shapes of the matrices of a GPT-2 of this width."""
    return layers * [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def random(sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return normal matrices."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def jobs(matrices: list[Tensor], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return what each variant does."""
    return {
        TORCH: lambda: [peer(m) for m in matrices],
        FASTGPT: lambda: orthogonalise(matrices, dtype),
        MATMUL: lambda: [products(m) for m in matrices],
    }


def flops(every: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Run each variant once; return the FLOP of its products."""
    found = {}
    for name, job in every.items():
        with FlopCounterMode(display=False) as counter:
            job()
        found[name] = counter.get_total_flops()
    return found


def red(sizes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> str:
    """Return which matrix has too large an error, as a norm; empty if none has."""
    for m, ours in zip(matrices := random(sizes, dtype, device), orthogonalise(matrices, dtype)):
        exact = peer(m.double())
        error, other = (float((out.double() - exact).norm()) for out in (ours, peer(m)))
        if not error <= ALLOWED * other:
            return f"{m.shape[0]} x {m.shape[1]}: error {error:.2e}, allowed {ALLOWED * other:.2e}"
    return ""


def measure(every: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, Samples]:
    """Return the seconds of each variant, one sample a round."""
    samples = {name: Samples() for name in VARIANTS}
    for turn in range(rounds):
        for name in turns(list(VARIANTS), turn):
            start = time.perf_counter()
            every[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples[name].seconds.append(time.perf_counter() - start)
    return samples


def rows_of(width: int, layers: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return one row per variant, or a single one with the reason if the result is wrong."""
    about: dict[str, Any] = {"bench": "muon", "phase": "orthogonalise", "shape": f"{layers}x{width}"}
    about |= {"dtype": str(dtype).split(".")[1], "machine": provenance(device)}
    if why := red(shapes(width, 1), dtype, device):
        return [{**about, "variant": FASTGPT, "red": why}]
    every = jobs(random(shapes(width, layers), dtype, device), dtype)
    counted = flops(every)  # and the round that is not timed
    samples = measure(every, device, rounds)
    rates = {name: counted[name] / mine.quantile(0.5) for name, mine in samples.items()}
    rows = []
    for name, mine in samples.items():
        row = {**about, "variant": name, **mine.figures(), "gflop": counted[name] / 1e9}
        row |= {"tflop_s": rates[name] / 1e12, "pct_of_matmul": 100 * rates[name] / rates[MATMUL]}
        rows.append(row | (mine.against(samples[TORCH], TORCH) if name == FASTGPT else {}))
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return a line for each variant."""
    lines = []
    for r in rows:
        if "red" in r:
            lines.append(f"{r['variant']:<10}RED, no speed is shown: {r['red']}")
            continue
        share = f", torch / fastgpt {1 / r['relative']:.2f}" if "relative" in r else ""
        rate = f"{r['tflop_s']:.4f} TFLOP/s, {r['pct_of_matmul']:.0f} % of matmul's"
        lines.append(f"{r['variant']:<10}{r['ms']:>10.1f} ms{r['gflop']:>10.1f} GFLOP  {rate}{share}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if the result was red."""
    parser = command_line("muon", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of the iteration")
    parser.add_argument("--layers", type=number(int, 1), default=LAYERS, help=f"default: {LAYERS}")
    parser.add_argument("--rounds", type=number(int, 1), default=7, help="default: 7")
    parser.add_argument("--threads", type=number(int, 1), default=available_cores(), help="default: all cores")
    parser.add_argument("--quick", action="store_true", help="tiny matrices, for trying this program")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = device_of(parser, args.device)
    rows = rows_of(TINY if args.quick else WIDTH, args.layers, dtype_of(args.dtype, device.type), device, args.rounds)
    print(f"muon, {rows[0]['shape']}, {rows[0]['dtype']}, {where(rows[0]['machine'])}")
    print(show(rows))
    if args.json:
        append_rows(args.json, rows)
    return int("red" in rows[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
