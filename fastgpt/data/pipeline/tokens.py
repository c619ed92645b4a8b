"""Tokenize: choose or train the tokenizer, and encode the kept documents of each chunk."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.data.packing import FillInTheMiddle
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
    """A task: encode the kept rows of a chunk with the tokenizer.json at `tokenizer`, as ids of `dtype`, reordered by
    `middle` if that is given. pieces: the parts of the documents that are cut, a file of PIECE; each is a document."""

    chunk: Chunk
    mask: Path
    tokenizer: Path
    fingerprint: str
    dtype: str
    folder: Path
    middle: FillInTheMiddle | None = None
    pieces: Path | None = None

    @functools.cached_property
    def path(self) -> Path:
        """The folder of the result: its name depends on which documents are kept, not on why."""
        facts: list[Any] = [self.chunk.key, file_hash(self.mask), self.fingerprint, self.dtype]
        facts += [asdict(self.middle)] if self.middle else []
        facts += ["pieces", file_hash(self.pieces)] if self.pieces else []
        return self.folder / key_of("tokens", *facts)

    @functools.cached_property
    def cuts(self) -> dict[int, list[tuple[int, int]]]:
        """The characters that stay of each row that is cut."""
        found: dict[int, list[tuple[int, int]]] = {}
        for row, start, end in np.load(self.pieces).tolist() if self.pieces else []:
            found.setdefault(row, []).append((start, end))
        return found

    def texts(self, rows: npt.NDArray[Any]) -> Iterator[list[str]]:
        """Yield the texts of rows, or what stays of them, in batches."""
        left = iter(rows.tolist())
        for texts in self.chunk.texts(rows):
            spans = [self.cuts.get(row, [(0, None)]) for _, row in zip(texts, left)]
            yield [text[start:end] for text, own in zip(texts, spans) for start, end in own]


def encode(task: Encoding) -> None:
    """Write the task's folder: tokens.bin (ids, each document after `<|endoftext|>`) and table.npy ((n,) of ROW)."""
    if task.path.exists():
        return
    tokenizer = _loaded(str(task.tokenizer))
    documents = task.chunk.table()
    kept = np.flatnonzero(np.load(task.mask))
    rows = np.repeat(kept, [len(task.cuts.get(row, [None])) for row in kept.tolist()])  # one for each piece
    table = np.zeros(len(rows), ROW)
    for name in ("id_at", "id_bytes", "bytes"):
        table[name] = documents[name][rows]
    eot = np.array([tokenizer.eot], task.dtype).tobytes()
    at = done = 0
    with new_result(task.path) as aside:
        with open(aside / "tokens.bin", "wb") as f:
            for texts in task.texts(kept):
                for text, ids in zip(texts, tokenizer.encode_documents(texts, threads=1), strict=True):
                    if task.middle is not None:
                        ids = task.middle.apply(ids, int(documents["hash"][rows[done]]))
                    f.write(eot + ids.astype(task.dtype).tobytes())
                    table["at"][done], table["tokens"][done] = at, len(ids) + 1
                    if rows[done] in task.cuts:
                        table["bytes"][done] = len(text.encode())
                    at, done = at + len(ids) + 1, done + 1
        np.save(aside / "table.npy", table)


@functools.lru_cache(1)
def _loaded(path: str) -> Tokenizer:
    return load_tokenizer(path)


def reorderings(recipe: Recipe, tokenizer: Tokenizer) -> dict[str, FillInTheMiddle]:
    """Return fill-in-the-middle with the ids of a tokenizer, for each source that uses it.

    Raises UserError if one of its sentinels is not a special token of the tokenizer.
    """
    found = {}
    for name, source in recipe.sources.items():
        settings = source.reordering
        if settings is None:
            continue
        sentinels = settings.prefix, settings.suffix, settings.middle
        missing = [token for token in sentinels if token not in tokenizer.specials]
        if missing:
            raise UserError(
                f"sources.{name}.fill_in_the_middle: the tokenizer has no special token {missing[0]}, expected one; "
                "name its own ones as prefix, suffix and middle, or train a tokenizer"
            )
        seed = recipe.seed if settings.seed is None else settings.seed
        prefix, suffix, middle = (tokenizer.specials[token] for token in sentinels)
        found[name] = FillInTheMiddle(prefix, suffix, middle, settings.rate, settings.spm, seed)
    return found


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
    sentinels = recipe.sentinels
    facts = [trained.vocab_size, trained.bytes, recipe.seed, [c.key for c in chunks]]
    key = key_of("tokenizer", *facts, *([sentinels] if sentinels else []))
    path = work / f"tokenizer-{key}-{masks[0].parent.name if masks else ''}" / "tokenizer.json"
    if not path.exists():
        log.info("training a tokenizer of %d tokens", trained.vocab_size)
        _save(train_tokenizer(_sample(chunks, masks, trained.bytes), trained.vocab_size, sentinels), path)
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
