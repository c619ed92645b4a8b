"""A whole model on our kernels against the same function in plain PyTorch: loss, logits, gradients and ten steps.

Truth is plain PyTorch in fp64. By the parity rule (fastgpt/parity/rule.py): error(ours) <= 2 (loss, logits) or 3
(gradients) times the baseline plus one unit in the last place; after ten AdamW steps by relative L2 error per tensor.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import generator
from torch import Tensor

from fastgpt import parity
from fastgpt.core import backend
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import keep_gradients
from fastgpt.optim import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMMON: dict[str, Any] = dict(n_layers=2, n_heads=4, width=32, vocab_size=61, vocab_multiple=8, block_size=24)
SHAPES = {
    "gpt2": ModelConfig(**COMMON),
    "llama": ModelConfig(
        **COMMON, n_kv_heads=2, norm="rms", norm_eps=1e-5, activation="swiglu", mlp_width=48, positions="rope",
        qkv_bias=False, proj_bias=False, mlp_bias=False, tied=False,
    ),
}  # fmt: skip
BACKENDS = [b for b in (*parity.backends_here("layer_norm"), "torch")]
# the setting of this name, with PyTorch's kernels for all other ops: it needs a GPU or Triton's interpreter
EPILOGUES = [("epilogues", "gpt2")] if parity.backends_here("gelu_mlp") else []
ON = pytest.mark.parametrize(
    "kernels,name",
    [
        *((b, name) for name in SHAPES for b in BACKENDS),
        *(pytest.param(*both, marks=pytest.mark.extended) for both in EPILOGUES),
    ],
)
LR, BETAS, DECAY, CLIP = 1e-2, (0.9, 0.95), 0.1, 0.5
Params = dict[str, Tensor]


def choice(kernels: str, dtype: torch.dtype) -> dict[str, Any]:
    """These kernels for every op, PyTorch's for those ops that have none of them for this dtype."""
    if kernels == "epilogues":
        return {"all": "torch", "gelu_mlp": "triton", "linear_qkv": "triton"}
    cells = {op: c[kernels] for op, c in backend.ops().items() if kernels in c}
    return {"all": kernels} | {op: "torch" for op, cell in cells.items() if not cell.takes(dtype, 0)}


def rotate(x: Tensor) -> Tensor:
    """RoPE from the paper, half pairing: x (B, H, T, D)."""
    t, half = x.shape[2], x.shape[3] // 2
    angle = torch.outer(torch.arange(t).double(), 10000.0 ** (-torch.arange(half).double() / half)).to(x.device)
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def plain_logits(c: ModelConfig, p: Params, ids: Tensor) -> Tensor:
    """The model as a textbook writes it: ids (B, T) -> logits (B, T, vocab_size)."""
    llama, d = c.norm == "rms", c.width // c.n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        if llama:
            return F.rms_norm(x, (c.width,), p[name + ".weight"], c.norm_eps)
        return F.layer_norm(x, (c.width,), p[name + ".weight"], p[name + ".bias"], c.norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[name + ".weight"], p.get(name + ".bias"))

    x = F.embedding(ids, p["wte.weight"])
    x = x if llama else x + p["wpe.weight"][: ids.shape[1]]
    for i in range(c.n_layers):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv").unflatten(-1, (-1, d)).transpose(1, 2)
        q, k, v = qkv.split([c.n_heads, c.kv_heads, c.kv_heads], dim=1)
        q, k = (rotate(q), rotate(k)) if llama else (q, k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), b + "attn.proj")
        h = linear(norm(x, b + "norm2"), b + "mlp.up")
        gate, up = h.chunk(2, -1) if llama else (h, h)
        h = F.silu(gate) * up if llama else F.gelu(h, approximate="tanh")
        x = x + linear(h, b + "mlp.down")
    return F.linear(norm(x, "norm_f"), p["wte.weight" if c.tied else "head.weight"][: c.vocab_size])


def plain_loss(c: ModelConfig, p: Params, ids: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    z = plain_logits(c, p, ids).flatten(0, 1)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), targets.flatten(), reduction=reduction)


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    g = generator(3)
    tokens = torch.randint(61, (n, 2, 25), generator=g).to(DEVICE)
    out = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens]
    out[0][1][0, 3:7] = -100  # targets that do not count
    return out


def drawn(targets: Tensor) -> list[Tensor]:
    """Targets for losses per token, some hundred of them: of few, or of their mean, the error is a matter of luck."""
    return [targets, *((targets + shift) % 61 for shift in range(7, 61, 9))]


def model_of(name: str, dtype: torch.dtype) -> GPT:
    model = GPT(SHAPES[name], generator=generator(1))
    with torch.no_grad():  # larger than initial weights, so that attention and norms matter; biases too
        for i, p in enumerate(model.parameters()):
            p += 0.2 * torch.randn(p.shape, generator=generator(i))
    return model.to(DEVICE, dtype)


