"""Checks of a suite itself: `fastgpt eval check`. Findings name files and lines and never show contents.

An error makes figures wrong: an item that is broken, there twice, or in the training data, or that every answer passes.
A warning is worth a look: near-duplicates, answers that the prompt contains, answers that stand in one place too often.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastgpt.core import progress
from fastgpt.core.command import Parser
from fastgpt.core.errors import UserError, counted
from fastgpt.data.built import open_built
from fastgpt.data.dedup import NgramIndex
from fastgpt.data.dedup.similarity import jaccard, shingle_sets
from fastgpt.data.dedup.words import split
from fastgpt.data.documents import document_starts
from fastgpt.evaluate import power
from fastgpt.evaluate.metrics import normalized
from fastgpt.evaluate.suite_file import Suite, read_suite, schema_of
from fastgpt.evaluate.suite_items import Item
from fastgpt.evaluate.suite_schema import fits

SHINGLE, SIMILAR = 3, 0.8  # words of a shingle; Jaccard similarity of near-duplicates
COMMON = 50  # a shingle of more items comes from the template and does not make pairs
NGRAM = 13
SHOWN = 5  # places of one finding that are printed
DRAWS = 2000  # of a suite without a preference for a position
ANYTHING: tuple[Any, ...] = (None, True, 0, 1.5, "", "text", [], [1], {}, {"a": 1})
BATCH = 256  # documents

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something to change, with the places where it is."""

    level: Level
    text: str
    places: tuple[str, ...]

    def __str__(self) -> str:
        more = len(self.places) - SHOWN
        places = "; ".join(self.places[:SHOWN]) + (f"; and {more:,} more" if more > 0 else "")
        return f"{self.level:<7}  {self.text}" + (f": {places}" if places else "")


@dataclass
class Report:
    """What the checks found, and facts about the suite."""

    findings: list[Finding] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)

    def add(self, level: Level, text: str, places: Iterable[str]) -> None:
        """Add a finding if it is anywhere."""
        if found := tuple(places):
            self.findings.append(Finding(level, text, found))

    @property
    def errors(self) -> int:
        """Number of findings that are errors."""
        return sum(f.level == "error" for f in self.findings)


def check_suite(suite: Suite, shards: Path | None = None) -> Report:
    """Check a suite, and its overlap with the training documents of a data set of `fastgpt data build`.

    Raises:
        UserError: the data set cannot be opened.
    """
    report = Report()
    for problem in suite.problems:
        report.add("error", problem.text, [problem.place])
    _duplicates(suite, report)
    _passed_by_all(suite, report)
    _given_away(suite, report)
    _balance(suite, report)
    if shards is not None:
        _leaks(suite, shards, report)
    if suite.items and suite.settings.kind not in ("perplexity", "generation"):
        report.facts += [f"for two models, {line}" for line in power.summary(len(suite.items))]
    return report


def _contents(item: Item) -> list[str]:
    """Return the texts of an item."""
    return [item.prompt, *item.choices, *item.answers]


def _duplicates(suite: Suite, report: Report) -> None:
    """Find items that are equal, or of nearly the same words, and those with one prompt and several answers."""
    items = [*suite.items, *suite.pool]
    first: dict[str, Item] = {}
    prompts: dict[tuple[str, ...], Item] = {}
    twins, contradictions, different = [], [], []
    for item in items:
        key = (item.prompt, *sorted(item.choices))
        if item.id in first:
            twins.append(f"{item.place} is {first[item.id].place}")
            continue
        first[item.id] = item
        if key in prompts and prompts[key].target != item.target:
            contradictions.append(f"{item.place} and {prompts[key].place}")
            continue
        prompts.setdefault(key, item)
        different.append(item)
    report.add("error", "items are there twice", twins)
    report.add("error", "items have the same prompt and different answers", contradictions)
    near = [f"{different[j].place} and {different[i].place}" for i, j in near_duplicates(different)]
    report.add("warning", f"items have nearly the same words (similarity {SIMILAR} or more)", near)


