"""Byte-level BPEs of other models (Llama 3, Qwen, Pythia): other word patterns and special tokens than GPT-2's."""

from __future__ import annotations

import json
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.library import LibraryTokenizer
from fastgpt.data.tokenizer import byte_alphabet


class ByteLevelTokenizer(LibraryTokenizer):
    """A tokenizer.json whose vocabulary is spelled in GPT-2's stand-ins for bytes."""

    kind = "byte-level BPE"

    def _check(self, spec: dict[str, Any], where: str) -> None:
        before = json.dumps(spec["pre_tokenizer"])
        if '"ByteLevel"' not in before or '"Metaspace"' in before or spec["model"]["type"] != "BPE":
            raise UserError(f"{where} is not a byte-level BPE")
        self.cut = '"add_prefix_space": true' not in before  # else each part would begin with a space
        self._alphabet = byte_alphabet()

    def _spell(self, spec: dict[str, Any], token: str) -> bytes:
        return bytes(self._alphabet[c] for c in token)
