"""The baseline: a nanoGPT-class GPT in plain PyTorch, parameter for parameter the same function as fastgpt's.

Parameters bear the names of fastgpt.model.GPT's, so that its state_dict loads as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.config import ModelConfig, TrainConfig


class Attention(nn.Module):
    """Causal self-attention through PyTorch's scaled_dot_product_attention."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.n_heads
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.proj = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(c, dim=2))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    """Four times the width, GELU by tanh (GPT-2's)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(c.width, 4 * c.width)
        self.down = nn.Linear(4 * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm: x + attention, x + MLP."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """ids, targets (B, T) -> mean loss over all logits, padding columns as ordinary classes; head tied to wte."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        assert c.vocab_size is not None and c.block_size is not None
        self.wte = nn.Embedding(c.padded_vocab_size, c.width)
        self.wpe = nn.Embedding(c.block_size, c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm_f = nn.LayerNorm(c.width)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def make_step(
    like: nn.Module, cfg: TrainConfig, batches: Iterator[tuple[Tensor, Tensor]], compiled: bool
) -> Callable[[float], Tensor]:
    """`step(rate)` -> loss: nanoGPT's training step from the weights of `like`, a fastgpt.model.GPT."""
    device = torch.device(cfg.device)
    with torch.device(device):
        model = PlainGPT(cfg.model)
    model.load_state_dict(like.state_dict())  # fp32 here, whatever like's dtype
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [
        {"params": decayed, "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    run: Any = torch.compile(model) if compiled else model
    cuda = device.type == "cuda"

    def step(rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, targets = next(batches)
        with torch.autocast("cuda", torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = run(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
