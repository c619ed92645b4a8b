"""Estimate the device memory of a training run from its settings alone.

    peak = parameters + gradients + optimizer + activations + max(loss, one block's backward)

activations: tensors that the blocks save for backward at the recompute level in use (fastgpt/models/recompute.py);
loss: the last norm, the head and the loss with their gradients, in chunks or in one piece. No tensor is allocated.
The figures hold for fastgpt's kernels in eager mode. PyTorch's own ops or a compiler may keep other tensors, which are
not included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch

from fastgpt.core.device import dtype_of
from fastgpt.models.config import GATED, ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.models.recompute import Level
from fastgpt.nn import KEPT_NUMEL
from fastgpt.ops import _linear_cross_entropy
from fastgpt.ops.linear_cross_entropy import rows_at_once
from fastgpt.training.config import TrainConfig

LEVELS: tuple[Level, ...] = get_args(Level)
SPARE = {"cuda": 0.08, "cpu": 0.2}  # fraction left for CUDA's context, workspaces and gaps; for the system


@dataclass(frozen=True)
class Target:
    """Device to plan for: kind ("cuda" or "cpu"), memory in bytes and, for a known card, bandwidth (bytes/s) and peak
    (bf16 FLOP/s)."""

    name: str
    kind: str
    memory: int
    bandwidth: float | None = None
    peak: float | None = None

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * (1 - SPARE[self.kind]))


class Shape(NamedTuple):
    """Sizes of a model that a plan depends on: elements of all parameters, of the token embedding and of the matrices
    that Muon updates; number of tensors that AdamW updates; bytes of tables; FLOP per token of forward and backward
    (6 N + 12 L A T)."""

    parameters: int
    embedding: int
    matrices: int
    tensors: int
    tables: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """Bytes on one device at the peak of a step. `loss` and `block` never coexist, so the larger of them counts."""

    parameters: int  # including rotary tables and the token ids of a step
    gradients: int
    masters: int
    moments: int
    activations: int
    loss: int
    block: int
    validation: int = 0  # allocated in addition to a step's memory, which CUDA graphs keep

    @property
    def needed(self) -> int:
        """Bytes that must fit."""
        return self.peak + self.validation

    @property
    def peak(self) -> int:
        held = self.parameters + self.gradients + self.masters + self.moments + self.activations
        return held + max(self.loss, self.block)

    def largest(self) -> tuple[str, int]:
        """Return the name and the bytes of the largest part."""
        parts = {"the parameters": self.parameters, "the gradients": self.gradients}
        parts |= {"the optimizer's state": self.masters + self.moments, "activations": self.activations}
        parts |= {"the loss (logits)": self.loss, "a block's backward": self.block}
        name = max(parts, key=lambda k: parts[k])
        return name, parts[name]


def shape_of(cfg: TrainConfig) -> Shape:
    """Count the sizes of a model built on the meta device; cfg.model.vocab_size must be set."""
    with torch.device("meta"):
        model = GPT(cfg.model)
    sizes = [p.numel() for p in model.parameters()]
    tables = sum(b.nbytes for b in model.buffers())
    groups = model.param_groups(0.0, muon=cfg.optimizer == "muon")
    matrices = [p.numel() for g in groups if g.get("muon") for p in g["params"]]
    adamw = len(sizes) - len(matrices)
    flops = model.flops_per_token(cfg.block_size)["full"]
    return Shape(sum(sizes), model.wte.weight.numel(), sum(matrices), adamw, tables, flops)


def block_bytes(m: ModelConfig, n: int, w: int, mask: int) -> tuple[int, int]:
    """Return the bytes that one block saves for backward over n = B T tokens: (saved at levels "none" and "norms",
    recomputed at level "norms").

    w: bytes of an element; mask: bytes of the dropout mask per element. Weights are not counted.
    """
    a, packed = m.n_heads * m.d_head, (m.n_heads + 2 * m.kv_heads) * m.d_head
    stat = 8 if m.norm == "layer" else 4  # fp32 mean and 1/std, or 1/rms, of a row
    norms, sums = (1 if m.parallel == "shared" else 2), (1 if m.parallel != "none" else 2)
    columns = (sums + norms) * m.width + packed + a + _mlp_columns(m) + m.d_mlp
    again = _made_again(m) + (norms * m.width if m.norm_placement == "pre" else 0)
    row = w * (columns - again) + stat * norms + 4 * m.n_heads  # the last term: attention's log-sum-exp
    row += 2 * mask * m.width if m.resid_dropout > 0 else 0
    row += (m.n_heads + m.kv_heads) * (w * m.d_head + stat) if m.qk_norm else 0
    return n * row + (16 if m.attn_dropout > 0 else 0), n * w * again


def _mlp_columns(m: ModelConfig) -> int:
    """Return the columns of the activation's input (for squared ReLU: of the ReLU's output, saved instead)."""
    return m.d_mlp * (2 if m.activation in GATED else 1)


def _made_again(m: ModelConfig) -> int:
    """Return the columns of the activation's output that level "norms" recomputes."""
    return 0 if m.activation == "relu2" else m.d_mlp


