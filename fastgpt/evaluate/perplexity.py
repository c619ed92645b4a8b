"""Perplexity and bits per byte of documents: a run's own validation data by source, and text files.

Every token of a document is scored once, after one start token. Bits per byte, sum(nats) / (ln 2 · sum(bytes)), divides
by the UTF-8 bytes of the text, so models with different tokenizers compare; perplexity, exp(sum(nats) / sum(tokens)),
does not allow that. Standard errors are those of a ratio of two means over documents, by the delta method (Cochran,
Sampling Techniques, 1977, 2.11).
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError, cause_of
from fastgpt.data import Tokenizer
from fastgpt.data.documents import document_starts
from fastgpt.data.shards import Tokens
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Figure, Items, Results, item_id, ratio
from fastgpt.evaluate.target import Target
from fastgpt.training.build import open_data
from fastgpt.training.config import from_dict

BATCH = 256  # documents scored at a time


class Perplexity:
    """Perplexity and bits per byte as a part of an evaluation.

    Args:
        texts: files: .jsonl has a document in `text` on each line, any other file is one document.
        validation: whether to score the validation data of the run, too.
        required: whether a run without validation data is an error; otherwise a note says so.
    """

    name = "perplexity"

    def __init__(self, texts: Iterable[Path] = (), validation: bool = True, required: bool = False) -> None:
        self.texts, self.validation, self.required = list(texts), validation, required
        self._sources: dict[str, Callable[[], Iterator[str]]] = {}
        self._missing = ""

    def check(self, target: Target) -> None:
        """Open the sources.

        Raises:
            UserError: a text file cannot be read, has a line without `text`, or no text; or the required validation
                data is not there.
        """
        self._sources, self._missing = {}, ""
        if self.validation:
            try:
                held = validation_data(target)
            except UserError as e:
                if self.required:
                    raise
                self._missing = f"the validation data is not scored: {e}"
                held = {}
            for name, tokens in held.items():
                self._sources[name] = _of_tokens(tokens, target.tokenizer)
        for path in self.texts:
            documents = functools.partial(iter, read_texts(path))
            self._sources[path.name if path.name not in self._sources else str(path)] = documents

    def run(self, engine: Engine, results: Results, limit: int | None) -> None:
        """Score the first `limit` documents of each source (None: all)."""
        if self._missing:
            results.notes.append(self._missing)
        for name, documents in self._sources.items():
            start, rows, chosen = time.perf_counter(), [], islice(documents(), limit)
            while texts := list(islice(chosen, BATCH)):
                scored = engine.rolling(texts)
                rows += [(t, -logprob, tokens) for t, (logprob, tokens) in zip(texts, scored, strict=True)]
            if not rows:
                results.notes.append(f"{name} has no documents")
                continue
            results.figures += figures(name, rows)
            ids = [item_id(text) for text, _, _ in rows]
            sizes = [float(len(text.encode())) for text, _, _ in rows]
            per_byte = [nats / math.log(2) / size for (_, nats, _), size in zip(rows, sizes, strict=True)]
            results.items.append(Items(name, "bits_per_byte", ids, per_byte, sizes))
            results.seconds[name] = round(time.perf_counter() - start, 3)


def figures(name: str, rows: list[tuple[str, float, int]]) -> list[Figure]:
    """Return bits per byte and perplexity of documents.

    Args:
        rows: text, nats and scored tokens of each document.
    """
    nats = np.array([n for _, n, _ in rows])
    sizes = np.array([float(len(text.encode())) for text, _, _ in rows])
    tokens = np.array([float(t) for _, _, t in rows])
    bits, bits_error = ratio(nats / math.log(2), sizes)
    per_token, error = ratio(nats, tokens)
    perplexity = math.exp(min(per_token, 700.0))  # a number in JSON, whatever the model
    n, down = len(rows), {"higher_is_better": False}
    return [
        Figure(name, "bits_per_byte", bits, n, bits_error, **down),
        Figure(name, "perplexity", perplexity, n, None if error is None else perplexity * error, **down),
    ]


def validation_data(target: Target) -> dict[str, Tokens]:
    """Return the validation tokens of the run by source; one source is "validation".

    Raises:
        UserError: it is not a run, or its data is not where it was or was encoded with another tokenizer.
    """
    if not target.settings:
        raise UserError(f"{target.name} is not a run of `fastgpt train`")
    source, more = open_data(from_dict(target.settings))
    if source.fingerprint not in (None, target.tokenizer.fingerprint):
        raise UserError(f"{source.name} was encoded with another tokenizer than that of {target.name}")
    return {**(source.val_sources or {"validation": source.val}), **more}


def _of_tokens(tokens: Tokens, tokenizer: Tokenizer) -> Callable[[], Iterator[str]]:
    """Return a function that yields the documents of a stream of tokens as texts."""

    def documents() -> Iterator[str]:
        starts = document_starts(tokens, tokenizer.eot)
        for start, stop in zip(starts, starts[1:], strict=False):
            ids = tokens.read(int(start), int(stop - start))
            if text := tokenizer.decode(ids[ids != tokenizer.eot].tolist()):
                yield text

    return documents


def read_texts(path: Path) -> list[str]:
    """Return the documents of a text file or a .jsonl file.

    Raises:
        UserError: it cannot be read, has no text, or a line is not an object with `text`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({cause_of(e)}), expected a UTF-8 text file") from None
    found = [text] if path.suffix != ".jsonl" else [_text(path, n, ln) for n, ln in enumerate(text.splitlines(), 1)]
    found = [document for document in found if document]
    if not found:
        raise UserError(f"{path} has no text, expected at least one document")
    return found


def _text(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        row: Any = json.loads(line)
        text = row["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"{path}:{number} is {line[:40]!r}, expected a JSON object with the key 'text'")
    return text
