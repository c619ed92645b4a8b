"""SentencePiece's tokenizer.model as a tokenizer.json, which gives the same ids.

The file is a protocol buffer (github.com/google/sentencepiece, src/sentencepiece_model.proto). Only a few of its fields
matter, so they are read here: neither sentencepiece nor protobuf has to be installed.

BPE merges the two neighbours whose piece has the largest score, the leftmost first. A tokenizer.json ranks pairs
instead, so each piece gives a merge for every way to cut it into two pieces, ordered by the score of the piece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastgpt.core.errors import UserError
from fastgpt.data.pieces import MARK

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # types of pieces; 1 is normal, 5 unused
UNIGRAM, BPE = 1, 2  # types of models


@dataclass(frozen=True)
class Model:
    """A tokenizer.model: its pieces (text, score, type) and settings."""

    pieces: list[tuple[str, float, int]]
    kind: int
    byte_fallback: bool
    unk: int
    bos: int
    eos: int
    charsmap: bytes
    dummy_prefix: bool
    strip: bool


def read_model(content: bytes, where: str) -> Model:
    """Return the pieces and settings of a tokenizer.model.

    Raises:
        UserError: it is damaged, or a model of words or characters.
    """
    try:
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for field, value in _fields(content):
            if field == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
            elif field in (2, 3):
                (trainer if field == 2 else normalizer).update(_fields(value))
        unk, bos, eos = (_signed(trainer.get(40 + i, i)) for i in range(3))  # -1 is none
        flags = (bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)))
        kind = trainer.get(3, UNIGRAM)
        model = Model(pieces, kind, bool(trainer.get(35, 0)), unk, bos, eos, normalizer.get(2, b""), *flags)
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as e:
        raise UserError(f"{where} is damaged or no model of SentencePiece ({type(e).__name__}: {e})") from None
    if not pieces or kind not in (UNIGRAM, BPE):
        raise UserError(f"{where} is no BPE or Unigram model of SentencePiece")
    if trainer.get(24) or normalizer.get(5, 1) == 0:
        raise UserError(f"{where} marks spaces in another way than SentencePiece's default")
    if model.dummy_prefix and any(kind == USER_DEFINED for _, _, kind in pieces):
        raise UserError(f"{where} has symbols of its user and adds a space in front, which no tokenizer.json can say")
    return model


def tokenizer_json(m: Model, add_bos: bool = True) -> str:
    """Return the content of a tokenizer.json; add_bos: prompts begin with the model's BOS, if it has one."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    options: dict[str, Any] = dict(byte_fallback=m.byte_fallback)
    if m.kind == BPE:
        vocabulary = {text: i for i, (text, _, _) in enumerate(m.pieces)}
        model: Any = models.BPE(vocabulary, merges(m.pieces), unk_token=m.pieces[m.unk][0], fuse_unk=True, **options)
    else:
        model = models.Unigram([(text, score) for text, score, _ in m.pieces], unk_id=m.unk, **options)
    made = Tokenizer(model)
    steps: list[Any] = [normalizers.Precompiled(m.charsmap)] if m.charsmap else []
    if m.strip:
        steps += [normalizers.Replace(Regex(r"^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(MARK)] if m.dummy_prefix else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", MARK)])
    ends: list[Any] = [decoders.Strip(content=" ", left=1)] if m.dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    if add_bos and m.bos >= 0:
        bos = m.pieces[m.bos][0]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, m.bos)]
        )
    for text, _, kind in m.pieces:
        if kind in (UNKNOWN, CONTROL, USER_DEFINED):
            made.add_tokens([AddedToken(text, normalized=False, special=kind != USER_DEFINED)])
    return str(made.to_str(pretty=True))


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Return the merges of a BPE by rank, from the scores of its pieces."""
    ids = {text: i for i, (text, _, kind) in enumerate(pieces) if kind not in (UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
    ranked = sorted(ids, key=lambda text: (-pieces[ids[text]][1], ids[text]))
    return [(text[:i], text[i:]) for text in ranked for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protocol buffer: int for a varint, bytes for anything else."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        field, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(content, at)
            yield field, value
            continue
        size, at = _varint(content, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(content):
            raise ValueError("it ends within a field")
        yield field, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
