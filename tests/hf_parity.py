"""Compare a model of transformers with itself in fp64, by the rule of parity.

error(patched) <= 2 (logits, losses) or 3 (gradients, weights after steps) times that of the unpatched model in the same
dtype plus one unit in the last place; errors are relative L2 per tensor.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class InFp64(TorchFunctionMode):
    """Runs every step that transformers' code takes in fp32 in fp64 instead, those in the default dtype too.

    Make models outside, or they draw their weights in fp64.
    """

    def __enter__(self) -> Any:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        torch.set_default_dtype(self.default)
        return super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = {torch.float32: torch.float64, torch.Tensor.float: torch.Tensor.double}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return wide.get(func, func)(*args, **kwargs)


def outcome(model: Any, ids: Tensor, labels: Tensor, sets: int, vocab: int, **inputs: Tensor) -> dict[str, Tensor]:
    """Return logits, losses of `sets` sets of labels, and every gradient of the first one."""
    return outcome_of(model, {"input_ids": ids, **inputs}, labels, sets, vocab)


def outcome_of(
    model: Any, given: dict[str, Tensor], labels: Tensor, sets: int, classes: int, **in_place: Tensor
) -> dict[str, Tensor]:
    """Return the same of a model with any inputs. in_place: inputs that it needs where it has no labels."""
    model.train()
    loss = model(**given, labels=labels).loss
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    out = {f"d{n}": g for n, g in zip(names, grads) if g is not None}
    with torch.no_grad():
        shifts = range(0, classes, -(-classes // sets))
        others = [torch.where(labels == -100, -100, (labels + shift) % classes) for shift in shifts]
        out["losses"] = torch.stack([model(**given, labels=s).loss.double() for s in others])
        model.eval()
        return {**out, "logits": model(**given, **in_place).logits}


def in_fp64(model: Any) -> Any:
    """Return a copy of the model in fp64."""
    return experts_one_by_one(copy.deepcopy(model).double())


def experts_one_by_one(model: Any) -> Any:
    """Let a model compute its experts one by one, since their grouped products do not have fp64; return the model."""
    for m in model.modules():
        if hasattr(getattr(m, "config", None), "_experts_implementation"):
            m.config._experts_implementation = "eager"
    return model


def exact(model: Any, *args: Any, **inputs: Any) -> dict[str, Tensor]:
    """Return the outcome of the model in fp64."""
    with InFp64():
        return outcome(in_fp64(model), *args, **inputs)


def excess(ours: dict[str, Tensor], base: dict[str, Tensor], truth: dict[str, Tensor], eps: float) -> dict[str, float]:
    """Return by how much each tensor breaks the rule; empty if none does."""
    assert ours.keys() == base.keys() == truth.keys()
    worst = {}
    for name, t in truth.items():
        scale = float(t.double().norm()) or 1.0
        mine, theirs = (float((x[name].double() - t).norm()) / scale for x in (ours, base))
        ratio = mine / ((3 if name.startswith("d") else 2) * theirs + eps)
        if not ratio <= 1:
            worst[name] = ratio
    return worst


def joined(runs: list[tuple[dict[str, Tensor], ...]]) -> list[dict[str, Tensor]]:
    """Return the tensors of several runs (ours, base, truth) side by side, (ours, base, truth).

    An error is a random number, and that of a small tensor may be small by chance in one run. Tensors that some run
    lacks, such as the gradient of an expert without tokens, are left out.
    """
    names = [n for n in runs[0][2] if all(n in side for run in runs for side in run)]
    return [{n: torch.cat([out[n].double().flatten() for out in side]) for n in names} for side in zip(*runs)]


def excess_of_runs(runs: list[tuple[dict[str, Tensor], ...]], eps: float) -> dict[str, float]:
    """Return by how much each tensor breaks the rule over several runs (ours, base, truth) together."""
    ours, base, truth = joined(runs)
    return excess(ours, base, truth, eps)
