"""GPU specifications from the vendors' datasheets: peak arithmetic rate, memory and its bandwidth."""

from __future__ import annotations

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A GPU's dense bf16 peak in FLOP/s, memory in bytes and memory bandwidth in bytes/s."""

    peak: float
    memory: float
    bandwidth: float


# Name as the device's name has it, then its memory. SXM where a card comes in two forms. Older cards (T4, V100) are not
# here: they do not multiply bf16.
CARDS = {
    "L4 24GB": Card(121e12, 24e9, 300e9),
    "A10 24GB": Card(125e12, 24e9, 600e9),
    "RTX 3090 24GB": Card(71e12, 24e9, 936e9),
    "A30 24GB": Card(165e12, 24e9, 933e9),
    "RTX 4090 24GB": Card(165.2e12, 24e9, 1008e9),
    "A100 40GB": Card(312e12, 40e9, 1555e9),
    "A40 48GB": Card(149.7e12, 48e9, 696e9),
    "L40S 48GB": Card(362e12, 48e9, 864e9),
    "A100 80GB": Card(312e12, 80e9, 2039e9),
    "H100 80GB": Card(989.5e12, 80e9, 3350e9),
    "H100 PCIe 80GB": Card(756e12, 80e9, 2000e9),
    "H200 141GB": Card(989.5e12, 141e9, 4800e9),
    "B200 180GB": Card(2250e12, 180e9, 8000e9),
}


def _datasheets(name: str) -> list[Card]:
    """Return the cards that a device of this name may be: it contains all words of their names, and no other card
    shares more words."""
    words = set(re.findall(r"[A-Za-z0-9]+", name))
    shared = {key: len(words & set(key.split())) for key in CARDS if set(key.split()[:-1]) <= words}
    return [CARDS[key] for key in shared if shared[key] == max(shared.values())]


def datasheet_peak(name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of a GPU of this name; None if CARDS has none or several that differ."""
    found = {card.peak for card in _datasheets(name)}
    return found.pop() if len(found) == 1 else None


def datasheet_bandwidth(name: str) -> float | None:
    """Return the memory bandwidth in bytes/s of a GPU of this name; None if CARDS has none or several that differ."""
    found = {card.bandwidth for card in _datasheets(name)}
    return found.pop() if len(found) == 1 else None
