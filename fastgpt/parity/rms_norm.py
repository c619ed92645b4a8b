"""Parity of rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgpt import ops
from fastgpt.ops.rms_norm import rms_norm_ref, rms_norm_torch
from fastgpt.parity._norm import bases, run_norm, variants
from fastgpt.parity.rule import Subject, Variant


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    return variants(dtype, [{"weight_offset": 1.0}, {"weight_offset": 1.0, "fp32_weight": True, "residual": True}])


SUBJECT = Subject(run_norm, ops.rms_norm, rms_norm_torch, rms_norm_ref, bases, _variants)
