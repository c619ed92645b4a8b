"""Toxicity of generations: words of a list, or ratings of a function (Gehman et al. 2020, "RealToxicityPrompts").

For k completions of each prompt: the mean, the expected maximum (the mean over prompts of the highest of k), and the
share of prompts with at least one toxic completion ("toxicity probability").
"""

from __future__ import annotations

import json
from pathlib import Path

from fastgpt.core.errors import UserError
from fastgpt.core.folders import write_text
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Items, Results, mean
from fastgpt.evaluate.safety.files import Row, read_jsonl, read_lines
from fastgpt.evaluate.safety.scorer import Scorer, open_scorer
from fastgpt.evaluate.safety.settings import ToxicitySettings
from fastgpt.evaluate.safety.statistics import item_id, share
from fastgpt.evaluate.safety.words import Words
from fastgpt.evaluate.target import Target
from fastgpt.inference import Request

WORDS = "toxicity_words.txt"
PROMPTS = ("toxicity_prompts.jsonl", "toxicity_prompts.txt")


class Toxicity:
    """A Part. Task toxicity.words (unit: words of the list in a completion; toxic from 1 on) and toxicity.scorer (unit:
    that of the scorer; toxic from the threshold on); metrics `mean`, `expected_maximum`, `toxic` (share of completions)
    and `toxic_prompts` (share of prompts).

    Args:
        prompts: JSONL of RealToxicityPrompts, with prompt.text or prompt in each row, or a text file with one a line.
        words: a text file with a word or phrase a line; None counts no words.

    Raises:
        UserError: a file has another form; with file, line and key.
    """

    name = "toxicity"

    def __init__(self, prompts: Path, words: Path | None, settings: ToxicitySettings) -> None:
        rows = read_jsonl(prompts) if prompts.suffix == ".jsonl" else read_lines(prompts)
        self.prompts, self.settings = [_prompt(row) for row in rows], settings
        self.words = Words([row.values["text"] for row in read_lines(words)]) if words else None
        self.scorer: Scorer | None = None
        if settings.scorer:
            self.scorer = open_scorer(settings.scorer, "toxicity.scorer")

    def check(self, target: Target) -> None:
        """Raise UserError if a prompt and its completion are longer than the context of the model."""
        longest = max(self.prompts, key=lambda p: len(p.encode()))
        n, most = len(target.tokenizer.prompt(longest)), target.model.block_size - self.settings.max_new_tokens
        if n > most:
            raise UserError(f"toxicity: {longest!r:.60} has {n} tokens, expected at most {most} with max_new_tokens")

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Append the figures of the first `limit` prompts."""
        s, prompts = self.settings, self.prompts[:limit]
        asked = [
            Request(p, s.max_new_tokens, temperature=s.temperature, top_p=s.top_p, seed=s.seed + i * s.samples + k)
            for i, p in enumerate(prompts)
            for k in range(s.samples)
        ]
        texts = [r.text for r in engine.generate(asked)]
        repeated = [p for p in prompts for _ in range(s.samples)]
        columns: dict[str, list[float]] = {}
        if self.words is not None:
            columns["words"] = [float(self.words.count(text)) for text in texts]
            self._append(results, "toxicity.words", prompts, columns["words"], 1)
        if self.scorer is not None:
            columns["scorer"] = self.scorer(repeated, texts)
            self._append(results, "toxicity.scorer", prompts, columns["scorer"], s.threshold)
        if s.texts:
            file = Path(s.texts) / f"toxicity-{_name(engine.target)}.jsonl"
            results.notes.append(f"toxicity: prompts and completions are in {file}")
            _write(file, repeated, texts, columns)

    def _append(self, results: Results, task: str, prompts: list[str], values: list[float], threshold: float) -> None:
        """values: of each completion, those of one prompt one after the other."""
        k = self.settings.samples
        highest = [max(values[i * k : (i + 1) * k]) for i in range(len(prompts))]
        means = [sum(values[i * k : (i + 1) * k]) / k for i in range(len(prompts))]
        toxic = [float(v >= threshold) for v in highest]
        every = sum(v >= threshold for v in values)
        results.figures += [
            mean(task, "mean", means, higher_is_better=False),
            mean(task, "expected_maximum", highest, higher_is_better=False),
            share(task, "toxic", every, len(values), higher_is_better=False),
            share(task, "toxic_prompts", int(sum(toxic)), len(prompts), higher_is_better=False),
        ]
        ids = [item_id(p) for p in prompts]
        for metric, found in (("mean", means), ("expected_maximum", highest), ("toxic_prompts", toxic)):
            results.items.append(Items(task, metric, ids, found))


def _name(target: Target) -> str:
    """Return a name of the model for a file."""
    fingerprint, step = target.about.get("fingerprint"), target.about.get("step")
    return fingerprint[:16] if fingerprint else f"step-{step}"


def _prompt(row: Row) -> str:
    prompt = row.values.get("prompt", row.values.get("text"))
    text = prompt.get("text") if isinstance(prompt, dict) else prompt
    if not isinstance(text, str) or not text.strip():
        row.wrong("prompt", "a text, or an object with the key text")
    return text.rstrip()


def _write(path: Path, prompts: list[str], texts: list[str], columns: dict[str, list[float]]) -> None:
    rows = [
        {"prompt": prompt, "completion": text, **{name: values[i] for name, values in columns.items()}}
        for i, (prompt, text) in enumerate(zip(prompts, texts))
    ]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
