"""Tokenizers of other models, run by `tokenizers` from a tokenizer.json: what all kinds share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import Tokenizer, pieces, prefix_of


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json whose tokens are bytes, so the bytes of a text are those of its tokens.

    Args:
        text: content of the tokenizer.json.
        where: its file, for errors.
        eos: the special token that ends a text.

    Attributes as in Tokenizer. Added tokens that are not special, such as runs of spaces, are found in every text;
    special ones only by encode(specials=True).

    Raises:
        UserError: it is damaged, of another kind, or has no token `eos`.
    """

    kind = "tokenizer"  # for errors
    cut = True  # whether a text may be encoded in parts: see tokenizer.pieces

    def __init__(self, text: str, where: str, eos: str) -> None:
        from tokenizers import Tokenizer as HFTokenizer

        try:
            spec = json.loads(text)
            self._check(spec, where)
            added = {t["content"]: int(t["id"]) for t in spec["added_tokens"]}
            self.specials = {t["content"]: int(t["id"]) for t in spec["added_tokens"] if t["special"]}
            vocabulary = spec["model"]["vocab"]
            ids = vocabulary if isinstance(vocabulary, dict) else {t: i for i, (t, _) in enumerate(vocabulary)}
            self._bytes = {int(i): b for t, i in ids.items() if t not in added and (b := self._spell(spec, t))}
            self._bytes |= {i: t.encode() for t, i in added.items()}
            if eos not in self.specials:
                raise UserError(f"{where} has no special token {eos!r}, expected one that ends a text")
            self.eot, self.prefix = self.specials[eos], prefix_of(spec)
            self.n_vocab = max(*ids.values(), *added.values()) + 1
            whole = spec | {"truncation": None, "padding": None}
            self._whole = HFTokenizer.from_str(json.dumps(whole))
            self._plain = HFTokenizer.from_str(json.dumps(whole | self._without_specials(spec)))
        except UserError:
            raise
        except Exception as e:  # tokenizers raises no class of its own
            raise UserError(f"{where} is damaged or not a {self.kind} ({type(e).__name__}: {e})") from None
        parts = {k: spec[k] for k in ("model", "pre_tokenizer", "normalizer", "added_tokens")}
        self.text, self.ends = text, (self.eot,)
        self.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _check(self, spec: dict[str, Any], where: str) -> None:
        """Raise UserError unless the tokenizer is of this kind."""

    def _spell(self, spec: dict[str, Any], token: str) -> bytes:
        """Return the bytes of a token of the vocabulary."""
        raise NotImplementedError

    def _without_specials(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Return the parts of a tokenizer.json for which the text of a special token is ordinary text."""
        model, kept = dict(spec["model"]), [t for t in spec["added_tokens"] if not t["special"]]
        if isinstance(model["vocab"], list):  # Unigram: ids are places, so specials stay, under names no text has
            model["vocab"] = [[f"\ufdd0{t}" if t in self.specials else t, s] for t, s in model["vocab"]]
        else:
            merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
            model["merges"] = [m for m in merges if "".join(m) not in self.specials]
        return {"model": model, "added_tokens": kept, "post_processor": None}

    def encode(self, text: str, specials: bool = False) -> npt.NDArray[np.uint32]:
        """Return ids (n,) uint32, without those of `prefix`; the text of a special token is ordinary text, or with
        `specials` the special token. Raises UserError for lone surrogates."""
        parts = pieces(text) if self.cut and not specials else [text]
        run = self._whole if specials else self._plain
        try:
            ids = [np.array(run.encode(part, add_special_tokens=False).ids, np.uint32) for part in parts]
        except (UnicodeEncodeError, TypeError):
            at = next((i for i, c in enumerate(text) if 0xD800 <= ord(c) < 0xE000), None)
            if at is None:
                raise
            raise UserError(f"text is not Unicode: character {at} is a surrogate") from None
        return np.concatenate([np.empty(0, np.uint32), *ids])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ids; ids without a token have none. Raises ValueError as `decode`."""
        checked = [int(i) for i in ids]
        if wrong := [i for i in checked if not 0 <= i < self.n_vocab]:
            raise ValueError(f"decode: ids must be in [0, {self.n_vocab}), got {wrong[0]}")
        return b"".join(self._bytes.get(i, b"") for i in checked)
