"""The report's plots."""

from __future__ import annotations

import re
from typing import Any

from fastgpt.core.page import Plot, figure

OURS, WORSE, THEIRS, GRID = "#2f6f4f", "#b4532a", "#8b949e", "#d0d7de"


def speeds(
    title: str, bars: list[tuple[str, tuple[float, ...]]], axis: str = "PyTorch's time / time; over 1: faster"
) -> Plot:
    """Draw horizontal bars of PyTorch's time over each one's (or of another ratio, which `axis` names), with whiskers
    from 20 to 80 % and a line at one."""
    labels = [label for label, _ in bars]
    middles = [found[0] for _, found in bars]
    low = [found[0] - found[1] if len(found) == 3 else 0.0 for _, found in bars]
    high = [found[2] - found[0] if len(found) == 3 else 0.0 for _, found in bars]

    def draw(ax: Any) -> None:
        colors = [THEIRS if "torch" in label else OURS if m >= 1 else WORSE for label, m in zip(labels, middles)]
        whiskers = {"xerr": [low, high], "error_kw": {"ecolor": "#1b1f24", "elinewidth": 1, "capsize": 2}}
        ax.barh(range(len(bars)), middles, color=colors, height=0.7, **whiskers)
        ax.axvline(1, color="#1b1f24", linewidth=1)
        ax.set_yticks(range(len(bars)), labels, fontsize=8)
        ax.invert_yaxis()
        ends = [m + h for m, h in zip(middles, high)]
        for i, (m, end) in enumerate(zip(middles, ends)):
            ax.text(end + 0.01 * max(ends), i, f" {m:.2f}", va="center", fontsize=8)
        ax.set_xlim(0, 1.1 * max(1.0, *ends))
        ax.set_xlabel(axis, fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(axis="x", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)

    return Plot(_name(title), title, figure(draw, 9.0, 1.0 + 0.27 * len(bars)))


def losses(title: str, curves: dict[str, list[float]]) -> Plot:
    """Draw the losses of all variants over each other."""

    def draw(ax: Any) -> None:
        for i, (name, values) in enumerate(curves.items()):
            style = ("-", "--", "-.", ":")[i % 4]
            ax.plot(range(1, 1 + len(values)), values, style, label=name, linewidth=max(1.0, 3.0 - 0.5 * i), alpha=0.8)
        ax.set_xlabel("step", fontsize=8)
        ax.set_ylabel("loss (nats per token)", fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(color=GRID, linewidth=0.6)
        ax.legend(fontsize=7)
        ax.spines[["top", "right"]].set_visible(False)

    return Plot(_name(title), title, figure(draw, 7.0, 3.2))


def roofline(title: str, points: dict[str, tuple[float, float]], issue: float, memory: float) -> Plot:
    """Draw an instruction roofline. points: name -> instructions of warps a byte, and a second; issue: the most
    instructions a second; memory: bytes a second. Source: Ding, Williams 2019 (DOI 10.1109/PMBS49563.2019.00007)."""
    ends = [f(x for x, _ in points.values()) for f in (min, max)]
    low, high = min(ends[0], issue / memory) / 2, max(ends[1], issue / memory) * 4

    def draw(ax: Any) -> None:
        ax.plot([low, issue / memory, high], [low * memory, issue, issue], color="#1b1f24", linewidth=1)
        for i, (name, (x, y)) in enumerate(points.items()):
            ax.plot(x, y, "o", color=OURS, markersize=5)
            ax.annotate(name, (x, y), (4, 4 - 9 * (i % 2)), textcoords="offset points", fontsize=7)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("instructions of warps per byte of memory", fontsize=8)
        ax.set_ylabel("instructions of warps per second", fontsize=8)
        ax.set_title(title, fontsize=10, loc="left")
        ax.grid(color=GRID, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)

    return Plot(_name(title), title, figure(draw, 8.0, 4.5))


def _name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") + ".png"
