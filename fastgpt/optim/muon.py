"""Muon for the matrices in the middle of a model, AdamW for the rest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.ops.adamw import follow_param
from fastgpt.optim.adamw import AdamW
from fastgpt.optim.state import T, check_saved, load_uncast, loss_of

BUFFER = "momentum_buffer"


class MuonAdamW(torch.optim.Optimizer):
    """Optimizer with torch.optim.Muon for the matrices in the middle of a model and AdamW for all other parameters.

    Args:
        groups: parameter groups; those with "muon": True contain only matrices, and are first in `param_groups`.
        lr, weight_decay, momentum: as in torch.optim.Muon, whose update is scaled to the size of an AdamW
            update ("match_rms_adamw"), so one learning rate suits both.
        max_norm: clip the global gradient norm, over all parameters, to this.
        settings: further settings of fastgpt.optim.AdamW.

    Attributes:
        grad_norm: as in AdamW.

    16-bit matrices always have fp32 copies; `master` applies to the other parameters. A step is
    skipped if its norm is not finite or found_inf is set; detecting that waits for the device. Weights that you set,
    and state that you clear or replace, are handled as in AdamW.

    Raises:
        ValueError: a group is added after construction, or a matrix that was fp32 at construction no longer is.

    Source: arXiv:2502.16982.
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
        super().__init__(sorted(groups, key=lambda g: not g.get("muon")), dict(lr=lr, weight_decay=weight_decay))
        mine = [g for g in self.param_groups if g.get("muon")]
        others = [g for g in self.param_groups if not g.get("muon")]
        self.max_norm = max_norm
        self.matrices = [p for g in mine for p in g["params"]]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.matrices]
        of = dict(zip(self.matrices, self.masters, strict=True))
        self.muon = torch.optim.Muon(
            [{**g, "params": [of[p] for p in g["params"]]} for g in mine],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = AdamW(others, lr=lr, weight_decay=weight_decay, **settings)
        for group, inner in zip(mine, self.muon.param_groups, strict=True):
            group.update({name: value for name, value in inner.items() if name != "params"})
        self.device, self.found_inf = self.adamw.device, None
        self.grad_norm = torch.full((1,), torch.nan, dtype=torch.float32, device=self.device)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "adamw"):  # otherwise the constructor adds it
            raise ValueError("MuonAdamW: got a new group after construction, expected all groups in the constructor")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy (torch.optim.Optimizer keeps only defaults, state and groups)."""
        names = ("max_norm", "matrices", "masters", "muon", "adamw", "device", "found_inf", "grad_norm")
        return {**super().__getstate__(), **{n: getattr(self, n) for n in names}}

    @torch.no_grad()
    def step(self, closure: Callable[[], T] | None = None) -> T | None:  # type: ignore[override]
        """Update every parameter that has a gradient; return the loss of the closure, if one was passed."""
        loss = loss_of(closure)
        given = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.grad_norm.copy_(torch.nn.utils.get_total_norm([p.grad for p in given]))
        skip = ~self.grad_norm.isfinite()
        if bool(skip if self.found_inf is None else skip | (self.found_inf != 0)):
            return loss
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(given, self.max_norm, self.grad_norm[0])
        self._share()
        for p, master in zip(self.matrices, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.muon.step()
        self.adamw.step()
        for p, master in zip(self.matrices, self.masters, strict=True):
            self.state[p].update(self.muon.state[master])
            if master is not p:
                p.copy_(master)
                master.grad = None
        return loss

    def _share(self) -> None:
        """Pass settings and state, which may have been changed, loaded or cleared, to the two inner optimizers."""
        mine = self.param_groups[: len(self.muon.param_groups)]
        for group, inner in zip(mine, self.muon.param_groups, strict=True):
            inner.update({name: value for name, value in group.items() if name != "params"})
        self.adamw.param_groups = self.param_groups[len(mine) :]
        self.adamw.state = self.state
        self.muon.state = defaultdict(dict)
        for p, master in zip(self.matrices, self.masters, strict=True):
            state = self.state.setdefault(p, {})
            if master is not p:
                _follow(p, master, state)
            elif p.dtype != torch.float32:
                raise ValueError(
                    f"MuonAdamW: a matrix became {p.dtype}, expected the optimizer to be created after the cast"
                )
            if BUFFER in state:
                self.muon.state[master][BUFFER] = state[BUFFER].to(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for master in self.masters:  # gradients of the fp32 copies
            master.grad = None

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
                self.state[p] = {BUFFER: saved[BUFFER].to(masters[p], copy=True)}
                if masters[p] is not p:
                    self.state[p]["master"] = saved.get("master", p.detach()).to(masters[p], copy=True)
        self.adamw.param_groups = self.param_groups[len(self.muon.param_groups) :]
        self.adamw.state = self.state
        self.adamw._load([(p, saved) for p, saved in pairs if p not in masters])


def _follow(p: Tensor, master: Tensor, state: dict[str, Any]) -> None:
    """Update the fp32 copy of a matrix in place after the state was cleared or replaced, or the matrix was set."""
    if master.device != p.device:
        master.data = master.to(p.device)
    if state.get("master") is not master:
        master.copy_(state.get("master", p))
        state["master"] = master
    master.copy_(follow_param(p, master))
