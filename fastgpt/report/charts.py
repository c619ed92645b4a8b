"""The charts of a page: which figures share one, its title, and the points that its script draws."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt.core.page import number
from fastgpt.report.metrics import Metrics
from fastgpt.report.run import RunFiles, rounded
from fastgpt.report.series import Point

LOSS, STEPS, EVALUATIONS = "Loss", "Steps", "Evaluations"
TITLES = {
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Throughput (tokens/s)",
    "memory_gb": "Memory (GB)",
    "mfu_causal": "Share of peak FLOP/s, causal attention",
    "power_watts": "Power of the GPU (W)",
    "watts": "Mean power of each session (W)",
    "joules": "Energy of each session (J)",
}
APART = {"tokens", "seconds", "mfu_full"}  # axes, and what mfu_causal says with another count
MOST_CHARTS = 48


@dataclass(frozen=True)
class Chart:
    """A chart of a figure of the steps and of one of the validations; either may be missing ("")."""

    section: str
    title: str
    step: str = ""
    validation: str = ""


def is_evaluation(name: str) -> bool:
    """Return whether a validation's figure is one of a preset or of the user's own evaluation, as a whole: no subject
    of a task, and not its time."""
    own = name.startswith("val_") or name in ("joules", "watts")
    return not own and "/" not in name and not name.endswith((".seconds", ".share_of_time"))


def charts_of(runs: Sequence[RunFiles]) -> tuple[list[Chart], int]:
    """Return the charts of runs, and how many of evaluations were left out."""
    steps = _ordered(name for run in runs for name in run.metrics.step_names() if name not in APART)
    several = {name for run in runs for name in run.metrics.validations if len(run.metrics.points(name)) > 1}
    validated = _ordered(name for run in runs for name in run.metrics.validations)
    found = []
    for name in steps:
        validation = f"val_{name}" if f"val_{name}" in validated else ""
        section = LOSS if name not in TITLES or name == "loss" else STEPS
        title = TITLES.get(name, name) + (" (lines: training, circles: validation)" if validation else "")
        found.append(Chart(section, title, name, validation))
    paired = {chart.validation for chart in found}
    for name in validated:
        section = STEPS if name in TITLES else LOSS if name.startswith("val_") else EVALUATIONS
        if name in several and name not in paired and (section != EVALUATIONS or is_evaluation(name)):
            found.append(Chart(section, TITLES.get(name, name), "", name))
    return found[:MOST_CHARTS], max(0, len(found) - MOST_CHARTS)


def _ordered(names: Iterator[str]) -> list[str]:
    return list(dict.fromkeys(names))


def data_of(runs: Sequence[RunFiles], charts: Sequence[Chart]) -> str:
    """Return the points of the charts as JSON that may stand in a script element of HTML."""
    lists: list[dict[str, Any]] = [_run_data(run, charts) for run in runs]
    pairs = [[chart.step, chart.validation] for chart in charts]
    text = json.dumps({"runs": lists, "charts": pairs}, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _run_data(run: RunFiles, charts: Sequence[Chart]) -> dict[str, Any]:
    metrics = run.metrics
    ends = metrics.steps.ends
    axis = {
        "step": [int(step) for step, _, _ in ends],
        "tokens": [rounded(tokens, 7) for _, tokens, _ in ends],
        "hours": [rounded(seconds / 3600, 6) for _, _, seconds in ends],
    }
    steps = {c.step: _columns(metrics.steps.points(c.step)) for c in charts if c.step in metrics.step_names()}
    validations = {c.validation: _columns(metrics.points(c.validation)) for c in charts if c.validation}
    return {"name": run.name, "axis": axis, "steps": steps, "validations": validations}


def _columns(points: Iterator[Point] | Sequence[Point]) -> list[list[float | None]]:
    """Return the columns of points: steps, means, and extremes unless every point is of one row."""
    rows = list(points)
    columns = [[rounded(p.step, 7) for p in rows], [rounded(p.mean) for p in rows]]
    if any(p.low != p.high for p in rows):
        columns += [[rounded(p.low) for p in rows], [rounded(p.high) for p in rows]]
    return columns


def body(indices: Sequence[int], charts: Sequence[Chart], runs: Sequence[RunFiles]) -> str:
    """Return the HTML in which the page's script draws the charts of a section."""
    return f'<div class="charts">{"".join(_figure(i, charts[i], runs) for i in indices)}</div>'


def _figure(index: int, chart: Chart, runs: Sequence[RunFiles]) -> str:
    about = html.escape(f"{chart.title}: {'; '.join(_course(chart, run) for run in runs)}", quote=True)
    wide = " first" if chart.step == "loss" else ""
    return (
        f'<figure class="chart{wide}" data-chart="{index}"><figcaption>{html.escape(chart.title)}</figcaption>'
        f'<div class="plot" role="img" tabindex="0" aria-label="{about}"></div>'
        '<p class="values" aria-live="polite"></p></figure>'
    )


def _course(chart: Chart, run: RunFiles) -> str:
    """Return in words where a figure began and ended."""
    points = _points(chart, run.metrics)
    if not points:
        return f"{run.name} has none"
    return f"{run.name} from {number(points[0].mean)} to {number(points[-1].mean)}"


def _points(chart: Chart, metrics: Metrics) -> list[Point]:
    return list(metrics.steps.points(chart.step)) if chart.step else metrics.points(chart.validation)
