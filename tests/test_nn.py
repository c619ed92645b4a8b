"""fastgpt.nn: each module against the one it replaces: constructor, state_dict, numbers, compile, autocast."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from draws import generator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastgpt import nn as fnn
from fastgpt import parity
from fastgpt.ops import use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LlamaMLP(nn.Module):
    """The module that fastgpt.nn.SwiGLU replaces, with the names of transformers' LlamaMLP."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.silu, bias: bool = False) -> None:
        super().__init__()
        self.act = act
        self.gate_proj, self.up_proj = nn.Linear(12, 20, bias), nn.Linear(12, 20, bias)
        self.down_proj = nn.Linear(20, 12, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class BiasThenGELU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.bias, approximate="tanh")


class OffsetRMSNorm(nn.Module):
    """Gemma's RMSNorm: weights are stored as a difference from one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (12,), 1 + self.weight, 1e-6)


class ComplexRotary(nn.Module):
    """Llama's original formulation: pairs (2i, 2i + 1) as complex numbers, rotated by theta^(-2i / dim) per
    position."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        angle = torch.arange(q.shape[1])[:, None] * 500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        turn = torch.polar(torch.ones_like(angle), angle).to(wide.to_complex())[:, None].to(q.device)

        def turned(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x[..., :8].to(wide).unflatten(-1, (-1, 2)).contiguous())
            return torch.cat((torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype), x[..., 8:]), -1)

        return turned(q), turned(k)


@dataclass(frozen=True)
class Case:
    """A fastgpt module, the stock module it replaces, the shapes of its inputs and the extra keywords of its call."""

    ours: Callable[[], nn.Module]
    stock: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    call: dict[str, Any] = field(default_factory=dict)
    integers: int = 0  # inputs of class numbers or ids are below this, and shapes[-1] is their shape
    scale: float = 1.0
    same: bool = False  # one input, three times

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        g = generator(1)
        floats = self.shapes[:-1] if self.integers else self.shapes
        out = [(self.scale * torch.randn(s, generator=g)).to(DEVICE, torch.bfloat16).to(dtype) for s in floats]
        if self.integers:
            out.append(torch.randint(self.integers, self.shapes[-1], generator=g).to(DEVICE))
        return out

    def pair(self) -> tuple[Any, Any]:
        """Return the fastgpt and the stock module with the same random weights, which are bf16 values (exact in
        every dtype)."""
        ours, stock = self.ours().to(DEVICE), self.stock().to(DEVICE)
        g = generator(2)
        with torch.no_grad():
            for p in stock.parameters():
                p.copy_((0.25 * torch.randn(p.shape, generator=g)).bfloat16() + (p.dim() == 1))
        ours.load_state_dict(stock.state_dict())
        return ours, stock


class LinearThenCrossEntropy(nn.Module):
    """torch.nn.LinearCrossEntropyLoss, in PyTorch since 2.13, as a layer and a function."""

    def __init__(self, in_features: int, num_classes: int, bias: bool = False, **options: Any) -> None:
        super().__init__()
        self.linear, self.options = nn.Linear(in_features, num_classes, bias), options

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(x), target, **self.options)


def both(name: str, *args: Any, **options: Any) -> dict[str, Callable[[], nn.Module]]:
    stock = LinearThenCrossEntropy if name == "LinearCrossEntropyLoss" else None
    return {
        "ours": lambda: getattr(fnn, name)(*args, **options),
        "stock": lambda: getattr(nn, name, stock)(*args, **options),
    }


def attention(shapes: tuple[tuple[int, ...], ...] = ((2, 7, 24),), call: dict[str, Any] | None = None, **options: Any):
    pair = both("MultiheadAttention", 24, 4, **{"batch_first": True, **options})
    return Case(**pair, shapes=shapes, call={"need_weights": False, **(call or {})}, same=len(shapes) == 1)


