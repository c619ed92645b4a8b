"""The results of a sweep as tables: for the terminal and the page, in Markdown, and as rows of results.jsonl."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.core.errors import counted
from fastgpt.core.page import markdown_table, number
from fastgpt.report.rows import read_json
from fastgpt.report.words import digits, duration
from fastgpt.sweep import interval
from fastgpt.sweep.interval import Mean
from fastgpt.sweep.jobs import Row
from fastgpt.sweep.outcome import RESULT, Outcome
from fastgpt.sweep.spec import Spec


@dataclass(frozen=True)
class Summary:
    """What the runs of a trial or variant came to together.

    Attributes:
        mean: of the metric over the seeds that completed; None: none did.
        last: the metric of a pruned run, where the mean is None.
        state: "complete", "pruned", "failed" or "unfinished".
        seconds: time of training of all its runs.
    """

    row: Row
    mean: Mean | None
    last: float | None
    state: str
    tokens_per_second: float | None
    seconds: float

    @property
    def complete(self) -> list[Outcome]:
        """The runs that completed."""
        return [one for one in self.row.outcomes if one.status == "complete"]


def summary(row: Row, seeds: int) -> Summary:
    """Return the summary of a trial or variant of `seeds` runs."""
    values = [one.value for one in row.outcomes if one.status == "complete" and one.value is not None]
    speeds = [one.tokens_per_second for one in row.outcomes if one.tokens_per_second is not None]
    others = [one for one in row.outcomes if one.status != "complete"]
    state = others[0].status if others else "complete" if len(values) == seeds else "unfinished"
    return Summary(
        row,
        interval.mean(values) if values else None,
        others[0].value if others else None,
        state,
        sum(speeds) / len(speeds) if speeds else None,
        sum(one.seconds for one in row.outcomes),
    )


def ranked(rows: Sequence[Row], spec: Spec) -> list[Summary]:
    """Return summaries, best first: those that are complete, then by how far they came."""
    sign = -1 if spec.rises else 1
    order = {"complete": 0, "unfinished": 1, "pruned": 2, "failed": 3}

    def key(one: Summary) -> tuple[int, bool, float]:
        value = one.last if one.mean is None else one.mean.value
        return order[one.state], value is None, sign * (value or 0.0)

    return sorted((summary(row, len(spec.seeds)) for row in rows), key=key)


def shown(mean: Mean | None, sign: str = "") -> str:
    """Return a mean with half the width of its interval, as "3.1000 ± 0.0200"; `sign` "+" gives a mean its sign."""
    if mean is None:
        return "-"
    form = ".4f" if abs(mean.value) < 100 else ",.1f"
    return f"{mean.value:{sign}{form}}" + ("" if mean.reach is None else f" ± {mean.reach:{form}}")


def difference(one: Summary, base: Summary) -> str:
    """Return the mean of the differences from `base` over the seeds that both completed, with its interval."""
    if one is base:
        return ""
    before = {run.seed: run.value for run in base.complete}
    pairs = [(run.value, before[run.seed]) for run in one.complete if run.seed in before]
    values = [a - b for a, b in pairs if a is not None and b is not None]
    return shown(interval.mean(values) if values else None, "+")


def cells(summaries: Sequence[Summary], spec: Spec, base: Summary | None = None) -> list[list[str]]:
    """Return a header and a row for each trial or variant; with `base`, the differences from it."""
    grid = spec.sampler == "grid"
    varied = [] if spec.variants else list(dict.fromkeys(key for one in summaries for key in one.row.given))
    head = ["variant" if grid else "trial", *varied, spec.metric]
    if base is not None:
        head.append(f"difference from {base.row.name}")
    table = [[*head, "tokens/s", "time", "runs"]]
    for one in summaries:
        value = digits(one.last) if one.mean is None and one.last is not None else shown(one.mean)
        line = [one.row.name, *(short(one.row.given.get(key, "")) for key in varied), value]
        if base is not None:
            line.append(difference(one, base))
        runs = f"{len(one.complete)} of {len(spec.seeds)}" + ("" if one.state == "complete" else f", {one.state}")
        table.append([*line, number(one.tokens_per_second), duration(one.seconds or None), runs])
    return table


def short(value: str) -> str:
    """Return the text of a setting, of a number with a fraction its first four digits."""
    try:
        return value if value.isdigit() else f"{float(value):.4g}"
    except ValueError:
        return value


def text(table: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned lines, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)
    return "\n".join(lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """Return a sentence on every run that failed."""
    return [
        f"{row.name}, seed {one.seed}: {one.reason}" for row in rows for one in row.outcomes if one.status == "failed"
    ]


def markdown(rows: Sequence[Row], spec: Spec, out: Path) -> str:
    """Return the table in Markdown, variants in the order of the file, and what it was measured with."""
    summaries = [summary(row, len(spec.seeds)) for row in rows] if spec.variants else ranked(rows, spec)
    base = summaries[0] if spec.variants and len(summaries) > 1 else None
    parts = [markdown_table(cells(summaries, spec, base)), provenance(spec, out)]
    return "\n\n".join([*parts, *failures(rows)]) + "\n"


def provenance(spec: Spec, out: Path) -> str:
    """Return in sentences what the figures are, with date, commit, device and versions."""
    several = f"{spec.metric}: mean over {counted(len(spec.seeds), 'seed')}"
    several += ", with 95 % interval (Student's t)" if len(spec.seeds) > 1 else ""
    several += "; differences are paired by seed" if spec.variants and len(spec.seeds) > 1 else ""
    at_once = spec.parallel or max(1, len(spec.devices))
    measured = [f"{several}. tokens/s: median over the steps, with {counted(at_once, 'run')} at a time."]
    measured.append(f"`fastgpt train {' '.join(spec.arguments({}))}`.")
    results = sorted(out.rglob(RESULT), key=lambda path: path.stat().st_mtime)
    if results:
        date = datetime.datetime.fromtimestamp(results[-1].stat().st_mtime, datetime.timezone.utc).date()
        machine = read_json(results[-1].with_name("run.json")).get("machine", {})
        facts = [machine.get("device_name"), f"torch {machine.get('torch')}", f"commit {machine.get('commit')}"]
        measured.append(f"{date}, {', '.join(str(fact) for fact in facts if fact)}.")
    return " ".join(measured)


def result_rows(rows: Sequence[Row], spec: Spec) -> str:
    """Return the lines of results.jsonl: one for each run."""
    lines: list[dict[str, Any]] = [
        {
            "name": row.name,
            "settings": row.given,
            "seed": one.seed,
            "status": one.status,
            spec.metric: one.value,
            "step": one.step,
            "tokens_per_second": one.tokens_per_second,
            "seconds": one.seconds,
            "reason": one.reason,
        }
        for row in rows
        for one in row.outcomes
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)
