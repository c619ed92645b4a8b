"""A suite of one's own as a part of an evaluation: what the model does with its items, and the figures."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError, counted
from fastgpt.data import Tokenizer
from fastgpt.evaluate import metrics
from fastgpt.evaluate.classification import classification, confusion_matrix
from fastgpt.evaluate.engine import Engine, Scored
from fastgpt.evaluate.judge import Judge, Question
from fastgpt.evaluate.results import Figure, Items, Results, mean, ratio
from fastgpt.evaluate.suite_file import Suite, open_suite, schema_of
from fastgpt.evaluate.suite_items import Item
from fastgpt.evaluate.suite_schema import text_fits
from fastgpt.evaluate.suite_settings import GENERATES
from fastgpt.evaluate.target import Target
from fastgpt.inference import Request
from fastgpt.inference.chat import Conversation

RESAMPLES = 1000


def suite_of(path: str | Path) -> SuitePart:
    """Return the part of a suite. Raises UserError if something is wrong with the suite."""
    return SuitePart(open_suite(path))


class SuitePart:
    """A suite as a part of an evaluation."""

    def __init__(self, suite: Suite) -> None:
        self.suite, self.name = suite, suite.settings.suite
        self.schema = schema_of(suite.settings, suite.path) if suite.settings.judge.schema is not None else None
        judge = suite.settings.judge.model
        self.judge = Judge(judge, suite.path.parent) if judge else None

    def check(self, target: Target) -> None:
        """Check that answers fit into the context, and that the judge is there.

        Raises:
            UserError: an answer, `max_new_tokens` or a message does not fit into the context; the model has no chat
                template, which the suite asks for; or the judge does not answer.
        """
        s, context = self.suite.settings, target.model.block_size
        if s.kind in GENERATES and s.max_new_tokens >= context:
            raise UserError(
                f"{self.suite.path}: max_new_tokens is {s.max_new_tokens}, expected less than the context of "
                f"{context} tokens of {target.name}"
            )
        if s.chat:
            for item in self.suite.items:
                self._message(target, item, context - s.max_new_tokens)
        for item in self.suite.items if s.kind in ("choice", "classification", "cloze") else []:
            answers = [s.delimiter + text for text in item.choices or item.answers]
            if max(len(text.encode()) for text in answers) + len(item.prompt) - len(item.prompt.rstrip()) < context:
                continue  # no token is shorter than a byte
            tokens = max(len(after) for _, after in encode_pairs(target.tokenizer, self.suite.context(item), answers))
            if tokens > context:
                raise UserError(
                    f"{item.place}: an answer has {tokens} tokens, expected at most the context of {context} "
                    f"tokens of {target.name}"
                )
        if self.judge:
            self.judge.check()

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Evaluate the first `limit` items (None: all)."""
        start = time.perf_counter()
        items = self.suite.items[:limit]
        kind = self.suite.settings.kind
        results.truncated[self.name] = 0
        if kind == "perplexity":
            self._perplexity(engine, results, items)
        elif kind in GENERATES:
            self._generations(engine, results, items)
        else:
            self._likelihoods(engine, results, items)
        results.seconds[self.name] = round(time.perf_counter() - start, 3)

    def _add(self, results: Results, metric: str, items: Sequence[Item], values: list[float], **more: Any) -> None:
        """Append the mean of a metric and the value of each item."""
        results.figures.append(mean(self.name, metric, values, shots=self.suite.settings.shots, **more))
        results.items.append(Items(self.name, metric, [item.id for item in items], values))

    def _likelihoods(self, engine: Engine, results: Results, items: list[Item]) -> None:
        """Score the answers of choice, classification and cloze."""
        s, tokenizer = self.suite.settings, engine.target.tokenizer
        texts = [item.choices or item.answers for item in items]
        pairs = [
            pair
            for item, answers in zip(items, texts)
            for pair in encode_pairs(
                tokenizer, self.suite.context(item), [s.delimiter + text for text in answers], engine.start
            )
        ]
        scored = iter(engine.loglikelihoods(pairs))
        found = [[next(scored) for _ in answers] for answers in texts]
        results.truncated[self.name] = sum(any(one.truncated for one in each) for each in found)
        if s.kind == "cloze":
            self._cloze(results, items, [each[0] for each in found])
            return
        logprobs = [np.array([one.logprob for one in each]) for each in found]
        picked = [int(each.argmax()) for each in logprobs]
        chance = sum(1 / len(item.choices) for item in items) / len(items)
        self._add(results, "acc", items, [float(p == i.gold) for p, i in zip(picked, items)], chance=chance)
        if s.kind == "classification":
            self._macro_f1(results, [item.gold for item in items], picked)
            return
        lengths = [np.array([len(text) for text in item.choices]) for item in items]
        by_length = [int((each / n).argmax()) for each, n in zip(logprobs, lengths)]
        self._add(results, "acc_norm", items, [float(p == i.gold) for p, i in zip(by_length, items)], chance=chance)

    def _cloze(self, results: Results, items: list[Item], scored: list[Scored]) -> None:
        self._add(results, "acc", items, [float(one.greedy) for one in scored])
        nats = mean(self.name, "", [-one.logprob for one in scored])
        value = _exp(nats.value)
        stderr = None if nats.stderr is None else value * nats.stderr  # delta method
        shots = self.suite.settings.shots
        results.figures.append(
            Figure(self.name, "perplexity", value, nats.n, stderr, shots=shots, higher_is_better=False)
        )

    def _macro_f1(self, results: Results, gold: list[int], picked: list[int]) -> None:
        """Append macro F1, with the standard error of a bootstrap over items, and the baseline of the majority."""
        labels, n = self.suite.settings.labels, len(gold)
        matrix = confusion_matrix(gold, picked, len(labels))
        value = classification(matrix)["macro_f1"]
        drawn = np.random.default_rng(0).multinomial(n, matrix.reshape(-1) / n, RESAMPLES)
        samples = [classification(m.reshape(matrix.shape))["macro_f1"] for m in drawn]
        stderr = float(np.std(samples, ddof=1)) if n > 1 else None
        results.figures.append(Figure(self.name, "macro_f1", value, n, stderr, shots=self.suite.settings.shots))
        common = int(matrix.sum(1).argmax())
        results.notes.append(
            f"{self.name}: always answering {labels[common]!r} has acc {matrix.sum(1)[common] / n:.4f}"
        )

    def _perplexity(self, engine: Engine, results: Results, items: list[Item]) -> None:
        """Score the texts; per word and per byte as the harness, over the sums of all texts."""
        texts = [item.prompt for item in items]
        nats = np.array([-logprob for logprob, _ in engine.rolling(texts)])
        size = np.array([len(text.encode()) for text in texts], np.float64)
        words = np.array([len(re.split(r"\s+", text)) for text in texts], np.float64)
        for metric, units in (("word_perplexity", words), ("byte_perplexity", size), ("bits_per_byte", size)):
            rate, error = ratio(nats, units)
            value, slope = (rate / math.log(2), 1 / math.log(2)) if metric == "bits_per_byte" else (_exp(rate),) * 2
            stderr = None if error is None else slope * error
            results.figures.append(Figure(self.name, metric, value, len(items), stderr, higher_is_better=False))
        ids, bits = [item.id for item in items], (nats / size / math.log(2)).tolist()
        results.items.append(Items(self.name, "bits_per_byte", ids, bits, size.tolist()))

    def _generations(self, engine: Engine, results: Results, items: list[Item]) -> None:
        """Generate answers and compare or judge them."""
        s, tokenizer = self.suite.settings, engine.target.tokenizer
        room, stop = engine.context - s.max_new_tokens, list(s.stop)
        if s.chat:
            prompts = [self._message(engine.target, item, room) for item in items]
            assert engine.target.chat is not None
            stop += [engine.target.chat.stop] if engine.target.chat.stop else []
        else:
            prompts = [tokenizer.prompt(self.suite.context(item)) or [engine.start] for item in items]
        results.truncated[self.name] = sum(len(ids) > room for ids in prompts)
        requests = [Request(ids[-room:], s.max_new_tokens, temperature=0.0, stop=stop) for ids in prompts]
        texts = [result.text for result in engine.generate(requests)]
        if self.judge:
            self._judged(results, items, texts)
            return
        rows = [self.grade(text, item.answers, item.regex) for text, item in zip(texts, items)]
        for metric in rows[0]:
            self._add(results, metric, items, [row[metric] for row in rows])
        if s.kind != "generation":
            answers = [list(item.answers) for item in items]
            options = {"tokenizer": s.tokenizer, "normalize": s.normalize}
            results.notes += [f"{self.name}, {note}" for note in metrics.score("f1", texts, answers, **options).notes]

    def _message(self, target: Target, item: Item, room: int) -> list[int]:
        """Return the ids of an item's prompt as the message of a user."""
        if target.chat is None:
            raise UserError(f"{self.suite.path} has `chat: true`, but {target.name} has no chat template")
        try:
            return Conversation(target.chat, target.tokenizer, room).ask(self.suite.context(item))[0]
        except UserError as e:
            raise UserError(f"{item.place}: {e}") from None

    def grade(self, text: str, answers: Sequence[str], regex: str) -> dict[str, float]:
        """Return the figures of a generated text."""
        s = self.suite.settings
        if s.kind != "generation":
            return {
                "exact_match": metrics.exact_match(text.strip(), answers, s.normalize),
                "f1": metrics.f1(text, answers, s.tokenizer, s.normalize),
            }
        if self.schema is not None:
            return {"valid": float(text_fits(text, self.schema))}
        match = re.fullmatch(regex, text.strip()) if s.judge.full else re.search(regex, text)
        return {"pass": float(match is not None)}

    def _judged(self, results: Results, items: list[Item], texts: list[str]) -> None:
        """Ask the judge. Items without a verdict are left out and counted."""
        assert self.judge is not None
        questions = [
            Question(item.prompt, text.strip(), item.answers[0] if item.answers else "")
            for item, text in zip(items, texts)
        ]
        verdicts = self.judge(questions)
        failed = sum(value is None for value in verdicts.values)
        reasons = ", ".join(f"{reason}: {n}" for reason, n in sorted(verdicts.failures.items()))
        if failed == len(items):
            raise UserError(f"{self.name}: the judge gave no verdict on {counted(failed, 'item')} ({reasons})")
        kept = [(item, value) for item, value in zip(items, verdicts.values) if value is not None]
        self._add(results, "judge", [item for item, _ in kept], [value for _, value in kept])
        results.notes.append(
            f"{self.name}: {counted(verdicts.asked, 'verdict')} of {self.judge.settings.model}, "
            f"{verdicts.kept} from an earlier run"
        )
        if failed:
            results.notes.append(f"{self.name}: {counted(failed, 'item')} left out without a verdict ({reasons})")


def encode_pairs(
    tokenizer: Tokenizer, context: str, continuations: Sequence[str], start: int = 0
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of a context and of each of its continuations, divided as the harness does.

    Spaces at the end of the context belong to the continuation. Both are encoded as one text, of which the context has
    as many tokens as it has alone; if that leaves none, because the first token joins both, the continuation is encoded
    by itself. An empty context is the token `start`.
    """
    if not context:
        return [([start], tokenizer.encode(text).tolist()) for text in continuations]
    before = tokenizer.prompt(context.rstrip())
    pairs = [(before, tokenizer.prompt(context + text)[len(before) :], text) for text in continuations]
    return [(before, after or tokenizer.encode(text).tolist()) for before, after, text in pairs]


def _exp(value: float) -> float:
    """Return e^value, at most the largest number that JSON can hold."""
    return math.exp(min(value, 700.0))
