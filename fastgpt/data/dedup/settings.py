"""What counts as a duplicate, and which of several is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Keep = Literal["first", "longest", "source"]


@dataclass(frozen=True, slots=True)
class DedupSettings:
    """Settings of deduplication.

    Attributes:
        near: find near-duplicates, not only equal texts
        threshold: Jaccard similarity of the shingle sets from which two documents are near-duplicates
        shingle: words of a shingle
        bands, rows: a pair is compared if all `rows` minima of one of the `bands` bands agree; with similarity J that
            happens with probability 1 - (1 - J^rows)^bands: 0.77 at J = 0.75, 0.92 at 0.8, 0.999 at 0.9
        seed: seed of the permutations
        keep: of the documents of a cluster, keep the "first", the "longest", or the first of the "source" that
            `prefer` names first
        prefer: sources, the best first; the others follow in the order of their parts
        bucket: documents of one bucket up to which all pairs are compared, and representatives of a larger bucket
        samples: pairs to report
        rows_in_memory: documents of one band to sort at once; 28 bytes each
    """

    near: bool = True
    threshold: float = 0.8
    shingle: int = 5
    bands: int = 14
    rows: int = 8
    seed: int = 1
    keep: Keep = "first"
    prefer: tuple[str, ...] = ()
    bucket: int = 16
    samples: int = 20
    rows_in_memory: int = 4_000_000

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold of deduplication: got {self.threshold}, expected more than 0 and at most 1")
        if self.keep not in get_args(Keep):
            raise ValueError(f"keep of deduplication: got {self.keep!r}, expected one of {', '.join(get_args(Keep))}")
        for name in ("shingle", "bands", "rows", "bucket", "rows_in_memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of deduplication: got {getattr(self, name)}, expected at least 1")
