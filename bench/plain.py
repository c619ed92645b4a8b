"""The baseline: a nanoGPT-class GPT-2 or Llama in plain PyTorch; with the same parameters, the same function as
fastgpt's.

Its parameters have the names of those of fastgpt.models.gpt.GPT, so the state_dict loads unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.models.config import ModelConfig
from fastgpt.training.config import TrainConfig


def norm(c: ModelConfig) -> nn.Module:
    """Return the norm of a GPT-2 or of a Llama."""
    return nn.LayerNorm(c.width, c.norm_eps) if c.norm == "layer" else nn.RMSNorm(c.width, c.norm_eps)


def rotary_table(c: ModelConfig) -> Tensor:
    """Return (2, block_size, D / 2) fp32: cos and sin of each position and pair of columns."""
    assert c.block_size is not None
    rate = c.rope_theta ** (-torch.arange(0, c.d_head, 2, dtype=torch.float32) / c.d_head)
    angle = torch.outer(torch.arange(c.block_size, dtype=torch.float32), rate)
    return torch.stack((angle.cos(), angle.sin()))


def turn(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by position, halves paired."""
    cos, sin = table[:, : x.shape[-2]].to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    """Causal self-attention through PyTorch's scaled_dot_product_attention."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.n_heads
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        self.proj = nn.Linear(c.width, c.width, bias=c.proj_bias)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (z.view(b, t, self.heads, -1).transpose(1, 2) for z in self.qkv(x).split(c, dim=2))  # (B, H, T, D)
        if table is not None:
            q, k = turn(q, table), turn(k, table)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    """GELU in the tanh form (GPT-2), or SwiGLU over one packed projection, gate first (Llama)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.gated = c.activation == "swiglu"
        self.up = nn.Linear(c.width, (2 if self.gated else 1) * c.d_mlp, bias=c.mlp_bias)
        self.down = nn.Linear(c.d_mlp, c.width, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.gated:
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm block: x + attention, x + MLP."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(c), norm(c)
        self.attn, self.mlp = Attention(c), MLP(c)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), table)
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """ids, targets (B, T) -> mean loss over all logits, padding columns as ordinary classes; a tied head is wte."""

    table: Tensor | None

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        assert c.vocab_size is not None and c.block_size is not None
        self.register_buffer("table", rotary_table(c) if c.positions == "rope" else None, persistent=False)
        self.wte = nn.Embedding(c.padded_vocab_size, c.width)
        self.wpe = nn.Embedding(c.block_size, c.width) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm_f = norm(c)
        self.head = None if c.tied else nn.Linear(c.width, c.padded_vocab_size, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(ids)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, self.table)
        logits = F.linear(self.norm_f(x), self.wte.weight if self.head is None else self.head.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def make_step(
    like: nn.Module, cfg: TrainConfig, batches: Iterator[tuple[Tensor, Tensor]], compiled: bool
) -> Callable[[float], Tensor]:
    """Return `step(rate)` -> loss: nanoGPT's training step from the weights of `like`, a fastgpt.models.gpt.GPT."""
    device = torch.device(cfg.device)
    with torch.device(device):
        model = PlainGPT(cfg.model)
    model.load_state_dict(like.state_dict())  # fp32 here, whatever the dtype of `like`
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
