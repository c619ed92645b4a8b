"""Recognise attention that a forward writes out, and run it on the op.

Such a forward multiplies queries with transposed keys, divides, adds a mask, applies softmax and dropout, and
multiplies with values. Its source shows that it does nothing else with the scores. It runs unchanged but for
torch.matmul and F.softmax: the first product returns `Scores`, which only record what follows, and the second one runs
the op.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import types
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.core.fallback import leave_to_torch
from fastgpt.patching import _attention, _masks
from fastgpt.patching import _replace as replace

USUAL = re.compile(r"m/?\+?sd?v")  # what is done with scores, as in `_step`, in this order


@dataclass
class Scores:
    """Products of queries (B, H, T, D) and keys (B, H, D, S) that were not computed, what they are divided by, and the
    mask added to them."""

    query: Tensor
    keys: Tensor
    divisor: float = 1.0
    mask: Tensor | None = None

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Scores:
        """Divide or add a mask: a compiler has operators end here, with their operands in either order."""
        scores, other = args if isinstance(args[0], Scores) else args[::-1]
        return scores.masked(other) if isinstance(other, Tensor) else scores.over(other)

    def __truediv__(self, divisor: float) -> Scores:
        return self.over(divisor)

    def __add__(self, mask: Tensor) -> Scores:
        return self.masked(mask)

    def over(self, divisor: float) -> Scores:
        """Return the scores over a number."""
        return Scores(self.query, self.keys, divisor)

    def masked(self, mask: Tensor) -> Scores:
        """Return the scores plus a mask."""
        return Scores(self.query, self.keys, self.divisor, mask)


@dataclass
class Weights:
    """Softmax of scores, and the probability of a dropout."""

    scores: Scores
    dropout: float = 0.0

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record dropout, or multiply with values, see `Scores`."""
        if function is not F.dropout:
            weights, value = args if isinstance(args[0], Weights) else args[::-1]
            return weights.times(value)
        given = {**dict(zip(("input", "p", "training"), args)), **(kwargs or {})}
        return Weights(given["input"].scores, given["p"]) if given["training"] else given["input"]

    def __matmul__(self, value: Tensor) -> Tensor:
        return self.times(value)

    def times(self, value: Tensor) -> Tensor:
        """Compute attention: values (B, H, S, D) -> (B, H, T, D)."""
        q, k = self.scores.query, self.scores.keys.transpose(-1, -2)
        numbers: dict[str, Any] = dict(scaling=1 / self.scores.divisor, dropout=self.dropout)
        if self.scores.mask is None:
            return _attention.attend(q, k, value, causal=False, **numbers).transpose(1, 2)
        return _attention.masked(q, k, value, self.scores.mask, "all", **numbers).transpose(1, 2)


def product(a: Any, b: Tensor) -> Any:
    """Replace torch.matmul in a forward with attention."""
    return a.times(b) if isinstance(a, Weights) else Scores(a, b)


def softmax(scores: Scores, dim: int) -> Weights:
    """Replace F.softmax in a forward with attention."""
    return Weights(scores)


REPLACEMENTS: list[tuple[Any, Any]] = [(torch.matmul, product), (F.softmax, softmax)]


def inline(module: nn.Module, rebound: Any, names: tuple[str, ...], *args: Any, **kwargs: Any) -> Any:
    """Run a forward rebuilt with REPLACEMENTS, which returns None for the weights; under other masks than ours, or if
    weights are requested, the module's own.

    names: the parameters of the forward.
    """
    given = {**dict(zip(names, args)), **kwargs}
    masks = [given[n] for n in names if "mask" in n and given.get(n) is not None]
    why = "" if all(map(_attention.is_ours, masks)) else _attention.OTHER_MASK
    if why or given.get("output_attentions"):
        leave_to_torch("attention", why or "output_attentions")
        return replace.own(module, *args, **kwargs)
    y = rebound(module, *args, **kwargs)
    return tuple(None if isinstance(t, (Scores, Weights)) else t for t in y) if isinstance(y, tuple) else y


def writes_attention(f: types.FunctionType, module: nn.Module) -> bool:
    """Return whether a module's forward writes attention out and uses its mask for nothing else."""
    dropouts = frozenset(n for n, m in module._modules.items() if type(m) is nn.Dropout)
    return "softmax" in f.__code__.co_names and _attends(f, dropouts)


@functools.cache
def _attends(f: types.FunctionType, dropouts: frozenset[str]) -> bool:
    tree = _masks.tree(f)
    if tree is None or _masks.computes(f, added=True):
        return False
    names = set[str]()
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Assign)), key=_end):
        if _step(node.value, names, dropouts) in tuple("m/+sd"):
            names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    steps: list[tuple[Any, str]] = [(node, step) for node in ast.walk(tree) if (step := _step(node, names, dropouts))]
    added = {node.right.id for node, step in steps if step == "+"}
    used = {id(_operand(node)) for node, _ in steps}
    others = [n for n in _uses(tree, names) if id(n) not in used and not _returned(n, tree)]
    order = "".join(step for _, step in sorted(steps, key=lambda s: _end(s[0])))
    return bool(USUAL.fullmatch(order)) and not others and added <= {*inspect.signature(f).parameters}


def _end(node: Any) -> tuple[int, int]:
    """Return the place where an expression ends: after those inside it."""
    return node.end_lineno, node.end_col_offset


def _operand(node: Any) -> Any:
    """Return the first operand of a product, sum or call."""
    if isinstance(node, ast.BinOp):
        return node.left
    return node.args[0] if isinstance(node, ast.Call) and node.args else None


def _step(node: Any, names: set[str], dropouts: frozenset[str]) -> str:
    """Return what a node does with scores, whose variables are `names`: m, computes them; / and +, divides them and
    adds a mask; s and d, applies softmax and dropout; v, multiplies them with values. "other": another softmax. Empty:
    anything else."""
    first = _operand(node)
    scores = isinstance(first, ast.Name) and first.id in names or bool(_step(first, names, dropouts) if first else "")
    called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    if called == "torch.matmul" and len(node.args) == 2:
        return "v" if scores else "m"
    if called.endswith("functional.softmax"):
        usual = scores and len(node.args) == 1 and [ast.unparse(k) for k in node.keywords] == ["dim=-1"]
        return "s" if usual else "other"
    if not scores:
        return ""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, ast.MatMult):
            return "v"
        if isinstance(node.op, ast.Div) and ast.unparse(node.right).startswith("math.sqrt("):
            return "/"
        masked = isinstance(node.op, ast.Add) and isinstance(node.right, ast.Name) and "mask" in node.right.id
        return "+" if masked else ""
    return "d" if called.removeprefix("self.") in dropouts and not node.keywords else ""


def _uses(tree: Any, names: set[str]) -> list[ast.Name]:
    """Return where variables of these names are read, or changed in place."""
    changed = {id(n.target) for n in ast.walk(tree) if isinstance(n, ast.AugAssign)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in names]
    return [n for n in found if isinstance(n.ctx, ast.Load) or id(n) in changed]


def _returned(node: ast.Name, tree: Any) -> bool:
    """Return whether a variable is an element of a tuple here, which the forward returns."""
    return any(isinstance(n, ast.Tuple) and node in n.elts for n in ast.walk(tree))
