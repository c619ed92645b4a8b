"""The data card: what a data set is made of, how it was processed, and what was not looked at, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastgpt.core.errors import counted
from fastgpt.data.recipe import MiddleRecipe


def card_of(report: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the data card in Markdown, from the report and the settings of the recipe."""
    sources = report["sources"]
    whole = sum(facts["mixed_tokens"] for facts in sources.values()) or 1
    lines = ["# Data card", "", f"{recipe.get('description') or 'Text for training a language model.'}", ""]
    lines += [
        "## Sources",
        "",
        "| source | license | read | kept | training tokens | share |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for name, facts in sources.items():
        row = [name, facts["license"], f"{facts['documents']:,}", f"{facts['kept']:,}", f"{facts['mixed_tokens']:,}"]
        lines.append("| " + " | ".join([*row, f"{facts['mixed_tokens'] / whole:.1%}"]) + " |")
    lines += ["", "## Processing", ""]
    for name, facts in sources.items():
        lines.append(f"- {name}: rules `{recipe['sources'][name]['clean']}`; {_drops(facts)}")
        lines += _reordered(name, recipe["sources"][name].get("fill_in_the_middle"))
    duplicates = report.get("duplicates")
    lines.append(f"- Duplicates: {'removed, ' + _removed(duplicates) if duplicates else 'not looked for'}.")
    lines.append(f"- Evaluation data: {_compared(recipe.get('decontaminate'))}.")
    lines += ["", "## Personal data and bias", ""]
    scrubbed = {n: k for n, facts in sources.items() for k in [_personal(facts)] if k}
    lines += [f"- {name}: {text}" for name, text in scrubbed.items()] or [
        "- Personal data was not looked for, or none was found."
    ]
    measured = [name for name, facts in sources.items() if facts["terms"]]
    rates = f"measured for {', '.join(measured)} (report.html has the rates)" if measured else "not measured"
    lines += [f"- Rates of group terms and toxic terms: {rates}.", "", "## Limits", ""]
    lines.append("- Rules find patterns, not meaning: texts that are wrong, private or harmful may remain.")
    lines.append("- Licenses are those that the recipe states; they were not checked.")
    return "\n".join(lines) + "\n"


def _reordered(name: str, settings: Any) -> list[str]:
    if not settings:
        return []
    found = settings if isinstance(settings, dict) else asdict(MiddleRecipe())
    tokens = ", ".join(f"`{found[part]}`" for part in ("prefix", "suffix", "middle"))
    return [
        f"- {name}: fill-in-the-middle in {found['rate']:.0%} of the training documents, of these {found['spm']:.0%} "
        f"with the suffix first; special tokens {tokens}."
    ]


def _compared(settings: Any) -> str:
    found = settings if isinstance(settings, dict) else {"files": settings or [], "action": "drop"}
    if not found["files"]:
        return "not looked for"
    done = "overlaps are cut out of the documents" if found["action"] == "cut" else "documents that overlap are dropped"
    return f"compared with {len(found['files'])} files, {done}"


def _drops(facts: Mapping[str, Any]) -> str:
    total = sum(facts["dropped"].values())
    if not total:
        return "no document dropped."
    most = ", ".join(f"{rule} {n:,}" for rule, n in list(facts["dropped"].items())[:3])
    return f"{total:,} of {facts['documents']:,} documents dropped ({most})."


def _removed(duplicates: Mapping[str, Any]) -> str:
    exact = sum(counts["exact"] for _, _, counts in duplicates["counts"])
    near = sum(counts["near"] for _, _, counts in duplicates["counts"])
    return f"{exact:,} equal and {near:,} similar documents"


def _personal(facts: Mapping[str, Any]) -> str:
    found = {what: n for what, n in facts["changes"].items() if what.startswith("personal_data.")}
    said = [f"{counted(n, 'time')} {what.split('.')[1]} replaced" for what, n in found.items()]
    return ", ".join(said) + "." if found else ""
