"""One HTML page on a sweep: its table, the metric over each setting, importances, and the curves of the best runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgpt.core import page as core_page
from fastgpt.core.page import Plot, Section, Table
from fastgpt.report.command import read
from fastgpt.report.page import chart_sections, with_charts
from fastgpt.sweep import table
from fastgpt.sweep.jobs import Row
from fastgpt.sweep.space import Choices, Dimension
from fastgpt.sweep.spec import Spec
from fastgpt.sweep.table import Summary

CURVES = 10  # runs whose curves are shown
PLOTS = 12  # settings with a plot
LONG = 40  # rows of a table that is folded
WIDTH, HEIGHT = 7.0, 3.6  # inches


def render(spec: Spec, rows: Sequence[Row], out: Path, importances: Mapping[str, float]) -> str:
    """Return the page on a sweep in the folder `out`."""
    best = table.ranked(rows, spec)
    base = next((one for one in best if one.row.name == next(iter(spec.variants), None)), None)
    results = Table("Results, best first", table.cells(best, spec, base), long=len(best) > LONG)
    about = [table.provenance(spec, out)]
    about += [f"failed: {sentence}" for sentence in table.failures(rows)]
    sections = [Section("Results", about, [results])]
    if plots := _plots(spec, best):
        sections.append(Section("Metric and settings", plots=plots, tables=_importance_table(importances)))
    folders = [out / one.row.name / f"seed-{one.complete[0].seed}" for one in best[:CURVES] if one.complete]
    if folders:
        sections += chart_sections(read(folders))
    about_curves = f"Made by `fastgpt sweep`. The curves are those of the best {len(folders)}, with their first seed."
    return with_charts(f"Sweep {out.resolve().name}", about_curves, sections)


def _importance_table(importances: Mapping[str, float]) -> list[Table]:
    if not importances:
        return []
    title = "Share of each setting in how the best tenth of the trials differ from the others (PED-ANOVA)"
    return [Table(title, [["setting", "share"], *([name, f"{share:.0%}"] for name, share in importances.items())])]


def _plots(spec: Spec, best: Sequence[Summary]) -> list[Plot]:
    shown = [one for one in best if _value(one) is not None]
    if not shown:
        return []
    if spec.sampler == "grid":
        return [_plot("variants", f"{spec.metric} of each variant", lambda ax: _draw_variants(ax, shown, spec))]

    def of(one: Dimension) -> Plot:
        return _plot(one.key, f"{spec.metric} over {one.key}", lambda ax: _draw_setting(ax, one, shown, spec))

    return [of(one) for one in spec.dimensions[:PLOTS]]


def _plot(name: str, about: str, draw: Callable[[Any], None]) -> Plot:
    return Plot(name, about, core_page.figure(draw, WIDTH, HEIGHT))


def _value(one: Summary) -> float | None:
    value = one.last if one.mean is None else one.mean.value
    return value if value is not None and math.isfinite(value) else None


def _draw_variants(ax: Any, shown: Sequence[Summary], spec: Spec) -> None:
    """Draw the runs of each variant as circles and their mean with its interval, best at the top."""
    for y, one in enumerate(reversed(shown)):
        values = [run.value for run in one.complete]
        ax.plot(values, [y] * len(values), "o", color="0.6", markerfacecolor="none")
        if one.mean is not None:
            ax.errorbar(one.mean.value, y, xerr=one.mean.reach or 0.0, fmt="s", color="C0", capsize=3)
    ax.set_yticks(range(len(shown)), [one.row.name for one in reversed(shown)])
    ax.set(xlabel=f"{spec.metric} (circles: runs; squares: mean with 95 % interval)", ylim=(-0.6, len(shown) - 0.4))
    ax.grid(alpha=0.3)


def _draw_setting(ax: Any, one: Dimension, shown: Sequence[Summary], spec: Spec) -> None:
    """Draw the metric of each trial over a setting; pruned trials are open circles, at their last validation."""
    places = {value: float(i) for i, value in enumerate(one.values)} if isinstance(one, Choices) else {}
    for states, style, label in ((("complete",), "C0", "complete"), (("pruned", "unfinished"), "none", "pruned")):
        points = [s for s in shown if s.state in states]
        xs = [places[s.row.given[one.key]] if places else float(s.row.given[one.key]) for s in points]
        if points:
            ax.scatter(xs, [_value(s) for s in points], facecolors=style, edgecolors="C0", label=label)
    if places:
        ax.set_xticks(list(places.values()), list(places))
    elif not isinstance(one, Choices) and one.log:
        ax.set_xscale("log")
    ax.set(xlabel=one.key, ylabel=spec.metric)
    ax.grid(alpha=0.3)
    if any(s.state != "complete" for s in shown):
        ax.legend()
