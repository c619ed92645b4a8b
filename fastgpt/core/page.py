"""A report's parts and their output: Markdown with plots in files, or one HTML page that contains everything."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core.errors import UserError

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Table:
    """Cells of text; the first row is the header. `long`: folded in the page. `marked`: the rows that stand out there,
    by their first cell."""

    title: str
    rows: list[list[str]]
    long: bool = False
    marked: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plot:
    """A PNG with a file name and its alternative text."""

    name: str
    about: str
    png: bytes


@dataclass
class Section:
    """A heading, sentences (`code` between back quotes), tables and plots; in the page also `body`, which is HTML."""

    title: str
    about: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    body: str = ""


def figure(draw: Callable[[Any], None], width: float, height: float) -> bytes:
    """Return the PNG that `draw` draws on matplotlib's axes.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plots need matplotlib, expected `pip install matplotlib`") from None
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    draw(fig.add_subplot())
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def number(value: Any) -> str:
    """Format a number with three or four significant digits; thousands have commas."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def spread(row: dict[str, Any], key: str) -> str:
    """Format a median with its 20 and 80 % quantiles where they were kept."""
    low, high = row.get(f"{key}_q20"), row.get(f"{key}_q80")
    return number(row[key]) + (f" ({number(low)} .. {number(high)})" if low is not None and high is not None else "")


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; a bar within a cell is escaped."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(title: str, about: str, sections: list[Section], plots: Path) -> str:
    """Return the report in Markdown; plots are written to the folder `plots`, next to which the text will be saved."""
    parts = [f"# {title}", about]
    for s in sections:
        parts += [f"## {s.title}", *s.about]
        for p in s.plots:
            plots.mkdir(parents=True, exist_ok=True)
            (plots / p.name).write_bytes(p.png)
            parts.append(f"![{p.about}]({plots.name}/{p.name})")
        for t in s.tables:
            parts += [f"**{t.title}**", markdown_table(t.rows)]
    return "\n\n".join(parts) + "\n"


STYLE = """
:root { --ink: #1b1f24; --paper: #fff; --line: #d0d7de; --soft: #f6f8fa; --even: #fafbfc; --faint: #8b949e;
  --mark: #fff3c4; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
.wide { overflow-x: auto; } img { max-width: 100%; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: left; white-space: nowrap; }
th { background: var(--soft); position: sticky; top: 0; } tr:nth-child(even) td { background: var(--even); }
td.none { color: var(--faint); font-style: italic; } td.number { text-align: right; }
tr.marked td { background: var(--mark); }
code { background: var(--soft); padding: 0 .25rem; } nav a { margin-right: 1rem; } summary, .title { font-weight: 600; }
"""


def page(title: str, about: str, sections: list[Section], style: str = "", script: str = "") -> str:
    """Return the report as one HTML page that loads nothing else; `style` and `script` are added to it."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    body = "\n".join(_html_section(s) for s in sections)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    code = f"<script>{script}</script>" if script else ""
    top = f"<h1>{html.escape(title)}</h1>\n<p>{_text(about)}</p>\n<nav>{links}</nav>"
    whole = f"<head>{head}<style>{STYLE}{style}</style></head><body>\n{top}\n{body}\n{code}</body>"
    return f'<!doctype html>\n<html lang="en">{whole}</html>\n'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _text(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _html_section(s: Section) -> str:
    parts = [f'<h2 id="{_anchor(s.title)}">{html.escape(s.title)}</h2>', *(f"<p>{_text(line)}</p>" for line in s.about)]
    parts += [s.body] * bool(s.body)
    for p in s.plots:
        data = base64.b64encode(p.png).decode("ascii")
        parts.append(f'<p><img alt="{html.escape(p.about)}" src="data:image/png;base64,{data}"></p>')
    for t in s.tables:
        table = f'<div class="wide">{_html_table(t)}</div>'
        title = html.escape(t.title)
        folded = f"<details><summary>{title}</summary>{table}</details>"
        parts.append(folded if t.long else f'<p class="title">{title}</p>{table}')
    return "\n".join(parts)


def _html_table(table: Table) -> str:
    head, *body = table.rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for row in body:
        mark = ' class="marked"' if row[0] in table.marked else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td{_kind(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _kind(cell: str) -> str:
    if cell == NOT_MEASURED:
        return ' class="none"'
    return ' class="number"' if re.match(r"[-+]?[\d,.]+( |$|%)", cell) else ""
