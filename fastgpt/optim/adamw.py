"""AdamW over all parameters at once: clip, unscale, decay, update, 16-bit write-back in two launches, no host sync."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.backend import select
from fastgpt.ops._common import mark_mutated
from fastgpt.ops.adamw import ADAMW_PREPARE, ADAMW_UPDATE, PARTIALS, Bucket, adamw_ref, grad_norm_ref
from fastgpt.optim.state import (
    MOMENTS,
    Fitted,
    Rates,
    T,
    check_group,
    check_parameter,
    check_saved,
    check_settings,
    fit,
    is_sharded,
    load_uncast,
    loss_of,
    set_step,
    shard,
    still_fits,
    sum_over,
    write_master,
)

# PyTorch's methods without their wrapper, whose first call imports torch._dynamo: most of a second, and 50 MB for good
_add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
_zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with a fused update; arguments, defaults and state_dict are the same.

    Args:
        params: parameters or groups; fp32, bf16, fp16 or fp64, on one device. If one is fp64, the `torch` backend
            updates all of them. `lr` and `weight_decay` may differ by group.
        lr: a number, or a tensor of one element. A tensor on the device of the parameters is read there, so it can
            change inside a CUDA graph.
        betas, eps, weight_decay: as in torch.optim.AdamW (decoupled decay).
        master: how 16-bit parameters keep what 16 bits cannot hold: "fp32" copies, "remainder" (bf16 only: 16 low bits,
            the exact fp32 value in 2 bytes less), "stochastic" rounding (bf16 only, unbiased, from `seed`), or None.
        max_norm: clip the global gradient norm to this, by the formula of `torch.nn.utils.clip_grad_norm_`; None: do
            not clip. A norm that is not finite skips the step on the device: parameters, moments and step counters do
            not change.
        moment_dtype: torch.float32 or torch.bfloat16.
        seed: seed for stochastic rounding.

    Attributes:
        grad_norm: (1,) fp32 on the device: global norm of the last step before clipping (with max_norm only; NaN before
            the first step). Reading it waits for the device.

    Weights that you set between steps (a checkpoint, the best model, a merge) keep their value: fp32 masters follow a
    parameter that is no longer their rounding. A remainder cannot detect that; it adds at most half a unit in the last
    place of bf16. Cleared state is initialised again, step count included; replaced state is used as it is. Parameters
    may be cast, moved or replaced (`model.half()`, `p.data = ...`): their state is converted at the next step.

    With DTensors (FSDP2) every process updates its own shards, and the norm is summed over processes on the device.
    `foreach`, `fused` and `capturable` change nothing: the update is fused and can be captured. Groups may be added at
    any time. Pickle and deepcopy keep everything. torch.amp.GradScaler works: grad_scale and found_inf are read on the
    device.

    Raises:
        ValueError: a setting that is not supported (`amsgrad`, `maximize`, `differentiable`), or a parameter with gaps
            or overlaps in memory.
        TypeError: a sparse or complex parameter.

    Example:
        >>> import torch
        >>> from fastgpt.optim import AdamW
        >>> model = torch.nn.Linear(8, 4, dtype=torch.bfloat16)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, master="remainder", max_norm=1.0)
        >>> model(torch.randn(2, 8, dtype=torch.bfloat16)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm.shape
        torch.Size([1])

    Source: arXiv:1711.05101.
    """

    _step_supports_amp_scaling = True
    # by the protocol of torch.amp.GradScaler both exist only during its steps
    grad_scale: Tensor | None  # divides the gradients
    found_inf: Tensor | None  # if it is not 0, the step is skipped

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
        check_settings(master, max_norm, moment_dtype, seed)
        flags = dict(maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable)
        # by decoupled_weight_decay the optimizers of PyTorch recognise a saved group of AdamW
        flags |= dict(amsgrad=amsgrad, fused=fused, decoupled_weight_decay=True)
        self.master, self.max_norm, self.moment_dtype, self.seed = master, max_norm, moment_dtype, int(seed)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **flags))
        self._number()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group at any time; settings that it does not name have their defaults.

        Raises:
            ValueError, TypeError: a setting or a parameter that the constructor would reject; nothing is added then.
        """
        _add_param_group(self, param_group)
        try:
            check_group(param_group)
            for p in param_group["params"]:
                check_parameter(p, self.master)
            if hasattr(self, "_order"):  # else the constructor numbers all groups
                self._number()
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set every gradient to None, or to zeros."""
        _zero_grad(self, set_to_none)

    def _number(self) -> None:
        """Assign each parameter a slot in the step counters, of which state["step"] is a view, and each group a
        learning rate on the device. Existing step counts are kept."""
        order = [p for g in self.param_groups for p in g["params"]]
        devices = {p.device for p in order} or {torch.device("cpu")}
        if len(devices) > 1:
            raise ValueError(f"AdamW: parameters are on {sorted(map(str, devices))}, expected one device")
        self._order, self.device = order, devices.pop()
        self._device_number = (
            order[0].get_device() if order else -1
        )  # compared for each parameter in each step, so it must be fast
        self._sharded = any(map(is_sharded, order))
        fp32: dict[str, Any] = dict(
            dtype=torch.float32, device=self.device
        )  # independent of the default dtype and device
        self._steps = torch.zeros(len(order), **fp32)
        self._places = [self._steps[slot] for slot in range(len(order))]  # views
        for slot, p in enumerate(order):
            if state := self.state.get(p):
                set_step(self._places[slot], state)
        self._fitted: list[Fitted | None] = [None] * len(order)
        self._fitted_for = self.master, self.moment_dtype
        self._rates = Rates(len(self.param_groups), self.device)
        self._lr = self._rates.values
        self._partials = torch.zeros(0, **fp32)
        self._with_grad: list[tuple[int, ...]] = []
        self.grad_norm = getattr(self, "grad_norm", torch.full((1,), torch.nan, **fp32)).to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy (torch.optim.Optimizer keeps only defaults, state and groups)."""
        names = ("master", "max_norm", "moment_dtype", "seed", "grad_norm")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "master" in state:  # otherwise load_state_dict calls this, and fills the state itself
            self._number()

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of the closure, if one was passed."""
        loss = loss_of(closure)
        buckets = self._buckets()
        if not buckets:
            return loss
        self.refresh_lr()
        backend = select("adamw", max((b.params[0] for b in buckets), key=Tensor.element_size))
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
        if clip and (
            with_grad != self._with_grad or self._sharded
        ):  # with other tensors, other partial sums stay unused
            self._with_grad = with_grad
            self._partials = torch.zeros(PARTIALS * len(buckets), dtype=torch.float32, device=self.device)
        for i, b in enumerate(buckets):
            ADAMW_PREPARE[backend](b.grads, self._steps, b.index, self._partials, i * PARTIALS, clip)
            if clip and b.groups:
                sum_over(b.groups, self._partials[i * PARTIALS : (i + 1) * PARTIALS])
        beta1, beta2, eps, decay = zip(*(_numbers(g) for g in self.param_groups))
        for b in buckets:
            ADAMW_UPDATE[backend](
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
                norms = [sum_over(b.groups, grad_norm_ref([b], grad_scale).square()) for b in buckets]
                norm = torch.stack(norms).sum(0).sqrt()
            self.grad_norm.copy_(norm)
        names = ("beta1", "beta2", "eps", "weight_decay")
        groups = [dict(zip(names, _numbers(g))) for g in self.param_groups]
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
        """Group parameters with a gradient (shards of DTensors) by parameter dtype, gradient dtype, process groups."""
        if len(self.param_groups) != len(self._lr):
            self._number()
        if (self.master, self.moment_dtype) != self._fitted_for:  # the user set one of them
            check_settings(self.master, self.max_norm, self.moment_dtype, self.seed)
            self._number()
        buckets: dict[tuple[Any, ...], Bucket] = {}
        slot = -1
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                slot += 1
                g = p.grad
                if g is None:
                    continue
                # the parameter was replaced in its group, or moved
                if slot >= len(self._order) or p is not self._order[slot] or p.get_device() != self._device_number:
                    self._number()
                    return self._buckets()
                groups, dtype, grad_dtype, stride, state = (), p.dtype, g.dtype, p.stride(), self.state.get(p)
                if state is None or not still_fits(self._fitted[slot], p, dtype, stride, state):
                    state = self._fit(p, slot)
                    _check_gradient(p, g)
                if g.layout is not torch.strided:
                    raise TypeError(f"AdamW: a gradient is {g.layout}, expected dense (sparse=False in the embedding)")
                if self._sharded and is_sharded(p):
                    groups, p, g, state = shard(p, g, state)
                    stride = p.stride()
                known = grad_dtype is dtype or grad_dtype is torch.float32
                if not known or g.stride() != stride:
                    grad_dtype = grad_dtype if known else torch.float32
                    g = torch.empty_like(p, dtype=grad_dtype).copy_(g)
                b = buckets.get((dtype, grad_dtype, groups))
                if b is None:
                    b = buckets[(dtype, grad_dtype, groups)] = Bucket([], [], [], [], [], [], [], groups)
                b.params.append(p)
                b.grads.append(g)
                b.exp_avgs.append(state["exp_avg"])
                b.exp_avg_sqs.append(state["exp_avg_sq"])
                if "master" in state:
                    b.masters.append(state["master"])
                b.index.append(slot)
                b.group.append(number)
        return list(buckets.values())

    def _fit(self, p: Tensor, slot: int) -> dict[str, Any]:
        """Return the state of p, converted to fit p and the settings as they are now."""
        state: dict[str, Any] = self.state.setdefault(p, {})
        self._fitted[slot] = fit(p, state, self._places[slot], self.master, self.moment_dtype)
        self._with_grad = []  # with another size, other partial sums stay unused
        return state

    def refresh_lr(self) -> None:
        """Copy the learning rates of the groups to the device: floats only when they changed, tensors by a device copy.

        step() calls it; call it yourself before each replay of a CUDA graph that contains step().
        """
        self._rates.refresh(self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer or of torch.optim.AdamW, converted to the settings of this optimizer.

        (PyTorch's load_state_dict would cast fp32 moments of bf16 parameters to bf16.) A master of another kind is
        converted: fp32 and remainder into each other. A missing master is initialised from the weight, and a master is
        dropped if this optimizer keeps none.

        Raises:
            ValueError: a setting that is not supported, the state of another kind of optimizer, or a tensor whose shape
                differs from that of its parameter; nothing has changed then.
        """
        load_uncast(self, state_dict, check_saved, self._load)

    def _load(self, saved: list[tuple[Tensor, dict[str, Any]]]) -> None:
        self._number()
        slots = {p: slot for slot, p in enumerate(self._order)}
        for p, old in saved:
            self.state[p] = {"step": old["step"]}
            state = self._fit(p, slots[p])
            for name in MOMENTS:
                state[name].copy_(old[name])
            if "master" in state:
                write_master(state["master"], p, old.get("master"))


def _check_gradient(p: Tensor, g: Tensor) -> None:
    """Raise ValueError for a gradient computed before p changed its shape or device."""
    if g.shape != p.shape or g.device != p.device:
        raise ValueError(
            f"AdamW: a gradient of shape {tuple(g.shape)} is on {g.device}, expected its parameter's "
            f"{tuple(p.shape)} on {p.device}"
        )


def _numbers(group: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return beta1, beta2, eps and weight_decay of a group."""
    beta1, beta2 = group["betas"]
    return float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])
