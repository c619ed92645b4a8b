"""AdamW over all parameters at once: clip, unscale, decay, update, 16-bit write-back in two launches, no host sync."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import select
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

    DTensors (FSDP2): every process updates its own shards; the norm is summed over processes on the device.
    `foreach`, `fused` and `capturable` change nothing (it is fused and can be captured), `amsgrad`, `maximize` and
    `differentiable` are not supported. Groups may be added at any time. Pickle and deepcopy keep everything.
    Works with torch.amp.GradScaler (grad_scale and found_inf are used on the device). Raises ValueError for settings
    it does not support and for parameters with gaps or overlaps in memory, TypeError for sparse or complex ones.
    Source: arXiv:1711.05101.
    """

    _step_supports_amp_scaling = True
    # torch.amp.GradScaler's protocol, by which both are absent but in its steps
    grad_scale: Tensor | None  # divide gradients by this,
    found_inf: Tensor | None  # change nothing where this is not 0

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master: str | None = "fp32",
        max_norm: float | None = None,
        moment_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        _check_settings(master, max_norm, moment_dtype)
        flags = dict(maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable)
        # decoupled_weight_decay: PyTorch's optimizers tell by it that a saved group is AdamW's
        flags |= dict(amsgrad=amsgrad, fused=fused, decoupled_weight_decay=True)
        self.master, self.max_norm, self.moment_dtype, self.seed = master, max_norm, moment_dtype, seed
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **flags))
        self._number()
        self.grad_norm = torch.full((1,), torch.nan, device=self.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, before the first step or after any; it has the defaults of what it does not name.

        Raises:
            ValueError, TypeError: a setting or a parameter that the constructor would not take; nothing is added then.
        """
        super().add_param_group(param_group)
        try:
            _check_group(param_group)
            for p in param_group["params"]:
                _check_parameter(p, self.master)
            if hasattr(self, "_slots"):  # else the constructor numbers all groups
                self._number()
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def _number(self) -> None:
        """Give every parameter its slot in the step counters, which state["step"] are views of, and every group its
        learning rate on the device; steps that were taken are kept."""
        slots = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        devices = {p.device for p in slots}
        if len(devices) > 1:
            raise ValueError(f"AdamW: parameters are on {sorted(map(str, devices))}, expected one device")
        self._slots, self.device = slots, devices.pop()
        self._sharded = any(map(_is_sharded, slots))
        steps = torch.zeros(len(slots), device=self.device)
        for p, slot in slots.items():
            if p in self.state:
                self.state[p]["step"] = steps[slot].copy_(self.state[p]["step"])
        self._steps = steps
        self._lr = torch.zeros(len(self.param_groups), device=self.device)
        self._lr_floats: list[float | None] = []
        self._partials = torch.zeros(0, device=self.device)
        self._with_grad: list[tuple[int, ...]] = []

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy (torch's own keeps only its settings, state and groups)."""
        names = ("master", "max_norm", "moment_dtype", "seed", "grad_norm")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "master" in state:  # else load_state_dict, which fills in what there is
            self._number()

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
        scaling = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if backend == "torch":
            self._step_torch(buckets, *scaling)
        else:
            self._step_kernel(backend, buckets, *scaling)
        return loss

    def _step_kernel(
        self, backend: str, buckets: list[Bucket], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        clip = self.max_norm is not None
        with_grad = [tuple(b.index) for b in buckets]
        if clip and (with_grad != self._with_grad or self._sharded):  # other tensors leave other partial sums unused
            self._with_grad = with_grad
            self._partials = torch.zeros(PARTIALS * len(buckets), device=self.device)
        for i, b in enumerate(buckets):
            PREPARE[backend](b.grads, self._steps, b.index, self._partials, i * PARTIALS, clip)
            if clip and b.groups:
                _sum_over(b.groups, self._partials[i * PARTIALS : (i + 1) * PARTIALS])
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
            if self._sharded:
                norms = [_sum_over(b.groups, grad_norm_ref([b], grad_scale).square()) for b in buckets]
                norm = torch.stack(norms).sum(0).sqrt()
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
        """Parameters with a gradient, by (parameter dtype, gradient dtype, process groups); of DTensors the shards."""
        buckets: dict[tuple[Any, ...], Bucket] = {}
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                g = p.grad
                if g is None:
                    continue
                if g.layout is not torch.strided:
                    raise TypeError(f"AdamW: a gradient is {g.layout}, expected dense (sparse=False in the embedding)")
                state, slot, groups = self.state[p] or self._init_state(p), self._slots[p], ()
                if self._sharded and _is_sharded(p):
                    groups, p, g, state = _shard(p, g, state)
                if g.stride() != p.stride():
                    g = torch.empty_like(p, dtype=g.dtype).copy_(g)
                b = buckets.get((p.dtype, g.dtype, groups))
                if b is None:
                    b = buckets[(p.dtype, g.dtype, groups)] = Bucket([], [], [], [], [], [], [], groups)
                b.params.append(p)
                b.grads.append(g)
                b.exp_avgs.append(state["exp_avg"])
                b.exp_avg_sqs.append(state["exp_avg_sq"])
                if "master" in state:
                    b.masters.append(state["master"])
                b.index.append(slot)
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

        Raises:
            ValueError: a group with a setting that is not supported, or a tensor of another shape than its parameter's.
        """
        state: dict[int, dict[str, Any]] = {}
        numbers: list[int] = []

        def take(_: Any, content: dict[str, Any]) -> dict[str, Any]:  # behind other hooks: what they left
            for group in content["param_groups"]:
                _check_group(group)
                numbers.extend(group["params"])
            state.update(content["state"])
            return {**content, "state": {}}

        def fill(_: Any) -> None:  # before other hooks: they find the state there
            self._steps.zero_()
            for number, p in zip(numbers, self._slots, strict=True):
                if number in state:
                    self._load_state(p, state[number])

        hooks = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _load_state(self, p: Tensor, saved: dict[str, Any]) -> None:
        state = self._init_state(p)
        for name, value in saved.items():
            if name in state:
                if name != "step" and value.shape != p.shape:
                    raise ValueError(f"AdamW: saved {name} has shape {tuple(value.shape)}, expected {tuple(p.shape)}")
                state[name].copy_(torch.as_tensor(value))


def _is_dense(p: Tensor) -> bool:
    """Whether p's elements fill their memory, each at a place of its own."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(p.stride(), p.shape) if n != 1):
        if stride != size and p.numel():
            return False
        size *= n
    return True


def _is_sharded(p: Tensor) -> bool:
    """Whether p is a DTensor (whose import takes half a second)."""
    return hasattr(p, "to_local")


def _shard(p: Any, g: Any, state: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor, Tensor, dict[str, Any]]:
    """Process groups that DTensor p is sharded over, and this process's part of it, of its gradient and state."""
    groups = tuple(p.device_mesh.get_group(i) for i, place in enumerate(p.placements) if place.is_shard())
    g = g if g.placements == p.placements else g.redistribute(placements=p.placements)
    return groups, p.to_local(), g.to_local(), {n: t.to_local() if _is_sharded(t) else t for n, t in state.items()}


def _sum_over(groups: tuple[Any, ...], t: Tensor) -> Tensor:
    """t, summed in place over the processes of these groups."""
    for group in groups:
        torch.distributed.all_reduce(t, group=group)
    return t


def _check_parameter(p: Tensor, master: str | None) -> None:
    if not p.is_floating_point() or p.layout is not torch.strided:
        raise TypeError(f"AdamW: a parameter is {p.dtype} {p.layout}, expected dense floating point")
    if not _is_dense(p.to_local() if _is_sharded(p) else p):  # type: ignore[attr-defined]
        raise ValueError(
            f"AdamW: a parameter of shape {tuple(p.shape)} has strides {p.stride()}, expected elements without "
            "gaps or overlaps in memory, in any order of dimensions (call .contiguous() on a view first)"
        )
    if master in ("remainder", "stochastic") and p.dtype == torch.float16:
        raise ValueError(f"AdamW: master={master!r} is for bf16 parameters, came with torch.float16")


def _check_group(group: dict[str, Any]) -> None:
    """Settings of a parameter group, the constructor's own or loaded; what is left out is the default."""
    for flag in ("amsgrad", "maximize", "differentiable"):
        if group.get(flag):
            raise ValueError(f"AdamW: {flag}=True is not supported")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError("AdamW: decoupled_weight_decay is False (torch.optim.Adam's), expected AdamW's")
    lr, betas, eps, decay = (group[n] for n in ("lr", "betas", "eps", "weight_decay"))
    if not isinstance(lr, Tensor) and lr < 0:
        raise ValueError(f"AdamW: lr is {lr}, expected at least 0")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr has shape {tuple(lr.shape)}, expected one element")
    if any(isinstance(b, Tensor) for b in betas):
        raise ValueError("AdamW: betas are tensors, expected numbers")
    if not all(0.0 <= b < 1.0 for b in betas):
        raise ValueError(f"AdamW: betas are {betas}, expected 0 to less than 1")
    if eps < 0 or decay < 0:
        raise ValueError(f"AdamW: eps is {eps} and weight_decay {decay}, expected at least 0")


def _check_settings(master: str | None, max_norm: float | None, moment_dtype: torch.dtype) -> None:
    if master not in MASTERS:
        raise ValueError(f"AdamW: master is {master!r}, expected one of {MASTERS}")
    if max_norm is not None and max_norm <= 0:
        raise ValueError(f"AdamW: max_norm is {max_norm}, expected more than 0, or None")
    if moment_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"AdamW: moment_dtype is {moment_dtype}, expected torch.float32 or torch.bfloat16")
