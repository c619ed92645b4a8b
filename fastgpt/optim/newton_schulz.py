"""Newton-Schulz iteration, which moves all singular values of a matrix towards 1: the update of Muon.

    X = M / max(|M|_F, eps), then five times X = a X + (b G + c G^2) X with G = X X^T (n x n, the smaller side)

Matrices of equal shape, transposed where they are tall, are iterated as one batch. Two things save products:

- All n x n products are symmetric, as are those of commuting symmetric matrices. On a CPU they are computed in blocks
  of rows, from the diagonal on, and mirrored; on a GPU such a block would have few tiles.
- Where X is at least twice as wide as tall, several steps run on G alone: with P = a I + b G + c G^2, the next G is
  P G P, and at the end X is multiplied by the product of all P. Each step there multiplies the rounding of G in small
  singular values by a^2, so G is computed anew after three steps, in bf16 after two.

FLOP of an n x m matrix, in units of 2 n^3, with r = m / n and s = the share of a symmetric product that is computed:
5 (s r + s + r) in single steps, 2 r (1 + s) + 14 s in three and two, 3 r (1 + s) + 11 s in two, two and one.

Source: Keller Jordan's Muon (kellerjordan.github.io/posts/muon), torch.optim.Muon.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
EPS = 1e-7
STEPS = (1, 1, 1, 1, 1)  # of the iteration between two products with the whole matrix
# the same where the matrix is at least twice as wide as tall; the error stays near that of single steps
WIDE_STEPS = {torch.float32: (3, 2), torch.bfloat16: (2, 2, 1)}
BLOCK = 192  # rows of a block of a symmetric product
MOST = 1 << 24  # elements of a batch


def batches(shapes: Sequence[torch.Size]) -> list[list[int]]:
    """Return the positions of the matrices that are iterated together: equal shapes up to transposition."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(shapes):
        found.setdefault(tuple(sorted(shape)), []).append(i)
    sizes = {shape: max(1, MOST // max(1, shape[0] * shape[1])) for shape in found}
    return [same[i : i + sizes[shape]] for shape, same in found.items() for i in range(0, len(same), sizes[shape])]


@torch.no_grad()
def orthogonalise(matrices: Sequence[Tensor], precision: torch.dtype) -> list[Tensor]:
    """Return each matrix (R, C) after the iteration, in `precision`, which is also that of the iteration."""
    found: list[Tensor] = list(matrices)
    for together in batches([m.shape for m in matrices]):
        wide = [matrices[i] if matrices[i].shape[0] <= matrices[i].shape[1] else matrices[i].mT for i in together]
        x = _iterate(torch.stack([m.to(precision) for m in wide]))  # (B, n, m)
        for i, out in zip(together, x):
            found[i] = out if out.shape == matrices[i].shape else out.mT
    return found


def _iterate(x: Tensor) -> Tensor:
    """Iterate a batch (B, n, m) with n <= m, which is overwritten."""
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp(min=EPS))
    for steps in WIDE_STEPS.get(x.dtype, STEPS) if 2 * x.shape[1] <= x.shape[2] else STEPS:
        x = _advance(x, steps)
    return x


def _advance(x: Tensor, steps: int) -> Tensor:
    """Return a batch (B, n, m) after some steps, from one Gram matrix."""
    g = _symmetric(x, x.mT)  # (B, n, n)
    p = _symmetric(g, g, plus=g, beta=B, alpha=C)  # a step multiplies by P = A I + p
    if steps == 1:
        return torch.baddbmm(x, p, x, beta=A)
    q = p.clone()  # product of all P
    q.diagonal(dim1=-2, dim2=-1).add_(A)
    for _ in range(1, steps):
        g = _symmetric(g, p, plus=g, beta=A)
        g = _symmetric(g, p, plus=g, beta=A)
        p = _symmetric(g, g, plus=g, beta=B, alpha=C)
        q = _symmetric(p, q, plus=q, beta=A)
    return q @ x


def _symmetric(x: Tensor, y: Tensor, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return beta plus + alpha x y (B, n, n), known to be symmetric; see the head of this file."""
    count, n = x.shape[:2]
    out = x.new_empty(count, n, n)
    block = n if x.is_cuda else BLOCK
    for i in range(0, n, max(1, block)):
        rows, after = slice(i, i + block), slice(i + block, n)
        here = out[:, rows, i:]
        if plus is None:
            torch.bmm(x[:, rows], y[:, :, i:], out=here)
        else:
            torch.baddbmm(plus[:, rows, i:], x[:, rows], y[:, :, i:], beta=beta, alpha=alpha, out=here)
        out[:, after, rows] = out[:, rows, after].mT
    return out
