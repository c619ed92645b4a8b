"""Use fastgpt's ops, modules and optimizer in your own model.

Shows: a pre-norm transformer block whose residual adds run inside the norms, attention on one packed projection, rotary
embedding in place, and the LM head fused with its loss. Under `fastgpt.ops.use(all="torch")` the same model runs on
PyTorch's ops, which is the quickest way to check a result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastgpt.nn as fnn
from fastgpt import ops
from fastgpt.ops.rope import rope_frequencies
from fastgpt.optim import AdamW

VOCAB, TOKENS, WIDTH, HEADS, LAYERS = 256, 32, 64, 4, 2


class Block(nn.Module):
    """Map (branch, residual), two tensors whose sum is the stream, to the next such pair; the next norm adds them in
    its pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = fnn.RMSNorm(WIDTH), fnn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = fnn.SwiGLU(WIDTH, 4 * WIDTH)

    def forward(self, branch: Tensor, residual: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm1(branch, residual)  # y = norm(branch + residual), residual = branch + residual
        qkv = self.qkv(y).unflatten(-1, (3 * HEADS, WIDTH // HEADS))  # (B, T, query, key and value heads, D)
        qkv = ops.rope_qkv(qkv, cos, sin, n_heads=HEADS, n_kv_heads=HEADS)
        attended = ops.attention_qkv(qkv, n_heads=HEADS, n_kv_heads=HEADS, causal=True)
        y, residual = self.norm2(self.out(attended.flatten(-2)), residual)
        return self.mlp(y), residual


class Model(nn.Module):
    """A small Llama: token embedding, blocks, norm, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = fnn.Embedding(VOCAB, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = fnn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        angles = torch.outer(torch.arange(TOKENS), rope_frequencies(WIDTH // HEADS)).float()
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss; ids and targets are (B, T)."""
        branch = self.embedding(ids)
        residual = torch.zeros_like(branch)
        for block in self.blocks:
            branch, residual = block(branch, residual, self.cos, self.sin)
        y, _ = self.norm(branch, residual)
        return ops.linear_cross_entropy(y.flatten(0, 1), self.head.weight, targets.flatten())


def main(steps: int = 30) -> list[float]:
    """Train for some steps; return the losses."""
    torch.manual_seed(0)
    model = Model()
    optimizer = AdamW(model.parameters(), lr=3e-3, max_norm=1.0)
    losses = []
    for _ in range(steps):
        text = (torch.randint(VOCAB, (8, 1)) + torch.arange(TOKENS + 1)) % VOCAB  # counts upwards
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    with ops.use(all="torch"), torch.no_grad():
        reference = model(text[:, :-1], text[:, 1:])
    with torch.no_grad():
        print(f"on PyTorch's ops {reference:.6f}, on fastgpt's {model(text[:, :-1], text[:, 1:]):.6f}")
    return losses


if __name__ == "__main__":
    main()
