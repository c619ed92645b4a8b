"""Tokenize: choose or train the tokenizer, and encode the kept documents of each chunk."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.data.pipeline.store import Chunk, key_of, new_result
from fastgpt.data.published import open_tokenizer
from fastgpt.data.recipe import Recipe
from fastgpt.data.shards import file_hash
from fastgpt.data.tokenizer import Tokenizer, train_tokenizer

log = logging.getLogger("fastgpt")

# part: index of the tokens folder; at, tokens: place in its tokens.bin, `<|endoftext|>` included; id_at, id_bytes:
# place in the chunk's ids.bin; bytes: UTF-8 of the text
ROW = np.dtype(
    [("part", "<i4"), ("id_bytes", "<i4"), ("at", "<i8"), ("tokens", "<i8"), ("id_at", "<i8"), ("bytes", "<i8")]
)


@dataclass(frozen=True)
class Encoding:
    """A task: encode the kept rows of a chunk with the tokenizer.json at `tokenizer`, as ids of `dtype`."""

    chunk: Chunk
    mask: Path
    tokenizer: Path
    fingerprint: str
    dtype: str
    folder: Path

    @functools.cached_property
    def path(self) -> Path:
        """The folder of the result: its name depends on which documents are kept, not on why."""
        return self.folder / key_of("tokens", self.chunk.key, file_hash(self.mask), self.fingerprint, self.dtype)


def encode(task: Encoding) -> None:
    """Write the task's folder: tokens.bin (ids, each document after `<|endoftext|>`) and table.npy ((n,) of ROW)."""
    if task.path.exists():
        return
    tokenizer = _loaded(str(task.tokenizer))
    documents = task.chunk.table()
    rows = np.flatnonzero(np.load(task.mask))
    table = np.zeros(len(rows), ROW)
    for name in ("id_at", "id_bytes", "bytes"):
        table[name] = documents[name][rows]
    eot = np.array([tokenizer.eot], task.dtype).tobytes()
    at = done = 0
    with new_result(task.path) as aside:
        with open(aside / "tokens.bin", "wb") as f:
            for texts in task.chunk.texts(rows):
                for ids in tokenizer.encode_documents(texts, threads=1):
                    f.write(eot + ids.astype(task.dtype).tobytes())
                    table["at"][done], table["tokens"][done] = at, len(ids) + 1
                    at, done = at + len(ids) + 1, done + 1
        np.save(aside / "table.npy", table)


@functools.lru_cache(1)
def _loaded(path: str) -> Tokenizer:
    return load_tokenizer(path)


def choose_tokenizer(
    recipe: Recipe, chunks: Sequence[Chunk], masks: Sequence[Path], before: Tokenizer | None, work: Path
) -> Path:
    """Return the path of the tokenizer.json to encode with, in the work folder.

    before: the tokenizer to use instead of training one.
    Raises UserError if there is no such tokenizer, or too little text to train one.
    """
    given = before if not isinstance(recipe.tokenizer, str) else open_tokenizer(recipe.tokenizer)
    if given is not None:
        path = work / f"tokenizer-{given.fingerprint[:16]}" / "tokenizer.json"
        return path if path.exists() else _save(given, path)
    assert not isinstance(recipe.tokenizer, str)
    trained = recipe.tokenizer.train
    key = key_of("tokenizer", trained.vocab_size, trained.bytes, recipe.seed, *[[c.key for c in chunks]])
    path = work / f"tokenizer-{key}-{masks[0].parent.name if masks else ''}" / "tokenizer.json"
    if not path.exists():
        log.info("training a tokenizer of %d tokens", trained.vocab_size)
        _save(train_tokenizer(_sample(chunks, masks, trained.bytes), trained.vocab_size), path)
    return path


def _save(tokenizer: Tokenizer, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)
    return path


def _sample(chunks: Sequence[Chunk], masks: Sequence[Path], limit: int) -> Iterator[str]:
    """Yield training documents of about `limit` bytes together, chosen by their hashes."""
    total = sum(chunk.bytes for chunk in chunks)
    # the share is of all text; the kept part is smaller, so that the sample never exceeds the limit by much
    threshold = np.uint64(min(2**64 - 1, int(2**64 * min(1.0, limit / max(1, total)))))
    spread = np.uint64(0x9E3779B97F4A7C15)  # makes the choice independent of the split, which uses the same hash
    empty = True
    for chunk, mask in zip(chunks, masks, strict=True):
        if chunk.held:
            continue
        for texts in chunk.texts(np.flatnonzero(np.load(mask) & (chunk.table()["hash"] * spread <= threshold))):
            empty = False
            yield from texts
    if empty:
        raise UserError("there is no text to train a tokenizer on: every document was dropped or held out")