def near_duplicates(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Return pairs i < j of items whose sets of three words in a row have a Jaccard similarity of 0.8 or more."""
    sets = shingle_sets([" ".join(_contents(item)) for item in items], SHINGLE)
    holders: dict[int, list[int]] = defaultdict(list)
    for i, shingles in enumerate(sets):
        for shingle in shingles.tolist():
            holders[shingle].append(i)
    candidates = {
        (a, b) for held in holders.values() if len(held) <= COMMON for n, a in enumerate(held) for b in held[n + 1 :]
    }
    return sorted((a, b) for a, b in candidates if jaccard(sets[a], sets[b]) >= SIMILAR)


def _passed_by_all(suite: Suite, report: Report) -> None:
    """Find items that a model cannot fail, or cannot pass."""
    s, items = suite.settings, suite.items
    alike = [i.place for i in items if s.kind == "choice" and len(set(i.choices)) == 1]
    report.add("error", "all choices are equal", alike)
    twice = [i.place for i in items if s.kind == "choice" and 1 < len(set(i.choices)) < len(i.choices)]
    report.add("error", "two choices are equal", twice)
    patterns = [i for i in items if i.regex]
    report.add("error", "the regex matches the empty text", [i.place for i in patterns if _passes("", i, s.judge.full)])
    if s.normalize and s.kind in ("qa", "span"):
        empty = [i.place for i in items if not all(map(normalized, i.answers))]
        report.add("error", "an answer is only articles or punctuation, of which nothing is compared", empty)
    if s.judge.schema is not None:
        schema = schema_of(s, suite.path)
        if all(fits(value, schema) for value in ANYTHING):
            report.add("error", "the schema accepts every JSON value", [str(suite.path)])
    if s.kind == "span":
        absent = [i.place for i in items if not any(a.lower() in i.prompt.lower() for a in i.answers)]
        report.add("warning", "no answer is in the context", absent)


def _given_away(suite: Suite, report: Report) -> None:
    """Find prompts that contain the answer, and spaces that stand twice."""
    s, items = suite.settings, suite.items
    if s.kind in ("choice", "classification"):
        given = [i.place for i in items if _in(i.target, i.prompt) and not any(_in(c, i.prompt) for c in _wrong(i))]
        report.add("warning", "the prompt contains the right answer and none of the others", given)
    if s.kind in ("qa", "cloze"):
        given = [i.place for i in items if any(_in(a, i.prompt) for a in i.answers)]
        report.add("warning", "the prompt contains an answer", given)
    matched = [i.place for i in items if i.regex and re.search(i.regex, i.prompt) and not _passes("", i, s.judge.full)]
    report.add("warning", "the prompt matches the regex", matched)
    if s.kind != "perplexity":
        spaced = [i.place for i in items if i.prompt and i.prompt[-1] in " \t"]
        report.add("warning", "the prompt ends with a space, which tokenizers join with the answer", spaced)
    if s.delimiter.endswith(" "):
        spaced = [i.place for i in items if any(t[0].isspace() for t in (*i.choices, *i.answers))]
        report.add("warning", "an answer begins with a space, and the delimiter ends with one", spaced)


def _passes(text: str, item: Item, full: bool) -> bool:
    return bool((re.fullmatch if full else re.search)(item.regex, text))


def _wrong(item: Item) -> list[str]:
    return [c for n, c in enumerate(item.choices) if n != item.gold]


def _in(text: str, prompt: str) -> bool:
    """Return whether the words of a text occur in a row in a prompt."""
    words, where = split(text), split(prompt)
    return bool(words) and any(where[i : i + len(words)] == words for i in range(len(where) - len(words) + 1))


def _balance(suite: Suite, report: Report) -> None:
    """Count labels or places of the right choices, and what a model reaches that looks at these alone."""
    s, items = suite.settings, suite.items
    if not items or s.kind not in ("choice", "classification"):
        return
    counts = Counter(item.gold for item in items)
    n = len(items)
    if s.kind == "classification":
        shares = ", ".join(f"{label} {counts[i] / n:.1%}" for i, label in enumerate(s.labels))
        report.facts.append(f"labels: {shares}; always the most common one has acc {max(counts.values()) / n:.4f}")
        missing = [label for i, label in enumerate(s.labels) if not counts[i]]
        report.add("warning", "no item has the label", missing)
        return
    chance = sum(1 / len(i.choices) for i in items) / n
    shares = ", ".join(f"{place} {counts[place] / n:.1%}" for place in range(max(len(i.choices) for i in items)))
    report.facts.append(
        f"places of the right choice: {shares}; always the most common one has acc "
        f"{max(counts.values()) / n:.4f}, chance is {chance:.4f}"
    )
    for name, pick in (("longest", max), ("shortest", min)):
        hits = sum(_alone(item, pick) for item in items) / n
        report.facts.append(f"always the {name} choice has acc {hits:.4f}")
        if hits > chance + 4 * (chance * (1 - chance) / n) ** 0.5:
            report.add("warning", f"the right choice is the {name} one too often", [f"acc {hits:.4f} by length alone"])
    if (p := unbalanced(items)) < 0.001:
        report.add("warning", "the right choice stands in one place too often", [f"p = {p:.2g} by chance"])


def _alone(item: Item, pick: Callable[..., int]) -> float:
    """Return the accuracy of picking the longest or shortest choice; several of one length share it."""
    lengths = [len(c) for c in item.choices]
    best = [i for i, length in enumerate(lengths) if length == pick(lengths)]
    return (item.gold in best) / len(best)


def unbalanced(items: Sequence[Item]) -> float:
    """Return how often chance puts the right choice into its most common place at least as often, by simulation."""
    sizes = np.array([len(item.choices) for item in items])
    most = max(Counter(item.gold for item in items).values())
    rng = np.random.default_rng(0)
    drawn = np.zeros((DRAWS, int(sizes.max())), np.int64)
    for size, count in zip(*np.unique(sizes, return_counts=True)):
        drawn[:, :size] += rng.multinomial(count, np.full(size, 1 / size), DRAWS)
    return float(((drawn.max(1) >= most).sum() + 1) / (DRAWS + 1))


def _leaks(suite: Suite, shards: Path, report: Report) -> None:
    """Find items of which 13 words in a row, or all words of a shorter text, are in training documents."""
    items = [*suite.items, *suite.pool]
    index = NgramIndex({item.place: _contents(item) for item in items}, NGRAM)
    documents, found = 0, Counter[str]()
    for texts in _documents(shards):
        documents += len(texts)
        for hits in index.hits_of(texts):
            found.update({hit.file for hit in hits})
    places = [f"{place} ({counted(found[place], 'document')})" for place in index.files if found[place]]
    report.add("error", f"items are in the training data: {NGRAM} words in a row, or a shorter text as a whole", places)
    tiny = sum(file.texts == file.tiny for file in index.files.values())
    report.facts.append(
        f"compared with {counted(documents, 'training document')}; {counted(tiny, 'item')} of fewer than "
        f"{index.shortest} words in each text would be found only as whole documents"
    )


def _documents(shards: Path) -> Iterator[list[str]]:
    """Yield the training documents of a data set as texts, BATCH at a time."""
    built = open_built(shards)
    starts = document_starts(built.train, built.tokenizer.eot)
    bar = progress.bar(total=len(starts) - 1, desc="training documents", disable=None, leave=False)
    for at in range(0, len(starts) - 1, BATCH):
        texts = []
        for start, stop in zip(starts[at : at + BATCH], starts[at + 1 : at + BATCH + 1]):
            ids = built.train.read(int(start), int(stop - start))
            texts.append(built.tokenizer.decode(ids[ids != built.tokenizer.eot].tolist()))
        yield texts
        bar.update(len(texts))
    bar.close()


def main(argv: list[str]) -> int:
    """Run `fastgpt eval check`: 1 if there are errors."""
    parser = Parser(
        prog="fastgpt eval check",
        description="Check a suite: broken, repeated and leaked items, balance, answers given away.",
    )
    parser.add_argument("suite", metavar="SUITE", help="YAML file of the suite")
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="data set of `fastgpt data build` that the model was trained on"
    )
    args = parser.parse_args(argv)
    suite = read_suite(args.suite)
    if not suite.items and not suite.problems:
        raise UserError(f"suite {args.suite} has no items, expected at least one")
    report = check_suite(suite, args.shards)
    s = suite.settings
    print(f"suite {s.suite}: {counted(len(suite.items), 'item')} of kind {s.kind}, {counted(s.shots, 'shot')}")
    for line in (*report.findings, *report.facts):
        print(line)
    warnings = len(report.findings) - report.errors
    print(f"{counted(report.errors, 'error')}, {counted(warnings, 'warning')}")
    return 1 if report.errors else 0
