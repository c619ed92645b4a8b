"""What a run is about to learn, in text: the share of tokens with loss, the rows left out, and an example."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastgpt.data.tokenizer import Tokenizer
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Classified, Loaded, Pair, Rated

BEGIN, END = "[[", "]]"  # around what is learned
CHARACTERS = 2000


def summary(loaded: Loaded[Any]) -> list[str]:
    """Return lines about the rows of a path: how many are used, the share of tokens that carries loss, what was cut,
    and how many were left out, by reason."""
    c = loaded.counts
    share = f", {c.learned:,} of them ({c.learned / c.tokens:.1%}) carry loss" if c.learned else ""
    lines = [f"{loaded.name}: {len(loaded.items):,} examples of {c.rows:,} rows, {c.tokens:,} tokens{share}"]
    if c.left_out:
        left = ", ".join(f"{n:,} {why}" for why, n in sorted(c.left_out.items()))
        lines.append(f"  left out: {left}")
    notes = (
        (c.cut, "longer than the context, their end and the end-of-text token are cut off"),
        (c.split, "longer than the context, split"),
        (c.special_texts, "texts hold the text of a special token, which stays ordinary text"),
    )
    return lines + [f"  {n:,} {note}" for n, note in notes if n]


def rendered(item: Example | Pair | Rated | Classified, tokenizer: Tokenizer) -> str:
    """Return the text of an example, its learned parts in [[ ]]; of a pair both sides, with their names; of others also
    the rating or the label. A long text is cut."""
    if isinstance(item, Pair):
        return f"chosen:\n{rendered(item.chosen, tokenizer)}\nrejected:\n{rendered(item.rejected, tokenizer)}"
    if isinstance(item, Rated):
        return f"{'good' if item.good else 'bad'}:\n{rendered(item.example, tokenizer)}"
    if isinstance(item, Classified):
        return _labelled(item, tokenizer)
    cuts = np.flatnonzero(np.diff(item.learned.astype(np.int8))) + 1
    parts = np.split(item.ids, cuts)
    texts = [tokenizer.decode_bytes(part).decode("utf-8", "replace") for part in parts]
    marked = (f"{BEGIN}{t}{END}" if learned else t for t, learned in zip(texts, item.learned[[0, *cuts]]))
    return _short("".join(marked))


def _labelled(item: Classified, tokenizer: Tokenizer) -> str:
    if not isinstance(item.label, np.ndarray):
        return f"{_short(tokenizer.decode(item.ids))}\nlabel: {item.label}"
    begins = np.flatnonzero(item.label >= 0)
    words = np.split(item.ids, begins)[1:]
    return " ".join(f"{tokenizer.decode(w).strip()}/{item.label[b]}" for w, b in zip(words, begins))


def _short(text: str) -> str:
    half = CHARACTERS // 2
    return (
        text
        if len(text) <= CHARACTERS
        else f"{text[:half]}\n[... {len(text) - 2 * half:,} characters ...]\n{text[-half:]}"
    )
