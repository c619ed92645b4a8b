"""The results of an evaluation as one HTML page: tables, and a plot of each figure over the checkpoints of a run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from fastgpt.core import page
from fastgpt.evaluate import table
from fastgpt.evaluate.results import Figure, Results


def render(results: Sequence[Results]) -> str:
    """Return the page of the results of one model, or of the checkpoints of a run, oldest first.

    Raises:
        UserError: there is something to plot and matplotlib is not installed.
    """
    last = results[-1]
    sections = [_figures(last)]
    if len(results) > 1:
        about = "Bars are standard errors; the dashed line is a model that guesses."
        sections.append(page.Section("Checkpoints", [about], plots=_plots(results)))
    sections.append(_provenance(last))
    step = last.model.get("step")
    at = "" if step is None else f" at step {step:,}"
    return page.page(f"Evaluation of {last.model['name']}", f"Preset `{last.preset}`{at}, {last.date}.", sections)


def _figures(results: Results) -> page.Section:
    tables = [page.Table("Tasks", table.rows(results))]
    parts = table.rows(results, parts=True)
    if len(parts) > 1:
        tables.append(page.Table(f"Subjects and paradigms ({len(parts) - 1} figures)", parts, long=True))
    about = ["Shares are from 0 to 1; the standard error is that of the mean over the items.", *results.notes]
    return page.Section("Figures", about, tables)


def _provenance(results: Results) -> page.Section:
    facts = [["what", "value"], *([k, str(v)] for k, v in {**results.model, **results.versions}.items())]
    return page.Section("Provenance", [], [page.Table("Model and versions", facts)])


def _plots(results: Sequence[Results]) -> list[page.Plot]:
    """Return a plot for each task and kind of metric; the accuracies of a task share one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for f in [f for r in results for f in r.figures if not table.is_part(f)]:
        metrics = groups.setdefault((f.task, "accuracy" if f.metric.startswith("acc") else f.metric), [])
        metrics += [f.metric] * (f.metric not in metrics)
    unit = "tokens" if all(r.model.get("tokens") is not None for r in results) else "step"
    found = []
    for (task, kind), metrics in groups.items():
        lines = [[(r.model.get(unit) or 0, r.figure(task, metric)) for r in results] for metric in metrics]
        known = [[(x, f) for x, f in line if f is not None] for line in lines]
        if max(map(len, known)) > 1:
            draw = functools.partial(_draw, lines=known, title=f"{task}: {kind}", unit=unit)
            png = page.figure(draw, 6, 2.8)
            found.append(page.Plot(f"{task}-{kind}.png", f"{kind} of {task} over the checkpoints", png))
    return found


def _draw(axes: Any, lines: list[list[tuple[int, Figure]]], title: str, unit: str) -> None:
    """Draw the metrics of a task with error bars, and the chance line."""
    for line in lines:
        figures = [f for _, f in line]
        errors = [f.stderr or 0.0 for f in figures]
        axes.errorbar(
            [x for x, _ in line],
            [f.value for f in figures],
            yerr=errors,
            marker="o",
            markersize=4,
            capsize=3,
            label=figures[-1].metric,
        )
    last = lines[0][-1][1]
    if last.chance is not None:
        axes.axhline(last.chance, color="gray", linestyle="--", linewidth=1, label="chance")
    better = {True: " (higher is better)", False: " (lower is better)", None: ""}[last.higher_is_better]
    axes.set_title(title + better, fontsize=10)
    axes.set_xlabel(unit)
    axes.grid(alpha=0.3)
    if len(lines) > 1 or last.chance is not None:
        axes.legend(fontsize=8)