def leaves(model: GPT, dtype: torch.dtype) -> Params:
    """The model's parameters by name, as leaves in another dtype."""
    return {n: p.detach().to(dtype).clone().requires_grad_() for n, p in model.named_parameters()}


def plain_step(c: ModelConfig, p: Params, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    plain_loss(c, p, ids, targets).backward()
    with torch.no_grad():
        losses = [plain_loss(c, p, ids, t, "none") for t in drawn(targets)]
        out = {"logits": plain_logits(c, p, ids), "losses": torch.cat(losses)}
    return {**out, **{f"d{n}": t.grad for n, t in p.items() if t.grad is not None}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ON
@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "kept"])
def test_loss_logits_and_every_gradient(kernels: str, name: str, dtype: torch.dtype, kept: bool) -> None:
    c, (ids, targets) = SHAPES[name], batches(1)[0]
    model = model_of(name, dtype)
    model.epilogues = kernels == "epilogues"
    exact_leaves = leaves(model, torch.float64)
    exact = plain_step(c, exact_leaves, ids, targets)
    baseline = plain_step(c, leaves(model, dtype), ids, targets)

    def exactly(*weights: Tensor) -> list[Tensor]:
        named = dict(zip(exact_leaves, (w.detach().requires_grad_() for w in weights), strict=True))
        return list(plain_step(c, named, ids, targets).values())

    moved = parity.sensitivities(exactly, *exact_leaves.values())
    if kept:
        keep_gradients(model, min_numel=1)
    with backend.use(**choice(kernels, dtype), strict=True):
        model(ids, targets).backward()
        with torch.no_grad():
            losses = [model(ids, t, reduction="none").flatten() for t in drawn(targets)]
            ours = {"logits": model(ids), "losses": torch.cat(losses)}
    ours |= {f"d{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == exact.keys()
    for (what, truth), sensitivity in zip(exact.items(), moved, strict=True):
        error, base = (parity.largest_error(t[what], truth) for t in (ours, baseline))
        allowed = parity.allowed_error(what, truth, base, ours[what].dtype, sensitivity)
        assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
    for n, p in model.named_parameters():
        own = kept and p.dim() == 2 and (kernels not in ("torch", "epilogues") or n.startswith("blocks."))
        assert not own or p.grad is p.grad_buffer, n


class Plain:
    """Clip and torch.optim.AdamW on leaves of a plain model; 16-bit leaves follow fp32 masters."""

    def __init__(self, model: GPT, dtype: torch.dtype, wide: torch.dtype, shift: int = 0) -> None:
        self.params = leaves(model, dtype)
        for i, p in enumerate(self.params.values() if shift else ()):  # a draw of parity's sensitivity
            p.data = parity.moved(p.data, shift, i)
        self.masters = {n: p.detach().to(wide).clone().requires_grad_() for n, p in self.params.items()}
        groups = [
            {"params": [p for p in self.masters.values() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in self.masters.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS)

    def step(self, c: ModelConfig, ids: Tensor, targets: Tensor) -> float:
        loss = plain_loss(c, self.params, ids, targets)
        grads = torch.autograd.grad(loss, list(self.params.values()))
        for master, g in zip(self.masters.values(), grads):
            master.grad = g.to(master.dtype)
        torch.nn.utils.clip_grad_norm_(self.masters.values(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            for n, p in self.params.items():
                p.copy_(self.masters[n])
        return float(loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ON
def test_ten_steps(kernels: str, name: str, dtype: torch.dtype) -> None:
    c, model = SHAPES[name], model_of(name, dtype)
    model.epilogues = kernels == "epilogues"
    start = copy.deepcopy(model)
    exact, base = Plain(model, torch.float64, torch.float64), Plain(model, dtype, torch.float32)
    shifts = range(1, parity.SHIFTS + 1) if dtype == torch.float32 else ()
    others = [base, *(Plain(model, torch.float64, torch.float64, shift) for shift in shifts)]
    keep_gradients(model, min_numel=1)
    optimizer = AdamW(model.param_groups(DECAY), lr=LR, betas=BETAS, max_norm=CLIP)
    losses: list[list[float]] = []  # ours, exact, the others
    with backend.use(**choice(kernels, dtype), strict=True):
        for ids, targets in batches(10):
            loss = model(ids, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append([float(loss.detach()), *(p.step(c, ids, targets) for p in (exact, *others))])
    unit = torch.finfo(dtype).eps
    ours_off, _, *others_off = (max(abs(row[i] / row[1] - 1) for row in losses) for i in range(len(losses[0])))
    assert ours_off <= 3 * max(others_off) + unit
    for n, p in model.named_parameters():
        truth = exact.params[n].detach()
        moved = (truth - dict(start.named_parameters())[n].double()).norm()
        assert moved > 1e-3 * truth.norm(), f"{n} did not move"
        ours_error, *errors = (
            float((t.detach().double() - truth).norm() / truth.norm()) for t in (p, *(o.params[n] for o in others))
        )
        assert ours_error <= 3 * max(errors) + unit, f"{n}: {ours_error:.3e}, baseline {max(errors):.3e}"
