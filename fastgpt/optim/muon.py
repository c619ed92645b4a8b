"""Muon for the matrices in the middle of a model, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgpt.optim import AdamW


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