CAUSAL = torch.ones(7, 7, dtype=torch.bool, device=DEVICE).triu(1)
PADDING = torch.zeros(2, 7, dtype=torch.bool, device=DEVICE)  # left, holes, right
PADDING[0, [0, 1, 4]] = PADDING[1, 5:] = True
WEIGHT = torch.linspace(0.5, 1.5, 11)
X, ROWS = ((2, 5, 12),), ((9, 11), (9,))
CASES: dict[str, Case] = {
    "LayerNorm": Case(**both("LayerNorm", 12), shapes=X),
    "LayerNorm no bias": Case(**both("LayerNorm", (12,), 0.1, bias=False), shapes=X),
    "LayerNorm plain": Case(**both("LayerNorm", 12, elementwise_affine=False), shapes=X),
    "LayerNorm 2-D": Case(**both("LayerNorm", [5, 12]), shapes=X),
    "LayerNorm 2-D plain": Case(**both("LayerNorm", (5, 12), elementwise_affine=False), shapes=X),
    "RMSNorm": Case(**both("RMSNorm", 12), shapes=X),
    "RMSNorm tiny": Case(**both("RMSNorm", 12), shapes=X, scale=3e-4),
    "RMSNorm eps": Case(**both("RMSNorm", (12,), 0.1), shapes=X),
    "RMSNorm 2-D": Case(**both("RMSNorm", (5, 12)), shapes=X),
    "RMSNorm plain": Case(**both("RMSNorm", 12, elementwise_affine=False), shapes=X),
    "RMSNorm offset": Case(lambda: fnn.RMSNorm(12, 1e-6, weight_offset=1.0), OffsetRMSNorm, X),
    "Linear": Case(**both("Linear", 12, 8), shapes=X),
    "GELU": Case(**both("GELU"), shapes=X),
    "GELU tanh": Case(**both("GELU", "tanh"), shapes=X),
    "BiasGELU": Case(lambda: fnn.BiasGELU(12, "tanh"), BiasThenGELU, X),
    "MLP": Case(lambda: fnn.MLP(12, 20, 6), lambda: nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6)), X),
    "SwiGLU": Case(lambda: fnn.SwiGLU(12, 20), LlamaMLP, X),
    "SwiGLU gelu": Case(
        lambda: fnn.SwiGLU(12, 20, bias=True, activation="gelu"), lambda: LlamaMLP(F.gelu, bias=True), X
    ),
    "SwiGLU gelu tanh": Case(
        lambda: fnn.SwiGLU(12, 20, activation="gelu_tanh"),
        lambda: LlamaMLP(functools.partial(F.gelu, approximate="tanh")),
        X,
    ),
    "RotaryEmbedding": Case(
        lambda: fnn.RotaryEmbedding(8, 9, theta=500.0, interleaved=True), ComplexRotary, ((2, 7, 4, 10), (2, 7, 2, 10))
    ),
    "Embedding": Case(**both("Embedding", 6, 12), shapes=((2, 9),), integers=6),
    "Embedding padded": Case(**both("Embedding", 6, 12, padding_idx=-2), shapes=((2, 9),), integers=6),
    "attention": attention(),
    "attention causal": attention(call={"is_causal": True, "attn_mask": CAUSAL}),
    "attention padded": attention(call={"key_padding_mask": PADDING}),
    "attention (T, B, C)": attention(((7, 2, 24),), batch_first=False),
    "attention (T, B, C) padded": attention(((7, 2, 24),), {"key_padding_mask": PADDING}, batch_first=False),
    "attention lone": attention(((7, 24),), {"key_padding_mask": PADDING[0]}, bias=False),
    "attention lone (T, C)": attention(((7, 24),), batch_first=False),
    "attention cross": attention(((2, 3, 24), (2, 7, 24), (2, 7, 24)), {"key_padding_mask": PADDING}),
    "attention kdim": attention(((2, 3, 24), (2, 7, 10), (2, 7, 6)), kdim=10, vdim=6),
    "CrossEntropyLoss": Case(**both("CrossEntropyLoss"), shapes=ROWS, integers=11),
    "CrossEntropyLoss none": Case(**both("CrossEntropyLoss", reduction="none"), shapes=ROWS, integers=11),
    "CrossEntropyLoss reduce": Case(
        **both("CrossEntropyLoss", None, False, 3, True, label_smoothing=0.2), shapes=ROWS, integers=11
    ),
    "CrossEntropyLoss weight": Case(**both("CrossEntropyLoss", WEIGHT), shapes=ROWS, integers=11),
    "LinearCrossEntropyLoss": Case(**both("LinearCrossEntropyLoss", 11, 13), shapes=ROWS, integers=13),
    "LinearCrossEntropyLoss bias": Case(
        **both("LinearCrossEntropyLoss", 11, 13, bias=True, ignore_index=4, label_smoothing=0.1, reduction="sum"),
        shapes=ROWS,
        integers=13,
    ),
}
ON = pytest.mark.parametrize("name", CASES)
NAMESAKES = [n for n in fnn.__all__ if hasattr(nn, n)]
ONE_EACH = [n for n in CASES if " " not in n or n in ("attention causal", "attention padded")]


