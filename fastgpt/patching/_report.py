"""Report of what `patch` replaced in a model, what it left, and why."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

PARTS = ("norm", "mlp", "attention", "rope", "loss", "embedding")


@dataclass(frozen=True)
class Entry:
    """One line of a report: `op` replaced `what` in module `name`, or, if `op` is empty, did not, for the reason
    `why`."""

    name: str
    part: str
    what: str
    op: str
    why: str


@dataclass(frozen=True)
class Report:
    """Report of what was replaced and what was left; it prints as a table, with one line for similar layers.

    notes: sentences about the rest of the model, such as quantised linear layers, which stay as they are.
    """

    replaced: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    dry_run: bool = False
    options: tuple[Any, ...] = ()
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'would replace' if self.dry_run else 'replaced'} {len(self.replaced)}, left {len(self.left)}"]
        counts: dict[tuple[str, ...], int] = {}
        for e in [*self.replaced, *self.left]:
            end = f"fastgpt.ops.{e.op}" if e.op else f"left: {e.why}"
            row = (e.part, re.sub(r"\d+", "*", e.name) or "(the model)", e.what, end)
            counts[row] = counts.get(row, 0) + 1
        rows = [(p, name if n == 1 else f"{name} ({n})", what, end) for (p, name, what, end), n in counts.items()]
        widths = [max((len(r[i]) for r in rows), default=0) for i in range(3)]
        lines += ["  ".join([*(c.ljust(w) for c, w in zip(r, widths)), r[3]]) for r in rows]
        return "\n".join([*lines, *self.notes])

    def summary(self) -> str:
        """Return one line: how many modules of each part were replaced, and how many were left."""
        done = f"{'would replace' if self.dry_run else 'replaced'} {_counted(self.replaced) or 'nothing'}"
        return done + (f"; left {_counted(self.left)}" if self.left else "")


def _counted(entries: list[Entry]) -> str:
    """Return the parts with their numbers: "norm 5, mlp 2"."""
    numbers = Counter(e.part for e in entries)
    return ", ".join(f"{part} {numbers[part]}" for part in PARTS if numbers[part])


def notes_on(model: nn.Module) -> list[str]:
    """Return what a report says about modules that no op replaces but that a user would ask about."""
    kinds = Counter(type(m).__name__ for m in model.modules() if _is_quantised(m))
    return [f"{n} quantised {kind} modules stay as they are" for kind, n in kinds.items()]


def _is_quantised(module: nn.Module) -> bool:
    """Return whether a module holds a matrix of whole numbers (bitsandbytes, GPTQ, AWQ) or a quantised tensor of
    torchao."""
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if isinstance(t, Tensor)]
    linear = "linear" in type(module).__name__.lower() or isinstance(module, (nn.Linear, nn.Embedding))
    return linear and any(
        type(t).__module__.startswith("torchao") or (t.dim() == 2 and not (t.is_floating_point() or t.is_complex()))
        for t in tensors
    )
