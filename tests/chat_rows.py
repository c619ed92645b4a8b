"""Conversations, their templates and a tokenizer with their marks, for the tests of fine-tuning."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from fastgpt.data import Tokenizer, train_tokenizer

MARKS = ["<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "the dog"},
    {"role": "user", "content": "and on"},
    {"role": "assistant", "content": "sat "},
]


@functools.cache
def chat_tokenizer() -> Tokenizer:
    """Return a tokenizer with merges, also over spaces, and ChatML's marks."""
    return train_tokenizer(["the cat sat on the mat; a: the dog"] * 9, 290, MARKS)


def write_rows(path: Path, *rows: Any) -> Path:
    """Write JSON lines; a text is a line as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path
