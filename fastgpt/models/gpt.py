"""A decoder-only transformer on fastgpt.ops: its settings make it any family that docs/weights.md lists.

    x = embed_scale wte[ids] + wpe[positions]
    pre-norm    x = x + attn(norm1(x));  x = x + mlp(norm2(x))
    post-norm   x = norm1(x + attn(x));  x = norm2(x + mlp(x))
    parallel    x = x + attn(norm1(x)) + mlp(norm1(x) or norm2(x))
    logits = r norm_f(x) head^T, loss = cross-entropy in the same op; r = mup_base_width / width, 1 without µP

The blocks are in block.py. Dims: B, T, C width, V vocabulary (rows padded to Vp).
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.models.block import Block, Pass, add_norm, dropout, make_module, norm_of
from fastgpt.models.cache import Cache
from fastgpt.models.config import ModelConfig
from fastgpt.models.flops import flops_per_token
from fastgpt.models.recompute import Level, MadeAgain
from fastgpt.models.tree import TokenTree
from fastgpt.nn import Embedding, Linear, RotaryEmbedding
from fastgpt.nn._hooks import fusable

HIDDEN = re.compile(r"^blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(up|down))\.weight$")  # both sizes grow with the width
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Head(Linear):
    """Logits of the tokens that exist, without the padding rows; a tied head gets the token embedding's weight."""

    def __init__(
        self, vocab_size: int, in_features: int, out_features: int, bias: bool, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.vocab_size = vocab_size

    def forward(self, input: Tensor, tied: Tensor | None = None) -> Tensor:
        weight = self.weight if tied is None else tied
        bias = None if self.bias is None else self.bias[: self.vocab_size]
        return ops.linear(input, weight[: self.vocab_size], bias)


class GPT(nn.Module):
    """Model of `config`. Initial weights are drawn on the CPU from `generator`, so they are the same on every device.

    Submodules are called, so their hooks run. Ops fused across several submodules are used as long as these have no
    hooks and are not replaced. Each block calls the rotary embedding once.

    Raises:
        ValueError: config.vocab_size or config.block_size is None.
    """

    def __init__(self, config: ModelConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.vocab_size is None or config.block_size is None:
            raise ValueError("GPT: config.vocab_size or config.block_size is None, expected numbers")
        self.config, c = config, config
        self.vocab_size, self.block_size = config.vocab_size, config.block_size
        self.extended = 0  # positions beyond block_size: see `extend`
        self.recompute: Level = "none"  # what backward recomputes: fastgpt/models/recompute.py
        self.epilogues = False  # whether fastgpt's own matrix products do what passes around PyTorch's would
        self.lora_dropout = 0.0  # of adapters in the blocks: fastgpt/finetune/lora.py
        self.wte = make_module(Embedding, c.padded_vocab_size, c.width)
        self.wpe = make_module(Embedding, self.block_size, c.width) if c.positions == "learned" else None
        rope: dict[str, Any] = dict(theta=c.rope_theta, scaling=c.rope_scaling, interleaved=c.rope_interleaved)
        self.rotary = RotaryEmbedding(c.rotary, self.block_size, **rope) if c.positions == "rope" else None
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.n_layers))
        self.norm_f = norm_of(c, c.width) if c.norm_placement == "pre" else None
        self.head = make_module(Head, self.vocab_size, c.width, c.padded_vocab_size, bias=c.head_bias)
        if c.tied:
            self.head.register_parameter("weight", None)
        scale = torch.tensor(c.embed_scale, dtype=torch.float64, device="cpu")
        self.scales = {dtype: float(scale.to(dtype)) for dtype in FLOATS}  # as a tensor of the model's dtype has it
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise as in GPT-2: normal weights, smaller where a block writes its output; biases 0, norms 1. With µP
        the variance of hidden matrices is in inverse proportion to the width."""
        std, small = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.n_layers)
        inner = math.sqrt(self.config.width_ratio)
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0 - self.config.norm_offset if name.endswith("weight") else 0.0)
            elif not p.is_meta:
                s = small if name.endswith(("proj.weight", "down.weight")) else std
                s *= inner if HIDDEN.match(name) else 1.0
                p.copy_(torch.empty(p.shape, device="cpu").normal_(0.0, s, generator=generator))

    @property
    def head_weight(self) -> Tensor:
        """Weight of the head, or of the token embedding if they are tied: (Vp, C)."""
        return self.wte.weight if self.config.tied else self.head.weight

    def hidden(
        self,
        ids: Tensor,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        kv_cache: Cache | None = None,
        tree: TokenTree | None = None,
    ) -> Tensor:
        """Compute the input of the head, (B, T, C), from ids (B, T); with µP it is scaled by mup_base_width / width.

        Args:
            tree: ids (1, T) are a tree of texts, in evaluation mode; the other arguments are then None.

        Other arguments as in `forward`.
        """
        if ids.dim() != 2:
            raise ValueError(f"GPT: ids has shape {tuple(ids.shape)}, expected (B, T)")
        if kv_cache is not None and doc_ids is not None:
            raise ValueError("GPT: got doc_ids and kv_cache, expected one of them")
        positions = self._positions(ids, positions, kv_cache) if tree is None else self._of_tree(ids, tree)
        if isinstance(self.rotary, RotaryEmbedding):
            self.rotary.adapt(ids.shape[1], positions)
        kept = self.recompute if self.training and torch.is_grad_enabled() else "none"
        again = MadeAgain() if kept == "norms" else None
        # restore the generator's state only for dropout: it costs host time and cannot be recorded in a CUDA graph
        random = max(self.config.attn_dropout, self.config.resid_dropout, self.lora_dropout) > 0
        run = Pass(self.rotary, positions, doc_ids, kv_cache, again, tree, self.epilogues)
        x = dropout(self._embed(ids, positions), self.config.embed_dropout, self.training)
        residual = bias = None  # x + bias + residual is the stream
        with again or nullcontext():
            for block in self.blocks:
                if kept == "block":
                    x, residual, bias = checkpoint(
                        block, x, residual, bias, run, use_reentrant=False, preserve_rng_state=random
                    )
                else:
                    x, residual, bias = block(x, residual, bias, run)
            if self.norm_f is not None:
                x, _ = add_norm(self.norm_f, x, residual, bias, run)
        x = x if self.config.width_ratio == 1.0 else x * self.config.width_ratio
        if kv_cache is not None:
            kv_cache.advance(ids.shape[1])
        return x

    def _positions(self, ids: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor | None:
        """Return the positions of ids (B, T), or None for 0, 1, 2, ...; check that model and cache have them."""
        if cache is not None:
            found = cache.positions(ids, self.max_positions)
            return found if positions is None else positions
        end, most = ids.shape[1], self.max_positions
        if end > most:
            raise ValueError(f"GPT: ids reach position {end}, expected at most {most} (block_size or kv_cache)")
        return positions

    def _of_tree(self, ids: Tensor, tree: TokenTree) -> Tensor:
        if tree.end > self.max_positions or ids.shape != (1, len(tree.positions)):
            raise ValueError(
                f"GPT: ids has shape {tuple(ids.shape)} and the tree ends at position {tree.end}, "
                f"expected (1, {len(tree.positions)}) and at most {self.max_positions}"
            )
        return tree.positions

    @property
    def max_positions(self) -> int:
        """Positions that the model can tell apart: block_size, or more after `extend`."""
        return max(self.block_size, self.extended)

    def extend(self, positions: int) -> None:
        """Let the model read texts of `positions` tokens, beyond block_size: possible unless positions are learned.

        Raises:
            ValueError: the model's positions are learned.
        """
        if positions <= self.max_positions:
            return
        if self.wpe is not None:
            raise ValueError(
                f"GPT: {positions} positions, expected at most {self.block_size}, the size of the learned table"
            )
        if self.rotary is not None:
            self.rotary.extend(positions)
        self.extended = positions

    def _embed(self, ids: Tensor, positions: Tensor | None) -> Tensor:
        """Add token and position embeddings in one op: (B, T, C)."""
        if self.wpe is None:
            return self._tokens(ids)
        if self.config.embed_scale == 1.0 and fusable(self.wte, Embedding) and fusable(self.wpe, Embedding):
            return ops.embedding(ids, self.wte.weight, self.wpe.weight, positions=positions)
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        x: Tensor = self._tokens(ids) + self.wpe(positions)
        return x

    def _tokens(self, ids: Tensor) -> Tensor:
        """Return the token embeddings, scaled: (B, T, C)."""
        x: Tensor = self.wte(ids)
        return x if self.config.embed_scale == 1.0 else x * self.scales[x.dtype]

    def _head(self, h: Tensor) -> Tensor:
        """Compute logits (..., vocab_size) before the softcap from (..., C), the output of `hidden`."""
        z: Tensor = self.head(h, self.wte.weight) if self.config.tied else self.head(h)
        return z[..., : self.vocab_size]  # a replaced head may return the padding, too

    def logits(self, h: Tensor) -> Tensor:
        """Compute logits (..., vocab_size) without the padding from (..., C), the output of `hidden`."""
        z, cap = self._head(h), self.config.logit_softcap
        return cap * torch.tanh(z / cap) if cap > 0 else z  # the losses' ops do this themselves

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        kv_cache: Cache | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss of predicting `targets`, or logits (B, T, vocab_size) without targets.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64, the token after each of ids; -100 does not count.
            positions: (T,) or (B, T) int64; default 0, 1, 2, ... after the positions in kv_cache.
            doc_ids: (B, T) int: tokens attend only within their own document.
            kv_cache: keys and values of earlier calls; this call appends its keys and values.
            reduction: "mean" and "sum" return a 0-dim loss in fp32, "none" (B, T).

        Raises:
            ValueError, TypeError: names the argument, the value received and the value expected.
        """
        h = self.hidden(ids, positions=positions, doc_ids=doc_ids, kv_cache=kv_cache)
        if targets is None:
            return self.logits(h)
        loss = self.head_loss(h.view(-1, h.shape[-1]), targets.reshape(-1), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def head_loss(
        self,
        rows: Tensor,
        targets: Tensor,
        *,
        reduction: str = "mean",
        temperature: float = 1.0,
        chunk: int | str = "auto",
    ) -> Tensor:
        """Return the loss of predicting `targets` (N,) int64 from `rows` (N, C) of the output of `hidden`, as `forward`
        does; `temperature` divides the logits, of which `chunk` rows are in memory at a time."""
        cap = self.config.logit_softcap / temperature  # cap tanh(z / cap) / t = (cap / t) tanh((z / t) / (cap / t))
        options: dict[str, Any] = dict(softcap=cap, reduction=reduction)
        rows = rows if temperature == 1.0 else rows / temperature
        if fusable(self.head, Head):
            bias = self.head.bias if self.head.bias is None or temperature == 1.0 else self.head.bias / temperature
            options |= dict(linear_bias=bias, vocab_size=self.vocab_size, chunk=chunk)
            return ops.linear_cross_entropy(rows, self.head_weight, targets, **options)
        if temperature != 1.0 and getattr(self.head, "bias", None) is not None:
            raise ValueError(f"GPT: temperature is {temperature}, expected 1 with a replaced head that has a bias")
        return ops.cross_entropy(self._head(rows), targets, **options)

    def num_params(self) -> int:
        """Count all parameters, padding rows included; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, block_size: int) -> dict[str, float]:
        """Return forward and backward FLOP per token of a sequence of T = block_size, with A = n_heads * head_dim:

        full: formula of nanoGPT and PaLM, 6 (N - wpe) + 12 L A T, which counts all of attention;
        causal: formula of llm.c and Megatron, 6 N + 6 L A T, which counts attention below the diagonal.
        N is `num_params()`, minus the token embedding if the head is not tied to it: a lookup multiplies nothing.
        Frozen weights count less: fastgpt/models/flops.py.
        """
        return flops_per_token(self, block_size)

    def param_groups(
        self, weight_decay: float, lr_ratios: dict[str, float] | None = None, muon: bool = False
    ) -> list[dict[str, Any]]:
        """Group the parameters for an optimizer: weight decay on tensors of two or more dimensions (embeddings too),
        none on norms and biases. With µP the hidden matrices are groups of their own, see `_share`.

        Args:
            weight_decay: that of the groups that have any.
            lr_ratios: regular expression -> ratio; the first expression found in a parameter's name sets the "lr_ratio"
                of its group, which is 1.0 otherwise; µP multiplies it.
            muon: put the matrices of the blocks in separate groups, with "muon": True.

        Raises:
            ValueError: an expression is found in no parameter's name.
        """
        ratios = {**(lr_ratios or {}), "": 1.0}
        groups: dict[tuple[str, bool, bool, float], list[Tensor]] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                pattern = next(pattern for pattern in ratios if re.search(pattern, name))
                inner = muon and p.dim() == 2 and name.startswith("blocks.")
                groups.setdefault((pattern, p.dim() < 2, inner, self._share(name, inner)), []).append(p)
        if idle := set(ratios) - {pattern for pattern, *_ in groups} - {""}:
            raise ValueError(
                f"lr_ratios: {sorted(idle)[0]!r} matches no parameter, expected a part of a name in the state_dict"
            )
        return [
            {"params": ps, "weight_decay": 0.0 if spared else weight_decay / share, "lr_ratio": ratios[pattern] * share}
            | ({"muon": True} if inner else {})
            for (pattern, spared, inner, share), ps in sorted(groups.items(), key=lambda item: item[0])
        ]

    def _share(self, name: str, muon: bool) -> float:
        """Return the factor of a parameter's learning rate that µP needs; its weight decay is divided by it, so that
        their product, the share of a weight that a step decays, is that of the base width.

        AdamW moves every element of a hidden matrix (C, C) by about lr. Such moves add up over the C inputs, so the
        factor is base / C (arXiv:2203.03466, table 8). Muon's update has the same elements, but is orthogonal: its
        largest singular value is sqrt(C) times that, not C times, so the factor is sqrt(base / C).
        """
        ratio = self.config.width_ratio if HIDDEN.match(name) else 1.0
        return math.sqrt(ratio) if muon else ratio
