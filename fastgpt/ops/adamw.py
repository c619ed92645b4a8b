"""AdamW over many tensors (Loshchilov, Hutter 2019, arXiv:1711.05101), clipping and write-back included.

    g = grad / grad_scale * min(1, max_norm / (norm + 1e-6))          norm over all gradients
    p = p (1 - lr wd);  m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

Two launches cover all tensors: `adamw_prepare` (step counters, sums of squares) and `adamw_update`. The host never
waits. If the norm is not finite or found_inf is set, nothing changes and the step counters are restored. 16-bit
parameters keep their low bits in `masters`: fp32 copies, or int16 remainders (fp32 bits = bf16 bits << 16, plus the
remainder). A parameter that is not the rounding of its fp32 copy was set from outside; the copy then takes its value
before the update. Use it through `fastgpt.optim.AdamW`.

Saved for backward: nothing; an optimizer step has no backward.

Determinism: bitwise. The norm adds partial sums in a fixed order; stochastic rounding draws from its seed.

Limits: dense, floating-point tensors on one device. No amsgrad, maximize or differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import Cell, register
from fastgpt.ops._common import define, no_outputs, relative_error

PARTIALS = 2048  # slots of a bucket for partial sums of squares; slots that a backend does not use stay 0


ADAMW_PREPARE = define(
    "adamw",
    "adamw_prepare",
    "(Tensor[] grads, Tensor(a!) steps, int[] index, Tensor(b!) partials, int offset, bool norm) -> ()",
    no_outputs,
)
ADAMW_UPDATE = define(
    "adamw",
    "adamw_update",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters, "
    "Tensor(e!) steps, int[] index, int[] group, Tensor lr, float[] beta1, float[] beta2, float[] eps, "
    "float[] weight_decay, Tensor partials, float max_norm, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(f!) grad_norm, bool stochastic, int seed) -> ()",
    no_outputs,
)


@dataclass
class Bucket:
    """Tensors of one param dtype, grad dtype and device, updated together. The lists are parallel."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]  # empty: none
    index: list[int]  # slot in the step counters
    group: list[int]  # parameter group
    groups: tuple[Any, ...] = ()  # process groups over which the tensors are sharded


def join_remainder(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 master that a bf16 parameter and an int16 remainder represent."""
    # no master splits into a zero and a negative remainder: the zero was set from outside, and the sum would be NaN
    low = torch.where(param == 0, remainder.clamp(min=0), remainder).to(torch.int32)
    return ((param.view(torch.int16).to(torch.int32) << 16) + low).view(torch.float32)


def follow_param(param: Tensor, master: Tensor) -> Tensor:
    """Return the fp32 master where param is its rounding, and elsewhere param, which was set from outside."""
    return torch.where(master.to(param.dtype) == param, master, param.to(master.dtype))


def split_remainder(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Write fp32 `master` as a bf16 parameter (rounded to nearest) and an int16 remainder."""
    bits = torch.where(master.isnan(), torch.nan, master).view(torch.int32)  # a NaN that rounding keeps NaN
    high = (bits + 0x8000) >> 16
    param.copy_(high.to(torch.int16).view(torch.bfloat16))
    remainder.copy_((bits - (high << 16)).to(torch.int16))


def _stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) >> 16).to(torch.int16).view(torch.bfloat16)


def grad_norm_ref(buckets: list[Bucket], grad_scale: Tensor | None) -> Tensor:
    """Return the norm over all gradients of all buckets, (1,) fp32."""
    squares = [g.float().square().sum() for b in buckets for g in b.grads]
    norm = torch.stack(squares).sum().sqrt().reshape(1)
    return norm if grad_scale is None else norm / grad_scale


