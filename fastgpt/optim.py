"""AdamW over all parameters at once: clip, unscale, decay, update, 16-bit write-back in two launches, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt.backend import select
from fastgpt.ops._common import mark_mutated
from fastgpt.ops.adamw import PARTIALS, PREPARE, UPDATE, Bucket, adamw_ref, grad_norm_ref

MASTERS = ("fp32", "remainder", "stochastic", None)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's interface (names, order, defaults, state_dict) over fastgpt's fused update.

    Args:
        params: parameters or groups; fp32, bf16 or fp16, on one device. `lr` and `weight_decay` may differ by group.
        lr: float, or a 0-dim tensor on the parameters' device (read there, so that it can change inside a CUDA graph).
        betas, eps, weight_decay: as in torch.optim.AdamW (decoupled decay).
        master: how 16-bit parameters keep what 16 bits cannot: "fp32" copies, "remainder" (bf16 only: 16 low bits,
            the exact fp32 value for 2 bytes less), "stochastic" rounding (bf16 only, unbiased, from `seed`), or None.
        max_norm: clip the global gradient norm to this (torch.nn.utils.clip_grad_norm_'s formula), None: no clipping.
            A norm that is not finite skips the step on the device: parameters, moments and step counters stay.
        moment_dtype: torch.float32 or torch.bfloat16.

    Attributes:
        grad_norm: (1,) fp32 on the device: global norm of the last step before clipping (with max_norm only; NaN before
            the first step). Reading it waits for the device.

    Works with torch.amp.GradScaler (grad_scale and found_inf are used on the device). Raises ValueError for settings
    it does not support and for parameters with gaps or overlaps in memory, TypeError for sparse or complex ones.
    Source: arXiv:1711.05101.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None  # torch.amp.GradScaler's protocol: divide gradients by this,
    found_inf: Tensor | None = None  # change nothing where this is not 0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        master: str | None = "fp32",
        max_norm: float | None = None,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **flags: Any,
    ) -> None:
        for name, value in flags.items():
            if name not in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                raise TypeError(f"AdamW: there is no argument {name!r}")
            if value and name not in ("capturable", "fused"):  # these two it always is
                raise ValueError(f"AdamW: {name}={value!r} is not supported")
        _check_settings(lr, betas, eps, weight_decay, master, max_norm, moment_dtype)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.master, self.max_norm, self.moment_dtype, self.seed = master, max_norm, moment_dtype, seed
        self._slots = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        devices = {p.device for p in self._slots}
        if len(devices) > 1:
            raise ValueError(f"AdamW: parameters are on {sorted(map(str, devices))}, expected one device")
        if master in ("remainder", "stochastic") and any(p.dtype == torch.float16 for p in self._slots):
            raise ValueError(f"AdamW: master={master!r} is for bf16 parameters, came with torch.float16")
        self.device = devices.pop()
        self._steps = torch.zeros(len(self._slots), device=self.device)
        self._lr = torch.zeros(len(self.param_groups), device=self.device)
        self._lr_floats: list[float | None] = []
        self._partials = torch.zeros(0, device=self.device)
        self._with_grad: list[tuple[int, ...]] = []
        self.grad_norm = torch.full((1,), torch.nan, device=self.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_slots"):
            raise ValueError("AdamW: parameter groups cannot be added later, expected all of them at construction")
        super().add_param_group(param_group)
        for p in param_group["params"]:
            if not p.is_floating_point() or p.layout is not torch.strided:
                raise TypeError(f"AdamW: a parameter is {p.dtype} {p.layout}, expected dense floating point")
            if not _is_dense(p):
                raise ValueError(
                    f"AdamW: a parameter of shape {tuple(p.shape)} has strides {p.stride()}, expected elements without "
                    "gaps or overlaps in memory, in any order of dimensions (call .contiguous() on a view first)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets = self._buckets()
        if not buckets:
            return loss
        self.refresh_lr()
        backend = select("adamw", buckets[0].params[0])
        if backend == "torch":
            self._step_torch(buckets, self.grad_scale, self.found_inf)
        else:
            self._step_kernel(backend, buckets, self.grad_scale, self.found_inf)
        return loss

    def _step_kernel(
        self, backend: str, buckets: list[Bucket], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        clip = self.max_norm is not None
        with_grad = [tuple(b.index) for b in buckets]
        if clip and with_grad != self._with_grad:  # other tensors leave other partial sums unused
            self._with_grad = with_grad
            self._partials = torch.zeros(PARTIALS * len(buckets), device=self.device)
        for i, b in enumerate(buckets):
            PREPARE[backend](b.grads, self._steps, b.index, self._partials, i * PARTIALS, clip)
        beta1, beta2, eps, decay = zip(*((*g["betas"], g["eps"], g["weight_decay"]) for g in self.param_groups))
        for b in buckets:
            UPDATE[backend](
                b.params,
                b.grads,
                b.exp_avgs,
                b.exp_avg_sqs,
                b.masters,
                self._steps,
                b.index,
                b.group,
                self._lr,
                beta1,
                beta2,
                eps,
                decay,
                self._partials if clip else self._partials[:0],
                self.max_norm or 0.0,
                grad_scale,
                found_inf,
                self.grad_norm,
                self.master == "stochastic" and b.params[0].dtype == torch.bfloat16,
                self.seed,
            )
            mark_mutated(b.params)

    def _step_torch(self, buckets: list[Bucket], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        norm = None
        if self.max_norm is not None:
            norm = grad_norm_ref(buckets, grad_scale)
            self.grad_norm.copy_(norm)
        groups = [
            dict(beta1=g["betas"][0], beta2=g["betas"][1], eps=g["eps"], weight_decay=g["weight_decay"])
            for g in self.param_groups
        ]
        for b in buckets:
            stochastic = self.master == "stochastic" and b.params[0].dtype == torch.bfloat16
            adamw_ref(
                b,
                self._steps,
                self._lr,
                groups,
                norm,
                self.max_norm or 0.0,
                grad_scale,
                found_inf,
                stochastic,
                self.seed,
            )

    def _buckets(self) -> list[Bucket]:
        """Parameters with a gradient, by (parameter dtype, gradient dtype)."""
        buckets: dict[tuple[torch.dtype, torch.dtype], Bucket] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                state = self.state[p] or self._init_state(p)
                if g.stride() != p.stride():
                    g = torch.empty_like(p, dtype=g.dtype).copy_(g)
                b = buckets.get((p.dtype, g.dtype))
                if b is None:
                    b = buckets[(p.dtype, g.dtype)] = Bucket([], [], [], [], [], [], [])
                b.params.append(p)
                b.grads.append(g)
                b.exp_avgs.append(state["exp_avg"])
                b.exp_avg_sqs.append(state["exp_avg_sq"])
                if "master" in state:
                    b.masters.append(state["master"])
                b.index.append(self._slots[p])
                b.group.append(number)
        return list(buckets.values())

    def _init_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        state["step"] = self._steps[self._slots[p]]  # a view: the kernels count all steps in one tensor
        wide = torch.promote_types(p.dtype, self.moment_dtype) if p.dtype == torch.float64 else self.moment_dtype
        state["exp_avg"] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
        if p.dtype in (torch.bfloat16, torch.float16):
            if self.master == "fp32":
                state["master"] = p.detach().to(torch.float32, copy=True)
            elif self.master == "remainder":
                state["master"] = torch.zeros_like(p, dtype=torch.int16)
        return state

    def refresh_lr(self) -> None:
        """Bring the groups' learning rates to the device: floats only when they changed, tensors by a device copy.

        step() does it; call it before each replay of a CUDA graph that holds step().
        """
        rates = [g["lr"] for g in self.param_groups]
        floats = [None if isinstance(r, Tensor) else float(r) for r in rates]
        if floats != self._lr_floats:
            self._lr_floats = floats
            host = torch.tensor([0.0 if f is None else f for f in floats])
            self._lr.copy_(host.pin_memory() if self.device.type == "cuda" else host, non_blocking=True)
        for i, rate in enumerate(rates):
            if isinstance(rate, Tensor):
                self._lr[i].copy_(rate, non_blocking=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's state, or torch.optim.AdamW's. Dtypes of moments and masters are kept as saved here.

        (torch's own would cast fp32 moments of bf16 parameters to bf16.)
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        saved = [i for g in state_dict["param_groups"] for i in g["params"]]
        for number, p in zip(saved, self._slots):
            if number not in state_dict["state"]:
                continue
            state = self._init_state(p)
            for name, value in state_dict["state"][number].items():
                if name in state:
                    if name != "step" and value.shape != p.shape:
                        raise ValueError(
                            f"AdamW: saved {name} has shape {tuple(value.shape)}, expected {tuple(p.shape)}"
                        )
                    state[name].copy_(torch.as_tensor(value))


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon for matrices in the middle of a model, AdamW for all other parameters, as one optimizer.

    Args:
        groups: parameter groups; those with "muon": True hold matrices only.
        lr, weight_decay, momentum: as in torch.optim.Muon, whose update is scaled to the size of AdamW's
            ("match_rms_adamw"), so that one learning rate serves both.
        max_norm: clip the global gradient norm, of all parameters together, to this.
        settings: of fastgpt.optim.AdamW.

    Attributes:
        grad_norm: as AdamW's.

    Matrices of 16 bits have fp32 copies, whatever `master` says of the others. A step whose norm is not finite, or with
    found_inf, changes nothing; telling that waits for the device. Source: arXiv:2502.16982.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        max_norm: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(groups, dict(lr=lr, weight_decay=weight_decay))
        mine = [g for g in self.param_groups if g.get("muon")]
        others = [g for g in self.param_groups if not g.get("muon")]
        self.max_norm = max_norm
        self.adamw = AdamW([{**g} for g in others], lr=lr, weight_decay=weight_decay, **settings)
        self.matrices = [p for g in mine for p in g["params"]]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.matrices]
        of = dict(zip(self.matrices, self.masters, strict=True))
        wide = [{**g, "params": [of[p] for p in g["params"]]} for g in mine]
        self.muon = torch.optim.Muon(
            wide, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]  # the same dicts: a schedule sets both
        self.device, self.found_inf = self.adamw.device, None
        self.grad_norm = torch.full((1,), torch.nan, device=self.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter; returns closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        others = [p for g in self.adamw.param_groups for p in g["params"]]
        given = [p for p in (*self.matrices, *others) if p.grad is not None]
        self.grad_norm.copy_(torch.nn.utils.get_total_norm([p.grad for p in given if p.grad is not None]))
        skip = (
            ~self.grad_norm.isfinite() if self.found_inf is None else ~self.grad_norm.isfinite() | (self.found_inf != 0)
        )
        if bool(skip):
            return loss
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(given, self.max_norm, self.grad_norm[0])
        for p, master in zip(self.matrices, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.muon.step()
        self.adamw.step()
        for p, master in zip(self.matrices, self.masters, strict=True):
            if master is not p:
                p.copy_(master)
                master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)
        for p in self.matrices:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The matrices' state first (momentum_buffer, and master of 16-bit ones), then AdamW's, numbered on."""
        state: dict[int, dict[str, Any]] = {}
        for i, (p, master) in enumerate(zip(self.matrices, self.masters, strict=True)):
            state[i] = {**self.muon.state[master], **({} if master is p else {"master": master})}
        others = self.adamw.state_dict()
        state |= {i + len(self.matrices): s for i, s in others["state"].items()}
        return {"state": state, "param_groups": others["param_groups"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        n = len(self.matrices)
        others = {i - n: s for i, s in state_dict["state"].items() if i >= n}
        self.adamw.load_state_dict({"state": others, "param_groups": state_dict["param_groups"]})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        for i, master in enumerate(self.masters):
            saved = state_dict["state"].get(i, {})
            if "momentum_buffer" in saved:
                self.muon.state[master]["momentum_buffer"] = saved["momentum_buffer"].to(master, copy=True)
            if "master" in saved:
                master.copy_(saved["master"])


def _is_dense(p: Tensor) -> bool:
    """Whether p's elements fill their memory, each at a place of its own."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(p.stride(), p.shape) if n != 1):
        if stride != size and p.numel():
            return False
        size *= n
    return True


def _check_settings(
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    master: str | None,
    max_norm: float | None,
    moment_dtype: torch.dtype,
) -> None:
    if not isinstance(lr, Tensor) and lr < 0:
        raise ValueError(f"AdamW: lr is {lr}, expected at least 0")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr has shape {tuple(lr.shape)}, expected one element")
    if not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"AdamW: betas are {betas}, expected 0 to less than 1")
    if eps < 0 or weight_decay < 0:
        raise ValueError(f"AdamW: eps is {eps} and weight_decay {weight_decay}, expected at least 0")
    if master not in MASTERS:
        raise ValueError(f"AdamW: master is {master!r}, expected one of {MASTERS}")
    if max_norm is not None and max_norm <= 0:
        raise ValueError(f"AdamW: max_norm is {max_norm}, expected more than 0, or None")
    if moment_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"AdamW: moment_dtype is {moment_dtype}, expected torch.float32 or torch.bfloat16")
