"""One HTML page on runs: charts, final values, samples, settings and machines. It loads nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from fastgpt.core import page as core_page
from fastgpt.core.page import Section
from fastgpt.report import tables
from fastgpt.report.charts import EVALUATIONS, LOSS, MOST_CHARTS, STEPS, Chart, body, charts_of, data_of
from fastgpt.report.run import RunFiles

COLOURS = 10  # of page.css; more runs share them, and differ in their dashes
SAMPLES, CHARACTERS = 6, 4000  # of each run; of each sample
HINT = "Point at a chart for its values, or focus it and press the arrow keys. The controls are those of all charts."
_HERE = Path(__file__).parent


def render(runs: Sequence[RunFiles]) -> str:
    """Return the page on runs whose rows have been read."""
    sections = [
        Section("Summary", _notes(runs), [tables.final_values(runs)]),
        *chart_sections(runs),
        *_samples(runs),
        Section("Settings and provenance", [], [*tables.settings(runs), tables.provenance(runs)]),
    ]
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    about = "Made by `fastgpt report`." + " Losses of different tokenizers do not compare." * (len(runs) > 1)
    return with_charts(title, about, sections)


def with_charts(title: str, about: str, sections: list[Section]) -> str:
    """Return a page whose sections may be those of `chart_sections`."""
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return core_page.page(title, about, sections, style, script)


def _notes(runs: Sequence[RunFiles]) -> list[str]:
    """Return what a reader has to know of the points and of lines that were not read."""
    widest = max(run.metrics.steps.width for run in runs)
    thinned = (
        f"Long runs are thinned: a point is the mean of up to {widest:,} steps, and the band around a line reaches "
        "from their lowest to their highest value."
    )
    ends = [f"{run.name}: {end}." for run in runs if (end := run.ended()).startswith("the process")]
    return [thinned] * (widest > 1) + [sentence for run in runs if (sentence := run.unread())] + ends


def _controls(runs: Sequence[RunFiles], charts: Sequence[Chart]) -> str:
    """Return the points of all charts, and their controls: the runs to show, the axes and the smoothing."""
    data = f'<script type="application/json" id="data">{data_of(runs, charts)}</script>'
    shown = "".join(
        f'<label class="run c{i % COLOURS}"><input type="checkbox" checked data-run="{i}">'
        f'<svg width="26" height="10" aria-hidden="true"><path d="M0 5H26"/></svg>{html.escape(run.name)}</label>'
        for i, run in enumerate(runs)
    )
    axes = "".join(f"<option>{name}</option>" for name in ("steps", "tokens", "hours"))
    return (
        f'{data}<noscript><p>The charts need JavaScript; the tables do not.</p></noscript><div class="controls">{shown}'
        f'<label>x axis <select id="x">{axes}</select></label>'
        '<label><input type="checkbox" id="log"> log y axis</label>'
        '<label>smoothing <input type="range" id="smooth" min="0" max="0.98" step="0.02" value="0"></label></div>'
    )


def chart_sections(runs: Sequence[RunFiles]) -> list[Section]:
    """Return the sections with the charts of runs, the first with the controls and the data of all."""
    charts, left_out = charts_of(runs)
    found = []
    last = tables.evaluations(runs)
    for title in (LOSS, STEPS, EVALUATIONS):
        indices = [i for i, chart in enumerate(charts) if chart.section == title]
        section = Section(title, tables=[last] if title == EVALUATIONS and last else [])
        section.about += [HINT] * (title == LOSS)
        if title == EVALUATIONS and left_out:
            section.about.append(f"{left_out} figures beyond the first {MOST_CHARTS} have no chart.")
        if indices:
            section.body = _controls(runs, charts) * (title == LOSS) + body(indices, charts, runs)
        if indices or section.tables:
            found.append(section)
    return found


def _samples(runs: Sequence[RunFiles]) -> list[Section]:
    """Return the last samples of each run, folded; of a long one its beginning."""
    parts = []
    for run in runs:
        texts = run.samples()
        for title, text in texts[-SAMPLES:]:
            cut = text[:CHARACTERS] + (" [cut]" if len(text) > CHARACTERS else "")
            head = html.escape(f"{run.name}, {title}")
            parts.append(f"<details><summary>{head}</summary><pre>{html.escape(cut)}</pre></details>")
        if len(texts) > SAMPLES:
            parts.append(f"<p>{html.escape(run.name)}: the last {SAMPLES} of {len(texts)} samples.</p>")
    return [Section("Samples", body="".join(parts))] if parts else []
