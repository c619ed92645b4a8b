"""A training step as a list of kernels with their modelled times: recorded on the meta device, bounded for a chip."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.bench.model import library
from fastgpt.bench.model.bound import bound
from fastgpt.bench.model.chips import CHIPS, Chip
from fastgpt.bench.model.cuda_launches import Planner, build
from fastgpt.bench.model.instances import Instances
from fastgpt.bench.model.launch import Bound, Launch
from fastgpt.bench.model.recording import META, AnyLaunch, Call, Device, Recorder, as_if_on
from fastgpt.bench.model.traffic import Work, describe, work_of
from fastgpt.bench.model.triton_launches import TritonLaunch
from fastgpt.bench.variants import GPU_SHAPES, settings, train_step
from fastgpt.checks.cuda import ToolMissing
from fastgpt.core import backend
from fastgpt.core.errors import UserError
from fastgpt.models.config import ModelConfig
from fastgpt.training.build import build_model, build_optimizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.stability import SpikeGuard

ROOT = Path(fastgpt.__file__).resolve().parents[1]  # of the checkout whose kernels are modelled (--source)
DEVICES = {
    "A100": Device("NVIDIA A100-SXM4-80GB", 8, 0, 108, 80 * 10**9, 163 << 10, 40 << 20),
    "H100": Device("NVIDIA H100 80GB HBM3", 9, 0, 132, 80 * 10**9, 227 << 10, 50 << 20),
    "H200": Device("NVIDIA H200", 9, 0, 132, 141 * 10**9, 227 << 10, 50 << 20),
}
# The shape of Llama 3.2 1B (tied head), 8 sequences of 2,048 tokens.
LLAMA_1B = ModelConfig(
    n_layers=16, n_heads=32, n_kv_heads=8, width=2048, mlp_width=8192, vocab_size=128256, block_size=2048,
    norm="rms", activation="swiglu", positions="rope", rope_theta=5e5, qkv_bias=False, proj_bias=False, mlp_bias=False,
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """A training step on a chip: the model's name, its settings, the backends that were chosen by op ("auto": the
    prior of the chip)."""

    model: str
    cfg: TrainConfig
    chip: Chip
    kernels: dict[str, str]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.cfg.batch_tokens


def config_of(
    model: str, batch: int | None, length: int | None, layers: int | None = None, **settings_: Any
) -> TrainConfig:
    """Return the settings of a step of one micro-batch in bf16; batch and length default to those of the model.

    settings_: further fields of TrainConfig.
    """
    if model == "gpt2-124m":
        cfg = settings(GPU_SHAPES[model], META)
    else:
        cfg = TrainConfig(model=LLAMA_1B, device="meta", block_size=2048, micro_batch=8, batch_tokens=8 * 2048)
    batch, length = batch or cfg.sequences, length or cfg.block_size
    shape = cfg.model if length <= (cfg.model.block_size or 0) else dataclasses.replace(cfg.model, block_size=length)
    shape = shape if layers is None else dataclasses.replace(shape, n_layers=layers)
    sizes: dict[str, Any] = dict(block_size=length, micro_batch=batch, batch_tokens=batch * length, max_steps=1000)
    return dataclasses.replace(cfg, model=shape, dtype="bf16", **sizes | settings_)


def chosen(kernels: dict[str, str]) -> dict[str, str]:
    """Return a backend for every op: the user's, or the first of the prior order on this chip that has the op.

    Raises:
        UserError: an op has no kernel of the backend that was named for it.
    """
    found = {}
    for op, cells in backend.ops().items():
        if kernels.get(op, "auto") not in (*cells, "auto"):
            raise UserError(f"model: {op}={kernels[op]}: expected one of {', '.join(cells)}")
        order = [b for b in backend.prior(op, "cuda", torch.bfloat16) if b in cells and b != "cpu"]
        found[op] = kernels.get(op, kernels.get("all", "auto"))
        if found[op] not in cells:
            found[op] = order[0]
    return found


def record(step: Step, planner: Planner | None) -> list[Call]:
    """Return the operators of the step, in order. It is the second step: the first makes the optimizer's state."""
    assert step.cfg.model.vocab_size is not None
    recorder = Recorder(None)
    ids = torch.empty((step.cfg.sequences, step.cfg.block_size), dtype=torch.int64, device=META)
    with as_if_on(DEVICES[step.chip.name], recorder), backend.use(strict=True, **chosen(step.kernels)):
        with META:
            model = build_model(step.cfg, step.cfg.model.vocab_size, META)
        optimizer, guard = build_optimizer(step.cfg, model), SpikeGuard(step.cfg.spike_sigmas, META)
        loader = itertools.repeat((ids, ids))
        with recorder:
            train_step(model, optimizer, loader, step.cfg.accumulation, guard)
            recorder.calls.clear()
            recorder.planner = planner
            train_step(model, optimizer, loader, step.cfg.accumulation, guard)
    return recorder.calls


