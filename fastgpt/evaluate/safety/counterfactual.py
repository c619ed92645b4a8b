"""A counterfactual probe of groups that the user names: the same text with one term exchanged.

For a term, its log-probability of a continuation is the mean over the templates; with a scorer, its rating is the mean
over the generations. The unit of the statistics is the term: a group's interval and the permutation test of the
largest gap are over terms, so a group needs several of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastgpt.core import options
from fastgpt.core.errors import UserError, counted
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Figure, Items, Results, mean
from fastgpt.evaluate.safety.pairs import Text, log_probs, require_fit
from fastgpt.evaluate.safety.scorer import Scorer, open_scorer
from fastgpt.evaluate.safety.statistics import item_id, largest_gap, permutation_p, ways
from fastgpt.evaluate.target import Target
from fastgpt.inference import Request

FOLDER, FILE = "counterfactual", "counterfactual.yaml"
TERM = "{term}"


@dataclass(frozen=True)
class Settings:
    """A counterfactual probe.

    Attributes:
        groups: name of a group -> its terms.
        templates: texts with {term} in them, where the model goes on.
        continuations: texts whose log-probability is compared.
        scorer: FILE.py:FUNCTION that rates generations; empty generates nothing.
        samples: generations of each template and term.
        max_new_tokens: longest generation.
        temperature: of the generations.
        seed: of the generations.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    templates: list[str] = field(default_factory=list)
    continuations: list[str] = field(default_factory=list)
    scorer: str = ""
    samples: int = 4
    max_new_tokens: int = 32
    temperature: float = 1.0
    seed: int = 0


class Counterfactual:
    """A Part. Task NAME.CONTINUATION or NAME.scorer; metrics `mean.GROUP`, `gap` (the largest difference between two
    groups) and `p` (of the permutation test). The unit is nats, or that of the scorer.

    Raises:
        UserError: the file has another form; with file and key.
    """

    def __init__(self, path: Path) -> None:
        self.name = FOLDER if path.name == FILE else f"{FOLDER}.{path.stem}"
        given = options.from_file(Settings, path)
        self.settings = s = Settings(**given)
        self.terms = [(group, term) for group, terms in s.groups.items() for term in terms]
        self.scorer: Scorer | None = None
        _require(path, s, given)
        if s.scorer:
            self.scorer = open_scorer(str(path.parent / s.scorer), f"{path}: scorer")

    def check(self, target: Target) -> None:
        """Raise UserError if a continuation is longer than the context of the model."""
        require_fit(target, self.name, [("", f" {c}") for c in self.settings.continuations])

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Append the figures; of the first `limit` templates."""
        s = self.settings
        templates = s.templates[:limit]
        for continuation in s.continuations:
            texts: list[Text] = [
                (t.replace(TERM, term), f" {continuation}") for _, term in self.terms for t in templates
            ]
            found = log_probs(engine, results, self.name, texts)
            self._append(results, f"{self.name}.{'_'.join(continuation.split())}", found, len(templates))
        if self.scorer is not None:
            prompts = [t.replace(TERM, term) for _, term in self.terms for t in templates for _ in range(s.samples)]
            given: dict[str, Any] = dict(max_new_tokens=s.max_new_tokens, temperature=s.temperature)
            asked = [Request(p, seed=s.seed + i % (len(templates) * s.samples), **given) for i, p in enumerate(prompts)]
            found = self.scorer(prompts, [r.text for r in engine.generate(asked)])
            self._append(results, f"{self.name}.scorer", found, len(templates) * s.samples)
        sizes = [len(terms) for terms in s.groups.values()]
        least = math.prod(math.factorial(sizes.count(n)) for n in set(sizes)) / ways(sizes)
        if least > 0.05:
            results.notes.append(
                f"{self.name}: with {counted(len(self.terms), 'term')}, p cannot be below {least:.2g}; more terms in "
                "each group let a gap be told from chance"
            )

    def _append(self, results: Results, task: str, found: list[float], each: int) -> None:
        """found: `each` values for every term, in their order."""
        groups: dict[str, list[float]] = {group: [] for group in self.settings.groups}
        for i, (group, _) in enumerate(self.terms):
            groups[group].append(sum(found[i * each : (i + 1) * each]) / each)
        for group, values in groups.items():
            ids = [item_id(term) for term in self.settings.groups[group]]
            results.items.append(Items(task, f"mean.{group}", ids, values))
        n = len(self.terms)
        results.figures += [mean(task, f"mean.{g}", values, higher_is_better=None) for g, values in groups.items()]
        results.figures += [
            Figure(task, "gap", largest_gap(groups), n, higher_is_better=False),
            Figure(task, "p", permutation_p(groups), n, higher_is_better=None),
        ]


def _require(path: Path, s: Settings, given: dict[str, Any]) -> None:
    """Raise UserError for settings that make no probe, or have no effect."""
    if len(s.groups) < 2:
        raise UserError(
            f"{path}: groups has {counted(len(s.groups), 'group')}, expected two or more, as in women: [she]"
        )
    for group, terms in s.groups.items():
        if not terms or not all(t.strip() for t in terms) or len(set(terms)) < len(terms):
            raise UserError(f"{path}: groups.{group} is {terms}, expected different terms that are not blank")
    if not s.templates:
        raise UserError(f"{path}: templates is missing, expected texts with {TERM}")
    for i, template in enumerate(s.templates):
        if TERM not in template:
            raise UserError(f"{path}: templates[{i}] is {template!r}, expected {TERM} in it")
    if not s.continuations and not s.scorer:
        raise UserError(f"{path}: continuations and scorer are missing, expected at least one of them")
    if not all(c.strip() for c in s.continuations):
        raise UserError(f"{path}: continuations has a blank text, expected words")
    for key in ("samples", "max_new_tokens", "temperature", "seed"):
        value, least = getattr(s, key), 1 if key in ("samples", "max_new_tokens") else 0
        if not least <= value < math.inf:
            raise UserError(f"{path}: {key} is {value}, expected {least} or more")
        if key in given and not s.scorer:
            raise UserError(f"{path}: {key} has no effect without scorer")
