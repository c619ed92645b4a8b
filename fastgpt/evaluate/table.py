"""The results of an evaluation as a table of texts, for the console and the page."""

from __future__ import annotations

from fastgpt.evaluate.results import Figure, Results

HEAD = ["task", "metric", "value", "± std. error", "chance", "shots", "items", "cut prompts", "seconds"]


def is_part(figure: Figure) -> bool:
    """Return whether a figure is one of a subject or a paradigm, as "mmlu/stem"."""
    return "/" in figure.task


def rows(results: Results, parts: bool = False) -> list[list[str]]:
    """Return a header and a row for each figure; of the whole tasks, or of their parts."""
    chosen = [f for f in results.figures if is_part(f) == parts]
    out, last = [HEAD], ""
    for f in chosen:
        first = f.task != last  # what belongs to the task stands in its first row
        cut = results.truncated.get(f.task) if first else None
        seconds = results.seconds.get(f.task) if first else None
        error = value(f.stderr) if f.low is None else f"{value(f.low)} to {value(f.high)}"
        cells = [value(f.value), error, value(f.chance), str(f.shots), f"{f.n:,}"]
        out.append(
            [f.task, f.metric, *cells, "" if cut is None else f"{cut:,}", "" if seconds is None else f"{seconds:.1f}"]
        )
        last = f.task
    return out


def value(number: float | None) -> str:
    """Format a figure: four digits after the point below 10, two below 10,000."""
    if number is None:
        return "-"
    return f"{number:.4f}" if abs(number) < 10 else f"{number:,.2f}" if abs(number) < 10_000 else f"{number:.3g}"


def text(results: Results) -> str:
    """Return the table of the whole tasks, and the notes, for the console."""
    lines = rows(results)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {0, 1}
    out = [
        "  ".join(
            c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*out, *(f"note: {note}" for note in results.notes)])