class Modeller:
    """Bounds for the kernels of one chip. Where the CUDA kernels cannot be built, `missing` says why, and their time is
    that of their bytes alone. Without `host` they are not built, and `rows` cannot plan their launches."""

    def __init__(self, chip: Chip, root: Path = ROOT, host: bool = True) -> None:
        self.chip, self.device, self.root = chip, DEVICES[chip.name], root
        self.instances = Instances(root / "csrc", chip.capability)
        self.missing = ""
        self.planner: Planner | None = None
        if not host:
            return
        try:
            self.planner = Planner(build(root), chip.multiprocessors)
        except (ToolMissing, OSError) as e:
            self.missing = str(e)

    def rows(self, calls: list[Call]) -> list[Row]:
        """Return a row for each different kernel of these calls, with how often it is launched."""
        self._compile(calls)
        found: dict[Any, Row] = {}
        for call in calls:
            for key, make in self._kernels(call):
                if key not in found:
                    found[key] = {**make(), "count": 0}
                found[key]["count"] += 1
        return [{**row, "ms": row["us"] * row["count"] / 1e3} for row in found.values()]

    def _compile(self, calls: list[Call]) -> None:
        ops = {backend.raw_ops[c.name] for c in calls if any(not isinstance(x, TritonLaunch) for x in c.launches)}
        try:
            self.instances.prepare(ops)
        except (ToolMissing, RuntimeError) as e:
            self.missing = self.missing or str(e)

    def _kernels(self, call: Call) -> Any:
        """Yield (key, function that makes the row) for each kernel of a call."""
        if not call.own:
            sizes = tuple(part.shape for part in (*call.read.values(), *call.written.values()))
            key = (call.name, sizes if library.kind(call) != "memory" else call.bytes_read + call.bytes_written)
            for number in range(library.launches(call.name)):
                yield (key, number > 0), lambda: self._of_library(call)
            return
        for name in call.also:
            for _ in range(library.launches(name)):
                yield (call.name, name), lambda name=name: self._beside(call, name)
        if not call.launches:
            yield (call.name, call.bytes_read), lambda: self._by_bytes(call)
        for launch in call.launches:
            work = work_of(call, launch)
            what = launch.instance if isinstance(launch, TritonLaunch) else launch
            yield (what, launch.grid, work), lambda launch=launch, work=work: self.of_kernel(call, launch, work)

    def _of_library(self, call: Call) -> Row:
        each = library.seconds(call, self.chip) / library.launches(call.name)
        row = self._row(call, call.name, library.kind(call), each)
        if library.kind(call) == "product":
            shapes = [part.shape for part in call.read.values() if len(part.shape) == 2][-2:]
            row["variant"] = " x ".join("x".join(map(str, shape)) for shape in shapes)
        flop = library.attention_flop(call) if library.is_attention(call) else call.flop
        return row | {"gb": (call.bytes_read + call.bytes_written) / 1e9, "tflop": flop / 1e12}

    def _beside(self, call: Call, name: str) -> Row:
        """An operator of PyTorch that a raw op calls on its index tensors."""
        return self._row(call, name, "memory", library.LEAST)

    def _by_bytes(self, call: Call) -> Row:
        moved = call.bytes_read + call.bytes_written
        each = max(moved / (self.chip.dram * library.DRAM_SHARE), library.LEAST)
        return self._row(call, call.name, "own", each) | {"limit": "bytes alone", "gb": moved / 1e9}

    def of_kernel(self, call: Call, launch: AnyLaunch, work: Work) -> Row:
        """Return the row of one launch."""
        gb = (work.read + work.written) / 1e9
        row = self._row(call, launch.name, "own", 0.0) | describe(launch) | {"gb": gb, "tflop": work.flop / 1e12}
        row["l2_gb"] = work.l2 / 1e9
        try:
            sizes = self._launch(call, launch, work)
            found = bound(sizes, self.chip)
            at_a_time = min(launch.blocks, found.blocks_per_multiprocessor * self.chip.multiprocessors)
            if at_a_time * work.held > self.device.L2_cache_size:
                found = bound(dataclasses.replace(sizes, dram_read=work.read + work.again), self.chip)
                row["gb"] += work.again / 1e9
        except (KeyError, ToolMissing, ValueError):  # not compiled, or it does not fit on this chip
            each = max(gb * 1e9 / (self.chip.dram * library.DRAM_SHARE), library.LEAST)
            return row | {"us": each * 1e6, "limit": "bytes alone"}
        warps = launch.blocks * math.ceil(row["threads"] / 32)
        row |= figures(found) | {"instructions": warps * sum(found.instructions.values())}
        slowest = 1e6 * library.product_seconds(work.flop, self.chip) if work.product else 0.0
        return row | ({"us": slowest, "limit": "tensor"} if slowest > row["us"] else {})

    def _launch(self, call: Call, launch: AnyLaunch, work: Work) -> Launch:
        if isinstance(launch, TritonLaunch):
            code, shared = self.instances.triton(launch)
            threads = code.threads or 32 * launch.options.get("num_warps", 4)
        else:
            code, shared = self.instances.cuda(backend.raw_ops[call.name], launch), launch.shared
            threads = launch.block[0] * launch.block[1] * launch.block[2]
        return Launch(
            kernel=launch.name,
            code=code,
            grid=launch.blocks,
            threads=threads,
            dynamic_shared=shared,
            dram_read=work.read,
            dram_written=work.written,
            l2_read=work.l2,
            tensor_flop=work.flop,
            slowest=work.slowest,
            masked=work.masked,
        )

    def _row(self, call: Call, kernel: str, kind: str, seconds: float) -> Row:
        name = backend.raw_ops.get(call.name, call.name)
        about = {"op": name, "kernel": kernel, "variant": "", "class": kind, "us": seconds * 1e6}
        limit = {"product": "tensor", "attention": "tensor"}.get(kind, "dram")
        return about | {"attention": library.is_attention(call), "limit": limit, "gb": 0.0, "tflop": 0.0}


