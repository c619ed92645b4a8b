"""Score what a run writes for held-out rows of `prompt` and `completion` (or `answer`).

    python recipes/finetune/score.py runs/qa data/rows/val/qa.jsonl

prints exact match and F1 of words (as SQuAD, but with case and punctuation kept), ROUGE-L of words in lower case (as
rouge-score without stemming), and chrF (as sacrebleu), all in percent.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt.inference import Generator, Request
from fastgpt.training.load import load_run

ORDER, BETA = 6, 2  # of chrF


def f_score(precision: float, recall: float, beta: float = 1) -> float:
    """Return the weighted harmonic mean of precision and recall; 0 if both are 0."""
    below = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / below if below else 0.0


def f1(text: str, expected: str) -> float:
    """Return F1 of the words of two texts."""
    a, b = text.split(), expected.split()
    common = sum((Counter(a) & Counter(b)).values())
    return f_score(common / max(1, len(a)), common / max(1, len(b)))


def rouge_l(text: str, expected: str) -> float:
    """Return the F-measure of the longest common subsequence of words (Lin 2004)."""
    a, b = (re.findall(r"[a-z0-9]+", t.lower()) for t in (text, expected))
    row = [0] * (len(b) + 1)
    for word in a:
        before, row = row, [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
    return f_score(row[-1] / max(1, len(a)), row[-1] / max(1, len(b)))


def chrf(texts: Sequence[str], expected: Sequence[str]) -> float:
    """Return chrF of a corpus: F2 of the n-grams of 1 to 6 characters without spaces (Popovic 2015)."""
    precisions, recalls = [], []
    for n in range(1, ORDER + 1):
        found = [(_grams(a, n), _grams(b, n)) for a, b in zip(texts, expected)]
        common = sum((a & b).total() for a, b in found)
        own = sum(a.total() for a, b in found if b)  # sacrebleu leaves out orders that the reference is too short for
        other = sum(b.total() for _, b in found)
        if own and other:
            precisions.append(common / own)
            recalls.append(common / other)
    count = max(1, len(precisions))
    return f_score(sum(precisions) / count, sum(recalls) / count, BETA)


def _grams(text: str, n: int) -> Counter[str]:
    whole = "".join(text.split())
    return Counter(whole[i : i + n] for i in range(len(whole) - n + 1))


def scores(texts: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return the scores of texts, each in percent."""
    pairs = list(zip(texts, expected))
    share = 100 / len(pairs)
    return {
        "exact match": share * sum(a == b for a, b in pairs),
        "F1": share * sum(f1(a, b) for a, b in pairs),
        "ROUGE-L": share * sum(rouge_l(a, b) for a, b in pairs),
        "chrF": 100 * chrf(texts, expected),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print and return the scores of a run."""
    parser = argparse.ArgumentParser(description="Score what a run writes for held-out prompts.")
    parser.add_argument("run")
    parser.add_argument("rows", type=Path, help="JSONL with prompt and completion")
    parser.add_argument("--limit", type=int, default=200, help="rows to score, from the first on")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args(argv)
    model, tokenizer, _ = load_run(args.run, torch.device("cpu"))
    rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()[: args.limit]]
    room = model.max_positions - args.max_new_tokens
    asked = [
        (tokenizer.prompt(row["prompt"].rstrip(" ")), row.get("completion", row.get("answer", "")).strip())
        for row in rows
    ]
    asked = [(ids, answer) for ids, answer in asked if len(ids) <= room]
    requests = [Request(ids, args.max_new_tokens, temperature=0.0) for ids, _ in asked]
    results = Generator(model, tokenizer, max_batch=16, graphs=False).generate(requests)
    texts = [result.text.strip() for result in results]
    found = scores(texts, [answer for _, answer in asked])
    print(f"{len(texts)} of {len(rows)} rows; the first: {texts[0]!r}, expected {asked[0][1]!r}")
    print(*(f"{name} {value:.1f}" for name, value in found.items()), sep=", ")
    return found


if __name__ == "__main__":
    main()
