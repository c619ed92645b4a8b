"""What a training run needs of a device's memory, from its settings alone.

    peak = parameters + gradients + optimizer + activations + max(loss, one block's backward)

activations: what the blocks keep between forward and backward, by level of recomputation (fastgpt/models/recompute.py);
loss: the last norm, the head and the loss with their gradients, in chunks or in one piece. No tensor is allocated.
The figures are of fastgpt's kernels, eager; what PyTorch's own ops or a compiler keep in their place is not in them.
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
SPARE = {"cuda": 0.08, "cpu": 0.2}  # share left to CUDA's context, libraries' workspaces and gaps; to the system


@dataclass(frozen=True)
class Target:
    """What is planned for: "cuda" or "cpu", its memory in bytes, and of a known card bandwidth (bytes/s), peak (bf16
    FLOP/s)."""

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
    """What a plan needs of a model: elements of its parameters, of the token embedding, of those that Muon gets, number
    of AdamW's parameters, bytes of tables, FLOP per token of forward and backward (6 N + 12 L A T)."""

    parameters: int
    embedding: int
    matrices: int
    tensors: int
    tables: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """Bytes on one device at the peak of a step; of `loss` and `block`, which are not there together, the larger."""

    parameters: int  # rotary tables and a step's token ids too
    gradients: int
    masters: int
    moments: int
    activations: int
    loss: int
    block: int
    validation: int = 0  # allocated beside a step's memory, which CUDA graphs keep

    @property
    def needed(self) -> int:
        """What must fit."""
        return self.peak + self.validation

    @property
    def peak(self) -> int:
        held = self.parameters + self.gradients + self.masters + self.moments + self.activations
        return held + max(self.loss, self.block)

    def largest(self) -> tuple[str, int]:
        """Name and bytes of the largest part."""
        parts = {"the parameters": self.parameters, "the gradients": self.gradients}
        parts |= {"the optimizer's state": self.masters + self.moments, "activations": self.activations}
        parts |= {"the loss (logits)": self.loss, "a block's backward": self.block}
        name = max(parts, key=lambda k: parts[k])
        return name, parts[name]


def shape_of(cfg: TrainConfig) -> Shape:
    """Counts, from a model on the meta device; cfg.model.vocab_size is set."""
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
    """What one block keeps for backward over n = B T tokens: (what every level keeps, what "norms" makes again).

    w: bytes of an element; mask: of dropout's mask per element. Weights are not counted.
    """
    a, packed = m.n_heads * m.d_head, (m.n_heads + 2 * m.kv_heads) * m.d_head
    stat = 8 if m.norm == "layer" else 4  # fp32 mean and 1/std, or 1/rms, of a row
    norms, sums = (1 if m.parallel == "shared" else 2), (1 if m.parallel != "none" else 2)
    columns = (sums + norms) * m.width + packed + a + _mlp_columns(m) + m.d_mlp
    again = _made_again(m) + (norms * m.width if m.norm_placement == "pre" else 0)
    row = w * (columns - again) + stat * norms + 4 * m.n_heads  # the last: attention's log-sum-exp
    row += 2 * mask * m.width if m.resid_dropout > 0 else 0
    row += (m.n_heads + m.kv_heads) * (w * m.d_head + stat) if m.qk_norm else 0
    return n * row + (16 if m.attn_dropout > 0 else 0), n * w * again


def _mlp_columns(m: ModelConfig) -> int:
    """Columns of what the activation reads (squared ReLU: the ReLU's output in its place)."""
    return m.d_mlp * (2 if m.activation in GATED else 1)


def _made_again(m: ModelConfig) -> int:
    """Columns of the activation's output that level "norms" does not keep."""
    return 0 if m.activation == "relu2" else m.d_mlp