def seconds_of(found: Bound) -> float:
    """Return the time of a bound, with the share of the memory's rate that a copy reaches and the shortest kernel."""
    share = {"dram": library.DRAM_SHARE}
    return max(library.LEAST, *(seconds / share.get(unit, 1.0) for unit, seconds in found.seconds.items()))


def figures(found: Bound) -> Row:
    """Return a bound as the cells of a row."""
    row: Row = {"us": seconds_of(found) * 1e6, "limit": found.limit, "waves": found.waves, "tail": found.tail}
    row |= {"blocks_per_sm": found.blocks_per_multiprocessor, "occupancy_pct": 100 * found.occupancy}
    row |= {"occupancy_limit": found.occupancy_limit, "serial": found.serial, "conflicts": found.conflicts}
    row |= {"lines": found.lines, "unknown": found.unknown, "bytes_in_flight": found.bytes_in_flight}
    return row | {"units_us": {unit: seconds * 1e6 for unit, seconds in found.seconds.items() if seconds}}


def total(rows: list[Row], step: Step) -> Row:
    """Return the sums of a step: ms by class, launches, gaps, tokens/s; once more without attention."""
    by_class: dict[str, float] = {}
    for row in rows:
        kind = "attention" if row["attention"] else row["class"]
        by_class[kind] = by_class.get(kind, 0.0) + row["ms"]
    count = sum(row["count"] for row in rows)
    of_attention = sum(row["count"] for row in rows if row["attention"])
    gaps = 1e3 * library.GAP * count
    ms = sum(by_class.values()) + gaps
    without = ms - by_class.get("attention", 0.0) - 1e3 * library.GAP * of_attention
    about = {"figure": "step", "tokens": step.tokens, "launches": count, "gaps_ms": gaps, "ms": ms}
    about |= {f"{kind}_ms": value for kind, value in sorted(by_class.items())}
    return about | {"ms_without_attention": without, "tokens_per_s": step.tokens / ms * 1e3}


def chip_named(name: str) -> Chip:
    """Return a chip of the model."""
    return CHIPS[name]
