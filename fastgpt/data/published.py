"""Tokenizers by name: GPT-2's, whose merges are part of this package, and the other encodings of tiktoken."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.byte_level import ByteLevelTokenizer
from fastgpt.data.corpus import EOT
from fastgpt.data.encoder import sample
from fastgpt.data.load import load_tokenizer
from fastgpt.data.tokenizer import Tokenizer, byte_alphabet

GPT2_MERGES = Path(__file__).with_name("files") / "gpt2.bpe.xz"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of vocab.bpe; tiktoken checks it too
ENCODINGS = ("gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base")


def open_tokenizer(name: str | Path) -> Tokenizer:
    """Return the tokenizer of a path, as `load_tokenizer`, or of a name, as `published_tokenizer`; a path goes first.

    Raises:
        UserError: as these two.
    """
    is_name = str(name) in ENCODINGS and not Path(name).exists()
    return published_tokenizer(str(name)) if is_name else load_tokenizer(name)


def published_tokenizer(name: str) -> Tokenizer:
    """Return a published tokenizer: gpt2 (= r50k_base) without a network, the others through tiktoken.

    tiktoken downloads an encoding once and checks its hash; TIKTOKEN_CACHE_DIR names a folder that has it already.

    Raises:
        UserError: the name is unknown, or the encoding cannot be downloaded.
    """
    if name in ("gpt2", "r50k_base"):
        return Tokenizer(gpt2_json(), name)
    if name not in ENCODINGS:
        raise UserError(f"tokenizer {name!r} is unknown, expected {', '.join(ENCODINGS)} or a tokenizer.json")
    import tiktoken

    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:  # of requests, or a ValueError of tiktoken
        raise UserError(
            f"tokenizer {name} cannot be downloaded ({type(e).__name__}), expected a network or TIKTOKEN_CACHE_DIR"
        ) from None
    return of_encoding(encoding)


def gpt2_json() -> str:
    """Return GPT-2's tokenizer.json. Raises UserError if the file of merges is damaged."""
    merges = lzma.decompress(GPT2_MERGES.read_bytes())
    if hashlib.sha256(merges).hexdigest() != GPT2_SHA256:
        raise UserError(f"{GPT2_MERGES} is damaged: its hash is not that of GPT-2's vocab.bpe; install fastgpt again")
    pairs = [tuple(line.split(" ")) for line in merges.decode().split("\n")[1:] if line]
    tokens = [*byte_alphabet(), *(a + b for a, b in pairs)]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _json(tokens, pairs, {EOT: len(tokens)}, split)


def of_encoding(encoding: Any) -> Tokenizer:
    """Return the tokenizer of a `tiktoken.Encoding`: same ids, as a tokenizer.json.

    Raises:
        UserError: it has no `<|endoftext|>`, a token is not the merge of two earlier ones, or the ids differ.
    """
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    specials: dict[str, int] = encoding._special_tokens
    if EOT not in specials:
        raise UserError(f"encoding {encoding.name} has no {EOT} token")
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            halves = _merged(token, ranks, rank)
            if len(halves) != 2:
                raise UserError(f"encoding {encoding.name}: token {rank} is not the merge of two tokens before it")
            pairs.append((spelled[halves[0]], spelled[halves[1]]))
    split = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": encoding._pat_str}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    tokenizer = ByteLevelTokenizer(_json(vocab, pairs, specials, split), f"encoding {encoding.name}", EOT)
    text = sample()
    if not np.array_equal(tokenizer.encode(text), encoding.encode_ordinary(text)):
        raise UserError(f"encoding {encoding.name}: its tokenizer.json gives other ids than tiktoken")
    return tokenizer


def _merged(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """Return the pieces of a token that merges before `limit` leave."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        rank, at = min((ranks.get(a + b, limit), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        if rank >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _json(
    tokens: list[str] | dict[str, int], merges: list[Any], specials: dict[str, int], pre_tokenizer: dict[str, Any]
) -> str:
    """Return a tokenizer.json of a byte-level BPE."""
    vocab = tokens if isinstance(tokens, dict) else {token: i for i, token in enumerate(tokens)}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    model: dict[str, Any] = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None)
    model |= dict(end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token} | flags for token, i in specials.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model | {"vocab": vocab | specials, "merges": [list(pair) for pair in merges]},
    }
    return json.dumps(spec, ensure_ascii=False)
