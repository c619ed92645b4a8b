"""The command line of one op's benchmark: `fastgpt bench OP`, `python -m fastgpt.bench.OP`."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch

from fastgpt.bench import _ncu
from fastgpt.bench._harness import (
    Setting,
    append_rows,
    where,
)
from fastgpt.bench._op import Bench, Shape, measure, providers, show
from fastgpt.bench._options import command_line, device_of
from fastgpt.core import backend
from fastgpt.core.command import Parser, number
from fastgpt.core.device import DTYPES, dtype_of, keep_freed_memory


def options(bench: Bench) -> Parser:
    """Return the parser for one op's benchmark."""
    parser = command_line(bench.op, __doc__)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    shape_type = functools.partial(parse_shape, bench.dims)
    parser.add_argument(
        "--shape", action="append", metavar=bench.dims, type=shape_type, help="shape to time; may be repeated"
    )
    parser.add_argument(
        "--phase", action="append", choices=bench.phases, help="phase to time; may be repeated; default: all"
    )
    parser.add_argument("--compile", action="store_true", help="also time torch.compile of the baseline")
    parser.add_argument("--max-autotune", action="store_true", help="also time torch.compile in its mode max-autotune")
    parser.add_argument("--seconds", type=number(float, 0), default=2.0, help="seconds of samples per phase")
    parser.add_argument("--backend", help="time only this backend of fastgpt: cpu, cuda, triton")
    parser.add_argument(
        "--calls", type=number(int, 1), help="only call each backend of fastgpt this often, for a profiler"
    )
    parser.add_argument(
        "--ncu", action="store_true", help="print the command that profiles one kernel, without running it"
    )
    return parser


def main(bench: Bench, argv: list[str] | None = None) -> int:
    """Run `fastgpt bench OP` or `python -m fastgpt.bench.OP`; return 1 if a fastgpt provider was red."""
    parser = options(bench)
    args = parser.parse_args(argv)

    elsewhere = args.ncu and args.device.startswith("cuda")  # print a command to run on a machine with a GPU
    device = torch.device(args.device) if elsewhere else device_of(parser, args.device)
    if device.type == "cpu":
        keep_freed_memory()  # else every call, of any provider, would fault in the pages of a large output again
    dtype = dtype_of(args.dtype or "auto", device.type)
    modes = ("default",) * args.compile + ("max-autotune-no-cudagraphs",) * args.max_autotune  # graphs are ours
    status = 0
    for shape in args.shape or bench.shapes[device.type]:
        setting = Setting(shape, dtype, device)
        phases = args.phase or list(bench.phases)
        if args.ncu:
            print(_ncu.command(bench, setting, phases[0], args.backend))
            continue
        found = [p for p in providers(bench, setting, modes) if args.backend in (None, p.backend) or not p.backend]
        if args.calls:
            _ncu.call(bench, setting, phases, found, args.calls)
            continue
        rows = measure(bench, setting, phases, found, args.seconds)
        tell(bench, setting, rows)
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r and r["backend"] is not None for r in rows)
    return status


def tell(bench: Bench, setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Print the rows and the fastgpt backends that are missing."""
    print(f"{bench.op} {'x'.join(map(str, setting.shape))} {setting.dtype} on {where(rows[0]['machine'])}")
    print(show(rows))
    for b in backend.ops()[bench.op]:
        if backend.DEVICE_OF.get(b) == setting.device.type and (why := backend.missing(b)):
            print(f"not measured: {b}: {why}")


def parse_shape(dims: str, text: str) -> Shape:
    """Parse '8192x768' for dims NxC as (8192, 768)."""
    parts, wanted = text.split("x"), dims.split("x")
    if len(parts) != len(wanted) or not all(p.isdigit() and int(p) for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, expected {len(wanted)} numbers {dims}")
    return tuple(map(int, parts))
