"""What a run trains on, from one setting: text that is prepared first, or token shards as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core import progress
from fastgpt.core.errors import UserError
from fastgpt.data.prepare import Dataset, prepare
from fastgpt.data.shards import Tokens, open_split, open_tokens
from fastgpt.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """Training and validation tokens with what they mean. `tokenizer` is None for shards that came without one."""

    name: str
    train: Tokens
    val: Tokens
    n_vocab: int
    tokenizer: Tokenizer | None

    @property
    def fingerprint(self) -> str | None:
        """The tokenizer's: a checkpoint is only continued or sampled with the same one."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    def describe(self) -> str:
        """One line for the console and the run header."""
        return f"{self.name}: {len(self.train):,} training and {len(self.val):,} validation tokens of {self.n_vocab:,}"


def open_source(
    data: str | None,
    *,
    val_data: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    folder: str | Path = "data",
) -> Source:
    """Open `data`: None (the Python standard library's source), a text file or folder, or .bin shards (globs allowed).

    Text gets a tokenizer of `vocab_size`, trained on its training split, and is prepared once, below `folder`.
    Shards are read as they are; `tokenizer` names the tokenizer.json they were made with.

    Raises:
        UserError: missing, empty, damaged or too short data, or settings that do not go together.
    """
    if data is not None and data.endswith(".bin"):
        train, val = open_split(data, val_data, val_fraction)
        loaded = None if tokenizer is None else Tokenizer.load(tokenizer)
        n_vocab = _ids_in(train, val) if loaded is None else loaded.n_vocab
        if loaded is not None:
            train.check_ids(n_vocab, limit=1 << 24)
        return Source(data, train, val, n_vocab, loaded)
    if val_data is not None:
        raise UserError(f"val_data is {val_data!r}, but text data holds out its own validation files (val_fraction)")
    if tokenizer is not None:
        raise UserError(f"tokenizer is {tokenizer!r}, but text data gets a tokenizer of its own (vocab_size)")
    stem = "stdlib" if data is None else re.sub(r"\W+", "-", Path(data).resolve().stem).strip("-") or "text"
    out = Path(folder) / f"{stem}-{vocab_size}"
    with _Bars() as bars:
        made: Dataset = prepare(
            data, out, vocab_size, val_fraction=val_fraction, stdlib_tests=data is None, progress=bars.report
        )
    return Source(str(made.path), made.train, made.val, made.tokenizer.n_vocab, made.tokenizer)


def open_validation(sources: dict[str, str], source: Source) -> dict[str, Tokens]:
    """Further validation tokens by name: .bin shards, or a text file in the tokenizer of `source`.

    Raises:
        UserError: missing or damaged files, ids that `source` does not have, text where there is no tokenizer.
    """
    found = {}
    for name, path in sources.items():
        if path.endswith(".bin"):
            found[name] = open_tokens(path)
            found[name].check_ids(source.n_vocab, limit=1 << 24)
            continue
        if source.tokenizer is None:
            raise UserError(
                f"val_sources.{name} is {path!r}, expected .bin shards (--tokenizer would let text be read)"
            )
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"val_sources.{name} is {path!r}, expected a UTF-8 text file or .bin shards ({e})") from e
        found[name] = Tokens([source.tokenizer.encode(text)])
    for name, tokens in found.items():
        if len(tokens) < 2:
            raise UserError(f"val_sources.{name} has {len(tokens)} tokens, expected at least 2")
    return found


def _ids_in(*splits: Tokens) -> int:
    """Size of the vocabulary that shards without a tokenizer need: GPT-2's for anything that fits it."""
    most = max(int(ids.max()) for tokens in splits for _, _, ids in tokens.chunks() if len(ids))
    return 50257 if most < 50257 and splits[0].parts[0].dtype == np.uint16 else most + 1


class _Bars:
    """A progress bar for each stage of preparing text; none where nothing has to be done."""

    def __init__(self) -> None:
        self.stage = ""
        self.bar: Any = None

    def __enter__(self) -> _Bars:
        return self

    def report(self, stage: str, done: int, total: int) -> None:
        if stage != self.stage:
            self.__exit__()
            self.stage, self.bar = stage, progress.bar(total, unit="B", unit_scale=True, desc=f"preparing {stage}")
        assert self.bar is not None
        self.bar.update(done - self.bar.n)

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.close()
