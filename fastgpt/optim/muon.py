"""Muon for the matrices in the middle of a model, AdamW for the rest.

    g = grad * min(1, max_norm / (norm + 1e-6))                    norm over all gradients
    m += (1 - momentum) (g - m);  u = g + momentum (m - g)
    p = p (1 - lr wd) - 0.2 sqrt(max(R, C)) lr orthogonalise(u)    fastgpt/optim/newton_schulz.py

If the norm is not finite or found_inf is set, nothing changes; that is decided on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.core.device import dtype_of
from fastgpt.ops.adamw import follow_param
from fastgpt.optim.adamw import AdamW
from fastgpt.optim.newton_schulz import batches, orthogonalise
from fastgpt.optim.spread import gradient, group_of_rows, orthogonalise_copies, orthogonalise_shards, total_norm
from fastgpt.optim.state import Rates, T, check_saved, is_sharded, load_uncast, local, loss_of

BUFFER = "momentum_buffer"


class MuonAdamW(torch.optim.Optimizer):
    """Optimizer with the update of torch.optim.Muon for the matrices in the middle of a model and AdamW for all other
    parameters.

    Args:
        groups: parameter groups; those with "muon": True contain only matrices, and are first in `param_groups`.
        lr, weight_decay, momentum: as in torch.optim.Muon, whose update is scaled to the size of an AdamW
            update ("match_rms_adamw"), so one learning rate suits both.
        max_norm: clip the global gradient norm, over all parameters, to this.
        precision: dtype of the Newton-Schulz iteration; None: torch.bfloat16 on a GPU, as in torch.optim.Muon, and
            torch.float32 on a CPU.
        replicated: all processes of torch.distributed's default group hold the same matrices and gradients, as under
            DDP: each orthogonalises a share of them.
        settings: further settings of fastgpt.optim.AdamW.

    Attributes:
        grad_norm: (1,) fp32 on the device: global norm of the last step before clipping (NaN before the first step).
            Reading it waits for the device.

    16-bit matrices always have fp32 copies; `master` applies to the other parameters. A step never waits for the
    device: it is skipped there if its norm is not finite or found_inf is set. With DTensors (FSDP2) every process
    updates its own rows, and each matrix is gathered and orthogonalised in one process. Weights that you set, and state
    that you clear or replace, are handled as in AdamW.

    Raises:
        ValueError: a tensor in a group with "muon" is no matrix, a setting is negative, a group is added after
            construction, a matrix that was fp32 at construction no longer is, or a DTensor is not sharded by rows.

    Source: arXiv:2502.16982.
    """

    found_inf: Tensor | None  # if it is not 0, the step is skipped

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        max_norm: float | None = None,
        precision: torch.dtype | None = None,
        replicated: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(sorted(groups, key=lambda g: not g.get("muon")), dict(lr=lr, weight_decay=weight_decay))
        mine = [g for g in self.param_groups if g.get("muon")]
        others = [g for g in self.param_groups if not g.get("muon")]
        for group in mine:
            group.setdefault("momentum", momentum)
            _check_group(group)
        self.max_norm, self.replicated = max_norm, replicated
        self.matrices = [p for g in mine for p in g["params"]]
        for p in filter(is_sharded, self.matrices):
            group_of_rows(p)
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.matrices]
        self.adamw = AdamW(others, lr=lr, weight_decay=weight_decay, **settings)
        self.device, self.found_inf = self.adamw.device, None
        self.precision = precision or dtype_of("auto", self.device.type)
        self.rates = Rates(len(mine), self.device)
        self.grad_norm = torch.full((1,), torch.nan, dtype=torch.float32, device=self.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "adamw"):  # otherwise the constructor adds it
            raise ValueError("MuonAdamW: got a new group after construction, expected all groups in the constructor")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy (torch.optim.Optimizer keeps only defaults, state and groups)."""
        names = ("max_norm", "replicated", "matrices", "masters", "adamw", "device", "found_inf", "precision", "rates")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in (*names, "grad_norm")}}

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of the closure, if one was passed."""
        loss = loss_of(closure)
        given = [(p, p.grad) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not given:
            return loss
        self.refresh_lr()
        self.grad_norm.copy_(total_norm(given))
        skip = ~self.grad_norm.isfinite()
        if self.found_inf is not None:
            skip = skip | (self.found_inf != 0)
        scale = None if self.max_norm is None else ((self.grad_norm + 1e-6) / self.max_norm).clamp(min=1.0)
        self._step_matrices(skip, scale)
        self.adamw.found_inf, self.adamw.grad_scale = skip.float(), scale
        self.adamw.step()
        return loss

    def refresh_lr(self) -> None:
        """Copy the learning rates of the groups to the device, as AdamW.refresh_lr does."""
        count = len(self.rates.values)
        self.adamw.param_groups, self.adamw.state = self.param_groups[count:], self.state  # a load replaces both
        self.rates.refresh(self.param_groups[:count])
        self.adamw.refresh_lr()

    def _step_matrices(self, skip: Tensor, scale: Tensor | None) -> None:
        """Update the matrices with a gradient, divided by `scale`; if `skip` is set, they and their state stay."""
        rates = self.rates.values
        settings = [(g, rates[k]) for k, g in enumerate(self.param_groups[: len(rates)]) for _ in g["params"]]
        given = [i for i, p in enumerate(self.matrices) if p.grad is not None]
        for i in given:
            self._fit(i)
        for together in self._together(given):
            updates = [self._momentum(i, settings[i][0]["momentum"], skip, scale) for i in together]
            for i, update in zip(together, self._orthogonalise(together, updates)):
                group, rate = settings[i]
                self._apply(i, update, rate, group["weight_decay"], skip)

    def _together(self, given: list[int]) -> Iterator[list[int]]:
        """Return the matrices that are updated together: all that several processes share, else a batch."""
        shards = [i for i in given if is_sharded(self.matrices[i])]
        copies = [i for i in given if not is_sharded(self.matrices[i])]
        if shards:
            yield shards
        if self.replicated and copies:
            yield copies
        else:
            for batch in batches([self.matrices[i].shape for i in copies]):
                yield [copies[k] for k in batch]

    def _orthogonalise(self, together: list[int], updates: Sequence[Tensor]) -> list[Tensor]:
        first = self.matrices[together[0]]
        if is_sharded(first):
            shapes = [self.matrices[i].shape for i in together]
            return orthogonalise_shards(updates, shapes, self.precision, group_of_rows(first))
        return (orthogonalise_copies if self.replicated else orthogonalise)(updates, self.precision)

    def _momentum(self, i: int, momentum: float, skip: Tensor, scale: Tensor | None) -> Tensor:
        """Update the momentum of matrix i and return what is orthogonalised, in the precision of the iteration."""
        p = self.matrices[i]
        g, m = gradient(p, p.grad).float(), local(self.state[p][BUFFER])
        g = g if scale is None else g / scale
        new = m.lerp(g, 1 - momentum)
        torch.where(skip, m, new, out=m)
        return g.lerp(new, momentum).to(self.precision)

    def _apply(self, i: int, update: Tensor, rate: Tensor, decay: float, skip: Tensor) -> None:
        p, master = self.matrices[i], local(self.masters[i].detach())
        step = update.to(master.dtype).mul_(rate * (0.2 * max(p.shape) ** 0.5))
        torch.where(skip, master, (master * (1 - rate * decay)).sub_(step), out=master)
        if self.masters[i] is not p:
            local(p.detach()).copy_(master)

    def _fit(self, i: int) -> None:
        """Convert the state of matrix i, which may have been changed, loaded or cleared, to what its update needs."""
        p, master = self.matrices[i], self.masters[i]
        state: dict[str, Any] = self.state.setdefault(p, {})
        if master is not p:
            _follow(p, master, state)
        elif p.dtype != torch.float32:
            raise ValueError(
                f"MuonAdamW: a matrix became {p.dtype}, expected the optimizer to be created after the cast"
            )
        if BUFFER not in state:
            state[BUFFER] = torch.zeros_like(p, dtype=torch.float32)
        state[BUFFER] = state[BUFFER].to(device=p.device, dtype=torch.float32)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this optimizer, converted to the current device and dtypes.

        Raises:
            ValueError: other groups, the state of another kind of optimizer, or a tensor whose shape differs from
                that of its parameter; nothing has changed then.
        """
        load_uncast(self, state_dict, self._check, self._load)

    def _check(self, groups: list[dict[str, Any]], pairs: list[tuple[Tensor, dict[str, Any]]]) -> None:
        mine = set(self.matrices)
        if [bool(g.get("muon")) for g in groups] != [bool(g.get("muon")) for g in self.param_groups]:
            raise ValueError("MuonAdamW: the saved groups are not those of this optimizer")
        for p, saved in pairs:
            t = saved.get(BUFFER)
            if p in mine and (t is None or t.shape != p.shape):
                got = f"has {sorted(saved)}" if t is None else f"has a {BUFFER} of shape {tuple(t.shape)}"
                raise ValueError(f"MuonAdamW: a matrix's saved state {got}, expected a {BUFFER} of {tuple(p.shape)}")
        others = [g for g in groups if not g.get("muon")]
        check_saved(others, [(p, saved) for p, saved in pairs if p not in mine])

    def _load(self, pairs: list[tuple[Tensor, dict[str, Any]]]) -> None:
        masters = dict(zip(self.matrices, self.masters, strict=True))
        for p, saved in pairs:
            if p in masters:
                as_state: dict[str, Any] = dict(device=p.device, dtype=torch.float32, copy=True)
                self.state[p] = {BUFFER: saved[BUFFER].to(**as_state)}
                if masters[p] is not p:
                    self.state[p]["master"] = saved.get("master", p.detach()).to(**as_state)
        self.adamw.param_groups = self.param_groups[len(self.rates.values) :]
        self.adamw.state = self.state
        self.adamw._load([(p, saved) for p, saved in pairs if p not in masters])


def _check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for a group of matrices that Muon does not support."""
    for p in group["params"]:
        if p.dim() != 2:
            raise ValueError(f"MuonAdamW: a parameter has shape {tuple(p.shape)}, expected a matrix")
    for name in ("lr", "weight_decay", "momentum"):
        value = group[name]
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"MuonAdamW: {name} is {value}, expected at least 0")


def _follow(p: Tensor, master: Tensor, state: dict[str, Any]) -> None:
    """Update the fp32 copy of a matrix in place after the state was cleared or replaced, or the matrix was set."""
    if master.device != p.device:
        master.data = master.to(p.device)
    if state.get("master") is not master:
        local(master).copy_(local(state.get("master", p)))
        state["master"] = master
    local(master).copy_(follow_param(local(p), local(master)))
