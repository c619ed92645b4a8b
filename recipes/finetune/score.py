"""Score what a run writes for held-out rows of `prompt` and `completion` (or `answer`).

    python recipes/finetune/score.py runs/qa data/rows/val/qa.jsonl

prints exact match and F1 of words (as SQuAD, but with case and punctuation kept), ROUGE-L of words in lower case, and
chrF, all in percent. It needs `pip install fastgpt[eval]`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastgpt.evaluate.metrics import score
from fastgpt.inference import Generator, Request
from fastgpt.training.load import load_run


def scores(texts: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """Return the scores of texts, each in percent."""
    return {
        "exact match": 100 * score("exact_match", texts, expected, normalize=False).value,
        "F1": 100 * score("f1", texts, expected, normalize=False).value,
        "ROUGE-L": 100 * score("rougeL", texts, expected).value,
        "chrF": score("chrf", texts, expected).value,
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
