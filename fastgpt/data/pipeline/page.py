"""The page of a data set: report.json and manifest.json as tables and plots, in one file that loads nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastgpt.core.page import Plot, Section, Table, figure, page
from fastgpt.data.pipeline.topics import Topic

COLORS = ("#2f6f4f", "#b4532a", "#3b6ea8", "#8a6d1f", "#7a4f8f", "#5f6b76", "#a83b6e", "#4f8f8a")
GRID = "#d0d7de"
NONE = "none"


def page_of(
    report: Mapping[str, Any],
    manifest: Mapping[str, Any],
    topics: Sequence[Topic] = (),
    packing: tuple[int, list[list[str]]] | None = None,
) -> str:
    """Return the page as HTML. It holds ids of documents, but nothing of their texts except the words of topics.

    packing: length of windows, and a table of what each method does in them.
    """
    last = manifest["generations"][-1]
    train = manifest["train"]
    about = (
        f"Generation {manifest['generation']} of {last['date']}: {train['tokens']:,} training tokens in "
        f"{train['documents']:,} documents, {len(manifest['shards'])} shards, a tokenizer of "
        f"{manifest['tokenizer']['n_vocab']:,} ids."
    )
    sections = [sources(report), dropped(report), changes(report), defects(report), lengths(report)]
    if packing is not None:
        sections.append(
            Section("Packing", [], [Table(f"Training documents in windows of {packing[0]:,} tokens", packing[1])])
        )
    sections += [duplicates(report), terms(report), topic_section(topics), origin(manifest)]
    return page("Data set", about, [s for s in sections if s is not None])


def sources(report: Mapping[str, Any]) -> Section:
    """Return how much of each source was read, kept and mixed in."""
    found = report["sources"]
    whole = sum(facts.get("mixed_tokens", 0) for facts in found.values()) or 1
    head = ["source", "license", "documents", "MB", "kept", "tokens", "held out", "epochs", "share", "bytes per token"]
    rows = [head]
    for name, facts in found.items():
        train, val = facts.get("train", {}), facts.get("val", {})
        tokens = train.get("tokens", 0) + val.get("tokens", 0)
        size = train.get("bytes", 0) + val.get("bytes", 0)
        row = [name, facts.get("license", "unknown"), f"{facts['documents']:,}", f"{facts['bytes'] / 1e6:,.1f}"]
        row += [f"{facts['kept']:,}", f"{train.get('tokens', 0):,}", f"{val.get('tokens', 0):,}"]
        row += [f"{facts.get('epochs', 0):.2f}", f"{facts.get('mixed_tokens', 0) / whole:.1%}"]
        rows.append([*row, f"{size / tokens:.2f}" if tokens else "-"])
    shares = {name: facts.get("mixed_tokens", 0) / whole * 100 for name, facts in found.items()}
    plot = bars("Share of the training tokens (%)", {"": shares}, "sources.png")
    return Section("Sources", [], [Table("By source", rows)], [plot])


def dropped(report: Mapping[str, Any]) -> Section:
    """Return the documents that each rule dropped."""
    found = {name: facts["dropped"] for name, facts in report["sources"].items() if facts["dropped"]}
    if not found:
        return Section("Dropped documents", [NONE])
    rows = [["source", "rule", "documents", "of the source", "such as"]]
    for name, rules in found.items():
        facts = report["sources"][name]
        for rule, n in rules.items():
            named = ", ".join(facts["examples"].get(rule, [])[:3])
            rows.append([name, rule, f"{n:,}", f"{n / max(1, facts['documents']):.2%}", named])
    plot = bars("Dropped documents by rule", found, "dropped.png")
    return Section("Dropped documents", [], [Table("By source and rule", rows)], [plot])


def changes(report: Mapping[str, Any]) -> Section | None:
    """Return what was changed in the documents that stayed."""
    rows = [["source", "change", "count"]]
    for name, facts in report["sources"].items():
        rows += [[name, what, f"{n:,}"] for what, n in facts["changes"].items()]
    return Section("Changes", [], [Table("By source", rows)]) if len(rows) > 1 else None


def defects(report: Mapping[str, Any]) -> Section | None:
    """Return what was wrong with the files."""
    rows = [["source", "defect", "count"]]
    examples = [["source", "such as"]]
    for name, facts in report["sources"].items():
        rows += [[name, what, f"{n:,}"] for what, n in facts["defects"].items()]
        examples += [[name, text] for text in facts["defect_examples"]]
    if len(rows) == 1:
        return None
    return Section("Defects of files", [], [Table("By source", rows), Table("Examples", examples, long=True)])


def lengths(report: Mapping[str, Any]) -> Section | None:
    """Return the lengths of documents in tokens."""
    found = {}
    for name, facts in report["sources"].items():
        if "train" in facts:
            counts = [a + b for a, b in zip(facts["train"]["lengths"], facts["val"]["lengths"])]
            if any(counts):
                found[name] = counts
    if not found:
        return None
    used = [k for counts in found.values() for k, n in enumerate(counts) if n]
    first, last = min(used), max(used)

    def draw(ax: Any) -> None:
        width = 0.8 / len(found)
        for i, (name, counts) in enumerate(found.items()):
            share = [100 * n / sum(counts) for n in counts[first : last + 1]]
            at = [k + i * width for k in range(len(share))]
            ax.bar(at, share, width, label=name, color=COLORS[i % len(COLORS)], align="edge")
        ax.set_xticks(range(last - first + 2), [f"{1 << k:,}" for k in range(first, last + 2)], fontsize=8, rotation=45)
        ax.set_xlabel("tokens of a document", fontsize=8)
        ax.set_ylabel("% of the source's documents", fontsize=8)
        ax.legend(fontsize=8, frameon=False)
        _plain(ax, "y")

    rows = [["tokens", *found]]
    for k in range(first, last + 1):
        rows.append([f"{1 << k:,} to {(2 << k) - 1:,}", *(f"{counts[k]:,}" for counts in found.values())])
    plot = Plot("lengths.png", "Tokens of a document, by source", figure(draw, 9.0, 3.6))
    return Section("Lengths", [], [Table("Documents by length", rows, long=True)], [plot])


def duplicates(report: Mapping[str, Any]) -> Section | None:
    """Return the duplicates within and across sources."""
    found = report.get("duplicates")
    if not found or not found["counts"]:
        return None
    rows = [["dropped from", "kept in", "equal", "similar"]]
    rows += [[a, b, f"{counts['exact']:,}", f"{counts['near']:,}"] for a, b, counts in found["counts"]]
    return Section("Duplicates", [], [Table("Documents", rows)])


def terms(report: Mapping[str, Any]) -> Section | None:
    """Return the rates of group terms and toxic terms before and after cleaning."""
    rows = [["source", "terms", "before", "after"]]
    for name, facts in report["sources"].items():
        before, after = facts["terms"].get("before", {}), facts["terms"].get("after", {})
        for category in sorted((before.keys() | after.keys()) - {"words"}):
            rates = [1e6 * when.get(category, 0) / max(1, when.get("words", 0)) for when in (before, after)]
            rows.append([name, category, *(f"{rate:,.1f}" for rate in rates)])
    if len(rows) == 1:
        return None
    about = "Occurrences per million words. A rate shows how often a group is named, not how it is spoken of."
    return Section("Group terms and toxic terms", [about], [Table("By source", rows)])


def topic_section(topics: Sequence[Topic]) -> Section | None:
    """Return the topics by share and source."""
    if not topics:
        return None
    names = list(topics[0].sources)
    rows = [["topic", "share", *names]]
    for topic in topics:
        shares = (f"{topic.sources.get(name, 0.0):.1%}" for name in names)
        rows.append([", ".join(topic.words), f"{topic.share:.1%}", *shares])
    about = "Clusters of a sample of documents with common words; each column adds up to 100 %."
    return Section("Topics", [about], [Table("By source", rows)])


def origin(manifest: Mapping[str, Any]) -> Section:
    """Return what the data set was made with, and its history."""
    rows = [["generation", "date", "documents", "tokens"]]
    for g in manifest["generations"]:
        rows.append([str(g["generation"]), g["date"], f"{g['documents']:,}", f"{g['tokens']:,}"])
    versions = [["package", "version"], *([name, text] for name, text in manifest["versions"].items())]
    files = [["file", "bytes", "sha256"]]
    files += [[name, f"{facts['bytes']:,}", facts["sha256"]] for name, facts in manifest["files"].items()]
    tables = [Table("Generations", rows), Table("Versions", versions, long=True), Table("Files", files, long=True)]
    return Section("Origin", [f"Tokenizer `{manifest['tokenizer']['fingerprint'][:16]}`."], tables)


def bars(title: str, groups: Mapping[str, Mapping[str, float]], name: str) -> Plot:
    """Draw a horizontal bar for each label; those of several groups are stacked."""
    labels = list(dict.fromkeys(label for values in groups.values() for label in values))
    totals = {label: sum(values.get(label, 0) for values in groups.values()) for label in labels}
    labels.sort(key=lambda label: -totals[label])

    def draw(ax: Any) -> None:
        left = [0.0] * len(labels)
        for i, (group, values) in enumerate(groups.items()):
            widths = [values.get(label, 0) for label in labels]
            ax.barh(range(len(labels)), widths, left=left, height=0.7, color=COLORS[i % len(COLORS)], label=group)
            left = [a + b for a, b in zip(left, widths)]
        for i, label in enumerate(labels):
            ax.text(left[i], i, f" {totals[label]:,.1f}".removesuffix(".0"), va="center", fontsize=8)
        ax.set_yticks(range(len(labels)), labels, fontsize=8)
        ax.set_xlim(0, 1.12 * max([*left, 1e-9]))
        ax.invert_yaxis()
        ax.set_title(title, fontsize=10, loc="left")
        if len(groups) > 1:
            ax.legend(fontsize=8, frameon=False, loc="lower right")  # the longest bars are at the top
        _plain(ax, "x")

    return Plot(name, title, figure(draw, 9.0, 1.0 + 0.3 * len(labels)))


def _plain(ax: Any, axis: str) -> None:
    ax.grid(axis=axis, color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
