"""Parity of layer_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgpt import ops
from fastgpt.ops.layer_norm import layer_norm_ref, layer_norm_torch
from fastgpt.parity._norm import bases, run_norm, variants
from fastgpt.parity.rule import Subject, Variant


def _variants(dtype: torch.dtype) -> Iterator[Variant]:
    return variants(dtype, [{"weight": False, "bias": False}, {"bias": False}])


SUBJECT = Subject(run_norm, ops.layer_norm, layer_norm_torch, layer_norm_ref, bases, _variants)
