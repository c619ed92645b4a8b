"""Prompts that ask for the text between a prefix and a suffix (Bavarian 2022, arXiv:2207.14255)."""

from __future__ import annotations

from fastgpt.data import Tokenizer
from fastgpt.serve.errors import ApiError

# special tokens before prefix, suffix and middle: Qwen, StarCoder, StarCoder's first version, DeepSeek
MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
)


def infill(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """Return the ids of a prompt after which a model writes what comes between two texts.

    Raises:
        ApiError: the tokenizer has no tokens for that.
    """
    marks = next((m for m in MARKS if all(mark in tokenizer.specials for mark in m)), None)
    if marks is None:
        raise ApiError(
            400, "suffix is given, expected none: the tokenizer has no fill-in-the-middle tokens", param="suffix"
        )
    before, between, after = (tokenizer.specials[mark] for mark in marks)
    head, tail = (list(map(int, tokenizer.encode(text))) for text in (prefix, suffix))
    return [*tokenizer.prefix, before, *head, between, *tail, after]
