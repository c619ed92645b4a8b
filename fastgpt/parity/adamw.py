"""Parity of the AdamW step: parameters, masters and moments after a few steps. There is no backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastgpt.ops.adamw import join_remainder
from fastgpt.optim import AdamW
from fastgpt.parity.inputs import Inputs
from fastgpt.parity.rule import Case, Outputs, Subject, Variant


class TorchAdamW(torch.optim.AdamW):
    """Baseline: clip, torch.optim.AdamW on fp32 masters, moments rounded where fastgpt stores 16 bits."""

    def __init__(self, groups: Any, max_norm: float | None = None, moment_dtype: torch.dtype = torch.float32, **_: Any):
        super().__init__(groups)
        self.max_norm, self.moment_dtype = max_norm, moment_dtype

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        params = [p for g in self.param_groups for p in g["params"]]
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self.max_norm)
        super().step()
        for p in params:
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[p][name] = self.state[p][name].to(self.moment_dtype).to(p.dtype)


def run_adamw(case: Case, make: Callable[..., torch.optim.Optimizer], inputs: Inputs) -> Outputs:
    """Step the optimizer that `make(groups, **settings)` returns, and return parameters, masters and moments."""
    settings = dict(case.options)
    masters = make is TorchAdamW and settings.get("master", "fp32") is not None
    params = [inputs.tensor(shape, case.dtype, written=True) for shape in (case.shape, (7,), (3, 5))]
    params = [torch.nn.Parameter(p.float() if masters else p) for p in params]
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3}]
    steps = settings.pop("steps", 4)
    optimizer = make(groups, **settings)
    for _ in range(steps):
        for p in params:
            grad = inputs.grad(tuple(p.shape), case.dtype).to(p.dtype)
            p.grad = grad.clone() if make is TorchAdamW else grad  # clip_grad_norm_ writes to it
        optimizer.step()
    out: Outputs = {}
    for i, p in enumerate(params):
        state, value = optimizer.state[p], p.detach()
        master = state.get("master", value)
        out[f"master{i}"] = join_remainder(value, master) if master.dtype == torch.int16 else master
        out[f"param{i}"] = value if inputs.wide else value.to(case.dtype)
        out[f"exp_avg{i}"], out[f"exp_avg_sq{i}"] = state["exp_avg"], state["exp_avg_sq"]
    return out


def _bases(dtype: torch.dtype) -> Iterator[Variant]:
    clip, narrow = {"max_norm": 0.5}, {"moment_dtype": torch.bfloat16}
    own: list[dict[str, Any]] = [{"master": "remainder"}, {"master": None}] if dtype == torch.bfloat16 else []
    for master in ({}, *own):  # in fp16 the baseline without masters is NaN
        for o in ({}, clip, narrow, clip | narrow):
            yield (3, 11, 17), {**master, **o, "steps": 2}


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    yield (33, 17), {"max_norm": 0.5}
    yield (33, 17), {"max_norm": 1e9, "moment_dtype": torch.bfloat16}
    yield (70001,), {"max_norm": 1.0, "steps": 2}
    yield (1,), {"max_norm": 0.5}
    yield (0,), {}


_LAYOUTS = ("contiguous", "transposed", "permuted", "misaligned")  # parameters and their state are dense
SUBJECT = Subject(run_adamw, AdamW, TorchAdamW, AdamW, _bases, _variants, _LAYOUTS)
