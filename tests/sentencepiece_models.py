"""Small models of SentencePiece, trained in the test."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

SAMPLE = "the cat sat on the mat; the dog's 12 cats ran  to it\nand on. "


def sentencepiece_folder(folder: Path, **options: Any) -> Any:
    """Train a model of SentencePiece into folder/tokenizer.model; return its processor."""
    spm = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentences = iter(SAMPLE.split(" ") * 30 + [SAMPLE] * 30)
    quiet = dict(minloglevel=2, hard_vocab_limit=False)
    spm.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=made, **quiet, **options)
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    return spm.SentencePieceProcessor(model_proto=made.getvalue())


PLAIN = dict(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=True)
MODELS: dict[str, dict[str, Any]] = {
    "bpe, as Llama 2": dict(model_type="bpe", vocab_size=320, **PLAIN),
    "bpe, as Gemma": dict(
        model_type="bpe", vocab_size=320, add_dummy_prefix=False, user_defined_symbols=["\n\n", "<u>"], **PLAIN
    ),
    "bpe, no fallback": dict(model_type="bpe", vocab_size=60, **PLAIN | dict(byte_fallback=False)),
    "unigram, normalised": dict(model_type="unigram", vocab_size=340, byte_fallback=True),
}
