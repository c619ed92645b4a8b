"""State of AdamW: checks of settings, parameters and saved state, and conversion of state to fit its parameter.

State can be cleared, replaced or loaded from other settings, and parameters can be cast, moved or replaced between two
steps. `fit` handles all of this in one place: missing state is initialised, existing state is kept and converted.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastgpt.ops.adamw import join_remainder

MASTERS = ("fp32", "remainder", "stochastic", None)
MOMENTS = ("exp_avg", "exp_avg_sq")
T = TypeVar("T")


def loss_of(closure: Callable[[], T] | None) -> T | None:
    """Call the closure of `step` with gradients enabled and return its result, or None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class Fitted(NamedTuple):
    """Properties of a parameter when its state was last fitted, and that state."""

    dtype: torch.dtype
    numel: int  # with the strides it determines the shape, and is faster to read
    stride: tuple[int, ...]
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None


def still_fits(
    fitted: Fitted | None, p: Tensor, dtype: torch.dtype, stride: tuple[int, ...], state: dict[str, Any]
) -> bool:
    """Return whether p, of this dtype and stride, and its state are unchanged; called per parameter and step."""
    if fitted is None:
        return False
    old_dtype, numel, old_stride, step, m, v, master = fitted
    get = state.get
    return (
        get("step") is step
        and get("exp_avg") is m
        and get("exp_avg_sq") is v
        and get("master") is master
        and dtype is old_dtype
        and stride == old_stride
        and p.numel() == numel
    )


def fit(p: Tensor, state: dict[str, Any], step: Tensor, master: str | None, moment_dtype: torch.dtype) -> Fitted:
    """Convert `state` in place to what the update of p needs; `step` is its slot in the step counters.

    Raises:
        ValueError, TypeError: p is no longer supported by AdamW, or a state tensor has another shape than p.
    """
    check_parameter(p, master)
    _check_shapes("state", p, state)
    set_step(step, state)
    wide = torch.float64 if p.dtype == torch.float64 else moment_dtype
    for name in MOMENTS:
        old = state.get(name)
        if not _fits(old, p, wide):
            state[name] = torch.zeros_like(p, dtype=wide)
            if old is not None:
                state[name].copy_(old)
    kind, old = _master_dtype(p, master), state.pop("master", None)
    if kind is not None:
        state["master"] = old if _fits(old, p, kind) else torch.zeros_like(p, dtype=kind)
        if state["master"] is not old:
            write_master(state["master"], p, old)
    return Fitted(p.dtype, p.numel(), p.stride(), step, state["exp_avg"], state["exp_avg_sq"], state.get("master"))


def set_step(place: Tensor, state: dict[str, Any]) -> None:
    """Replace state["step"] by the view `place` of the step counters, with the same count (0 if there is none)."""
    step = state.get("step", 0.0)
    if step is not place:
        place.copy_(step.reshape(())) if isinstance(step, Tensor) else place.fill_(float(step))
        state["step"] = place


def write_master(master: Tensor, p: Tensor, old: Tensor | None) -> None:
    """Fill p's master, fp32 or int16 remainder, from p and an older master of any kind (None: no older master).

    Between fp32 and remainders the value is kept. A value half-way between two bf16 values moves by one unit in the
    last place of fp32: the two kinds round it differently, and the parameter must remain its rounded value.
    """
    master, p, old = local(master), local(p.detach()), None if old is None else local(old).to(p.device)
    if old is not None and old.dtype == torch.int16 and p.dtype != torch.bfloat16:
        old = None  # low bits of a bf16 parameter do not apply to another dtype
    if master.dtype == torch.int16:
        if old is not None:
            master.copy_(old if old.dtype == torch.int16 else _low_bits(old.float()))
    elif old is None:
        master.copy_(p)
    else:
        master.copy_(join_remainder(p, old.clamp(min=-0x7FFF)) if old.dtype == torch.int16 else old)


