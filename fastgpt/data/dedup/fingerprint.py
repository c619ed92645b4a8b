"""Fingerprints of the documents of one part: all that the global search for duplicates reads, 136 bytes a document."""

from __future__ import annotations

import hashlib
import importlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt.core.errors import UserError
from fastgpt.data.dedup.settings import DedupSettings
from fastgpt.data.dedup.words import chunks, grams, hash_words, mix

FIELDS = ("exact", "bands", "lengths")


@dataclass(slots=True)
class Fingerprints:
    """Fingerprints of n documents.

    Attributes:
        exact: (n, 2) uint64, the 16 bytes of BLAKE2b of the normalized text
        bands: (n, settings.bands) uint64, stored column by column; 0 for a document without words
        lengths: (n,) int64, characters of the normalized text; 0 for an empty document
    """

    exact: np.ndarray
    bands: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    def save(self, stem: Path) -> list[Path]:
        """Write STEM.exact.npy, STEM.bands.npy and STEM.lengths.npy, and return their paths."""
        paths = [stem.with_name(f"{stem.name}.{field}.npy") for field in FIELDS]
        for path, field in zip(paths, FIELDS):
            np.save(path, getattr(self, field))
        return paths

    @classmethod
    def load(cls, stem: Path) -> Fingerprints:
        """Open what `save` wrote. The arrays stay on disk until they are read."""
        paths = (stem.with_name(f"{stem.name}.{field}.npy") for field in FIELDS)
        return cls(*(np.load(path, mmap_mode="r") for path in paths))


def normalized(text: str) -> str:
    """Return the text in NFC, with line ends as \\n, without whitespace around it. Documents are equal if these are.

    Texts that differ in other whitespace have the same words, so they are near-duplicates with similarity 1.
    """
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    return (text.replace("\r\n", "\n") if "\r" in text else text).strip()


def fingerprint(texts: Sequence[str], settings: DedupSettings = DedupSettings()) -> Fingerprints:
    """Return the fingerprints of texts. They depend on the texts and settings alone, not on the process.

    Args:
        texts: the documents of one part
        settings: `near`, `shingle`, `bands`, `rows` and `seed` matter here

    Raises:
        UserError: rensa, which computes the minima, is not installed
    """
    n = len(texts)
    exact, lengths = np.empty((n, 2), np.uint64), np.empty(n, np.int64)
    for i, text in enumerate(texts):
        text = normalized(text)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        exact[i] = np.frombuffer(digest, "<u8")
        lengths[i] = len(text)
    bands = np.zeros((n, settings.bands if settings.near else 0), np.uint64, order="F")
    if settings.near:
        rensa = _rensa()
        for part in chunks(texts):
            bands[part] = _bands(rensa, texts[part], settings)
    return Fingerprints(exact, bands, lengths)


def _bands(rensa: Any, texts: Sequence[str], settings: DedupSettings) -> np.ndarray:
    """Return a hash of the minima of each band: (texts, bands) uint64, 0 in the rows of texts without words."""
    hashes, _, bounds = grams(hash_words(texts), settings.shingle)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, bounds.astype(np.uint64), settings.bands * settings.rows, settings.seed
    )
    minima = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), settings.bands, settings.rows)
    result = np.zeros((len(texts), settings.bands), np.uint64)
    for row in range(settings.rows):
        result = mix(result + minima[:, :, row])
    result[result == 0] = 1
    result[np.diff(bounds) == 0] = 0
    return result


def _rensa() -> Any:
    try:
        return importlib.import_module("rensa")
    except ModuleNotFoundError:
        raise UserError(
            "near-duplicates need the package rensa, which is not installed: pip install 'fastgpt[data]'"
        ) from None
