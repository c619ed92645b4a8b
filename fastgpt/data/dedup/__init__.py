"""Duplicates (equal and similar documents) and overlap with evaluation sets."""

from fastgpt.data.dedup.find import find
from fastgpt.data.dedup.fingerprint import Fingerprints, fingerprint
from fastgpt.data.dedup.ngrams import NgramIndex
from fastgpt.data.dedup.parts import DedupPart, Outcome
from fastgpt.data.dedup.result import Counts, Duplicates, Pair, Work
from fastgpt.data.dedup.settings import DedupSettings

__all__ = [
    "Counts",
    "DedupPart",
    "DedupSettings",
    "Duplicates",
    "Fingerprints",
    "NgramIndex",
    "Outcome",
    "Pair",
    "Work",
    "find",
    "fingerprint",
]