def _loss_bytes(cfg: TrainConfig, n: int, w: int, target: Target, trained: bool) -> int:
    """Return the bytes of the head and the loss over n tokens; see fastgpt/ops/linear_cross_entropy.py."""
    c, v = cfg.model.width, cfg.model.padded_vocab_size
    norm = n * (w * c + (8 if cfg.model.norm == "layer" else 4)) if cfg.model.norm_placement == "pre" else 0
    rows = rows_at_once(
        n, v, w, _linear_cross_entropy.share_for_logits(target.memory if target.kind == "cuda" else None)
    )
    widens = w < 4 and target.kind == "cpu"  # torch on a CPU cannot multiply, sum or add 16 bits into fp32
    if not trained:  # dlogits, or logits of a chunk; the head's input, its gradient and a scaled copy
        return norm + n * (3 * w * c + 8) + min(rows, n) * w * v
    if rows >= n:
        return norm + n * (w * v + 3 * w * c + 8) + (4 * n * v if widens and cfg.model.head_bias else 0)
    # forward: the head's input, dx, dW in fp32 and a chunk of logits; backward: dx, a scaled copy of it and dW
    forward = 2 * n * w * c + 4 * v * c + rows * w * v + 8 * n + (4 * rows * (v + c) if widens else 0)
    backward = 2 * n * w * c + 4 * v * c + (8 * v * c if widens and cfg.accumulation > 1 else 0)
    return norm + max(forward, backward)


def _inputs(m: ModelConfig) -> int:
    """Return the number of (B, T, C) tensors that the blocks read: one per post-norm block; two per pre-norm block,
    whose sum is the stream. The first pre-norm block reads only one, and if it is parallel, this one is also the
    residual of the second block."""
    if m.norm_placement == "post":
        return m.n_layers
    return 2 * m.n_layers - (1 if m.parallel == "none" or m.n_layers == 1 else 2)


def _backward_bytes(m: ModelConfig, n: int, w: int, mask: int, recompute: Level) -> int:
    """Return the bytes that backward of the last block adds to what is kept: gradients and recomputed tensors."""
    a, packed = m.n_heads * m.d_head, (m.n_heads + 2 * m.kv_heads) * m.d_head
    masked = m.width * mask if m.resid_dropout > 0 else 0  # freed by the first gradient
    stream = m.width * (2 * w if m.resid_dropout > 0 else w) - masked
    again = _made_again(m) if recompute == "norms" else 0
    product = stream + w * (m.d_mlp + again)  # the MLP's second one; its input is freed before the activation
    activation = w * (m.width + again + (3 * m.d_mlp if m.activation == "relu2" else _mlp_columns(m))) - masked
    freed = _mlp_columns(m) + m.d_mlp - again  # by the MLP, whose backward runs before attention's backward
    attention = stream + w * (m.width + a + packed * (2 if m.qk_norm else 1) - freed) + 4 * m.n_heads
    most = n * max(product, activation, attention)
    if recompute != "block":
        return most
    # of the tensors that a post-norm block keeps, one is its input and one is freed by its last norm
    return most + sum(block_bytes(m, n, w, mask)) - (2 * n * w * m.width if m.norm_placement == "post" else 0)


