"""What causal_matrix.py and encoder_matrix.py share: the result of a type of transformers, what a patched model must do
beside equal outputs, running many types, and the table of a page."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.patching import PARTS

NEW = 6  # tokens to generate
EPS = torch.finfo(torch.float32).eps
GREEDY: dict[str, Any] = dict(
    max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, eos_token_id=None,
    pad_token_id=0, use_cache=True, num_beams=1,
)  # fmt: skip


@dataclass
class Row:
    """Result of one type. ops and left: of each part, the ops and the reasons; wrong: what breaks the rule; notes: what
    the unpatched model does not do; patterns: what was recognised."""

    kind: str
    model: str = ""
    ops: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)
    error: float = 0.0  # of the unpatched model's logits
    quick: bool = False  # whether only a part was compared

    @property
    def uncompared(self) -> str:
        """Why not even plain batches were compared; empty if they were."""
        return next((n for n in self.notes if n.startswith("plain")), "")

    @property
    def full(self) -> bool:
        """Whether the ops compute every part that the type has."""
        return bool(self.ops) and not self.uncompared and not any(self.left.values()) and not self.wrong


def call_strictly(row: Row, patched: Any, calls: Iterable[dict[str, Any]]) -> None:
    """Call a patched model, in training where a call has labels, with falling back to PyTorch an error. What falls back
    is left after all."""
    for given in calls:
        try:
            with fastgpt.ops.use(strict=True):
                patched.train(given.get("labels") is not None)(**given)
        except RuntimeError as e:
            op, _, why = str(e).partition(": ")
            part = next((p for p, ops in row.ops.items() if op in ops), "attention")
            row.left[part] = sorted({*row.left[part], why.partition(": only PyTorch")[0]})


def compare_generation(
    row: Row, model: Any, name: str, given: dict[str, Any], line: Callable[[Exception], str]
) -> bool:
    """Compare greedy generation with the cache, as far as no token is a close call; return whether the unpatched model
    generates at all. given: what generate gets; line: returns a sentence on an exception."""
    try:
        wanted = model.generate(**{**GREEDY, **given})
    except Exception as e:
        row.notes.append(f"generation: {line(e)}")
        return False
    try:
        got = fastgpt.patch(copy.deepcopy(model), quiet=True).generate(**{**GREEDY, **given})
    except Exception as e:
        row.wrong.append(f"generation, {name}: {line(e)}")
        return True
    logits = torch.stack(wanted.logits, 1)  # (B, NEW, V)
    top = logits.topk(2, -1).values
    allowed = 2 * row.error + EPS * float(logits.abs().max())
    clear = (top[..., 0] - top[..., 1] > 10 * allowed).long().cumprod(1).bool()
    ours, theirs = (g.sequences.flatten(0, -2)[:, -NEW:] for g in (got, wanted))  # (B, ...), or (B, codebooks, ...)
    if (ours != theirs)[clear].any():
        row.wrong.append(f"generation, {name}: other tokens")
    return True


def kept(
    kind: str, folder: Path | None, quick: bool, check: Callable[[str, bool], Row], line: Callable[[Exception], str]
) -> Row:
    """Return the result of a type, from the folder if it is there; an exception of the type itself is a note."""
    path = folder / f"{kind}{'.quick' if quick else ''}.json" if folder else None
    if path and path.exists():
        return Row(**json.loads(path.read_text()))
    torch.manual_seed(0)
    try:
        row = check(kind, quick)
    except Exception as e:
        row = Row(kind, notes=[f"not built: {line(e)}"])
    if path:
        path.write_text(json.dumps(asdict(row), indent=1) + "\n")
    return row


def table(rows: list[Row]) -> dict[str, str]:
    """Return the parts of a page that come from rows: the table, and the reasons that its numbers stand for."""
    notes: list[str] = []

    def number(text: str) -> int:
        if text not in notes:
            notes.append(text)
        return notes.index(text) + 1

    lines = [f"| type | {' | '.join(PARTS)} |", f"|{'---|' * (len(PARTS) + 1)}"]
    for row in rows:
        cells = []
        for part in PARTS:
            ops = ", ".join(f"`{op}`" for op in row.ops.get(part, []))
            left = "".join(f" [{number(why)}]" for why in row.left.get(part, []))
            cells.append(f"{ops}{', ' if ops and left else ''}{'left' if left else ''}{left}" or "none")
        if not row.ops:
            cells = [f"left [{number(row.notes[0])}]"] * len(PARTS)
        name = row.kind + r"\*" * row.quick
        name += f", not compared [{number(row.uncompared)}]" if row.uncompared else ""
        lines.append(f"| {name}{' **WRONG**' if row.wrong else ''} | {' | '.join(cells)} |")
    return {"table": "\n".join(lines), "notes": "".join(f"{i}. {note}\n" for i, note in enumerate(notes, 1))}


def arguments(about: str | None, quick: str, writes: str) -> argparse.ArgumentParser:
    """Return the parser of a check's command. quick, writes: what --quick compares, and what --write writes."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--quick", action="store_true", help=f"compare {quick}")
    parser.add_argument("--kept", type=Path, help="folder of results to go on from")
    parser.add_argument("--write", action="store_true", help=f"write {writes}")
    return parser


def results(kinds: Iterable[str], folder: Path | None, result: Callable[[str], Row]) -> list[Row]:
    """Check types, say what each one is, and return their rows."""
    warnings.simplefilter("ignore")
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in kinds:
        row = result(kind)
        rows.append(row)
        state = "full" if row.full else "WRONG" if row.wrong else "partly" if row.ops else "NOT BUILT"
        left = {p: w for p, w in row.left.items() if w}
        print(f"{kind}: {state} {left or ''} {row.wrong or ''} {row.notes or ''}", flush=True)
    return rows
