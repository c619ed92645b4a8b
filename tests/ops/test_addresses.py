"""Index arithmetic past 2^31: rows far apart in a sparse file give the same results as adjacent rows.

The optimizer has no such case: its tensors are dense, and its kernels read 64-bit addresses from a table.
"""

from pathlib import Path

import contract
import pytest
import torch
from contract import heads
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.ops.cross_entropy import CROSS_ENTROPY_FWD_BWD, SCALE_ROWS

TABLES = torch.rand(3, 4), torch.rand(3, 4)  # cos, sin
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAR = 2**30 + 64  # elements between rows: the offset of the third row does not fit into 32 bits
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the sparse file is host memory")


CALLS = {call: (op, fn) for op, found in contract.gather("FAR", {}).items() for call, fn in found.items()}
KERNELS = [(call, name) for call, (op, _) in CALLS.items() for name in parity.backends_here(op)]


def far_rows(folder: Path, near: Tensor) -> Tensor:
    """Copy near (3, C) to a file that spans 6 GB of addresses and a few pages of disk."""
    file = torch.from_file(str(folder / "sparse"), shared=True, size=3 * FAR, dtype=near.dtype)
    return file.as_strided(near.shape, (FAR, 1)).copy_(near)


@pytest.mark.parametrize("call,name", KERNELS)
def test_far_rows_are_as_near_ones(call: str, name: str, tmp_path: Path) -> None:
    op, fn = CALLS[call]
    near = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for x in (near, far_rows(tmp_path, near)):
        leaf = x.detach().requires_grad_()  # a view, not a copy: the rows stay far apart
        with use(strict=True, **{op: name}):
            out = fn(leaf)
            outputs = out if isinstance(out, tuple) else (out,)
            if differentiable := [o.sum() for o in outputs if o.requires_grad]:
                torch.autograd.backward(differentiable)
        results.append([*outputs, *([] if leaf.grad is None else [leaf.grad])])
    for a, b in zip(*results):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", parity.backends_here("cross_entropy"))
def test_logits_far_apart_are_replaced_by_their_gradient(name: str, tmp_path: Path) -> None:
    near = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    far = far_rows(tmp_path, near)
    for x in (near, far):
        loss, options = torch.empty(3), (-100, 0.0, 0.0, 0.0, 32)
        CROSS_ENTROPY_FWD_BWD[name](x, loss, torch.tensor([3, 0, 31]), None, torch.ones(1), *options)
        SCALE_ROWS[name](x, torch.full((1,), 3.0))
    assert torch.equal(far, near)


@pytest.mark.parametrize("name", parity.backends_here("linear"))
def test_rows_and_weights_far_apart(name: str, tmp_path: Path) -> None:
    """The kernel runs only where nothing needs a gradient."""
    near = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    far = far_rows(tmp_path, near)
    with use(strict=True, linear=name):
        assert torch.equal(ops.linear(far, near[:2]), ops.linear(near, near[:2]))
        assert torch.equal(ops.linear(near[:2], far), ops.linear(near[:2], near))


@pytest.mark.parametrize("name", parity.backends_here("rope"))
def test_heads_far_apart_turn_in_place(name: str, tmp_path: Path) -> None:
    near = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    far = far_rows(tmp_path, near)
    with use(strict=True, rope=name), torch.no_grad():
        for x in (near, far):
            ops.rope_qkv(heads(x, 4), *TABLES, n_heads=2, n_kv_heads=1)
    assert torch.equal(far, near)
