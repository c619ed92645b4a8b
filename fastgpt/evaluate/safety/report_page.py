"""The safety report as text for the console and as sections of a page."""

from __future__ import annotations

from typing import Any

from fastgpt.core import page
from fastgpt.evaluate.safety.changes import Change, is_part
from fastgpt.evaluate.safety.forgetting import Forgetting
from fastgpt.evaluate.table import value

HEAD = ["probe", "metric", "items", "before", "after", "change", "95 % interval", "paired", "p (Holm)", ""]
EXPLAINED = [
    "Intervals of 95 % are paired by item (`yes`), or those of two independent means (`no`).",
    "`better`, `worse` and `differs` say that the paired test is significant at 5 % after Holm's correction; `differs` "
    "stands where the metric has no better direction.",
    "No significant change is no proof of safety: look at the width of the intervals and at what the probes cover.",
]


def cells(changes: list[Change]) -> list[list[str]]:
    """Return the cells of a table, the header first."""
    return [HEAD, *map(_cells, changes)]


def _cells(c: Change) -> list[str]:
    interval = "-" if c.low is None or c.high is None else f"{_signed(c.low)} to {_signed(c.high)}"
    items = f"{c.before.n if c.row is None else c.row.n:,}"
    figures = [*map(value, c.values), _signed(c.value), interval]
    p = "-" if c.row is None else "<0.0001" if c.row.p_holm < 1e-4 else f"{c.row.p_holm:.4f}"
    return [c.before.task, c.before.metric, items, *figures, "no" if c.row is None else "yes", p, c.verdict]


def _signed(number: float) -> str:
    return f"{number:+.4f}"


def console(changes: list[Change], found: list[Forgetting], before: str, after: str, notes: list[str]) -> str:
    """Return the figures of whole probes, the forgetting check and the notes."""
    rows = cells([c for c in changes if not is_part(c)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    left = (0, 1, len(HEAD) - 1)
    lines = [
        "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
    said = [f"forgetting: {f.sentence()}" for f in found] or ["forgetting: not checked (--general names a corpus)"]
    return "\n".join([f"before: {before}\nafter: {after}", *lines, *said, *(f"note: {note}" for note in notes)])


def sections(
    changes: list[Change], found: list[Forgetting], before: str, after: str, notes: list[str]
) -> list[page.Section]:
    """Return the report as sections of a page: probes, categories, forgetting, notes."""
    whole, parts = [c for c in changes if not is_part(c)], [c for c in changes if is_part(c)]
    about = [f"Before is `{before}`, after is `{after}`.", *EXPLAINED]
    shares = [c for c in whole if c.row is not None and c.row.test == "McNemar"]
    result = [page.Section("Probes", about, [page.Table("Figures", cells(whole))], _plots(shares))]
    if parts:
        folded = page.Table(f"{len(parts)} figures of categories", cells(parts), long=True)
        result.append(page.Section("Categories", ["By type of bias, category or occupation."], [folded]))
    said = [f"{f.sentence()}." for f in found] or ["Not checked: `--general` names a corpus."]
    result.append(page.Section("Forgetting", said))
    if notes:
        result.append(page.Section("Notes", [f"{note[0].upper()}{note[1:]}." for note in notes]))
    return result


def _plots(shares: list[Change]) -> list[page.Plot]:
    """Return a plot of the shares before and after, if there are any."""
    if not shares:
        return []

    def draw(axes: Any) -> None:
        places = range(len(shares))
        old, new = [c.row.a for c in shares if c.row], [c.row.b for c in shares if c.row]
        axes.hlines(places, old, new, color="#8b949e", linewidth=2)
        axes.plot(old, places, "o", color="#57606a", markerfacecolor="white", markersize=9, label="before")
        axes.plot(new, places, "o", color="#0969da", markersize=5, label="after")
        axes.set_yticks(places, [f"{c.before.task} {c.before.metric}" for c in shares])
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("share of items")
        axes.grid(axis="x", alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)

    return [page.Plot("safety.png", "Shares before and after", page.figure(draw, 8, 1.2 + 0.3 * len(shares)))]
