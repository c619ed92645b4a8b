"""The kernels of attention for sm_90a (csrc/attention/sm90*.cu), a variant of the backend `cuda`.

They take causal order or none, grouped heads, head dimensions of 64 and 128, bf16 and fp16. They have run in the host
emulation only and never on a device, so nothing picks them unless a caller names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.core.cells import Variant, register_variant
from fastgpt.core.fallback import report_once, strict_mode

SM90, PLAIN = "cuda:sm_90a", "cuda"  # PLAIN serves the calls that the kernels do not take
HEAD_DIMS = (64, 128)
_ABSENT = ("window", "cu_seqlens_q", "cu_seqlens_k", "doc_ids", "kv_lens", "kv_start")

register_variant("attention", SM90, Variant((torch.bfloat16, torch.float16), raw_op="attention_bwd_sm90.cuda"))


def untaken(q: Tensor, o: dict[str, Any]) -> str | None:
    """Return why the kernels do not take a call with queries q (B, T, H, D) and these options; None if they do."""
    if q.shape[3] not in HEAD_DIMS:
        return "it takes head dimensions of 64 and 128 only"
    given = [name for name in _ABSENT if o[name] is not None]
    given += [name for name in ("softcap", "dropout_p") if o[name] > 0]
    if given:
        return f"it does not take {given[0]}"
    if o["scale"] is not None and o["scale"] < 0:
        return "it does not take a negative scale"
    return None


def or_plain(backend: str, q: Tensor, o: dict[str, Any]) -> str:
    """Return `backend`, or `cuda` if those are the kernels for sm_90a and do not take the call.

    Raises:
        RuntimeError: in strict mode, instead of falling back.
    """
    why = untaken(q, o) if backend == SM90 else None
    return backend if why is None else _plain(why, strict_mode[0])


def _plain(why: str, strict: bool) -> str:
    if strict:
        raise RuntimeError(f"attention: {SM90} was requested, but {why}")
    report_once("attention", f"{SM90} was requested, but {why}: running the plain cuda kernel")
    return PLAIN


# torch.compiler.assume_constant_result, as for backend._select: the warning comes while compiling.
_plain._dynamo_marked_constant = True  # type: ignore[attr-defined]
