"""Raters of answers: a classifier gives each text its own probability, in whichever batch, and long texts in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import byte_tokenizer

from fastgpt.core.errors import UserError
from fastgpt.finetune.head_files import save_pretrained, write_tokenizer
from fastgpt.finetune.heads import HeadConfig, attach
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.serve.watch.scorers import Classifier, open_rater

CONTEXT = 16


def write_classifier(folder: Path, head: HeadConfig) -> GPT:
    """Write a random model with a head as a finished run has it."""
    tokenizer, g = byte_tokenizer(), torch.Generator().manual_seed(0)
    config = ModelConfig(
        n_layers=1, n_heads=2, width=16, vocab_size=tokenizer.n_vocab, vocab_multiple=1, block_size=CONTEXT
    )
    model = GPT(config, generator=g).eval()
    attach(model, head, g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.3)
    save_pretrained(model, folder / "model", head, extra={"eos_token_id": tokenizer.eot})
    write_tokenizer(folder / "model", tokenizer, head, CONTEXT)
    return model


@torch.no_grad()
def test_a_classifier_rates_each_text_alone(tmp_path: Path) -> None:
    head = HeadConfig("classification", ("fine", "toxic"), pad_id=byte_tokenizer().eot)
    model = write_classifier(tmp_path / "run", head)
    tokenizer = byte_tokenizer()

    def probability(text: str) -> float:
        ids = torch.tensor([tokenizer.encode(text).tolist()])
        return float(model.head(model.hidden(ids)[:, -1]).softmax(-1)[0, 1])

    texts = ["a", "some text", "x" * CONTEXT, *(f"number {i}" for i in range(40))]
    rate = open_rater("toxic", f"{tmp_path / 'run'}:toxic", 0.5).rate
    assert rate(texts, texts) == pytest.approx([probability(t) for t in texts], abs=1e-5)
    long = "first part here " + "second part"
    assert rate([""], [long]) == pytest.approx([max(probability(long[:16]), probability(long[16:]))], abs=1e-5)
    assert 0 < rate([""], [""])[0] < 1
    other = Classifier(tmp_path / "run" / "model", "fine")
    assert other([""], ["a"]) == pytest.approx([1 - probability("a")], abs=1e-5)


def test_what_rates_nothing(tmp_path: Path) -> None:
    write_classifier(tmp_path / "run", HeadConfig("classification", ("fine", "toxic"), pad_id=0))
    write_classifier(tmp_path / "number", HeadConfig("regression", pad_id=0))
    write_classifier(tmp_path / "tags", HeadConfig("tags", ("A", "B"), pad_id=0))
    assert len(open_rater("n", str(tmp_path / "number"), 0.5).rate(["", ""], ["a", "b"])) == 2
    for what, message in (
        ("run:rude", "has no label 'rude', expected .*run:LABEL with one of fine, toxic"),
        ("run", "has several labels, expected .*run:LABEL"),
        ("number:x", "has no labels, expected its path without :x"),
        ("tags:A", "labels tokens, expected a classification or a regression"),
        ("none", "is neither FILE.py:FUNCTION nor RUN:LABEL"),
    ):
        with pytest.raises(UserError, match=message):
            open_rater("n", str(tmp_path / what), 0.5)