def _low_bits(master: Tensor) -> Tensor:
    """Return the difference of fp32 `master` from its rounding to bf16, as an int16 remainder."""
    high = master.bfloat16().view(torch.int16).to(torch.int32) << 16
    return (master.view(torch.int32) - high).clamp(max=0x7FFF).to(torch.int16)


def _fits(t: Any, p: Tensor, dtype: torch.dtype) -> bool:
    return isinstance(t, Tensor) and t.dtype == dtype and t.device == p.device and t.stride() == p.stride()


def _master_dtype(p: Tensor, master: str | None) -> torch.dtype | None:
    narrow = p.dtype in (torch.bfloat16, torch.float16)
    return {"fp32": torch.float32, "remainder": torch.int16}.get(master or "") if narrow else None


def load_uncast(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    check: Callable[[list[dict[str, Any]], list[tuple[Tensor, dict[str, Any]]]], None],
    fill: Callable[[list[tuple[Tensor, dict[str, Any]]]], None],
) -> None:
    """Load a state_dict without the cast of torch.optim.Optimizer.load_state_dict.

    That method would cast fp32 state of 16-bit parameters to 16 bits.

    check: receives the groups and the (parameter, state) pairs after other hooks have run, and raises before anything
    has changed. fill: writes the state of these pairs, before other hooks read it.
    """
    pairs: list[tuple[Tensor, dict[str, Any]]] = []

    def take(_: Any, content: dict[str, Any]) -> dict[str, Any]:  # runs after other hooks
        numbers = [n for g in content["param_groups"] for n in g["params"]]
        params = [p for g in optimizer.param_groups for p in g["params"]]
        state = content["state"]
        pairs.extend((p, state[n]) for n, p in zip(numbers, params) if n in state)
        check(content["param_groups"], pairs)
        return {**content, "state": {}}

    hooks = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(lambda _: fill(pairs), prepend=True),
    ]
    try:
        torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def check_saved(groups: list[dict[str, Any]], pairs: list[tuple[Tensor, dict[str, Any]]]) -> None:
    """Raise ValueError unless groups and states are from AdamW (this one or torch.optim) and match the shapes."""
    for group in groups:
        check_group(group)
    for p, saved in pairs:
        if missing := [name for name in ("step", *MOMENTS) if name not in saved]:
            raise ValueError(
                f"AdamW: saved state has {sorted(saved)} and no {missing[0]}, expected the state of an AdamW"
            )
        _check_shapes("saved", p, saved)


def _check_shapes(what: str, p: Tensor, state: dict[str, Any]) -> None:
    for name in (*MOMENTS, "master"):
        t = state.get(name)
        if t is not None and t.shape != p.shape:
            raise ValueError(f"AdamW: {what} {name} has shape {tuple(t.shape)}, expected {tuple(p.shape)}")


def is_sharded(p: Tensor) -> bool:
    """Return whether p is a DTensor, without importing DTensor, which takes half a second."""
    return hasattr(p, "placements")


def local(t: Any) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself."""
    return t.to_local() if is_sharded(t) else t


def shard(p: Any, g: Any, state: dict[str, Any]) -> tuple[tuple[Any, ...], Tensor, Tensor, dict[str, Any]]:
    """Return the process groups that DTensor p is sharded over, and the local shards of p, its gradient and state."""
    groups = tuple(p.device_mesh.get_group(i) for i, place in enumerate(p.placements) if place.is_shard())
    g = g if g.placements == p.placements else g.redistribute(placements=p.placements)
    return groups, p.to_local(), g.to_local(), {n: local(t) for n, t in state.items()}


def sum_over(groups: tuple[Any, ...], t: Tensor) -> Tensor:
    """Sum t in place over the processes of these groups, and return it."""
    for group in groups:
        torch.distributed.all_reduce(t, group=group)
    return t


class Rates:
    """The learning rates of parameter groups on the device, where a step reads them.

    Attributes:
        values: (groups,) fp32.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.values = torch.zeros(count, dtype=torch.float32, device=device)
        self._floats: list[float | None] = []

    def refresh(self, groups: list[dict[str, Any]]) -> None:
        """Copy the rates to the device: floats only when they changed, tensors by a device copy."""
        rates = [g["lr"] for g in groups]
        there = [
            isinstance(r, Tensor) and r.device.type != "cpu" for r in rates
        ]  # reading those would wait for the device
        floats = [None if t else float(r.detach() if isinstance(r, Tensor) else r) for r, t in zip(rates, there)]
        if floats != self._floats:
            self._floats = floats
            host = torch.tensor([0.0 if f is None else f for f in floats], dtype=torch.float32, device="cpu")
            self.values.copy_(host.pin_memory() if self.values.is_cuda else host, non_blocking=True)
        for i, rate in enumerate(rates):
            if there[i]:
                self.values[i].copy_(rate.reshape(()), non_blocking=True)


