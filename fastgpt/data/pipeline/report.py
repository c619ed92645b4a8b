"""What a build read, changed, dropped and kept: report.json, and its text for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from fastgpt.data.pipeline.clean import Counts
from fastgpt.data.pipeline.layout import Layout
from fastgpt.data.recipe import Recipe


def report_of(
    recipe: Recipe, counts: Mapping[str, Counts], selected: Mapping[str, Any], layout: Layout | None
) -> dict[str, Any]:
    """Return the content of report.json: plain values by source; without `layout`, no tokens are known yet.

    lengths: histogram of tokens per document; bin k counts lengths from 2^k to below 2^(k + 1).
    """
    sources: dict[str, Any] = {}
    for i, (name, count) in enumerate(counts.items()):
        facts = asdict(count)
        tally = facts.pop("tally")
        dropped = Counter(tally["dropped"]) + Counter(selected["dropped"].get(name, {}))
        facts["dropped"] = dict(dropped.most_common())
        facts["examples"] = {**tally["examples"], **selected["examples"].get(name, {})}
        changes = {**tally["changes"], **selected.get("changes", {}).get(name, {})}
        facts |= {"changes": changes, "characters": tally["characters"], "terms": tally["terms"].get(name, {})}
        facts["license"] = recipe.sources[name].license
        facts["kept"] = count.documents - count.unsampled - dropped.total()
        if layout is not None:
            facts |= layout.sources[name]
            facts["epochs"] = layout.mix.epochs[i]
            facts["mixed_tokens"] = sum(stage[i] for stage in layout.mix.tokens)
        sources[name] = facts
    return {"sources": sources, "duplicates": selected.get("duplicates")}


def describe(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    return "\n".join(_lines(report))


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    sources = report["sources"]
    whole = sum(facts.get("mixed_tokens", 0) for facts in sources.values())
    rows = [["source", "documents", "read", "kept", "tokens", "held out", "epochs", "share", "bytes/token"]]
    for name, facts in sources.items():
        row = [name, f"{facts['documents']:,}", size(facts["bytes"]), f"{facts['kept']:,}"]
        if "train" in facts:
            train, val = facts["train"], facts["val"]
            tokens = train["tokens"] + val["tokens"]
            row += [f"{train['tokens']:,}", f"{val['tokens']:,}", f"{facts['epochs']:.2f}"]
            row += [f"{facts['mixed_tokens'] / whole:.1%}" if whole else "-"]
            row += [f"{(train['bytes'] + val['bytes']) / tokens:.2f}" if tokens else "-"]
        rows.append(row)
    yield from table(rows)
    for name, facts in sources.items():
        for what in ("dropped", "changes", "defects"):
            for rule, n in facts[what].items():
                of = f" of {facts['documents']:,}" if what == "dropped" else ""
                named = facts["examples"].get(rule, []) if what == "dropped" else []
                yield f"{name}: {what} {n:,}{of}: {rule}" + (f" (such as {', '.join(named[:2])})" if named else "")
        yield from (f"{name}: {text}" for text in facts["defect_examples"])
        if facts["unsampled"]:
            yield f"{name}: {facts['unsampled']:,} documents are outside the sample"
    duplicates = report.get("duplicates")
    if duplicates:
        for dropped, kept, counts in duplicates["counts"]:
            both = f"{counts['exact']:,} equal and {counts['near']:,} similar"
            yield f"{dropped}: {both} to documents of {kept} that are kept"
    for name, facts in sources.items():
        if "train" in facts:
            yield from histogram(name, [a + b for a, b in zip(facts["train"]["lengths"], facts["val"]["lengths"])])


def histogram(name: str, counts: list[int], width: int = 40) -> Iterator[str]:
    """Yield the lines of a bar chart of tokens per document."""
    used = [k for k, n in enumerate(counts) if n]
    if not used:
        return
    yield f"{name}: tokens per document"
    for k in range(used[0], used[-1] + 1):
        bar = "#" * round(width * counts[k] / max(counts))
        yield f"  {f'{1 << k:,} ..':>14} {counts[k]:>10,} {bar}"


def table(rows: list[list[str]]) -> Iterator[str]:
    """Yield the lines of a table; all columns but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    for row in rows:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        yield "  ".join(cells).rstrip()


def size(n: float) -> str:
    """Return a number of bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
