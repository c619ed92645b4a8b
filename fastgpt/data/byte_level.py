"""Byte-level BPEs of other models (Llama 3, Qwen): other word patterns and special tokens, run by `tokenizers`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import Tokenizer, byte_alphabet


class ByteLevelTokenizer(Tokenizer):
    """A tokenizer.json whose tokens are bytes; `eos` is the special token that ends a text.

    Attributes as in Tokenizer. Raises UserError that names `where` if it is of another kind or has no `eos`.
    """

    def __init__(self, text: str, where: str, eos: str) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            spec = json.loads(text)
            kinds = json.dumps([spec["pre_tokenizer"], spec["decoder"]]), spec["model"]["type"]
            if '"ByteLevel"' not in kinds[0] or '"Metaspace"' in kinds[0] or kinds[1] != "BPE":
                raise UserError(f"{where} is not a byte-level BPE")
            self.specials = {t["content"]: int(t["id"]) for t in spec["added_tokens"]}
            alphabet, vocabulary = byte_alphabet(), spec["model"]["vocab"].items()
            self._bytes = {int(i): bytes(alphabet[c] for c in t) for t, i in vocabulary if t not in self.specials}
            self._bytes |= {i: t.encode() for t, i in self.specials.items()}
            self.eot = self.specials[eos]
            parts = {k: spec[k] for k in ("model", "pre_tokenizer", "normalizer", "added_tokens")}
            bare = spec | {"added_tokens": [], "truncation": None, "padding": None, "post_processor": None}
            self._plain = HFTokenizer.from_str(json.dumps(bare))  # a special token's text is ordinary text
        except UserError:
            raise
        except Exception as e:  # tokenizers raises no class of its own
            raise UserError(f"{where} is damaged or not a byte-level BPE ({type(e).__name__}: {e})") from None
        self.text, self.n_vocab = text, max(self._bytes) + 1
        self.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _encode_piece(self, piece: str) -> npt.NDArray[np.uint32]:
        return np.array(self._plain.encode(piece, add_special_tokens=False).ids, np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; ids without a token have none. Raises ValueError as `decode`."""
        checked = [int(i) for i in ids]
        if wrong := [i for i in checked if not 0 <= i < self.n_vocab]:
            raise ValueError(f"decode: ids must be in [0, {self.n_vocab}), got {wrong[0]}")
        return b"".join(self._bytes.get(i, b"") for i in checked)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.json, or the one in a folder: GPT-2's kind, or another byte-level BPE if a tokenizer_config.json
    beside it names the token that ends a text. Raises UserError if it is missing, damaged or of another kind."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    settings = path.with_name("tokenizer_config.json")
    try:
        return Tokenizer.load(path)
    except UserError:
        if not settings.is_file() or not path.is_file():
            raise
    try:
        eos = json.loads(settings.read_text(encoding="utf-8")).get("eos_token")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{settings} or {path.name} is damaged ({e})") from e
    eos = eos.get("content") if isinstance(eos, dict) else eos
    return ByteLevelTokenizer(text, str(path), str(eos))
