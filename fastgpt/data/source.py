"""The training data, opened from one setting: text that is prepared first, or existing token shards."""

from __future__ import annotations

import json
import pickletools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core import progress
from fastgpt.core.errors import UserError, cause_of
from fastgpt.data.built import is_built, open_built
from fastgpt.data.load import load_tokenizer
from fastgpt.data.packing import Method
from fastgpt.data.prepare import Dataset, prepare
from fastgpt.data.shards import Tokens, open_split, open_tokens
from fastgpt.data.tokenizer import Tokenizer

GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Source:
    """Training and validation tokens with their vocabulary.

    Attributes:
        n_vocab: size of the vocabulary unless the model's is set.
        tokenizer: None for shards without one.
        n_ids: the smallest vocabulary that a model may have: that of the tokenizer, or the largest id plus 1.
        said: where n_vocab comes from, if not from a tokenizer.
        val_sources: validation tokens by source, where the data set has several.
        shuffle: whether training may read windows in any order.
        packing: how the data set's recipe wants documents to share windows.
    """

    name: str
    train: Tokens
    val: Tokens
    n_vocab: int
    tokenizer: Tokenizer | None
    n_ids: int
    said: str = ""
    val_sources: dict[str, Tokens] = field(default_factory=dict)
    shuffle: bool = True
    packing: Method = "concatenate"

    @property
    def eot(self) -> int:
        """The id that documents begin with. Raises UserError if there is no tokenizer that says it."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer, which would say where documents begin: pass --tokenizer")
        return self.tokenizer.eot

    @property
    def fingerprint(self) -> str | None:
        """The tokenizer's fingerprint: a checkpoint can be resumed or sampled only with the same tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.fingerprint

    @property
    def licences(self) -> str | None:
        """The licences of the texts, from the manifest.json of a data set that `fastgpt data build` made."""
        try:
            manifest = json.loads(Path(self.train.names[0]).with_name("manifest.json").read_text(encoding="utf-8"))
            return ", ".join(f"{source} {facts['license']}" for source, facts in manifest["sources"].items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def describe(self) -> str:
        """One line for the console and the run header."""
        tokens = f"{len(self.train):,} training and {len(self.val):,} validation tokens of {self.n_vocab:,}"
        return f"{self.name}: {tokens}" + (f" ({self.said})" if self.said else "")


def open_source(
    data: str | None,
    *,
    data_dtype: str = "auto",
    val_data: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    folder: str | Path = "data",
) -> Source:
    """Open `data`: None (the Python standard library's source), a data set of `fastgpt data build`, a text file or
    folder, or .bin shards (globs allowed).

    Text is prepared once, below `folder`, with `tokenizer` or else one of `vocab_size` trained on its training split.
    Shards are read as they are, raw ones as ids of `data_dtype`; `tokenizer` names the tokenizer they were made with (a
    tokenizer.json or its folder). Without it their vocabulary is that of a meta.pkl beside them (nanoGPT's
    character-level data), else GPT-2's, else the largest id decides.

    Raises:
        UserError: missing, empty, damaged or too short data, or settings that do not go together.
    """
    if data is not None and is_built(data):
        if data_dtype != "auto":
            raise UserError(f"data_dtype is {data_dtype!r}, but {data} is a data set, whose manifest says its dtype")
        return _open_built(data, val_data, tokenizer)
    if data is not None and data.endswith(".bin"):
        train, val = open_split(data, val_data, val_fraction, None if data_dtype == "auto" else data_dtype)
        if tokenizer is None:
            n_ids = 1 + max(int(ids.max()) for tokens in (train, val) for _, _, ids in tokens.chunks() if len(ids))
            n_vocab, said = _vocabulary(train, n_ids)
            return Source(data, train, val, n_vocab, None, n_ids, said)
        loaded = load_tokenizer(tokenizer)
        _check_beside(train, loaded, tokenizer)
        for tokens in (train, val):
            tokens.check_ids(loaded.n_vocab, limit=1 << 24)
        return Source(data, train, val, loaded.n_vocab, loaded, loaded.n_vocab)
    if data_dtype != "auto":
        raise UserError(f"data_dtype is {data_dtype!r}, but data is text: only .bin files are read as ids")
    if val_data is not None:
        raise UserError(f"val_data is {val_data!r}, but text data holds out its own validation files (val_fraction)")
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    stem = "stdlib" if data is None else re.sub(r"\W+", "-", Path(data).resolve().stem).strip("-") or "text"
    out = Path(folder) / f"{stem}-{vocab_size if given is None else given.fingerprint[:12]}"
    with _Bars() as bars:
        made: Dataset = prepare(
            data,
            out,
            vocab_size,
            tokenizer=given,
            val_fraction=val_fraction,
            stdlib_tests=data is None,
            progress=bars.report,
        )
    n_vocab = made.tokenizer.n_vocab
    return Source(str(made.path), made.train, made.val, n_vocab, made.tokenizer, n_vocab)


def _open_built(data: str, val_data: str | None, tokenizer: str | None) -> Source:
    """Open a data set of `fastgpt data build`; its sources are validated one by one, too."""
    built = open_built(data)
    if tokenizer is not None and load_tokenizer(tokenizer).fingerprint != built.tokenizer.fingerprint:
        raise UserError(f"tokenizer is {tokenizer!r}, but {data} was encoded with another one, its own tokenizer.json")
    held = list(built.val.values())
    val = Tokens([p for t in held for p in t.parts], [n for t in held for n in t.names])
    if val_data is not None:
        val = open_tokens(val_data)
        val.check_ids(built.tokenizer.n_vocab, limit=1 << 24)
    n_vocab = built.tokenizer.n_vocab
    several = {name: t for name, t in built.val.items() if len(t) > 1} if len(built.val) > 1 else {}
    found = Source(data, built.train, val, n_vocab, built.tokenizer, n_vocab)
    return replace(found, val_sources=several, shuffle=built.shuffle, packing=built.packing)


def _check_beside(tokens: Tokens, tokenizer: Tokenizer, name: str) -> None:
    """Refuse shards beside which another tokenizer than `tokenizer` lies."""
    file = Path(tokens.names[0]).with_name("tokenizer.json")
    if file.is_file() and load_tokenizer(file).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{file} is another tokenizer than {name}, and the ids beside it are its own")


def open_validation(sources: dict[str, str], source: Source, data_dtype: str = "auto") -> dict[str, Tokens]:
    """Return further validation tokens by name: .bin shards (raw ones of `data_dtype`), or a text file in the
    tokenizer of
    `source`.

    Raises:
        UserError: missing or damaged files, ids that `source` does not have, text where there is no tokenizer.
    """
    found = {}
    for name, path in sources.items():
        if path.endswith(".bin"):
            found[name] = open_tokens(path, None if data_dtype == "auto" else data_dtype)
            found[name].check_ids(source.n_vocab, limit=1 << 24)
            continue
        if source.tokenizer is None:
            raise UserError(f"val_sources.{name} is {path!r}, expected .bin shards (text needs --tokenizer)")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(
                f"val_sources.{name} is {path!r}, expected a UTF-8 text file or .bin shards ({cause_of(e)})"
            ) from e
        found[name] = Tokens([source.tokenizer.encode(text)])
    for name, tokens in found.items():
        if len(tokens) < 2:
            raise UserError(f"val_sources.{name} has {len(tokens)} tokens, expected at least 2")
    return found


def _vocabulary(tokens: Tokens, n_ids: int) -> tuple[int, str]:
    """Return the vocabulary size of shards without a tokenizer, whose largest id is n_ids - 1, and its source."""
    meta = Path(tokens.names[0]).with_name("meta.pkl")
    if meta.is_file():
        size = read_vocab_size(meta)
        if size < n_ids:
            raise UserError(f"{meta} says vocab_size {size}, but the largest token id in its folder is {n_ids - 1}")
        return size, str(meta)
    if n_ids <= GPT2_VOCABULARY and tokens.parts[0].dtype == np.uint16:
        return (
            GPT2_VOCABULARY,
            f"vocabulary of GPT-2; the largest id is {n_ids - 1}, so --model.vocab-size {n_ids} is enough",
        )
    return n_ids, "from the largest id"


def read_vocab_size(meta: Path) -> int:
    """Return vocab_size from nanoGPT's meta.pkl.

    A pickle can run any code when it is loaded, so its opcodes are read, not executed: in a dict the number directly
    follows the key.

    Raises:
        UserError: it has no such key, or is not a pickle.
    """
    try:
        codes = [code for code in pickletools.genops(meta.read_bytes()) if not re.search("PUT|MEMOIZE", code[0].name)]
    except (OSError, ValueError) as e:
        raise UserError(f"{meta} cannot be read ({cause_of(e)}): move it away and pass --model.vocab-size") from e
    behind = [value for (_, key, _), (_, value, _) in zip(codes, codes[1:]) if key == "vocab_size"]
    if not behind or type(behind[0]) is not int or not 0 < behind[0] < 2**31:
        raise UserError(f"{meta} has no whole number as vocab_size: move it away and pass --model.vocab-size")
    return behind[0]


class _Bars:
    """A progress bar for each stage of preparing text; no bar if there is nothing to do."""

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