def run(module: nn.Module, case: Case, dtype: torch.dtype, autocast: bool = False, shift: int = 0) -> dict[str, Tensor]:
    """Return outputs, and gradients (names begin with d) of inputs and parameters, for random upstream gradients.

    shift: number of a draw of rounding errors of inputs and parameters (fastgpt/parity/rule.py); 0: none.
    """
    inputs = case.inputs(dtype)
    if shift:
        inputs = [parity.moved(t, shift, i) if t.is_floating_point() else t for i, t in enumerate(inputs)]
        for i, p in enumerate(module.parameters(), len(inputs)):
            p.data = parity.moved(p.data, shift, i)
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    with torch.autocast(DEVICE, torch.bfloat16) if autocast else nullcontext():
        out = module(*(inputs * 3 if case.same else inputs), **case.call)
    outs = [t for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
    g = generator(3)
    grads = [torch.randn(t.shape, generator=g).to(DEVICE, torch.bfloat16) for t in outs]
    torch.autograd.backward(outs, [d.to(t.dtype) for d, t in zip(grads, outs)])
    found = {f"d{n}": p.grad for n, p in module.named_parameters()}
    found |= {f"d{i}": t.grad for i, t in enumerate(inputs) if t.is_floating_point()}
    return {**{f"out{i}": t.detach() for i, t in enumerate(outs)}, **found}  # type: ignore[dict-item]


def compare(case: Case, dtype: torch.dtype, autocast: bool = False) -> None:
    """Hold ours to the parity rule: the truth is the stock module in fp64, the baseline the one in this dtype."""
    ours, stock = case.pair()
    wide = copy.deepcopy(stock).double()
    exact = run(copy.deepcopy(wide), case, torch.float64)
    theirs = run(stock.to(dtype), case, dtype, autocast)
    got = run(ours.to(dtype), case, dtype, autocast)
    shifts = range(1, parity.SHIFTS + 1) if dtype == torch.float32 and not autocast else ()
    moved = [run(copy.deepcopy(wide), case, torch.float64, shift=shift) for shift in shifts]
    assert got.keys() == exact.keys() == theirs.keys()
    for key, truth in exact.items():
        a, b = got[key], theirs[key]
        assert a.shape == b.shape and a.dtype in (b.dtype, torch.float32 if "Loss" in type(ours).__name__ else b.dtype)
        error, torch_error, *moves = (parity.largest_error(t, truth) for t in (a, b, *(m[key] for m in moved)))
        allowed = parity.allowed_error(key, truth, torch_error, b.dtype, max(moves, default=0.0))
        assert error <= allowed, (key, error, torch_error, moves)


@pytest.mark.parametrize("name", NAMESAKES)
def test_constructor_is_the_namesakes(name: str) -> None:
    """The names, order and defaults are the same; additional arguments are keyword-only and come last."""
    ours, stock = getattr(fnn, name), getattr(nn, name)
    want = [(p.name, p.kind, p.default) for p in inspect.signature(stock).parameters.values()]
    have = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.kind, p.default) for p in have[: len(want)]] == want
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in have[len(want) :])
    assert issubclass(ours, stock) and {"GELU", "LayerNorm", "Embedding", "CrossEntropyLoss"} <= set(NAMESAKES)


