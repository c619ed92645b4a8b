"""Time of what PyTorch runs in a step: matrix products at a share of the peak, its attention at published rates,
everything else by its bytes.

These are estimates with a named constant each, not bounds from machine code.
"""

from __future__ import annotations

import re

from fastgpt.bench.model.chips import Chip
from fastgpt.bench.model.recording import Call

# Share of the tensor cores' peak that large 16-bit products reach, by compute capability. 90: 650 TFLOP/s effective of
# 989, at which published steps of GPT-2 on an H100 and H200 are explained (docs/step-budget.md). 80: assumed.
PRODUCT_SHARE = {80: 0.80, 90: 0.657}
# Share of the data sheet's bandwidth that a copy reaches, and that a kernel bound by memory is given; assumed.
DRAM_SHARE = 0.9
# Seconds from the end of a kernel to the start of the next in a replayed CUDA graph; assumed.
GAP = 1e-6
# Seconds of a kernel that has next to nothing to do; assumed.
LEAST = 2e-6
# FLOP/s of the library's attention, causal, by compute capability and head dimension: forward, backward. 90: cuDNN 9.19
# on an H200, 2,048 tokens (cudnn-frontend, benchmark/, 2026-02-27; d = 64 with a window of 1,024). 80: assumed, after
# the figures of flash-attention 2 on an A100 (arXiv 2307.08691).
ATTENTION = {(90, 64): (310e12, 264e12), (90, 128): (484e12, 370e12), (80, 64): (160e12, 130e12)}
ATTENTION[80, 128] = 180e12, 150e12
SORT_LAUNCHES = 6  # of a stable sort of 32-bit keys: cub's onesweep, a histogram and a pass for each byte
FLASH = "_scaled_dot_product_flash_attention"


def is_attention(call: Call) -> bool:
    """Return whether a call belongs to attention."""
    return re.search(r"attention", call.name) is not None


def launches(name: str) -> int:
    """Return how many kernels an operator of PyTorch launches."""
    return SORT_LAUNCHES if name in ("sort", "argsort") else 1


def kind(call: Call) -> str:
    """Return the class of a call of PyTorch: 'product', 'attention' or 'memory'."""
    if is_attention(call):
        return "attention"
    return "product" if call.flop else "memory"


def seconds(call: Call, chip: Chip) -> float:
    """Return the time of a call of PyTorch, without the gaps around its kernels."""
    by_bytes = (call.bytes_read + call.bytes_written) / (chip.dram * DRAM_SHARE)
    if kind(call) == "product":
        return max(product_seconds(call.flop, chip), by_bytes, LEAST)
    if kind(call) == "attention":
        return max(attention_flop(call) / _attention_rate(call, chip), by_bytes, LEAST)
    return max(by_bytes, LEAST)


def product_seconds(flop: float, chip: Chip) -> float:
    """Return the time of a product of large 16-bit matrices, from its FLOP."""
    return flop / (peak(chip) * PRODUCT_SHARE[chip.capability])


def peak(chip: Chip) -> float:
    """Return the chip's peak of dense 16-bit products, FLOP/s."""
    return 2.0 * chip.tensor_fma * chip.multiprocessors * chip.clock


def attention_flop(call: Call) -> float:
    """Return the FLOP of a causal attention of PyTorch, (B, H, T, D): two products below the diagonal, five in
    backward."""
    b, h, t, d = call.read["query"].shape
    products = 5 if call.name.endswith("backward") else 2
    return products * float(b * h * t * t * d)


def _attention_rate(call: Call, chip: Chip) -> float:
    head_dim = call.read["query"].shape[3]
    rates = ATTENTION[chip.capability, 64 if head_dim <= 64 else 128]
    return rates[call.name.endswith("backward")]