def _is_dense(p: Tensor) -> bool:
    """Return whether the elements of p fill their memory without gaps or overlaps."""
    size = 1
    for stride, n in sorted((s, n) for s, n in zip(p.stride(), p.shape) if n != 1):
        if stride != size and p.numel():
            return False
        size *= n
    return True


def check_parameter(p: Tensor, master: str | None) -> None:
    """Raise TypeError or ValueError for a parameter that AdamW does not support."""
    if not p.is_floating_point() or p.layout is not torch.strided:
        raise TypeError(f"AdamW: a parameter is {p.dtype} {p.layout}, expected dense floating point")
    if not _is_dense(local(p)):
        raise ValueError(
            f"AdamW: a parameter of shape {tuple(p.shape)} has strides {p.stride()}, expected elements without "
            "gaps or overlaps in memory, in any order of dimensions (call .contiguous() on a view first)"
        )
    if master in ("remainder", "stochastic") and p.dtype == torch.float16:
        raise ValueError(f"AdamW: master={master!r} is for bf16 parameters, got torch.float16")


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for settings of a new or loaded parameter group that AdamW does not support."""
    if missing := [name for name in ("lr", "betas", "eps", "weight_decay") if name not in group]:
        raise ValueError(f"AdamW: a saved group has no {missing[0]}, expected the state of an AdamW")
    for flag in ("amsgrad", "maximize", "differentiable"):
        if group.get(flag):
            raise ValueError(f"AdamW: {flag}=True is not supported")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError("AdamW: decoupled_weight_decay is False (as in torch.optim.Adam), expected True")
    lr, betas, eps, decay = (group[n] for n in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr has shape {tuple(lr.shape)}, expected one element")
    if any(isinstance(b, Tensor) for b in betas):
        raise ValueError("AdamW: betas are tensors, expected numbers")
    for name, value in dict(lr=0.0 if isinstance(lr, Tensor) else lr, eps=eps, weight_decay=decay).items():
        if not _number(name, value) >= 0:  # rejects NaN too
            raise ValueError(f"AdamW: {name} is {value}, expected at least 0")
    if not all(0.0 <= _number("betas", b) < 1.0 for b in betas):
        raise ValueError(f"AdamW: betas are {betas}, expected 0 to less than 1")


def _number(name: str, value: Any) -> float:
    try:
        return value if isinstance(value, (int, float)) else float(value + 0)  # raises TypeError for strings
    except (TypeError, ValueError):
        raise ValueError(f"AdamW: {name} is {value!r}, expected a number") from None


def check_settings(master: str | None, max_norm: float | None, moment_dtype: torch.dtype, seed: Any) -> None:
    """Raise ValueError for settings of the whole optimizer that it does not support."""
    if master not in MASTERS:
        raise ValueError(f"AdamW: master is {master!r}, expected one of {MASTERS}")
    if max_norm is not None and not _number("max_norm", max_norm) > 0:
        raise ValueError(f"AdamW: max_norm is {max_norm}, expected more than 0, or None")
    if moment_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"AdamW: moment_dtype is {moment_dtype}, expected torch.float32 or torch.bfloat16")
    if not isinstance(seed, Integral) or not -(1 << 63) <= int(seed) < 1 << 63:
        raise ValueError(f"AdamW: seed is {seed!r}, expected an integer of 64 bits")