@ON
def test_state_dict_goes_both_ways(name: str) -> None:
    ours, stock = CASES[name].ours(), CASES[name].stock()
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, stock)]
    assert shapes[0] == shapes[1]
    stock.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), stock.state_dict().values()))
    if any(c in name for c in ("Norm", "Bias")):  # the other modules draw their initial values at random
        for a, b in zip(CASES[name].ours().parameters(), CASES[name].stock().parameters()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ON
def test_parity_with_the_namesake(name: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    compare(CASES[name], dtype)
    assert "falling back to PyTorch" not in caplog.text


@ON
def test_parity_under_autocast(name: str) -> None:
    compare(CASES[name], torch.float32, autocast=True)


@pytest.mark.parametrize("name", ["LayerNorm", "LayerNorm 2-D", "LayerNorm plain", "RMSNorm", "RMSNorm 2-D"])
def test_residual_is_added_first(name: str) -> None:
    ours, stock = CASES[name].pair()
    x, r = torch.randn(2, 2, 5, 12, device=DEVICE).unbind()
    y, total = ours(x, r)
    torch.testing.assert_close(total, x + r)
    torch.testing.assert_close(y, stock(x + r))
    bias = torch.randn(ours.normalized_shape, device=DEVICE)
    y, total = ours(x, r, bias)
    torch.testing.assert_close(total, x + bias + r)
    torch.testing.assert_close(y, stock(x + bias + r))


@pytest.mark.parametrize("name", ONE_EACH)
def test_compiles_whole(name: str) -> None:
    case = CASES[name]
    ours, _ = case.pair()
    eager = run(ours, case, torch.float32)
    ours.zero_grad()
    torch._dynamo.reset()
    whole = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), case, torch.float32)
    for key, value in eager.items():
        torch.testing.assert_close(whole[key.replace("d", "d_orig_mod.", 1) if key not in whole else key], value)


@ON
def test_copies_and_checkpointing_give_the_same_bits(name: str) -> None:
    """deepcopy, pickle, torch.save, a detour through the meta device, and torch.utils.checkpoint."""
    case = CASES[name]
    ours, _ = case.pair()
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    with torch.device("meta"):
        meta = case.ours()
    assert all(t.is_meta for t in meta.parameters())
    copies.append(meta.to_empty(device=DEVICE))
    copies[-1].load_state_dict(ours.state_dict())
    again = copy.deepcopy(ours)
    wanted = run(ours, case, torch.float32)
    results = [run(m, case, torch.float32) for m in copies]
    forward = again.forward
    again.forward = lambda *a, **k: checkpoint(forward, *a, use_reentrant=False, **k)  # type: ignore[method-assign]
    for got in (*results, run(again, case, torch.float32)):
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("name", [n for n in ONE_EACH if n not in ("Linear", "Embedding")])
def test_second_derivatives_and_vmap_are_clear_errors(name: str) -> None:
    case = CASES[name]
    ours, _ = case.pair()
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in case.inputs(torch.float32)]
    out = ours(*(inputs * 3 if case.same else inputs), **case.call)
    out = out[0] if isinstance(out, tuple) else out
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()
    stacked = [torch.stack((t.detach(), t.detach())) for t in inputs]

    def call(*a: Tensor) -> Tensor:
        result = ours(*(a * 3 if case.same else a), **case.call)
        return result[0] if isinstance(result, tuple) else result

    with pytest.raises(RuntimeError, match="kernels do not support torch.func and vmap"):
        torch.vmap(call)(*stacked)
    with use(all="torch"):
        got = torch.vmap(call)(*stacked)
    torch.testing.assert_close(got[1], out.detach())
