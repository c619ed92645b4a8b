"""The host's cost, with or without a GPU: `python -m fastgpt.bench.host [--figure call] [--op rope] [--json FILE]`.

call      microseconds of one op call at a shape whose maths is negligible: fastgpt, PyTorch, the installed libraries,
          and as the floor torch.empty for each output (no_grad) or an autograd.Function that does only that (forward,
          both: forward and backward). times_floor is the ratio of the medians; fastgpt's should stay under 2. The
          host does not wait for a GPU. Liger-Kernel's functions launch Triton kernels, so they have a figure only
          with a GPU.
step      the launches of one eager training step, the trainer against plain PyTorch: on a GPU its kernels, copies and
          fills from torch.profiler; on a CPU what a GPU would launch, counted as `fastgpt bench launches` does.
import    a new process each time: import torch, fastgpt, fastgpt.ops; and the number of modules loaded.
compile   a new process with empty caches: the first training step under torch.compile at one layer of `small`, and
          each Triton file's first configuration for sm_90.
build     only on request (--build): setup.py bdist_wheel of the checkout, the wheel's size and its installation;
          --wheel FILE measures an existing one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.bench import OPS, launches, variants
from fastgpt.bench._harness import (
    Job,
    Samples,
    Setting,
    append_rows,
    provenance,
    time_cpu,
    where,
)
from fastgpt.bench._op import Bench, Provider, bench_of, chosen, gate, providers
from fastgpt.bench._options import command_line, device_of
from fastgpt.bench.roofline import device_events
from fastgpt.core.command import number, run_command
from fastgpt.core.device import DTYPES, dtype_of

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ("call", "step", "import", "compile")
FLOOR = "floor"
PHASES = ("no_grad", "forward", "both")
IMPORTS = ("torch", "fastgpt", "fastgpt.ops")
IMPORT_ROUNDS = 3
LIMIT = 120  # seconds for one new process


class Nothing(torch.autograd.Function):
    """An op's tensors without its maths: uninitialised outputs, uninitialised gradients."""

    @staticmethod
    def forward(ctx: Any, like: list[Tensor], *arguments: Any) -> Any:
        ctx.save_for_backward(*(a for a, need in zip(arguments, ctx.needs_input_grad[1:]) if need))
        return nothing(like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        return None, *(torch.empty_like(next(saved)) if need else None for need in ctx.needs_input_grad[1:])


def nothing(like: list[Tensor]) -> Any:
    """Return uninitialised tensors like these; a single one without a tuple."""
    made = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]
    return tuple(made) if len(made) > 1 else made[0]


def floor(bench: Bench, setting: Setting, phase: str) -> Provider:
    """Return a provider of the least that a call with this op's inputs and outputs costs."""
    ours = Provider("torch", bench.public, "torch")
    with chosen(bench.op, ours):
        out = bench.job(ours, setting, "forward", 1).run()
    like = [t.detach() for t in (out if isinstance(out, tuple) else (out,))]
    if phase == "no_grad":
        return Provider(FLOOR, lambda *arguments, **options: nothing(like))
    return Provider(FLOOR, lambda *arguments, **options: Nothing.apply(like, *arguments, *options.values()))


def phases_of(bench: Bench) -> tuple[str, ...]:
    """Return the phases of `call` for an op: those of PHASES that it has, or its own."""
    if "both" in bench.phases:
        return PHASES
    return PHASES[:1] if "forward" in bench.phases else bench.phases


