"""Suites of every kind for tests, and a tiny random model to evaluate on them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import yaml

from fastgpt.data import train_tokenizer
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.suite_file import open_suite
from fastgpt.evaluate.target import Target
from fastgpt.inference import Request
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

WORDS = "cat dog cow hen owl fox bee ant".split()
LABELS = ["good", "bad", "so-so"]


def sentence(i: int) -> str:
    """Return the i-th of many different sentences."""
    a, b, c = WORDS[i % 8], WORDS[i // 8 % 8], WORDS[(3 * i + 1) % 8]
    return f"the {a} sees the {b} and number {i} is a {c}"


def items_of(kind: str, n: int, first: int = 0) -> list[dict[str, Any]]:
    """Return n items of a kind."""
    rows: dict[str, Any] = {
        "choice": lambda i: {
            "question": f"What does {sentence(i)} see?",
            "choices": [f"a {WORDS[(i + k) % 8]}" + " sees" * (k == i % 2) for k in range(3 + i % 2)],
            "answer": i % 3,
        },
        "classification": lambda i: {"text": sentence(i), "label": LABELS[i % 3]},
        "cloze": lambda i: {"text": f"{sentence(i)}: the cat on the", "answer": ["mat", "cat", "dog"][i % 3]},
        "qa": lambda i: {"question": sentence(i), "answers": ["the " + WORDS[i % 8], "a cat"]},
        "span": lambda i: {"context": sentence(i), "question": "who sees?", "answer": ["the cat", "mat", "dog"][i % 3]},
        "perplexity": lambda i: {"text": f"{sentence(i)}.\n{sentence(i + 1)}." + " And on." * (i % 4) * 2},
        "generation": lambda i: {"prompt": sentence(i) + ":", "regex": "[aeo]" * (1 + i % 4), "reference": "a cat"},
    }
    return [rows[kind](i) for i in range(first, first + n)]


def write_suite(folder: Path, kind: str, items: list[Any] | None = None, inline: bool = False, **settings: Any) -> Path:
    """Write a suite with 12 items, or those given, in the YAML file itself or beside it."""
    rows = items_of(kind, 12) if items is None else items
    more = {"labels": LABELS} if kind == "classification" else {}
    content: dict[str, Any] = {"suite": f"my-{kind}", "kind": kind, **more, **settings}
    if inline:
        content["items"] = rows
    else:
        content["items"] = "items.jsonl"
        write_rows(folder / "items.jsonl", rows)
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


@functools.cache
def tiny_target() -> Target:
    """Return a random model in fp64."""
    tokenizer = train_tokenizer([" ".join(map(sentence, range(64)))] * 4, 320)
    config = ModelConfig(n_layers=2, n_heads=4, width=32, vocab_size=tokenizer.n_vocab, block_size=96, init_std=0.4)
    model = GPT(config, generator=torch.Generator().manual_seed(3)).double().eval()
    return Target(model, tokenizer, "tiny", Path(), {"name": "tiny"})


def texts_of(path: Path) -> list[str]:
    """Return what the model generates for each item of a suite."""
    suite, target = open_suite(path), tiny_target()
    prompts = [target.tokenizer.prompt(suite.context(item)) for item in suite.items]
    tokens, stop = suite.settings.max_new_tokens, suite.settings.stop
    requests = [Request(ids, tokens, temperature=0.0, stop=stop) for ids in prompts]
    return [result.text for result in Engine(target).generate(requests)]


def run_part(part: Any, target: Target | None = None, limit: int | None = None) -> Results:
    """Check a part and run it."""
    target = target or tiny_target()
    results = Results(target.about, "suite")
    part.check(target)
    part.run(Engine(target), results, limit)
    return results
