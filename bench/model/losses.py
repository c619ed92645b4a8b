"""Head and loss by arithmetic: designs that never write the logits, beside the one that writes them, on one chip.

N rows, C columns, V classes, 16 bits, loss and both gradients. A product takes 2 N C V FLOP at the rate of a library's
products (library.py) or its bytes at the memory's, whichever is longer.

writes logits      z, a pass that replaces them by their gradient dz, dx = dz W, dW = dz^T x: 3 products, and 4 bytes
                   for each logit (the second sweep of a row comes from L2)
two products more  log-sum-exp of each row from the epilogue of a product that stores nothing; z again for dx and again
                   for dW, whose sums do not fit a multiprocessor together: 5 products
one product more   the same, but dz is made once, for a chunk of rows, and stored: 4 products
dz on the way      z is stored with its log-sum-exp, and both gradient products make dz from it as they load: 3 products

exp of a logit in an epilogue, at the rate of MUFU, overlaps with the next tile's products and is not counted.
"""

from __future__ import annotations

from fastgpt.bench.model import library
from fastgpt.bench.model.chips import Chip

BYTES = 2  # of an element
DESIGNS = {  # name -> products, bytes of passes over the logits
    "writes logits": (3, 4),
    "no logits, 2 products more": (5, 0),
    "no logits, 1 product more": (4, 0),
    "logits, dz on the way": (3, 0),
}


def product_seconds(n: int, c: int, v: int, chip: Chip) -> float:
    """Return the time of one product between (N, C), (V, C) and (N, V); the largest of them is in memory or not, by the
    other two it is bound by FLOP at any size of interest."""
    flop = 2.0 * n * c * v / (library.peak(chip) * library.PRODUCT_SHARE[chip.capability])
    return max(flop, BYTES * (n + v) * c / (chip.dram * library.DRAM_SHARE))


def design_seconds(name: str, n: int, c: int, v: int, chip: Chip) -> float:
    """Return the time of a design of DESIGNS."""
    products, passes = DESIGNS[name]
    return products * product_seconds(n, c, v, chip) + passes * n * v / (chip.dram * library.DRAM_SHARE)


def break_even(chip: Chip) -> float:
    """Return the C below which one product more is faster than the pass over the logits."""
    per_logit = DESIGNS["writes logits"][1] / (chip.dram * library.DRAM_SHARE)
    return per_logit * library.peak(chip) * library.PRODUCT_SHARE[chip.capability] / 2
