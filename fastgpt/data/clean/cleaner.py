"""Cleaner: documents through the cleaning rules, and Tally: what the rules did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

from fastgpt.data.clean.bias import Bias, Counterfactual
from fastgpt.data.clean.settings import contents, make, resolve
from fastgpt.data.clean.step import State, Step
from fastgpt.data.document import Document

EXAMPLES = 5  # ids of dropped documents kept for each rule
VERSION = 1  # of the rules; raised when one of them gives other results
_LIBRARIES = {"mojibake": "ftfy", "language": "py3langid"}
_PASSES = 8  # limit on passes of the transforms over a text that keeps changing


@dataclass(slots=True)
class Outcome:
    """What became of a document.

    Attributes:
        document: the cleaned document, or None if a rule dropped it.
        dropped_by: name of that rule.
        changes: what the rules changed or found, counts by name.
        would_drop: in a dry run, the names of all rules that would drop the document.
        rates: terms counted before and after cleaning, if the rule "bias" is on; "after" only for documents that stay.
    """

    document: Document | None
    dropped_by: str | None
    changes: dict[str, int]
    would_drop: tuple[str, ...] = ()
    rates: dict[str, dict[str, int]] = field(default_factory=dict)


class Cleaner:
    """Cleaning rules in order.

    A text passes the rules once. If one of them changed it, the transforms (not the decisions) are repeated until
    nothing changes any more, so a cleaned text that is cleaned again stays as it is.

    Attributes:
        settings: settings of the rules that are on, by name.
        steps: the rules.
    """

    def __init__(self, settings: dict[str, dict[str, Any]]) -> None:
        self.settings = settings
        self.steps: list[Step] = [make(name, values) for name, values in settings.items()]
        self._transforms = [step for step in self.steps if type(step).transform is not Step.transform]
        self._bias = next((step for step in self.steps if isinstance(step, Bias)), None)

    @classmethod
    def of(cls, settings: Mapping[str, Any] | str) -> Cleaner:
        """Return the cleaner of a preset's name, or of the section `clean` of a recipe; see `settings.resolve`."""
        return cls(resolve(settings))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the results: version, settings, contents of the files they name, libraries."""
        libraries = {rule: version(package) for rule, package in _LIBRARIES.items() if rule in self.settings}
        facts = [VERSION, self.settings, contents(self.settings), libraries]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def process(self, document: Document, dry_run: bool = False) -> Outcome:
        """Clean a document.

        Args:
            document: stays as it is.
            dry_run: let every rule decide, on the text as the rules before it would leave it, and drop nothing.
        """
        state = State(document)
        rates = {"before": self._bias.rates(state.features)} if self._bias else {}
        dropped: list[str] = []
        for step in self.steps:
            if isinstance(step, Counterfactual):
                continue
            if rule := step.apply(state):
                dropped.append(rule)
                if not dry_run:
                    return Outcome(None, rule, state.changes, (rule,), rates)
        if state.text != document.text:
            self._settle(state)
        if not state.text:
            dropped = dropped or ["empty"]
            if not dry_run:
                return Outcome(None, "empty", state.changes, ("empty",), rates)
        for step in self.steps:
            if isinstance(step, Counterfactual):
                step.apply(state)
        if self._bias:
            rates["after"] = self._bias.rates(state.features)
        cleaned = Document(state.text, document.id, document.source, state.meta)
        return Outcome(cleaned, dropped[0] if dropped else None, state.changes, tuple(dropped), rates)

    def _settle(self, state: State) -> None:
        """Repeat the transforms until the text stays the same."""
        for _ in range(_PASSES):
            before = state.text
            for step in self._transforms:
                state.replace(step.transform(state.text, state))
            if state.text == before:
                return


@dataclass
class Tally:
    """Counts of outcomes, added up over documents, parts and workers.

    Attributes:
        documents: documents seen.
        kept: documents that stayed.
        characters: characters before and after cleaning.
        dropped: dropped documents by rule; in a dry run, those that the rule would drop.
        examples: up to EXAMPLES ids for each of these rules.
        changed: documents by what was changed or found in them.
        changes: counts of it.
        terms: words and terms by source, then "before" and "after", then category.
    """

    documents: int = 0
    kept: int = 0
    characters: list[int] = field(default_factory=lambda: [0, 0])
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    changes: dict[str, int] = field(default_factory=dict)
    terms: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    def add(self, document: Document, outcome: Outcome) -> None:
        """Count the outcome of a document."""
        self.documents += 1
        self.characters[0] += len(document.text)
        if outcome.document is not None and outcome.dropped_by is None:
            self.kept += 1
            self.characters[1] += len(outcome.document.text)
        for rule in outcome.would_drop:
            _add(self.dropped, {rule: 1})
            if len(ids := self.examples.setdefault(rule, [])) < EXAMPLES:
                ids.append(document.id)
        _add(self.changes, outcome.changes)
        _add(self.changed, dict.fromkeys(outcome.changes, 1))
        for when, counts in outcome.rates.items():
            _add(self.terms.setdefault(document.source, {}).setdefault(when, {}), counts)

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally; merging parts in their order gives the examples of a single pass."""
        self.documents += other.documents
        self.kept += other.kept
        self.characters = [a + b for a, b in zip(self.characters, other.characters)]
        for mine, theirs in (
            (self.dropped, other.dropped),
            (self.changed, other.changed),
            (self.changes, other.changes),
        ):
            _add(mine, theirs)
        for rule, ids in other.examples.items():
            self.examples[rule] = (self.examples.get(rule, []) + ids)[:EXAMPLES]
        for source, times in other.terms.items():
            for when, counts in times.items():
                _add(self.terms.setdefault(source, {}).setdefault(when, {}), counts)

    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return terms per million words by source, "before" and "after", and category."""
        return {
            source: {
                when: {name: 1e6 * n / max(counts.get("words", 0), 1) for name, n in counts.items() if name != "words"}
                for when, counts in times.items()
            }
            for source, times in self.terms.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tally:
        """Return the tally that `to_json` wrote."""
        return cls(**json.loads(json.dumps(values)))


def _add(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


def clean_all(cleaner: Cleaner, documents: Iterable[Document], dry_run: bool = False) -> tuple[list[Document], Tally]:
    """Return the documents that stay, cleaned, and the tally; for data that fits in memory."""
    kept, tally = [], Tally()
    for document in documents:
        outcome = cleaner.process(document, dry_run)
        tally.add(document, outcome)
        if outcome.document is not None and outcome.dropped_by is None:
            kept.append(outcome.document)
    return kept, tally