def call_rows(bench: Bench, dtype: torch.dtype, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Return one row per phase and provider, from `seconds` of interleaved samples per phase."""
    setting = Setting(bench.tiny, dtype, device)
    found = providers(bench, setting)
    red = {p.name: why for p in found if p.backend and (why := gate(bench, p, setting))}
    red |= without_a_device(bench, setting)
    return [row for phase in phases_of(bench) for row in _call_phase(bench, setting, phase, found, seconds, red)]


def without_a_device(bench: Bench, setting: Setting) -> dict[str, str]:
    """Return the installed libraries with a baseline of this op; none of them has a figure on a CPU."""
    if setting.device.type == "cuda":
        return {}
    there = bench.others(dataclasses.replace(setting, device=torch.device("cuda")))
    return {p.name: "its kernels need a CUDA device" for p in there if p.package}


def _call_phase(
    bench: Bench, setting: Setting, phase: str, found: list[Provider], seconds: float, red: dict[str, str]
) -> list[dict[str, Any]]:
    timed = "forward" if phase == "no_grad" else phase
    here = {p.name: p for p in found if timed in p.phases}
    if phase in PHASES:
        here[FLOOR] = floor(bench, setting, phase)

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        if setting.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise a full queue would be timed
        with chosen(bench.op, here[name]), torch.set_grad_enabled(phase != "no_grad"):
            yield

    def jobs(p: Provider) -> list[Job]:
        return [bench.job(p, setting, timed, 1)]

    make = {p.name: functools.partial(jobs, p) for p in here.values() if p.name not in red}
    samples, errors = time_cpu(make, context, seconds)
    about: dict[str, Any] = {"bench": "host", "figure": "call", "op": bench.op, "phase": phase, "shape": bench.tiny}
    about |= {"dtype": str(setting.dtype).split(".")[1], "machine": provenance(setting.device)}
    rows = []
    for name in [*here, *(n for n in red if n not in here)]:
        row = {**about, "provider": name, "backend": here[name].backend if name in here else None}
        why = red.get(name) or errors.get(name)
        rows.append({**row, "red": why} if why else {**row, **_times(samples[name], samples.get(FLOOR))})
    return rows


def _times(samples: Samples, floor: Samples | None) -> dict[str, Any]:
    row: dict[str, Any] = samples.figures("us")
    if floor is None or samples is floor:
        return row if floor is None else row | {"times_floor": 1.0}
    return row | samples.against(floor, FLOOR) | {"times_floor": row["us"] / (floor.quantile(0.5) * 1e6)}


def step_rows(device: torch.device) -> list[dict[str, Any]]:
    """Return the launches of the second step of each variant (the first one allocates the optimizer's state)."""
    name = "gpt2-124m" if device.type == "cuda" else "small"
    shape = dataclasses.replace(variants.SHAPES[name], batch=1)
    cfg, data = variants.settings(shape, device), variants.batches(shape, device)
    rows = []
    for variant in ("torch", "fastgpt"):
        v = variants.build(variant, cfg, data)
        v.train(cfg, 1)
        row = {"bench": "host", "figure": "step", "provider": variant, "shape": name, "layers": shape.layers}
        if device.type == "cuda":
            row |= {"launches": len(device_events(lambda v=v: v.train(cfg, 1), device))}  # type: ignore[misc]
        else:
            with launches.Counted() as counted:
                v.train(cfg, 1)
            row |= {"launches": sum(launches.launches(counted.calls, tokens=shape.batch * shape.block))}
        rows.append({**row, "machine": provenance(device)})
    return rows


def fresh(code: str, **environment: str) -> Any:
    """Return the JSON that `code` prints last, in a new process: empty folder, empty caches, Triton not interpreted."""
    with tempfile.TemporaryDirectory(prefix="fastgpt-host-") as folder:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
        env |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it died"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


IMPORT = """
import json, sys, time
before, start = len(sys.modules), time.perf_counter()
import {module}
print(json.dumps([time.perf_counter() - start, len(sys.modules) - before]))
"""


def import_rows(device: torch.device, rounds: int = IMPORT_ROUNDS) -> list[dict[str, Any]]:
    """Return the seconds of `import X`, measured alternately, and times_floor: against torch, which each of them
    imports."""
    samples, modules = {name: Samples() for name in IMPORTS}, {}
    for _ in range(rounds):
        for name in IMPORTS:
            seconds, modules[name] = fresh(IMPORT.format(module=name))
            samples[name].seconds.append(seconds)
    rows = []
    for name, mine in samples.items():
        row: dict[str, Any] = {"bench": "host", "figure": "import", "provider": name, **mine.figures()}
        row["times_floor"] = row["ms"] / (samples["torch"].quantile(0.5) * 1e3)
        rows.append({**row, "modules": modules[name], "machine": provenance(device)})
    return rows


COMPILE = """
import dataclasses, json, time, torch
from fastgpt.bench import variants
shape = dataclasses.replace(variants.SHAPES["small"], layers=1)
cfg = variants.settings(shape, torch.device({device!r}))
v = variants.build({variant!r}, cfg, variants.batches(shape, torch.device({device!r})))
start = time.perf_counter()
v.train(cfg, 1)
print(json.dumps(time.perf_counter() - start))
"""
TRITON = """
import json, time
from fastgpt.checks import triton as triton_check
found = {}
for job in triton_check.jobs([90], False, quick=True):
    if job.module not in found:
        start = time.perf_counter()
        report = triton_check.compile_one(job)
        found[job.module] = time.perf_counter() - start if not report.error else report.error
print(json.dumps(found))
"""


def compile_rows(device: torch.device) -> list[dict[str, Any]]:
    """Return seconds with empty caches; whatever cannot compile here has a reason instead."""
    found: dict[str, Any] = {}
    for variant in ("torch", "fastgpt"):
        code = COMPILE.format(device=str(device), variant=f"{variant} compile")
        found[f"torch.compile {variant}"] = _said(lambda code=code: fresh(code))  # type: ignore[misc]
    kernels = _said(lambda: fresh(TRITON))
    found |= {f"triton {m}": s for m, s in kernels.items()} if isinstance(kernels, dict) else {"triton": kernels}
    about = {"bench": "host", "figure": "compile", "machine": provenance(device)}
    return [
        {**about, "provider": name, **({"red": s} if isinstance(s, str) else {"seconds": s})}
        for name, s in found.items()
    ]


def _said(measure: Callable[[], Any]) -> Any:
    try:
        return measure()
    except (RuntimeError, subprocess.TimeoutExpired) as e:  # the reason replaces the figure
        return f"{type(e).__name__}: {e}"


def build_wheel(folder: Path) -> tuple[float, Path]:
    """Return the seconds of building the checkout's wheel into `folder`, from scratch; and the wheel."""
    if not (ROOT / "setup.py").is_file():
        raise RuntimeError(f"{ROOT} is not a checkout of fastgpt")
    build = ["build", "--build-base", f"{folder}/build", "bdist_wheel", "--dist-dir", f"{folder}/dist"]
    seconds = _run([sys.executable, "setup.py", "-q", *build, "--bdist-dir", f"{folder}/wheel"], ROOT)
    return seconds, next((folder / "dist").glob("*.whl"))


def _run(command: list[str], folder: Path) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it died"])[-1])
    return time.perf_counter() - start


def install_rows(wheel: Path | None, device: torch.device) -> list[dict[str, Any]]:
    """Build (unless a wheel is given), return the wheel's size and the time to install it without dependencies."""
    about = {"bench": "host", "figure": "build", "machine": provenance(device)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fastgpt-host-") as name:
        folder = Path(name)
        try:
            if wheel is None:
                seconds, wheel = build_wheel(folder)
                rows.append({**about, "provider": "native build", "seconds": seconds})
            rows.append({**about, "provider": "wheel", "file": wheel.name, "mb": wheel.stat().st_size / 1e6})
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", f"{name}/site"]
            rows.append({**about, "provider": "install", "seconds": _run([*pip, str(wheel.resolve())], folder)})
        except (RuntimeError, OSError) as e:
            rows.append({**about, "provider": "build" if wheel is None else "wheel", "red": f"{type(e).__name__}: {e}"})
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """Return the rows as one table for each figure."""
    lines = []
    for r in rows:
        name = " ".join(str(r[key]) for key in ("op", "phase", "provider") if key in r)
        start = f"{r['figure']:<8}{name:<44}"
        if "red" in r:
            lines.append(f"{start}{'RED, no speed is shown' if r.get('backend') else 'not measured'}: {r['red']}")
            continue
        unit = next(u for u in ("us", "ms", "seconds", "mb", "launches") if u in r)
        figure = f"{r[unit]:>10,.0f}" if isinstance(r[unit], int) else f"{r[unit]:>10.2f}"
        spread = f" ({r[unit + '_q20']:.2f} .. {r[unit + '_q80']:.2f})" if unit + "_q20" in r else ""
        against = f"  {r['times_floor']:.2f} x {'torch' if unit == 'ms' else FLOOR}" if "times_floor" in r else ""
        lines.append(f"{start}{figure} {unit}{spread}{against}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Return 1 if a fastgpt provider was red."""
    parser = command_line("host", __doc__)
    parser.add_argument(
        "--figure", action="append", choices=FIGURES, help="figure to measure; may be repeated; default: all"
    )
    parser.add_argument("--op", action="append", choices=OPS, help="op to call; may be repeated; default: all")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the calls; default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--seconds", type=number(float, 0), default=0.2, help="seconds of samples per op and phase")
    parser.add_argument("--build", action="store_true", help="also build the wheel of the checkout and install it")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="also measure size and installation of this wheel")
    args = parser.parse_args(argv)
    device = device_of(parser, args.device)
    dtype = dtype_of(args.dtype or "auto", device.type)
    parts: list[Callable[[], list[dict[str, Any]]]] = []
    figures = args.figure or ([] if args.build or args.wheel else FIGURES)
    if "call" in figures:
        parts += [functools.partial(call_rows, bench_of(op), dtype, device, args.seconds) for op in args.op or OPS]
    others = {"step": step_rows, "import": import_rows, "compile": compile_rows}
    parts += [functools.partial(others[name], device) for name in figures if name != "call"]
    if args.build or args.wheel:
        parts.append(functools.partial(install_rows, None if args.build else args.wheel, device))
    print(f"host costs on {where(provenance(device))}")
    status = 0
    for part in parts:
        rows = part()
        print(show(rows), flush=True)
        if args.json:
            append_rows(args.json, rows)
        status |= any("red" in r and r.get("backend") for r in rows)
    return status


if __name__ == "__main__":
    sys.exit(run_command(main))
