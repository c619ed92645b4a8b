"""Prepare a data set on disk from text: train.bin, val.bin, tokenizer.json, meta.json.

Every document is preceded by `<|endoftext|>`, or by what ends and begins a text of a given tokenizer. A tokenizer that
is trained sees the training split alone. A data set appears
whole or not at all (built in a temporary folder, then renamed), and is reused if it was built from the same inputs.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.corpus import Corpus, Part, default_corpus, documents, split_files, text_files
from fastgpt.data.load import COMPANIONS, load_tokenizer
from fastgpt.data.shards import ShardWriter, Tokens, open_tokens
from fastgpt.data.tokenizer import Tokenizer, train_tokenizer

VERSION = 1
TRAINER_BYTES = 64 << 20  # text the BPE is trained on at most; more changes few merges and costs memory
FILES = {"train.bin", "val.bin", "tokenizer.json", "meta.json", *COMPANIONS}
_BATCH = 1 << 23  # characters encoded between two reports of progress
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set; `meta` is meta.json's content, `fresh` says that this call built it."""

    path: Path
    meta: dict[str, Any]
    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    fresh: bool = False


def prepare(
    data: str | Path | None,
    out_dir: str | Path,
    vocab_size: int = 4096,
    *,
    tokenizer: Tokenizer | None = None,
    val_fraction: float = 0.05,
    stdlib_tests: bool = False,
    progress: Progress | None = None,
) -> Dataset:
    """Prepare the data set `out_dir` from the user's text file or folder, or (None) from Python's standard library.

    tokenizer: encodes the text; by default one of `vocab_size` ids is trained on the training split.
    stdlib_tests: with data None, train on the standard library's test suite too, where it is installed; the validation
    files stay the same. progress(stage, done, total) is called with stages "tokenizer", "train", "val", in bytes.
    Raises UserError for bad input (see corpus.py), an `out_dir` that holds something else, a disk that cannot be
    written; the content of `out_dir` is then unchanged.
    """
    out = Path(out_dir)
    if data is not None and Path(data).resolve() in out.resolve().parents:
        raise UserError(f"data set folder {out} lies inside the data folder {data}; name a folder outside")
    corpus = default_corpus() if data is None else text_files(data)
    extra = default_corpus(tests=True) if data is None and stdlib_tests else Corpus("", [], [])
    inputs = _inputs_hash(corpus, extra, vocab_size if tokenizer is None else tokenizer.fingerprint, val_fraction)
    if out.exists():
        if not _is_ours(out):
            raise UserError(f"{out} exists and is not a data set that fastgpt prepared; name another folder")
        found = _load_same(out, inputs)
        if found is not None:
            return found
    train, val = split_files(corpus.files, val_fraction)
    known = {f.sha256 for f in corpus.files}
    train += [Part(f) for f in extra.files if f.sha256 not in known]
    about = {"inputs": inputs, "source": corpus.source, "skipped": corpus.skipped + extra.skipped}
    return _make(out, train, val, tokenizer or vocab_size, about, progress or (lambda stage, done, total: None))