def validation_bytes(cfg: TrainConfig, n: int, w: int, target: Target) -> int:
    """Return an upper bound on the bytes of a forward pass over n tokens without gradients: six tensors (B, T, C), and
    either a chunk of logits or a block's wide tensors."""
    m = cfg.model
    v, packed = m.padded_vocab_size, (m.n_heads + 2 * m.kv_heads) * m.d_head
    rows = rows_at_once(
        n, v, w, _linear_cross_entropy.share_for_logits(target.memory if target.kind == "cuda" else None)
    )
    block = max(packed * (2 if m.qk_norm else 1) + m.n_heads * m.d_head, _mlp_columns(m) + m.d_mlp)
    return w * (6 * n * m.width + max(n * block, min(rows, n) * v)) + 12 * n


def _gradient_bytes(
    cfg: TrainConfig, shape: Shape, row: int, w: int, activations: int, loss: int, block: int, gpus: int
) -> int:
    """Return the bytes of gradients alive at the peak. Gradients are allocated while activations are freed, so their
    maxima do not add up. row: bytes of one activation, (B, T, C)."""
    every, embedding = shape.parameters * w, shape.embedding * w
    first = embedding if cfg.model.tied and shape.embedding >= KEPT_NUMEL and not cfg.compile else 0
    if cfg.accumulation > gpus:  # the gradients of the first micro-batch
        first = every
    begins = first + activations + max(loss, block)
    ends = max(every - (0 if first else embedding) + block, every + row)  # the embedding's gradient comes last
    return max(begins, ends) - activations - max(loss, block)


def plan(cfg: TrainConfig, shape: Shape, target: Target, gpus: int = 1, *, trains_head: bool = True) -> Plan:
    """Plan the memory of one of `gpus` devices, each of which holds the whole model (DDP).

    Args:
        cfg: settings with model.vocab_size and a number for micro_batch. shape: `shape_of(cfg)`.
        trains_head: whether the loss has a gradient of the head's weight.
    """
    m, n, w = cfg.model, cfg.sequences * cfg.block_size, dtype_of(cfg.dtype, target.kind).itemsize
    mask = 1 if target.kind == "cuda" else w
    kept, again = block_bytes(m, n, w, mask)
    activations = n * m.width * mask if m.embed_dropout > 0 else 0
    if cfg.recompute == "block":
        activations += _inputs(m) * n * m.width * w
    else:
        activations += m.n_layers * (kept + (again if cfg.recompute == "none" else 0))
    masters = {"fp32": 4, "remainder": 2}.get(cfg.master, 0) if w == 2 else 0
    others = shape.parameters - shape.matrices  # Muon keeps an fp32 copy and a momentum
    copies = 4 * shape.matrices if w == 2 else 0
    graphs = cfg.graphs and target.kind == "cuda" and cfg.optimizer == "adamw"
    loss, block = _loss_bytes(cfg, n, w, target, trains_head), _backward_bytes(m, n, w, mask, cfg.recompute)
    return Plan(
        parameters=shape.parameters * w + shape.tables + 16 * cfg.batch_tokens // gpus,
        gradients=_gradient_bytes(cfg, shape, n * w * m.width, w, activations, loss, block, gpus),
        masters=others * masters + copies,
        moments=others * 8 + shape.matrices * 4 + 4 * shape.tensors,
        activations=activations,
        loss=loss,
        block=block,
        validation=validation_bytes(cfg, n, w, target) if graphs else 0,
    )
