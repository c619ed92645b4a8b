"""The model's rows as text and as a page: kernels of a step with the unit that limits each, sums, comparisons."""

from __future__ import annotations

import itertools
import re
from typing import Any

from fastgpt.bench import plots
from fastgpt.bench.model import library
from fastgpt.bench.model.chips import CHIPS, QUARTERS
from fastgpt.core.page import Plot, Section, Table, number, page

NOTE = "model, not measured"
HEAD = ["kernel", "op", "launches", "us", "ms", "limit", "GB", "TFLOP", "waves", "blocks/SM", "conflicts", "variant"]
FASTEST = 5  # launch shapes of a kernel that are printed
CLASSES = {"product": "matrix products", "attention": "attention", "own": "other kernels of fastgpt",
           "memory": "PyTorch's other kernels"}  # fmt: skip
Row = dict[str, Any]
Key = tuple[str, str, str]


def steps(rows: list[Row]) -> dict[Key, tuple[Row, list[Row]]]:
    """Return by (chip, model, kernels) the sums of a step, and its kernels, the longest first."""
    found: dict[Key, tuple[Row, list[Row]]] = {}
    for row in rows:
        if row["figure"] == "step":
            key = row["chip"], row["model"], row["kernels"]
            mine = [r for r in rows if r["figure"] == "kernel" and (r["chip"], r["model"], r["kernels"]) == key]
            found[key] = row, sorted(mine, key=lambda r: -r["ms"])
    return found


def title(step: Row) -> str:
    """Return the name of a step."""
    kernels = "" if step["kernels"] == "auto" else f", {step['kernels']}"
    settings = f", {step['settings']}" if step.get("settings") else ""
    return f"{step['model']}, B {step['batch']} x T {step['block']}, {step['chip']}{kernels}{settings}"


def sources(row: Row) -> str:
    """Return the commit of a row's kernels, or the digest of their sources."""
    return str(row["machine"]["commit"] or row["machine"]["sources"])


def kernel_rows(kernels: list[Row], only: str) -> list[list[str]]:
    """Return the kernels whose name, op or class matches `only`, as cells."""
    lines = [HEAD]
    for r in kernels:
        if not re.search(only, f"{r['kernel']} {r['op']} {r['class']}", re.I):
            continue
        cells = [r["kernel"], r["op"], str(r["count"]), f"{r['us']:.1f}", f"{r['ms']:.3f}", r["limit"]]
        cells += [f"{r['gb']:.3f}", f"{r['tflop']:.3f}" if r["tflop"] else "-"]
        cells += [number(r.get(key)) for key in ("waves", "blocks_per_sm", "conflicts")]
        lines.append([*cells, r["variant"][:80]])
    return lines


def step_line(step: Row) -> str:
    """Return the sums of a step in a sentence."""
    parts = [f"{CLASSES[k]} {step[k + '_ms']:.1f}" for k in CLASSES if k + "_ms" in step]
    gaps = f"{step['launches']} launches with gaps of {1e6 * library.GAP:g} us {step['gaps_ms']:.1f}"
    return (
        f"{step['ms']:.1f} ms = {', '.join(parts)}, {gaps}; {step['tokens_per_s']:,.0f} tokens/s; "
        f"without attention {step['ms_without_attention']:.1f} ms"
    )