def _make(
    out: Path, train: list[Part], val: list[Part], tokenizer: Tokenizer | int, about: dict[str, Any], progress: Progress
) -> Dataset:
    aside = _make_aside(out)
    try:
        meta = {"version": VERSION, **_build(aside, train, val, tokenizer, progress), **about}
        (aside / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        _put_in_place(aside, out)
    except OSError as e:
        raise UserError(f"cannot write data set {out}: {e.strerror}") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    loaded = load_dataset(out)
    return Dataset(out, loaded.meta, loaded.tokenizer, loaded.train, loaded.val, fresh=True)


def load_dataset(path: str | Path) -> Dataset:
    """Open a data set written by `prepare`. Raises UserError if a file is missing, damaged or from another set."""
    path = Path(path)
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        version, splits, fingerprint = meta["version"], (meta["train"], meta["val"]), meta["tokenizer"]
        counts = [s["tokens"] for s in splits]
    except OSError as e:
        raise UserError(f"{path} is not a prepared data set: {path / 'meta.json'}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"data set {path} is damaged: meta.json ({type(e).__name__}: {e})") from None
    if version != VERSION:
        raise UserError(f"data set {path} has version {version}, expected {VERSION}; prepare it again")
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"data set {path} is damaged: tokenizer.json is not the tokenizer that encoded its tokens")
    train, val = open_tokens(path / "train.bin"), open_tokens(path / "val.bin")
    for name, tokens, count in zip(("train.bin", "val.bin"), (train, val), counts, strict=True):
        if len(tokens) != count:
            raise UserError(f"data set {path} is damaged: {name} has {len(tokens)} tokens, meta.json says {count}")
    return Dataset(path, meta, tokenizer, train, val)


def unigram_nats(train_tokens: Tokens | npt.NDArray[Any], val_tokens: Tokens | npt.NDArray[Any], n_vocab: int) -> float:
    """Return the cross-entropy, in nats per token, of a unigram model on the validation tokens.

    p(token) = (count in training + 1) / (training tokens + n_vocab): the loss of a model without any context.
    Raises UserError for ids >= n_vocab or no validation tokens.
    """
    train, val = (_counts(t, n_vocab) for t in (train_tokens, val_tokens))
    if not val.sum():
        raise UserError("the validation split has no tokens, expected at least 1")
    log_p = np.log(train + 1.0) - np.log(float(train.sum()) + n_vocab)
    return float(-(val * log_p).sum() / val.sum())


def _counts(tokens: Tokens | npt.NDArray[Any], n_vocab: int) -> npt.NDArray[np.int64]:
    total = np.zeros(n_vocab, np.int64)
    for name, at, ids in (Tokens([tokens]) if isinstance(tokens, np.ndarray) else tokens).chunks():
        count = np.bincount(ids, minlength=n_vocab)
        if len(count) > n_vocab:
            j = int(np.argmax(ids >= n_vocab))
            raise UserError(f"{name} has token id {ids[j]} at position {at + j}; the vocabulary has {n_vocab} ids")
        total += count
    return total


def _build(
    aside: Path, train: list[Part], val: list[Part], tokenizer: Tokenizer | int, progress: Progress
) -> dict[str, Any]:
    """Write a data set with a tokenizer, or one of so many ids that is trained; return meta.json's content."""
    if isinstance(tokenizer, int):
        tokenizer = train_tokenizer(_trainer_texts(train, progress), tokenizer)
    tokenizer.save(aside / "tokenizer.json")
    meta: dict[str, Any] = {"tokenizer": tokenizer.fingerprint, "n_vocab": tokenizer.n_vocab, "eot": tokenizer.eot}
    for name, parts in (("train", train), ("val", val)):
        meta[name] = _encode(aside / f"{name}.bin", name, parts, tokenizer, progress)
        meta[name]["bytes_per_token"] = meta[name]["bytes"] / meta[name]["tokens"]
    splits = open_tokens(aside / "train.bin"), open_tokens(aside / "val.bin")
    meta["unigram_nats"] = unigram_nats(splits[0], splits[1], tokenizer.n_vocab)
    return meta


def _trainer_texts(parts: list[Part], progress: Progress) -> Iterator[str]:
    """Yield the documents that the BPE learns from: all, or those of the first files in the order of their names'
    hashes."""
    order = sorted(parts, key=lambda p: hashlib.sha256(p.file.name.encode("utf-8", "surrogateescape")).digest())
    total, done = min(TRAINER_BYTES, sum(p.file.size for p in parts)), 0
    for part in order:
        for document in documents(part.text()):
            yield document[: TRAINER_BYTES - done]
            done += len(document)
            if done >= TRAINER_BYTES:
                return
        progress("tokenizer", min(done, total), total)


def _encode(path: Path, stage: str, parts: list[Part], tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
    """Write one split and return its counts. bytes counts the documents' UTF-8, without the marks between them."""
    counts = {"tokens": 0, "bytes": 0, "documents": 0, "files": len(parts)}
    total, read = sum(p.file.size for p in parts), 0
    eot = np.array([tokenizer.eot, *(i for i in tokenizer.prefix if i != tokenizer.eot)], np.uint32)
    batch: list[str] = []
    with ShardWriter(path, tokenizer.n_vocab) as out:
        for i, part in enumerate(parts):
            batch += documents(part.text())
            read += part.file.size
            if sum(map(len, batch)) < _BATCH and i + 1 < len(parts):
                continue
            for ids in tokenizer.encode_documents(batch):
                out.write(eot)
                out.write(ids)
            counts["documents"] += len(batch)
            counts["bytes"] += sum(len(d.encode()) for d in batch)
            batch = []
            progress(stage, read, total)
        counts["tokens"] = out.n_tokens
    return counts


def _inputs_hash(corpus: Corpus, extra: Corpus, tokenizer: int | str, val_fraction: float) -> str:
    files = [[(f.name, f.sha256) for f in c.files] for c in (corpus, extra)]
    return hashlib.sha256(json.dumps([VERSION, tokenizer, val_fraction, files]).encode()).hexdigest()


def _is_ours(out: Path) -> bool:
    names = {p.name for p in out.iterdir()} if out.is_dir() else {""}
    return not names or ("meta.json" in names and names <= FILES)


def _load_same(out: Path, inputs: str) -> Dataset | None:
    """Return the data set in `out` if it is complete and was built from these inputs, else None: it is then rebuilt."""
    try:
        found = load_dataset(out)
    except UserError:
        return None
    return found if found.meta.get("inputs") == inputs else None


def _make_aside(out: Path) -> Path:
    """Create an empty folder next to `out` and remove those left by killed runs."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for old in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
            pid = old.name.split(".")[-2]
            if pid.isdigit() and not _alive(int(pid)):
                shutil.rmtree(old, ignore_errors=True)
        aside = out.parent / f".{out.name}.{os.getpid()}.partial"
        aside.mkdir()
        return aside
    except OSError as e:
        raise UserError(f"cannot write data set {out}: {e.strerror}") from e


def _alive(pid: int) -> bool:
    if pid == os.getpid() or os.name != "posix":
        return os.name != "posix"  # a number of ours from before a restart; elsewhere there is no harmless way to ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(aside: Path, out: Path) -> None:
    """Rename the folder to `out`, after moving a previous data set away: `out` is never a mixture of two."""
    if out.exists():
        os.replace(out, aside / "previous")
    os.replace(aside, out)
    shutil.rmtree(out / "previous", ignore_errors=True)
