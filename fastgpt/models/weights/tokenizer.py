"""The tokenizer's files as transformers and its older readers load them."""

from __future__ import annotations

import json
from typing import Any


def merges_of(spec: dict[str, Any]) -> list[str]:
    """Return the merges of a tokenizer.json, "left right" each: newer files have them as pairs."""
    return [" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]]


def tokenizer_files(
    text: str,
    *,
    gpt2: bool,
    eos: str | None,
    bos: str | None = None,
    max_length: int | None = None,
    chat_template: str | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, str]:
    """Return name -> content of the files of a tokenizer.

    Args:
        text: content of its tokenizer.json.
        gpt2: whether it is a byte-level BPE with GPT-2's word pattern and nothing else, as GPT2Tokenizer assumes.
        eos, bos: special tokens that end and begin a text.
        max_length: positions of the model.
        settings: a tokenizer_config.json to keep, whose own values count before the arguments.

    GPT-2's kind is a GPT2Tokenizer with its vocab.json and merges.txt, any other one a PreTrainedTokenizerFast: both
    are known to every version of transformers that reads tokenizer.json. GPT2Tokenizer reads no normalizer of it.
    """
    spec = json.loads(text)
    kept = {k: v for k, v in (settings or {}).items() if k not in ("tokenizer_class", "chat_template", "backend")}
    kind = "GPT2Tokenizer" if gpt2 else "PreTrainedTokenizerFast"
    known = {"eos_token": eos, "bos_token": bos, "unk_token": eos if gpt2 else None}
    config: dict[str, Any] = {"tokenizer_class": kind, "model_max_length": max_length, "add_prefix_space": False}
    config = {k: v for k, v in (config | known).items() if v is not None} | kept
    files = {"tokenizer.json": text, "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}
    if gpt2:
        vocabulary = spec["model"]["vocab"] | {t["content"]: t["id"] for t in spec["added_tokens"]}
        files["vocab.json"] = json.dumps(vocabulary, ensure_ascii=False)
        files["merges.txt"] = "\n".join(["#version: 0.2", *merges_of(spec)]) + "\n"
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template
    return files
