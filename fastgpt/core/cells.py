"""Cells of the table of backends: the kernels of an op on one backend, and what they support.

A variant is a kernel of a backend for one kind of chip, which callers choose by name, as in `attention=cuda:sm_90a`.
`auto` never picks it. Variants are not in the table, so benchmarks, tuning and parity leave them out, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgpt.core import native

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cell:
    """One op on one backend: the dtypes it supports and, where heads count, the largest head dimension (0: any)."""

    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    max_dim: int = 0

    def takes(self, dtype: torch.dtype, dim: int) -> bool:
        """Return whether the kernel supports this dtype and head dimension."""
        return dtype in self.dtypes and not 0 < self.max_dim < dim


@dataclass(frozen=True)
class Variant(Cell):
    """Kernels for one kind of chip; `raw_op` is the newest overload in csrc, as in attention_bwd_sm90.cuda."""

    raw_op: str = ""


_variants: dict[str, dict[str, Variant]] = {}  # op -> name, as in cuda:sm_90a -> variant


def register_variant(op: str, name: str, variant: Variant) -> None:
    """Add a variant of an op. name: its backend, a colon, and the architecture that nvcc compiles it for."""
    _variants.setdefault(op, {})[name] = variant


def variants_of(op: str) -> dict[str, Variant]:
    """Return the variants of an op by name."""
    return _variants.get(op, {})


def wrong_chip(name: str, simulated: bool) -> str | None:
    """Return why this device or this build cannot run a variant; None if it can.

    simulated: kernels run in the emulation, which is of any chip.
    """
    if simulated:
        return None
    arch = name.partition(":")[2]
    number = arch.removeprefix("sm_").rstrip("af")
    wanted, found = f"{number[:-1]}.{number[-1]}", "{}.{}".format(*torch.cuda.get_device_capability())
    if found != wanted:
        return f"{name} runs on devices of compute capability {wanted} only, and this one has {found}"
    if arch not in native.archs():
        return f"fastgpt._C was built without {arch}: TORCH_CUDA_ARCH_LIST={wanted}{arch[-1]} {native.REBUILD}"
    return None


def not_built(op: str, name: str, key: str) -> str | None:
    """Return why the compiled kernels lack a variant; None if they have it. key: the dispatch key of its tensors."""
    kernel = f"fastgpt::{variants_of(op)[name].raw_op}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(kernel, key):
        return None
    return f"fastgpt._C has no {kernel}: it was built from an older csrc/; {native.REBUILD}"
