"""Byte-level BPE: trained with Hugging Face `tokenizers`, stored as its tokenizer.json, run by `tiktoken`.

A text is cut into words by GPT-2's pattern, each word into bytes, and neighbours are merged in the order in which
training learned the merges (Sennrich et al. 2016; bytes as the alphabet: Radford et al. 2019). Any text therefore has
ids, and decode(encode(text)) == text. Both libraries return the same ids; tiktoken is about three times as fast.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.corpus import EOT
from fastgpt.data.encoder import Encode, fastest
from fastgpt.data.shards import atomic_file

# GPT-2's word pattern; possessive where that cannot change a match, so that long runs never backtrack
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PIECE = 1 << 18  # characters encoded in one call, where the text can be cut

# Between "\n" and a character other than a space, after a character other than a space, every word ends: cutting there
# changes no id.
_SEAM = re.compile(r"(?<=\S\n)(?=\S)")


class Tokenizer:
    """A byte-level BPE with special tokens, `<|endoftext|>` among them.

    n_vocab: number of ids, specials included; eot: the id of `<|endoftext|>`; specials: special token -> id;
    fingerprint: sha256 over what decides ids (not over the file's layout): a checkpoint stores it to detect another
    tokenizer; prefix: ids before every prompt, a BOS token where tokenizer.json says so; bos: text of the token that
    chat templates call bos_token, perhaps empty; ends: ids that end a text;
    companions: name -> content of the files that belong beside tokenizer.json, such as tokenizer_config.json.
    """

    _fastest: tuple[str, Encode] | None = None
    prefix: tuple[int, ...] = ()
    bos: str = ""
    ends: tuple[int, ...] = ()
    companions: Mapping[str, str] = {}

    def __init__(self, text: str, where: str = "tokenizer.json") -> None:
        """`text` is the content of a tokenizer.json. Raises UserError that names `where` and what is wrong with it."""
        import tiktoken

        ranks, specials = _parse(text, where)
        if EOT not in specials:
            raise UserError(f"{where} has no {EOT} token")
        self.text = text
        self.specials: dict[str, int] = specials
        self.eot: int = specials[EOT]
        self.prefix, self.ends = prefix_of(json.loads(text)), (self.eot,)
        self.n_vocab: int = len(ranks) + len(specials)
        digest = hashlib.sha256(PATTERN.encode())
        for token, i in sorted([*ranks.items(), *((s.encode(), i) for s, i in specials.items())], key=lambda ti: ti[1]):
            digest.update(b"%d:%d:%b" % (i, len(token), token))
        self.fingerprint: str = digest.hexdigest()
        self._bpe = tiktoken.Encoding("fastgpt", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder. Raises UserError if it is missing, damaged or of another
        kind."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        with readable(path):
            return cls(path.read_text(encoding="utf-8"), str(path))

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json, completely or not at all, after its companions; `tokenizers.Tokenizer.from_file` reads
        it too."""
        files = {Path(path).with_name(name): content for name, content in self.companions.items()}
        for file, content in (files | {Path(path): self.text}).items():
            with atomic_file(file) as f:
                f.write(content.encode("utf-8"))

    def prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt: those of `prefix`, then those of the text. Raises UserError as `encode`."""
        return [*self.prefix, *(int(i) for i in self.encode(text))]

    def encode(self, text: str, specials: bool = False) -> npt.NDArray[np.uint32]:
        """Return ids (n,) uint32; a literal `<|endoftext|>` is ordinary text, or with `specials` the special token.

        Raises UserError for lone surrogates.
        """
        if specials:
            return self._encode_specials(text)
        try:
            ids = [self._encode_piece(piece) for piece in pieces(text)]
        except UnicodeEncodeError as e:
            raise UserError(f"text is not Unicode: character {text.index(e.object[e.start])} is a surrogate") from None
        return ids[0] if len(ids) == 1 else np.concatenate([np.empty(0, np.uint32), *ids])

    def _encode_specials(self, text: str) -> npt.NDArray[np.uint32]:
        longest_first = sorted(self.specials, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)  # text, special, text, ...
        ids = [
            np.array([self.specials[part]], np.uint32) if i % 2 else self.encode(part) for i, part in enumerate(parts)
        ]
        return np.concatenate(ids)

    def _encode_piece(self, piece: str) -> npt.NDArray[np.uint32]:
        try:
            return self._bpe.encode_to_numpy(piece, disallowed_special=())
        except UnicodeEncodeError:
            raise
        except ValueError:  # the pattern's stack does not hold a run of some 10^6 blanks; the other library's does
            from tokenizers import Tokenizer as HFTokenizer

            spec = json.loads(self.text)
            spec["added_tokens"] = []  # its encode would find specials in the text
            return np.array(HFTokenizer.from_str(json.dumps(spec)).encode(piece).ids, np.uint32)

    def encode_documents(self, texts: Sequence[str], threads: int | None = None) -> list[npt.NDArray[np.uint32]]:
        """Encode each text with the fastest encoder that gives the ids of `encode`.

        threads: default the cores this process may use, at most 8. Raises UserError for lone surrogates.
        """
        _, encode = self.fastest()
        threads = threads or min(8, available_cores())
        if threads == 1:
            return list(map(encode, texts))  # a new thread would have memory of its own, which is not returned
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(encode, texts))

    def fastest(self) -> tuple[str, Encode]:
        """Return the name of the encoder for data sets, with the reason if it is not the fast one, and the encoder."""
        if self._fastest is None:
            self._fastest = fastest(self.text, self.encode)
        return self._fastest

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids (any iterable of ints, arrays included); bytes that form no character become U+FFFD.

        Raises ValueError for an id outside [0, n_vocab).
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; a token may end within a character. Raises ValueError as `decode`."""
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.n_vocab:
                raise ValueError(f"decode: ids must be in [0, {self.n_vocab}), got {i}")
        return self._bpe.decode_bytes(checked)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a tokenizer's file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"tokenizer file {path} does not exist") from None
    except OSError as e:
        raise UserError(f"cannot read tokenizer file {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"tokenizer file {path} is damaged: not UTF-8 at byte {e.start}") from None


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096, specials: Sequence[str] = ()) -> Tokenizer:
    """Train a BPE of at most `vocab_size` ids (fewer where the texts have no more pairs to merge).

    specials: special tokens beside `<|endoftext|>`, e.g. the marks of a chat template.
    Raises UserError for a vocab_size below 256 bytes and the special tokens, or an empty or repeated special token.
    """
    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    every = [EOT, *specials]
    if len(set(every)) < len(every) or "" in every:
        raise UserError(f"special tokens {list(specials)} are empty, repeated, or {EOT}, which is always there")
    least = 256 + len(every)
    if vocab_size < least:
        raise UserError(
            f"vocab_size is {vocab_size}; a byte-level BPE has at least {least} ids (256 bytes and {', '.join(every)})"
        )
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=every,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return Tokenizer(bpe.to_str())


def pieces(text: str) -> list[str]:
    """Cut a text into pieces of about PIECE characters where that changes no id; without such places, return one
    piece."""
    cuts = [0]
    while len(text) - cuts[-1] > PIECE:
        seam = _SEAM.search(text, cuts[-1] + PIECE)
        if seam is None:
            break
        cuts.append(seam.start())
    return [text[a:b] for a, b in pairwise([*cuts, len(text)])]


def available_cores() -> int:
    """Return the number of cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse(text: str, where: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Return token bytes -> id (rank) and special token -> id of a byte-level BPE's tokenizer.json."""
    try:
        spec = json.loads(text)
        specials = {t["content"]: int(t["id"]) for t in spec["added_tokens"]}
        _check_kind(spec, where)
        alphabet = byte_alphabet()
        ranks = {
            bytes(alphabet[c] for c in token): int(i)
            for token, i in spec["model"]["vocab"].items()
            if token not in specials
        }
        merged = ["".join(m if isinstance(m, list) else m.split(" ")) for m in spec["model"]["merges"]]
        order = [spec["model"]["vocab"][m] for m in merged]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{where} is damaged or not a byte-level BPE tokenizer ({type(e).__name__}: {e})") from None
    ids = sorted([*ranks.values(), *specials.values()])
    if ids != list(range(len(ids))) or len(ranks) != 256 + len(order) or any(a >= b for a, b in pairwise(order)):
        raise UserError(f"{where} is damaged: its ids are not 0..{len(ids) - 1} with the merges in id order")
    return ranks, specials


def _check_kind(spec: dict[str, Any], where: str) -> None:
    """Accept only what PATTERN and plain merges reproduce: anything else would silently produce other ids."""
    pre = spec["pre_tokenizer"] or {}
    for what, ok in {
        "model.type": spec["model"]["type"] == "BPE",
        "pre_tokenizer": pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre["add_prefix_space"],
        "normalizer": spec["normalizer"] is None,
        "model.ignore_merges": not spec["model"].get("ignore_merges"),
        "model.dropout": not spec["model"].get("dropout"),
        "added_tokens": all(t.get("special", True) for t in spec["added_tokens"]),
    }.items():
        if not ok:
            raise UserError(f"{where} has another {what} than a GPT-2 style byte-level BPE")


def prefix_of(spec: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that a tokenizer.json puts before every text."""
    step = spec.get("post_processor") or {"type": "none"}
    if step["type"] == "Sequence":
        return tuple(i for inner in step["processors"] for i in prefix_of({"post_processor": inner}))
    if step["type"] in ("BertProcessing", "RobertaProcessing"):
        return (int(step["cls"][1]),)
    ids: list[int] = []
    for item in step["single"] if step["type"] == "TemplateProcessing" else ():
        if "SpecialToken" not in item:
            break
        ids += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return tuple(ids)


def byte_alphabet() -> dict[str, int]:
    """Return GPT-2's stand-in for each byte -> the byte: printable Latin-1 is itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}
