"""Frequencies of rotary embedding, and the ways to stretch them past the context that a model was trained with.

Every formula is computed in fp64; transformers computes the same ones in fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# rope_type -> (keys that it needs, keys that it may have), in addition to rope_type
ROPE_TYPES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor", "original_max_position_embeddings"}), frozenset()),
    "yarn": (
        frozenset({"factor", "original_max_position_embeddings"}),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        frozenset(),
    ),
}


def rope_frequencies(
    rotary_dim: int, theta: float = 10000.0, scaling: dict[str, Any] | None = None, length: int = 0
) -> Tensor:
    """Radians per position of each pair: theta^(-2i / rotary_dim), scaled.

    Args:
        rotary_dim: columns of a head that rotate; even.
        theta: base of the frequencies.
        scaling: None, or a dict with "rope_type" and that type's keys. "linear" divides by "factor"
            (arXiv:2306.15595). "llama3" ("factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings") divides long wavelengths by factor, keeps short ones, and interpolates
            between. "yarn" ("factor", "original_max_position_embeddings"; optional "beta_fast", "beta_slow",
            "truncate") does so by the number of turns within the original context (arXiv:2309.00071). "dynamic"
            ("factor", "original_max_position_embeddings") raises theta with the length of the sequence.
        length: positions of the sequence; only "dynamic" depends on it, past the original context.

    Returns:
        (rotary_dim / 2,) fp64, on the CPU.
    """
    kind = None if scaling is None else scaling.get("rope_type")
    if scaling is not None and kind not in ROPE_TYPES:
        raise ValueError(f"rope: scaling's rope_type is {kind!r}, expected one of {', '.join(ROPE_TYPES)}")
    if scaling is not None and kind == "dynamic":
        original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        stretch = factor * max(length, original) / original - (factor - 1)
        theta *= stretch ** (rotary_dim / (rotary_dim - 2))
    f = theta ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)
    if scaling is None or kind == "dynamic":
        return f
    if kind == "linear":
        return f / scaling["factor"]
    if kind == "yarn":
        keep = _kept_by_yarn(rotary_dim, theta, scaling)
    else:
        turns = scaling["original_max_position_embeddings"] * f / (2 * math.pi)  # turns within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * f + (1 - keep) * f / scaling["factor"]


def _kept_by_yarn(rotary_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Share of each frequency that YaRN leaves as it is: 1 for pairs of many turns, 0 for pairs of few."""

    def pair(turns: float) -> float:
        """Number of the pair that turns so often within the original context."""
        original = scaling["original_max_position_embeddings"]
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high + 0.001 if low == high else high
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu")
    return 1 - ((pairs - low) / (high - low)).clamp(0, 1)


def rope_magnitude(scaling: dict[str, Any] | None) -> float:
    """Factor of cos and sin: 1, but for YaRN, which lowers the temperature of attention as the context grows."""
    if scaling is None or scaling.get("rope_type") != "yarn":
        return 1.0
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)

    def magnitude(scale: float) -> float:
        return 1.0 if scaling["factor"] <= 1 else 0.1 * scale * math.log(scaling["factor"]) + 1.0

    top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return magnitude(top) / magnitude(bottom) if top and bottom else magnitude(1.0)
