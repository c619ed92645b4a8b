"""Write an op in your own file: y = x + scale * branch (LayerScale, Touvron et al. 2021, arXiv:2103.17239).

Shows the five parts that every fastgpt op has: the formula in plain PyTorch, a Triton kernel, a raw op that
torch.compile treats as one node, an autograd.Function, and a public function that selects the backend. It then measures
the error against fp64 by the rule of docs/numerics.md. An op for the package itself also gets CPU and CUDA kernels, a
parity table and a benchmark: CONTRIBUTING.md lists the steps.

`fastgpt.core.backend` and `fastgpt.parity.rule` are internal and may change with any release. Without a GPU, run this
with TRITON_INTERPRET=1; otherwise only the formula is tested.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt import ops
from fastgpt.core import backend
from fastgpt.parity.rule import allowed_error

BLOCK = 1024


# 1. The formula: the reference of the tests and the `torch` backend.
def layer_scale_ref(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Return x + scale * branch."""
    return x + scale * branch


# 2. The kernel and its launcher: fp32 inside, one rounding at the end, 64-bit addresses.
@triton.jit
def layer_scale_kernel(x_ptr, branch_ptr, scale_ptr, y_ptr, N, C, ADD: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(scale_ptr + i % C, i < N).to(tl.float32) * tl.load(branch_ptr + i, i < N).to(tl.float32)
    if ADD:
        y += tl.load(x_ptr + i, i < N).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), i < N)


# 3. The raw op: opaque to autograd and torch.compile; the fake returns shapes without running it.
@torch.library.custom_op("example::layer_scale", mutates_args=())
def layer_scale_raw(x: Tensor | None, branch: Tensor, scale: Tensor) -> Tensor:
    """Return (x or 0) + scale * branch."""
    branch, x = branch.contiguous(), None if x is None else x.contiguous()
    y, n = torch.empty_like(branch), branch.numel()
    grid = (triton.cdiv(n, BLOCK),)
    layer_scale_kernel[grid](x, branch, scale.contiguous(), y, n, branch.shape[-1], ADD=x is not None, BLOCK=BLOCK)
    return y


@layer_scale_raw.register_fake
def _(x: Tensor | None, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(branch, memory_format=torch.contiguous_format)


# 4. Autograd: dx = dy, dbranch = scale * dy, dscale = sum over the rows of dy * branch.
class LayerScaleFn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(branch, scale)
        return layer_scale_raw(x, branch, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        branch, scale = ctx.saved_tensors
        dscale = (dy.float() * branch.float()).flatten(0, -2).sum(0).to(scale.dtype)
        return dy, layer_scale_raw(None, dy, scale), dscale


# 5. The registry and the public function: `ops.use(layer_scale="torch")` and FASTGPT_STRICT now work for this op too.
backend.register("layer_scale", triton=backend.Cell())


def layer_scale(x: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Return x + scale * branch, for x and branch (..., C) and scale (C,) of one dtype.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if branch.shape != x.shape or scale.shape != x.shape[-1:]:
        shapes = f"x {tuple(x.shape)}, branch {tuple(branch.shape)}, scale {tuple(scale.shape)}"
        raise ValueError(f"layer_scale: got {shapes}, expected (..., C), (..., C) and (C,)")
    if backend.select("layer_scale", x) == "torch":
        return layer_scale_ref(x, branch, scale)
    return LayerScaleFn.apply(x, branch, scale)


def outputs(function: Any, inputs: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return y and the gradients, in fp64 for the comparison."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in inputs]
    y = function(*leaves)
    grads = torch.autograd.grad(y.sum(), leaves)
    return {"y": y.detach().double(), **{f"d{i}": g.double() for i, g in enumerate(grads)}}


def main() -> float:
    """Compare with fp64; return the largest error as a share of the allowed one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    served = "triton" if backend.refusal("layer_scale", "triton", device, torch.float32) is None else "torch"
    worst = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(*shape, device=device).to(dtype) for shape in ((6, 96), (6, 96), (96,))]
        with ops.use(layer_scale=served):
            got = outputs(layer_scale, inputs, dtype)
        torch_got = outputs(layer_scale_ref, inputs, dtype)
        exact = outputs(layer_scale_ref, inputs, torch.float64)
        for name, truth in exact.items():
            error, baseline = (float((t[name] - truth).abs().max()) for t in (got, torch_got))
            worst = max(worst, error / allowed_error(name, truth, baseline, dtype))
    print(f"layer_scale on {served}: the largest error is {worst:.2f} of the allowed one")
    return worst


if __name__ == "__main__":
    main()
