"""Tokenizers in SentencePiece's style (Llama 2, Mistral, Gemma): pieces of text with a mark for a space, and bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.library import LibraryTokenizer

MARK = "\u2581"  # stands for a space
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a byte of a character that has no piece
STEPS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


class PieceTokenizer(LibraryTokenizer):
    """A tokenizer.json, BPE or Unigram, whose decoder turns marks into spaces and joins the pieces.

    Where a space is added in front of every text, `decode` removes it. The mark itself, U+2581, becomes a space.
    """

    kind = "SentencePiece tokenizer"
    cut = False  # a space may be added in front of each part

    def _check(self, spec: dict[str, Any], where: str) -> None:
        decoder = spec["decoder"] or {"type": "none"}
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        marked = any(
            s["type"] == "Metaspace" or s.get("content") == " " and MARK in str(s.get("pattern")) for s in steps
        )
        if not marked or {s["type"] for s in steps} - STEPS or spec["model"]["type"] not in ("BPE", "Unigram"):
            raise UserError(f"{where} is not a tokenizer in the style of SentencePiece")
        self._fallback = bool(spec["model"].get("byte_fallback"))
        last = steps[-1]
        self._strips = last["type"] == "Strip" and last["start"] > 0
        self._strips |= last["type"] == "Metaspace" and last.get("prepend_scheme", "always") != "never"

    def _spell(self, spec: dict[str, Any], token: str) -> bytes:
        byte = BYTE.fullmatch(token) if self._fallback else None
        return token.replace(MARK, " ").encode() if byte is None else bytes([int(byte[1], 16)])

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, without the space in front that encoding adds. Raises ValueError as Tokenizer's."""
        text = super().decode(ids)
        return text[1:] if self._strips and text.startswith(" ") else text
