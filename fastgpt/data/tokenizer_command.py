"""The command `fastgpt tokenizer`: train a byte-level BPE, show what a tokenizer does, check that it is sound."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastgpt.core.command import Parser, number
from fastgpt.core.errors import UserError
from fastgpt.core.progress import bar
from fastgpt.data.corpus import TextFile, documents, read_text, text_files
from fastgpt.data.encoder import sample
from fastgpt.data.published import ENCODINGS, open_tokenizer
from fastgpt.data.tokenizer import Tokenizer, train_tokenizer

TRAINER_MB = 64  # more text changes few merges; the words of 1 GB need some GB of memory
WHICH = f"tokenizer.json, its folder, or one of {', '.join(ENCODINGS)}"


def main(argv: list[str]) -> int:
    """Run `fastgpt tokenizer`; return the exit code: 1 if a check failed."""
    parser = Parser(prog="fastgpt tokenizer", description="Train, show and check tokenizers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|show|check")
    sub = commands.add_parser("train", help="train a byte-level BPE on text files")
    sub.add_argument("paths", nargs="+", metavar="PATH", help="text files, or folders of them")
    sub.add_argument("--out", required=True, metavar="FILE", help="the tokenizer.json to write")
    sub.add_argument("--vocab-size", type=number(int, 257, 100_000), default=32768, help="ids (default: 32768)")
    sub.add_argument("--special", nargs="*", default=[], metavar="TOKEN", help="special tokens beside <|endoftext|>")
    about = f"text to train on at most, in MB, taken evenly from all files (default: {TRAINER_MB})"
    sub.add_argument("--max-mb", type=number(float, 0, open_least=True), default=TRAINER_MB, help=about)
    sub = commands.add_parser("show", help="print the settings of a tokenizer, or the tokens of a text")
    sub.add_argument("tokenizer", help=WHICH)
    sub.add_argument("--text", help="print the tokens of this text")
    sub = commands.add_parser("check", help="encode and decode texts with every encoder; exit code 1 if any differs")
    sub.add_argument("tokenizer", help=WHICH)
    sub.add_argument("paths", nargs="*", metavar="PATH", help="text files, or folders of them (default: built-in text)")
    args = parser.parse_args(argv)
    run: dict[str, Callable[[Namespace], int]] = {"train": train, "show": show, "check": check}
    return run[args.command](args)


def train(args: Namespace) -> int:
    """Train a tokenizer and write it."""
    out, limit = Path(args.out), int(args.max_mb * 1e6)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder, expected the name of a file such as {out}/tokenizer.json")
    if not out.suffix:
        raise UserError(
            f"--out {out} has no suffix, expected the name of a file such as {out}.json or {out}/tokenizer.json"
        )
    files = [file for path in args.paths for file in text_files(path).files]
    start = time.monotonic()
    tokenizer = train_tokenizer(_evenly(files, limit), args.vocab_size, args.special)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make folder {out.parent}: {e.strerror}") from None
    tokenizer.save(out)
    seen = min(sum(file.size for file in files), limit)
    print(f"{out}: {tokenizer.n_vocab} ids from {seen / 1e6:.1f} MB of text in {time.monotonic() - start:.0f} s")
    if tokenizer.n_vocab < args.vocab_size:
        print(f"the text has no more pairs to merge: {tokenizer.n_vocab} ids instead of {args.vocab_size}")
    size, tokens = _compression(tokenizer, files)
    print(f"{size / tokens:.2f} bytes per token on the same text")
    return 0


def show(args: Namespace) -> int:
    """Print what a tokenizer is, or what it does to a text."""
    tokenizer = open_tokenizer(args.tokenizer)
    if args.text is not None:
        for i in tokenizer.encode(args.text).tolist():
            print(f"{i:>7}  {tokenizer.decode_bytes([i])[:40]!r}")
        return 0
    names = {i: token for token, i in tokenizer.specials.items()}
    sizes = {i: len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab) if i not in names}
    longest = sorted(sizes, key=lambda i: (-sizes[i], i))[:5]
    print(f"ids          {tokenizer.n_vocab}, of which {len(names)} special")
    print("special      " + ", ".join(f"{token} = {i}" for i, token in sorted(names.items())))
    print(f"end of text  {tokenizer.eot}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(f"encoder      {tokenizer.fastest()[0]}")
    for i in longest:
        print(f"longest      {i:>7}, {sizes[i]} bytes: {tokenizer.decode_bytes([i])[:40]!r}")
    return 0


def check(args: Namespace) -> int:
    """Check round trips, special tokens and that all encoders return the same ids; print the speed of each."""
    tokenizer = open_tokenizer(args.tokenizer)
    texts = [read_text(file.path) for path in args.paths for file in text_files(path).files] or [sample()]
    texts += list(_random_texts())
    failures = [f"text {n}: {e}" for n, text in enumerate(texts) if (e := _wrong(tokenizer, text))]
    failures += [f"special token {token} in a text became a token" for token in _leaks(tokenizer)]
    size = sum(len(text.encode()) for text in texts)
    name, fast = tokenizer.fastest()
    encoders = {"own": tokenizer.encode} | ({name: fast} if fast != tokenizer.encode else {})
    for label, encode in encoders.items():
        start = time.monotonic()
        ids = [encode(text) for text in texts]
        seconds = max(time.monotonic() - start, 1e-9)
        print(
            f"{label:<10} {size / 1e6:.2f} MB, {sum(map(len, ids))} tokens, {size / 1e6 / seconds:.1f} MB/s on one core"
        )
    if fast == tokenizer.encode:
        print(f"encoder: {name}")
    for failure in failures[:10]:
        print(f"fastgpt tokenizer check: {failure}", file=sys.stderr)
    print(f"{len(texts)} texts, {len(failures)} failed")
    return 1 if failures else 0


def _wrong(tokenizer: Tokenizer, text: str) -> str:
    """Return what is wrong with the ids of a text, or ''."""
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) != text:
        return "decoding its ids does not give the text"
    if not np.array_equal(ids, tokenizer.fastest()[1](text)):
        return f"{tokenizer.fastest()[0]} gives other ids"
    return ""


def _leaks(tokenizer: Tokenizer) -> list[str]:
    special = set(tokenizer.specials.values())
    encoders = tokenizer.encode, tokenizer.fastest()[1]
    return [t for t in tokenizer.specials for encode in encoders if special & set(encode(f"a{t}b").tolist())]


def _random_texts() -> Iterator[str]:
    """Yield texts of random bytes, as far as these are UTF-8, and of random characters: always the same."""
    rng = np.random.default_rng(1)
    for _ in range(500):
        raw = rng.integers(0, 256, rng.integers(1, 200), dtype=np.uint8).tobytes()
        yield raw.decode("utf-8", "ignore")
        points = rng.integers(0, 0x110000, rng.integers(1, 60))
        yield "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def _evenly(files: list[TextFile], limit: int) -> Iterator[str]:
    """Yield the documents of the files; of each the same share if together they are longer than `limit` bytes."""
    share = min(1.0, limit / max(1, sum(file.size for file in files)))
    progress = bar(len(files), unit="file", desc="read")
    for file in files:
        text = read_text(file.path)
        yield from documents(text[: int(len(text) * share)])
        progress.update()
    progress.close()


def _compression(tokenizer: Tokenizer, files: list[TextFile]) -> tuple[int, int]:
    """Return bytes and tokens of the first 4 MB of the files."""
    size = tokens = 0
    for file in files:
        piece = read_text(file.path)[: (4 << 20) - size]
        size, tokens = size + len(piece.encode()), tokens + len(tokenizer.encode(piece))
        if size >= 4 << 20:
            break
    return size, max(tokens, 1)