def _loss_bytes(cfg: TrainConfig, n: int, w: int, target: Target) -> int:
    """The head and the loss over n tokens: see fastgpt/ops/linear_cross_entropy.py."""
    c, v = cfg.model.width, cfg.model.padded_vocab_size
    norm = n * (w * c + (8 if cfg.model.norm == "layer" else 4)) if cfg.model.norm_placement == "pre" else 0
    rows = rows_at_once(
        n, v, w, _linear_cross_entropy.share_for_logits(target.memory if target.kind == "cuda" else None)
    )
    widens = w < 4 and target.kind == "cpu"  # there torch has no products, sums and adds of 16 bits into fp32
    if rows >= n:  # dlogits; the head's input, its gradient and a scaled copy
        return norm + n * (w * v + 3 * w * c + 8) + (4 * n * v if widens and cfg.model.head_bias else 0)
    # the head's input and dx, dW in fp32, a chunk of logits; backward has a scaled copy of dx in their place
    forward = 2 * n * w * c + 4 * v * c + rows * w * v + 8 * n + (4 * rows * (v + c) if widens else 0)
    backward = 2 * n * w * c + 4 * v * c + (8 * v * c if widens and cfg.accumulation > 1 else 0)
    return norm + max(forward, backward)


def _inputs(m: ModelConfig) -> int:
    """Tensors (B, T, C) that the blocks read: pre-norm two whose sum is the stream, the first block only one (which in
    a parallel block is also the second one's residual)."""
    if m.norm_placement == "post":
        return m.n_layers
    return 2 * m.n_layers - (1 if m.parallel == "none" or m.n_layers == 1 else 2)


def _backward_bytes(m: ModelConfig, n: int, w: int, mask: int, recompute: Level) -> int:
    """Gradients, and what is made again, while the last block goes backward, over what is kept."""
    a, packed = m.n_heads * m.d_head, (m.n_heads + 2 * m.kv_heads) * m.d_head
    masked = m.width * mask if m.resid_dropout > 0 else 0  # freed by the first gradient
    stream = m.width * (2 * w if m.resid_dropout > 0 else w) - masked
    again = _made_again(m) if recompute == "norms" else 0
    product = stream + w * (m.d_mlp + again)  # the MLP's second one; its input is freed before the activation's turn
    activation = w * (m.width + again + (3 * m.d_mlp if m.activation == "relu2" else _mlp_columns(m))) - masked
    freed = _mlp_columns(m) + m.d_mlp - again  # by the MLP, whose turn is before attention's
    attention = stream + w * (m.width + a + packed * (2 if m.qk_norm else 1) - freed) + 4 * m.n_heads
    most = n * max(product, activation, attention)
    if recompute != "block":
        return most
    # of all that a post-norm block keeps, one tensor is its input and one is freed by its last norm
    return most + sum(block_bytes(m, n, w, mask)) - (2 * n * w * m.width if m.norm_placement == "post" else 0)


def validation_bytes(cfg: TrainConfig, n: int, w: int, target: Target) -> int:
    """A bound of what a forward pass over n tokens without gradients has at a time: six tensors (B, T, C), a chunk of
    logits or a block's wide tensors."""
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
    """Gradients that are there at the peak: they come as activations go. row: bytes of one activation, (B, T, C)."""
    every, embedding = shape.parameters * w, shape.embedding * w
    first = embedding if cfg.model.tied and shape.embedding >= KEPT_NUMEL and not cfg.compile else 0
    if cfg.accumulation > gpus:  # the first micro-batch's
        first = every
    begins = first + activations + max(loss, block)
    ends = max(every - (0 if first else embedding) + block, every + row)  # the embedding's comes last
    return max(begins, ends) - activations - max(loss, block)


def plan(cfg: TrainConfig, shape: Shape, target: Target, gpus: int = 1) -> Plan:
    """What one device of `gpus` needs, each holding all of the model (DDP).

    Args:
        cfg: settings with model.vocab_size and a number for micro_batch. shape: `shape_of(cfg)`.
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
    others = shape.parameters - shape.matrices  # Muon has a copy in fp32, its gradient and a momentum
    copies = 8 * shape.matrices if w == 2 else 0
    graphs = cfg.graphs and target.kind == "cuda" and cfg.optimizer == "adamw"
    loss, block = _loss_bytes(cfg, n, w, target), _backward_bytes(m, n, w, mask, cfg.recompute)
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