def aligned(lines: list[list[str]]) -> str:
    """Return cells in columns; all but the first two and the last are set to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = (0, 1, len(widths) - 1)
    return "\n".join(
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def text(rows: list[Row], only: str = "") -> str:
    """Return everything as text."""
    parts = []
    for step, kernels in steps(rows).values():
        parts.append(f"{title(step)} ({NOTE})\n{aligned(kernel_rows(kernels, only))}\n{step_line(step)}")
    if ops := op_rows(rows):
        parts.append(f"single ops, forward and backward, us ({NOTE})\n{aligned(ops)}")
    if shapes := shape_rows(rows):
        parts.append(f"launch shapes of attention's Triton kernels, us ({NOTE})\n{aligned(shapes)}")
    return "\n\n".join(parts)


def op_rows(rows: list[Row]) -> list[list[str]]:
    """Return single ops by provider, as cells; empty if none was modelled."""
    found = [r for r in rows if r["figure"] == "op"]
    lines = [["op", "shape", "chip", "provider", "us", "launches", "limit", "longest kernel"]] if found else []
    for r in found:
        start = [r["op"], r["shape"], r["chip"], r["provider"]]
        rest = ["-", "-", "-", r["red"]] if "red" in r else []
        lines.append([*start, *(rest or [f"{r['us']:.1f}", str(r["launches"]), r["limit"], r["slowest"]])])
    return lines


def shape_rows(rows: list[Row]) -> list[list[str]]:
    """Return the fastest launch shapes of each kernel, chip and head dimension, and the one in use, as cells."""
    found = [r for r in rows if r["figure"] == "tile"]
    head = "kernel chip D queries keys warps stages limit registers programs us bound"
    lines = [[*head.split(), ""]] if found else []
    for _, group in itertools.groupby(found, lambda r: (r["chip"], r["head_dim"], r["kernel"])):
        best, *others = (r for r in group if "us" in r)
        for r in [best, *others[: FASTEST - 1], *(r for r in others[FASTEST - 1 :] if r["in_use"])]:
            start = [r["kernel"], r["chip"], str(r["head_dim"]), *map(str, r["tile"])]
            rest = [str(r["registers_of_thread"]), str(r["blocks_per_sm"]), f"{r['us']:.1f}", r["limit"]]
            lines.append([*start, *rest, "in use" if r["in_use"] else ""])
    return lines


def change(before: Row, after: Row) -> list[str]:
    """Return a step before and after as cells: ms, then ms without attention, with their changes."""
    cells = [title(after), sources(before), sources(after)]
    for key in ("ms", "ms_without_attention", "launches"):
        cells += [number(before[key]), number(after[key]), f"{(after[key] / before[key] - 1):+.1%}"]
    return cells


def compared(before: list[Row], after: list[Row]) -> str:
    """Return the steps of two files of rows beside each other, then the ops whose time differs most."""
    old, new = steps(before), steps(after)
    names = ("ms", "without attention", "launches")
    lines = [["step", "before", "after", *(c for n in names for c in (n, "then", "change"))]]
    both = [key for key in new if key in old]
    lines += [change(old[key][0], new[key][0]) for key in both]
    parts = [f"before and after ({NOTE})\n{aligned(lines)}"]
    for key in both:
        moved = [["op", "class", "ms", "then", "difference"]]
        sums = [_by_op(kernels) for _, kernels in (old[key], new[key])]
        for name in sorted(set(sums[0]) | set(sums[1]), key=lambda n: sums[1].get(n, 0.0) - sums[0].get(n, 0.0)):
            a, b = (s.get(name, 0.0) for s in sums)
            if abs(b - a) >= 0.005:
                moved.append([*name, f"{a:.3f}", f"{b:.3f}", f"{b - a:+.3f}"])
        parts.append(f"{title(new[key][0])}\n{aligned(moved)}")
    return "\n\n".join(parts)


def _by_op(kernels: list[Row]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for r in kernels:
        key = r["op"], "attention" if r["attention"] else r["class"]
        found[key] = found.get(key, 0.0) + r["ms"]
    return found


def roofline(step: Row, kernels: list[Row]) -> Plot | None:
    """Draw the kernels of fastgpt as points of an instruction roofline: instructions of warps a second over
    instructions a byte of memory, under the chip's issue rate and memory rate."""
    points = {r["kernel"]: (r["instructions"] / (1e9 * r["gb"]), r["instructions"] / r["us"] * 1e6)
              for r in reversed(kernels) if r.get("instructions") and r["gb"]}  # fmt: skip
    chip = CHIPS[step["chip"]]
    roofs = chip.multiprocessors * QUARTERS * chip.clock, chip.dram
    return plots.roofline(f"Kernels of {title(step)}: {NOTE}", points, *roofs) if points else None


def page_of(rows: list[Row], only: str = "") -> str:
    """Return the page: steps, their kernels and plots, single ops."""
    sums = [["step", "ms", *CLASSES.values(), "gaps", "launches", "tokens/s", "without attention"]]
    sections = []
    for step, kernels in steps(rows).values():
        cells = [number(step.get(f"{kind}_ms")) for kind in CLASSES]
        sums.append([title(step), number(step["ms"]), *cells, number(step["gaps_ms"]), str(step["launches"]),
                     f"{step['tokens_per_s']:,.0f}", number(step["ms_without_attention"])])  # fmt: skip
        lines = Table(f"Kernels ({NOTE})", kernel_rows(kernels, only), long=len(kernels) > 40)
        drawn = roofline(step, kernels)
        about = [f"{step_line(step)}.", f"Sources: {sources(step)}."]
        sections.append(Section(title(step), about, [lines], [drawn] if drawn else []))
    first = Section("Steps", [f"Milliseconds; {NOTE}."], [Table(f"A training step ({NOTE})", sums)])
    if ops := op_rows(rows):
        sections.append(Section("Single ops", ["Forward and backward, us."], [Table(f"Ops ({NOTE})", ops)]))
    told = f"Every figure here is from a {NOTE}: lower bounds of kernels, estimates of libraries; docs/step-budget.md."
    return page("fastgpt: a model of training steps", told, [first, *sections])
