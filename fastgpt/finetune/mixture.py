"""The order of samples: several sets mixed by weight, each shuffled anew in each of its epochs.

Like TokenLoader's, the order is a function of the seed and the sample's number alone, so the whole state is one number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastgpt.core.errors import UserError
from fastgpt.data.loader import permute


class Mixture:
    """Numbered samples from several sets.

    An epoch has as many samples as the sets together. Without weights it holds each sample once. With weights it holds
    of each set its share by weight, at least one: a set goes on where its last epoch ended, and is shuffled anew
    whenever it was read to its end, so none of its samples comes twice before all others came once.

    Attributes:
        sizes: of the sets.
        quotas: samples of each set in an epoch.
        epoch: their sum, the samples of an epoch.

    Raises:
        UserError: a set is empty, or weights are not positive numbers, one for each set.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0) -> None:
        if not sizes or min(sizes) < 1:
            raise UserError(
                f"the data sets have {', '.join(map(str, sizes)) or 'no'} samples, expected at least 1 each"
            )
        if weights is not None and (len(weights) != len(sizes) or not all(0 < w < float("inf") for w in weights)):
            raise UserError(
                f"weights are {list(weights)}, expected a positive number for each of {len(sizes)} data sets"
            )
        self.sizes, self.seed, self.epoch = tuple(sizes), seed, sum(sizes)
        self.quotas = self.sizes if weights is None else _quotas(weights, self.epoch)
        self._ends = np.cumsum(self.quotas)

    def take(self, sample: int, n: int) -> list[tuple[int, int]]:
        """Return (set, index in it) of the samples numbered sample .. sample + n - 1, counted over all epochs."""
        out: list[tuple[int, int]] = []
        while n > 0:
            epoch, position = divmod(sample, self.epoch)
            here = min(n, self.epoch - position)
            slots = np.arange(position, position + here, dtype=np.int64)
            slots = permute(slots, self.epoch, _key(self.seed, "slots", epoch))
            owners = np.searchsorted(self._ends, slots, side="right")
            out += [self._of(int(s), int(slot), epoch) for s, slot in zip(owners, slots)]
            sample, n = sample + here, n - here
        return out

    def _of(self, owner: int, slot: int, epoch: int) -> tuple[int, int]:
        """Return the sample of a set that a slot of an epoch stands for."""
        within = slot - int(self._ends[owner]) + self.quotas[owner]
        turn, position = divmod(epoch * self.quotas[owner] + within, self.sizes[owner])
        index: npt.NDArray[np.int64] = np.array([position], np.int64)
        return owner, int(permute(index, self.sizes[owner], _key(self.seed, owner, turn))[0])


def _quotas(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Return `total` in shares by weight, by largest remainders, at least 1 each."""
    exact = np.array(weights, float) / sum(weights) * total
    shares = exact.astype(np.int64)
    shares[np.argsort(shares - exact, kind="stable")[: total - int(shares.sum())]] += 1
    while shares.min() < 1:
        shares[shares.argmin()] += 1
        shares[shares.argmax()] -= 1
    return tuple(int(s) for s in shares)


def _key(*parts: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
