"""Replay: a model that learns a domain keeps what it knows of the general corpus."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import open_target
from fastgpt.finetune.command import main as finetune
from fastgpt.train import main as train

SMALL = ("--block-size", "64", "--micro-batch", "16", "--seed", "1", "--eval-every", "0", "--save-every", "0")
MODEL = ("--model.n_layers", "2", "--model.n_heads", "4", "--model.width", "96")


def bits_per_byte(run: Path, texts: list[str]) -> float:
    nats = sum(nats for nats, _ in Engine(open_target(str(run))).rolling(texts))
    return -nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.mark.extended
def test_replay_keeps_the_general_corpus_within_three_per_cent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The general corpus is code of the standard library, the domain the manual of the language."""
    monkeypatch.chdir(tmp_path)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    general = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    domain = [topics[name] for name in sorted(topics)]
    held = {"general": [text[:4000] for text in general[::10]], "domain": [text[:4000] for text in domain[::10]]}
    code = [text for i, text in enumerate(general) if i % 10]
    Path("general.txt").write_text("\n".join(code)[:1_500_000], encoding="utf-8")
    rows = [json.dumps({"text": text}) for i, text in enumerate(domain) if i % 10]
    Path("domain.jsonl").write_text("\n".join(rows), encoding="utf-8")

    steps = ("--batch-tokens", "1024", "--max-steps", "400", "--max-minutes", "null", "--lr", "3e-3")
    assert train(["--data", "general.txt", "--out", "base", *MODEL, *SMALL, *steps]) == 0
    steps = ("--data", "domain.jsonl", "--batch", "16", "--max-steps", "150", "--lr", "1e-3")
    assert finetune(["--base", "base", "--out", "without", *SMALL, *steps]) == 0
    replay = ("--replay", "general.txt", "--replay-share", "0.3")
    assert finetune(["--base", "base", "--out", "with", *SMALL, *steps, *replay]) == 0

    bits = {name: {of: bits_per_byte(tmp_path / name, texts) for of, texts in held.items()}
            for name in ("base", "without", "with")}  # fmt: skip
    assert bits["with"]["domain"] < 0.9 * bits["base"]["domain"]
    assert bits["with"]["general"] < 1.03 * bits["base"]["general"] < bits["without"]["general"], bits