def adamw_ref(
    bucket: Bucket,
    steps: Tensor,
    lr: Tensor,
    groups: list[dict[str, float]],
    norm: Tensor | None,
    max_norm: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    stochastic: bool,
    seed: int,
) -> None:
    """Apply the formula at the head of this file tensor by tensor, in fp32 (fp64 for fp64 parameters): the `torch`
    backend.

    `groups` holds beta1, beta2, eps and weight_decay. The counters in `steps` are advanced. Without `norm`, nothing is
    clipped.
    """
    if (found_inf is not None and bool(found_inf)) or (norm is not None and not bool(torch.isfinite(norm))):
        return
    factor = torch.ones(1, device=lr.device, dtype=torch.float32)
    factor = factor if norm is None or max_norm <= 0 else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factor = factor if grad_scale is None else factor / grad_scale
    for i, param in enumerate(bucket.params):
        g, m, v = bucket.grads[i], bucket.exp_avgs[i], bucket.exp_avg_sqs[i]
        master = bucket.masters[i] if bucket.masters else None
        wide = torch.promote_types(param.dtype, torch.float32)
        if master is None:
            p = param.to(wide)
        else:
            p = join_remainder(param, master) if master.dtype == torch.int16 else follow_param(param, master)
        h = groups[bucket.group[i]]
        steps[bucket.index[i]] += 1
        t = float(steps[bucket.index[i]])
        rate = lr[bucket.group[i]].to(wide)
        g = g.to(wide) * factor.to(wide)
        new_m = m.to(wide) + (1 - h["beta1"]) * (g - m.to(wide))
        new_v = h["beta2"] * v.to(wide) + (1 - h["beta2"]) * g * g
        denom = new_v.sqrt() / (1 - h["beta2"] ** t) ** 0.5 + h["eps"]
        p = p * (1 - rate * h["weight_decay"]) - rate / (1 - h["beta1"] ** t) * new_m / denom
        m.copy_(new_m)
        v.copy_(new_v)
        if master is None:
            generator = torch.Generator(p.device).manual_seed(hash((seed, t, bucket.index[i])) % (1 << 63))
            param.copy_(_stochastic_round(p, generator) if stochastic else p)
        elif master.dtype == torch.int16:
            split_remainder(p, param, master)
        else:
            master.copy_(p)
            param.copy_(p)


def _self_check(backend: str, device: torch.device) -> float:
    errors = [_error(backend, device, torch.float32)]
    if backend == "cuda":
        errors.append(_error(backend, device, torch.bfloat16))  # separate kernels, with fp32 masters
    return max(errors)


def _error(backend: str, device: torch.device, dtype: torch.dtype) -> float:
    params, grads = ([torch.randn(n, device=device).to(dtype) for n in (1300, 7)] for _ in range(2))
    moments = [[torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2)]
    masters = [p.float() for p in params] if dtype == torch.bfloat16 else []
    bucket = Bucket(params, grads, moments[0], moments[1], masters, [0, 1], [0, 0])
    wide = [[t.double() for t in tensors] for tensors in (params, grads, *moments)]
    steps, lr, norm = torch.zeros(2, device=device), torch.full((1,), 0.1, device=device), torch.zeros(1, device=device)
    partials = torch.zeros(PARTIALS, device=device)
    group = ([0.9], [0.999], [1e-8], [0.1])
    ADAMW_PREPARE[backend](grads, steps, bucket.index, partials, 0, True)
    tail = (*group, partials, 1.0, None, None, norm, False, 0)
    ADAMW_UPDATE[backend](params, grads, *moments, masters, steps, bucket.index, bucket.group, lr, *tail)
    exact = Bucket(wide[0], wide[1], wide[2], wide[3], [], [0, 1], [0, 0])
    exact_norm = torch.cat(wide[1]).norm().reshape(1)
    settings = dict(zip(("beta1", "beta2", "eps", "weight_decay"), (g[0] for g in group)))
    adamw_ref(exact, torch.zeros(2, device=device), lr, [settings], exact_norm, 1.0, None, None, False, 0)
    got = [*params, *masters, *moments[0], *moments[1], norm]
    wanted = [*exact.params, *exact.params[: len(masters)], *exact.exp_avgs, *exact.exp_avg_sqs, exact_norm]
    return relative_error(got, wanted)


register("adamw", _self_check, cuda=Cell(), triton=Cell(), cpu=Cell())
