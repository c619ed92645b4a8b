"""fastgpt.patch on models of no known family: what is recognised, what is left alone, and that patching can be
undone."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import fastgpt
import fastgpt.nn
from fastgpt.core import backend, fallback
from fastgpt.patching import _functions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C, H, V, T = 64, 4, 197, 12


class LayerNorm(nn.Module):
    """nanoGPT's LayerNorm: the bias is optional, and no attribute holds epsilon."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(C) + 0.5)
        self.bias = nn.Parameter(torch.rand(C)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        p = 0.5 if self.training else 0
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0 * p, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj, self.dropout = nn.Linear(C, 96), nn.GELU(), nn.Linear(96, C), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)
        x = self.gelu(x)
        x = self.c_proj(x)
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = LayerNorm(False), SelfAttention(), LayerNorm(True), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A small nanoGPT: a loss whose ignore_index is -1, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.ln_f, self.lm_head = LayerNorm(False), nn.Linear(C, V, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


@functools.cache
def _gpt() -> GPT:
    torch.manual_seed(0)
    return GPT().to(DEVICE)


def gpt() -> GPT:
    return copy.deepcopy(_gpt())


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    targets = ids.roll(-1, 1)
    targets[0, :4] = -1
    return ids, targets


def outcome(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Return every output and every gradient of their sum (each output times fixed random numbers)."""
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(2)
    total = sum((o * torch.randn(o.shape, generator=g).to(o)).sum() for o in outputs)
    names, params = zip(*model.named_parameters())
    grads = dict(zip(names, torch.autograd.grad(total, params)))  # type: ignore[arg-type]
    return {str(i): o.detach() for i, o in enumerate(outputs)} | {f"d{n}": t for n, t in grads.items()}


def assert_parity(model: nn.Module, *inputs: Tensor, differs: bool = True, **options: Any) -> None:
    """Apply the rule, by relative L2: 2 (outputs), 3 (gradients) times the unpatched model's error to fp64, plus a
    unit."""
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    truth, base = outcome(copy.deepcopy(model).double(), *wide), outcome(model, *inputs)
    ours = outcome(fastgpt.patch(copy.deepcopy(model), **options), *inputs)
    eps = torch.finfo(next(model.parameters()).dtype).eps
    for name, t in truth.items():
        mine, theirs = (float((x[name].double() - t).norm() / t.norm()) for x in (ours, base))
        assert mine <= (3 if name.startswith("d") else 2) * theirs + eps, f"{name}: {mine:.2e}, before {theirs:.2e}"
    assert not differs or any(not torch.equal(ours[n], base[n]) for n in truth), "nothing was computed by other kernels"


def replaced(model: nn.Module) -> dict[str, str]:
    """Return module name -> op, for what a patch would replace."""
    report = fastgpt.patch_report(fastgpt.patch(copy.deepcopy(model), dry_run=True))
    return {e.name: e.op for e in report.replaced}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_the_users_own(dtype: torch.dtype) -> None:
    model = gpt().to(dtype)
    assert replaced(model) == {
        "": "cross_entropy", "wte": "embedding", "wpe": "embedding", "ln_f": "layer_norm",
        **{f"h.{i}.{n}": op for i in (0, 1) for n, op in
           {"ln_1": "layer_norm", "ln_2": "layer_norm", "attn": "attention", "mlp": "bias_gelu"}.items()},
    }  # fmt: skip
    assert not fastgpt.patch_report(fastgpt.patch(copy.deepcopy(model))).left
    if dtype == torch.float32:  # PyTorch's loss is bf16 there
        assert_parity(model, *batch())
    assert_parity(model, *batch(), skip="loss")


def test_unpatching_a_copy_leaves_the_original_patched() -> None:
    model, inputs = gpt(), batch()
    before = outcome(model, *inputs)
    places = {n: (type(m), set(m.__dict__)) for n, m in model.named_modules()}
    keys = list(fastgpt.patch(model).state_dict())
    during, twin = outcome(model, *inputs), copy.deepcopy(model)
    assert keys == list(before_keys := dict(gpt().state_dict())) and before_keys
    assert fastgpt.unpatch(twin) is twin
    for m, wanted in ((twin, before), (model, during)):
        assert all(torch.equal(t, wanted[n]) for n, t in outcome(m, *inputs).items())
    assert {n: (type(m), set(m.__dict__)) for n, m in twin.named_modules()} == places
    with torch.no_grad():  # a copy computes with its own weights
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.zero_()
        assert not torch.equal(twin(*inputs)[0], model(*inputs)[0])


def test_a_model_pickled_whole_comes_back_with_its_own_forwards(tmp_path: Path) -> None:
    model, inputs = gpt(), batch()
    before = outcome(model, *inputs)
    torch.save(fastgpt.patch(model), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert all(torch.equal(t, before[n]) for n, t in outcome(fastgpt.unpatch(loaded), *inputs).items())
    assert not torch.equal(fastgpt.patch(loaded)(*inputs)[0], before["0"])


def test_hooks_and_checks_of_type_hold() -> None:
    model, seen = gpt(), []
    model.h[0].mlp.register_forward_hook(lambda m, args, out: seen.append(out))
    model.h[0].mlp.c_fc.register_forward_hook(lambda m, args, out: seen.append(out))
    ids, targets = batch()
    model(ids, targets)
    fastgpt.patch(model)(ids, targets)
    assert len(seen) == 4 and type(model.h[0].mlp) is MLP
    for before, after in zip(seen[:2], seen[2:]):  # the first linear layer's output includes its bias, for hooks to see
        torch.testing.assert_close(after, before)


def gated(act: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(C, 96, bias=False), nn.Linear(96, C), nn.Linear(C, 96)

        def forward(self, x: Tensor) -> Tensor:
            return self.w2(act(self.w1(x)) * self.w3(x))

    return Gated


class OwnRMSNorm(nn.Module):
    """RMSNorm of Llama's reference code; with an offset, Gemma's."""

    def __init__(self, offset: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.offset, self.eps = offset, eps
        self.weight = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (y * (self.offset + self.weight)).type_as(x)


class HardRMSNorm(OwnRMSNorm):
    """An RMSNorm whose epsilon is a literal in its code."""

    def __init__(self) -> None:
        super().__init__(eps=1e-5)
        self.small = self.__dict__.pop("eps")

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.small)


class Standardise(nn.Module):
    """An RMSNorm with TensorFlow's names."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.gamma = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-8).sqrt() * self.gamma + self.beta


RECOGNISED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nn.LayerNorm": (lambda: nn.LayerNorm(C), "layer_norm"),
    "nn.LayerNorm without bias": (lambda: nn.LayerNorm(C, eps=1e-3, bias=False), "layer_norm"),
    "nn.RMSNorm": (lambda: nn.RMSNorm(C), "rms_norm"),
    "nn.RMSNorm with eps": (lambda: nn.RMSNorm(C, eps=1e-3), "rms_norm"),
    "own RMSNorm": (OwnRMSNorm, "rms_norm"),
    "own RMSNorm, other eps": (lambda: OwnRMSNorm(eps=3e-4), "rms_norm"),
    "own RMSNorm, 1 + w": (lambda: OwnRMSNorm(offset=1.0), "rms_norm"),
    "own RMSNorm, eps unseen": (HardRMSNorm, "rms_norm"),
    "own LayerNorm": (lambda: LayerNorm(True), "layer_norm"),
    "LayerNorm of another name": (Standardise, "layer_norm"),
    "Sequential": (lambda: nn.Sequential(nn.Linear(C, 96), nn.GELU("tanh"), nn.Linear(96, C)), "bias_gelu"),
    "Sequential without bias": (
        lambda: nn.Sequential(nn.Linear(C, 96, False), nn.GELU(), nn.Linear(96, C)),
        "bias_gelu",
    ),
    "SwiGLU": (gated(F.silu), "swiglu"),
    "GeGLU": (gated(F.gelu), "swiglu"),
    "GeGLU tanh": (gated(functools.partial(F.gelu, approximate="tanh")), "swiglu"),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_recognised_by_what_it_computes(name: str) -> None:
    torch.manual_seed(0)
    make, op = RECOGNISED[name]
    model = nn.Sequential(make()).to(DEVICE)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    assert replaced(model) == {"0": op}
    assert_parity(model, torch.randn(3, 5, C, device=DEVICE) + 0.2)
    assert_parity(model, 1e-3 * torch.randn(3, 5, C, device=DEVICE), differs=False)  # inputs for which epsilon matters


class FunctionalRMSNorm(nn.Module):
    """PyTorch's function in a method, with its default epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (C,), self.gain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.RMSNorm(C), FunctionalRMSNorm], ids=["module", "function"])
def test_epsilon_that_is_pytorchs(make: Any, dtype: torch.dtype) -> None:
    """For 16-bit rows the default epsilon is also that of fp32; on small rows another epsilon is another norm."""
    model, x = make().to(DEVICE, dtype), (1e-2 * torch.randn(4, C, device=DEVICE)).to(dtype)
    before = model(x).detach().float()
    after = fastgpt.patch(model)(x).detach().float()
    assert fastgpt.patch_report(model).replaced
    assert float((after - before).abs().max()) <= 2 * torch.finfo(dtype).eps * float(before.abs().max())


class ScaledEmbedding(nn.Embedding):
    """Gemma's scaled embedding."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(V, C, padding_idx=3)
        self.factor = factor
        self.register_buffer("embed_scale", torch.tensor(5.5))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype) * self.factor


@pytest.mark.parametrize("make", [lambda: nn.Embedding(V, C, padding_idx=3), ScaledEmbedding], ids=["plain", "scaled"])
def test_embeddings_with_padding_and_scale(make: Callable[[], nn.Embedding]) -> None:
    """Forward gives the bits of PyTorch's embedding; the padding row has no gradient, whatever it had before."""
    ids = torch.tensor([[1, 3, 3], [1, 0, 2]], device=DEVICE)
    stock = make().to(DEVICE)
    ours = copy.deepcopy(stock)
    assert replaced(nn.Sequential(ours)) == {"0": "embedding"}
    grads = []
    for m in (stock, ours):
        y = m(ids)
        assert torch.equal(y, stock(ids))
        y.backward(torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y))
        assert m.weight.grad is not None and not m.weight.grad[3].any() and m.weight.grad[2].any()
        grads.append(m.weight.grad)
    torch.testing.assert_close(*grads)


class NormOfTwo(OwnRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.001


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Branching(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Keeping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.c_fc(x).sum()
        return super().forward(x)


def look_alike(change: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Return an RMSNorm with an additional step after it."""

    class RMSNorm(OwnRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return change(self, super().forward(x))

    return RMSNorm()


class LengthNorm(OwnRMSNorm):
    """A norm without epsilon: rows of zeros stay zeros, the smallest rows become as long as others."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * C**0.5 * self.weight


class AxisNorm(OwnRMSNorm):
    """A norm over axis 1, which is the last one only of two axes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps) * self.weight


class CountingNorm(OwnRMSNorm):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class CountingMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class TrainingMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x if self.training else x)


class HalfGELU(nn.GELU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nearly a norm": (NormOfTwo, "computes neither LayerNorm nor RMSNorm"),
    "two dimensions": (lambda: nn.LayerNorm((4, C)), "over 2 dimensions"),
    "residual inside": (Residual, "more than a chain"),
    "more than the chain": (Keeping, "more than a chain"),
    "control flow": (Branching, "cannot be traced"),
    "silu": (lambda: nn.Sequential(nn.Linear(C, 96), nn.SiLU(), nn.Linear(96, C)), "no SiLU"),
    "max_norm": (lambda: nn.Embedding(V, C, max_norm=1.0), "it has max_norm"),
    "max_norm of 0": (lambda: nn.Embedding(V, C, max_norm=0.0), "it has max_norm"),
    "scaled twice": (lambda: ScaledEmbedding(2.0), "it has its own forward"),
    "added keys": (lambda: nn.MultiheadAttention(C, H, add_bias_kv=True), "add_bias_kv"),
    "noise in training": (lambda: look_alike(lambda m, y: y * (torch.rand(()) > 0 if m.training else 1)), "random"),
    "another gradient": (lambda: look_alike(lambda m, y: y.detach() + 0 * m.weight), "nor RMSNorm"),
    "times sqrt(C) by its length": (LengthNorm, "nor RMSNorm"),
    "over another axis of 3": (AxisNorm, "only in some runs"),
    "another in training": (lambda: look_alike(lambda m, y: y + 1 if m.training else y), "only in some runs"),
    "counting calls": (CountingNorm, "changes its own attributes"),
    "MLP counting calls": (CountingMLP, "more than a chain"),
    "MLP in training": (lambda: TrainingMLP(), "differs in training"),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is_and_why(name: str) -> None:
    make, why = LEFT[name]
    with pytest.warns(UserWarning, match=f"nothing to patch in .*({why})"):
        fastgpt.patch(make())
    model = fastgpt.patch(nn.ModuleList([make(), nn.LayerNorm(C)]))
    (entry,) = fastgpt.patch_report(model).left
    assert entry.name == "0" and "forward" not in model[0].__dict__


class Flagged(MLP):
    """A module whose forward reads its settings in every way."""

    shift = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.config, self.act = None, types.SimpleNamespace(twice=False), F.gelu

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.c_fc(x))
        h = h if self.scale is None else h * self.scale
        h = h + h if self.config.twice or getattr(self, "thrice", False) else h
        return self.c_proj(h + self.shift if self.shift else h)


CHANGES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = {
    "LayerNorm.eps": (lambda: nn.LayerNorm(C), lambda m: setattr(m, "eps", 0.1)),
    "RMSNorm.eps": (lambda: nn.RMSNorm(C), lambda m: setattr(m, "eps", 0.1)),
    "LayerNorm.bias": (lambda: nn.LayerNorm(C), lambda m: setattr(m, "bias", None)),
    "LayerNorm.normalized_shape": (lambda: nn.LayerNorm(C, bias=False), lambda m: (
        setattr(m, "normalized_shape", (3, C)), setattr(m, "weight", nn.Parameter(torch.rand(3, C, device=DEVICE))))),
    "own RMSNorm.eps": (OwnRMSNorm, lambda m: setattr(m, "eps", 0.1)),
    "own RMSNorm.offset": (OwnRMSNorm, lambda m: setattr(m, "offset", 1.0)),
    "own LayerNorm.bias": (lambda: LayerNorm(True), lambda m: setattr(m, "bias", None)),
    "own LayerNorm with bias": (
        lambda: LayerNorm(False), lambda m: setattr(m, "bias", nn.Parameter(torch.rand(C, device=DEVICE)))),
    "a setting": (Flagged, lambda m: setattr(m, "scale", 3.0)),
    "a class's setting": (Flagged, lambda m: setattr(m, "shift", 3.0)),
    "a config's setting": (Flagged, lambda m: setattr(m.config, "twice", True)),
    "a setting that was missing": (Flagged, lambda m: setattr(m, "thrice", True)),
    "an activation function": (Flagged, lambda m: setattr(m, "act", F.relu)),
    "an activation": (MLP, lambda m: setattr(m, "gelu", nn.ReLU())),
    "an activation's setting": (MLP, lambda m: setattr(m.gelu, "approximate", "tanh")),
    "an activation's forward": (MLP, lambda m: setattr(m.gelu, "forward", F.relu)),
    "hooks on an activation": (MLP, lambda m: m.gelu.register_forward_hook(lambda m, args, y: y / 2)),
    "hooks before an activation": (MLP, lambda m: m.gelu.register_forward_pre_hook(lambda m, args: (args[0] / 2,))),
    "hooks on a linear layer": (MLP, lambda m: m.c_fc.register_forward_hook(lambda m, args, y: y / 2)),
    "a linear layer": (MLP, lambda m: setattr(m, "c_fc", nn.Sequential(m.c_fc, nn.Tanh()))),
    "a pruned linear layer": (MLP, lambda m: prune.random_unstructured(m.c_fc, "weight", 0.5)),
    "a parametrized linear layer": (
        MLP, lambda m: nn.utils.parametrize.register_parametrization(m.c_fc, "weight", nn.Tanh())),
    "a linear layer without bias": (MLP, lambda m: setattr(m.c_fc, "bias", None)),
    "Sequential's length": (
        lambda: nn.Sequential(nn.Linear(C, 96), nn.GELU(), nn.Linear(96, C)), lambda m: m.append(nn.Tanh())),
    "Embedding.max_norm": (lambda: nn.Sequential(Ids(), nn.Embedding(V, C)), lambda m: setattr(m[1], "max_norm", 0.5)),
}  # fmt: skip


class Ids(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., 0].abs().mul(100).long() % V


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_patching_counts(name: str) -> None:
    """It takes effect in the model and in its copies."""
    torch.manual_seed(0)
    make, change = CHANGES[name]
    plain = nn.Sequential(make()).to(DEVICE)
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.1
    patched = copy.deepcopy(fastgpt.patch(copy.deepcopy(plain)))
    x = 0.3 * torch.randn(2, 3, C, device=DEVICE)
    before = plain(x)
    torch.testing.assert_close(patched(x), before)
    for m in (plain, patched):
        torch.manual_seed(1)
        change(m[0])
    assert plain(x).shape != before.shape or not torch.allclose(plain(x), before, rtol=1e-3)
    torch.testing.assert_close(patched(x), plain(x))


def test_an_activation_of_the_users_own_is_not_its_parent() -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(C, 96), HalfGELU(), nn.Linear(96, C)), nn.LayerNorm(C)])
    assert replaced(model) == {"1": "layer_norm"}


def test_hooks_on_every_module_see_activations(caplog: pytest.LogCaptureFixture) -> None:
    fallback._reported.clear()
    model, seen = fastgpt.patch(nn.Sequential(MLP())).to(DEVICE), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, y: seen.append(m))
    try:
        model(torch.ones(2, C, device=DEVICE))
        assert model[0].gelu in seen and model[0].c_fc in seen
        with backend.use(strict=True), pytest.raises(RuntimeError, match="bias_gelu: MLP has .*hooks on it"):
            model(torch.ones(2, C, device=DEVICE))
    finally:
        handle.remove()
    assert len(caplog.records) == 1
    with backend.use(strict=True), FlopCounterMode(display=False):  # its hooks only track the current module
        model(torch.ones(2, C, device=DEVICE))


def test_modes_generators_and_buffers_are_as_before_patching() -> None:
    model = nn.ModuleList([nn.LayerNorm(C), CountingNorm(), CountingMLP(), TrainingMLP().eval()]).train()
    modes, drawn = [m.training for m in model.modules()], torch.get_rng_state()
    with torch.inference_mode():
        fastgpt.patch(model)
    assert modes == [m.training for m in model.modules()] and torch.equal(drawn, torch.get_rng_state())
    assert model[1].calls == 0 and model[2].calls == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_and_device_do_not_matter(dtype: torch.dtype) -> None:
    model = nn.ModuleList([OwnRMSNorm(), Standardise(), MLP(), ScaledEmbedding()])
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert len(replaced(model)) == 4
    finally:
        torch.set_default_dtype(torch.float32)


def test_multihead_attention_with_padding_and_other_keys() -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(batch_first=True, device=DEVICE)
    x, memory = torch.randn(2, 5, C, device=DEVICE), torch.randn(2, 7, 32, device=DEVICE)
    padding = torch.arange(7, device=DEVICE) >= torch.tensor([[7], [4]], device=DEVICE)
    for m, keys in (
        (nn.MultiheadAttention(C, H, kdim=32, vdim=32, **options), memory),
        (nn.MultiheadAttention(C, H, **options), x),
    ):
        mask = padding[:, : keys.shape[1]]
        wanted = m(x, keys, keys, mask, need_weights=False)[0]
        with backend.use(strict=True):
            got = fastgpt.patch(m)(x, keys, keys, mask, need_weights=False)[0]
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["gelu", functools.partial(F.gelu, approximate="tanh")], ids=["erf", "tanh"])
def test_transformer_encoder(norm_first: bool, activation: Any) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = dict(batch_first=True, norm_first=norm_first, activation=activation)
    layer = nn.TransformerEncoderLayer(C, H, 96, 0.0, **options)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE)
    assert set(replaced(model).values()) == {"layer_norm", "bias_gelu", "attention"}
    x = torch.randn(2, T, C, device=DEVICE)
    assert_parity(model, x)
    causal = nn.Transformer.generate_square_subsequent_mask(T, device=DEVICE)
    padding = torch.zeros(2, T, dtype=torch.bool, device=DEVICE)
    padding[1, 8:] = True
    patched = fastgpt.patch(copy.deepcopy(model))
    for kwargs in ({"mask": causal, "is_causal": True}, {"mask": causal}, {"src_key_padding_mask": padding}):
        torch.testing.assert_close(patched(x, **kwargs), model(x, **kwargs))
    with torch.no_grad():  # PyTorch's fused path, which bypasses submodules: it is left alone
        assert activation != "gelu" or torch.equal(patched.eval()(x), model.eval()(x))


def test_transformer_decoder_layer_and_time_first_attention() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(C, H, 96, 0.0, activation="gelu").to(DEVICE)
    x, memory = torch.randn(T, 2, C, device=DEVICE), torch.randn(7, 2, C, device=DEVICE)
    assert_parity(model, x, memory)


class Cross(nn.Module):
    """Calls under every name that the function has, with masks and lengths that the op does not accept as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.scale = nn.Linear(C, C), 0.3
        self.mask: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (self.proj(t).unflatten(-1, (H, -1)).transpose(1, 2) for t in (q, k))
        a = scaled_dot_product_attention(q, k, k, scale=self.scale)
        b = functional.scaled_dot_product_attention(q, k, k, attn_mask=self.mask)
        c = nn.functional.scaled_dot_product_attention(q, k, k, None, 0.0, True)
        return torch.cat((a, b, c), 1)


def test_every_call_of_sdpa_is_replaced_and_what_the_op_does_not_cover_is_pytorchs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = Cross().to(DEVICE)
    q, k = torch.randn(2, T, C, device=DEVICE), torch.randn(2, 7, C, device=DEVICE)
    assert_parity(model, q, q)
    fallback._reported.clear()
    caplog.clear()
    for _ in range(2):
        assert_parity(model, q, k)  # with unequal lengths is_causal aligns at the top left there
    model.mask = torch.rand(T, T, device=DEVICE) > 0.3
    assert_parity(model, q, q)
    said = [r.message for r in caplog.records]
    assert len(said) == 2 and "different lengths" in said[0] and "attn_mask" in said[1]
    assert (
        "scaled_dot_product_attention" not in vars(fastgpt.patching)
        and F.scaled_dot_product_attention(q, q, q) is not None
    )


class Losses(nn.Module):
    """Makes a loss under every name that its class has."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return nn.CrossEntropyLoss()(logits, target) + torch.nn.CrossEntropyLoss()(logits, target)


def test_every_loss_that_a_method_makes_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, calls = _functions.cross_entropy_loss, list[Any]()

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return ours(*args)

    monkeypatch.setattr(_functions, "cross_entropy_loss", counted)
    logits, target = torch.randn(6, 9, device=DEVICE), torch.tensor([0, 8, 3, 4, 4, 1], device=DEVICE)
    model = fastgpt.patch(Losses())
    torch.testing.assert_close(model(logits, target), Losses()(logits, target))
    assert len(calls) == 2


def holding(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def hiding(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, function: Any = function) -> Any:
        return function(*args)

    return call


@pytest.mark.parametrize("decorator", [holding, hiding])
def test_decorated_methods(decorator: Any) -> None:
    """What a decorated method calls is replaced too, if the decorator can be rebuilt around it."""

    class Attends(nn.Module):
        @decorator
        def forward(self, q: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, q, q)

    model, q = nn.ModuleList([Attends(), nn.LayerNorm(C)]).to(DEVICE), torch.randn(2, H, T, 16, device=DEVICE)
    wanted = model[0](q)
    report = fastgpt.patch_report(fastgpt.patch(model, quiet=True))
    attention = [e for e in (*report.replaced, *report.left) if e.part == "attention"]
    assert [e.op or e.why for e in attention] == [
        "attention" if decorator is holding else "its method has a decorator that cannot be rebuilt"
    ]
    torch.testing.assert_close(model[0](q), wanted)
    assert "forward" not in fastgpt.unpatch(model)[0].__dict__


def test_sdpa_groups_no_heads_unasked_and_strict_mode_forbids_falling_back() -> None:
    q, k = torch.randn(1, 4, 3, 8, device=DEVICE), torch.randn(1, 2, 3, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match="size"):
        _functions.sdpa(q, k, k)
    assert _functions.sdpa(q, k, k, enable_gqa=True).shape == q.shape
    with backend.use(strict=True), pytest.raises(RuntimeError, match="attn_mask: only PyTorch supports this"):
        _functions.sdpa(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool, device=DEVICE))
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention, "torch itself was changed"


def test_losses_that_the_op_does_not_cover(caplog: pytest.LogCaptureFixture) -> None:
    """Class probabilities and (N, C, d) logits fall back to PyTorch, logged once; class indices use the op, with
    every option."""
    torch.manual_seed(0)
    fallback._reported.clear()
    logits, wide = torch.randn(6, 9, device=DEVICE, requires_grad=True), torch.randn(2, 9, 5, device=DEVICE)
    target = torch.tensor([0, 8, 3, 4, 4, 1], device=DEVICE)
    for options in ({"weight": torch.rand(9, device=DEVICE), "label_smoothing": 0.1}, {"ignore_index": 3}):
        model = nn.CrossEntropyLoss(**options)  # type: ignore[arg-type]
        patched = fastgpt.patch(copy.deepcopy(model))
        torch.testing.assert_close(patched(logits, target), model(logits, target))
        assert not caplog.records or "ignore_index" in options
        torch.testing.assert_close(
            patched(wide, target[:2, None].expand(2, 5)), model(wide, target[:2, None].expand(2, 5))
        )
        if "weight" in options:
            chances = torch.rand(6, 9, device=DEVICE)
            torch.testing.assert_close(patched(logits, chances), model(logits, chances))
    assert len(caplog.records) == 1 and "cross_entropy: inputs other than" in caplog.text


def test_only_skip_and_dry_run() -> None:
    parts = {"norm", "mlp", "attention", "loss", "embedding"}
    for options, wanted in (
        ({"only": "norm"}, {"norm"}),
        ({"only": ["norm", "mlp"], "skip": ["mlp"]}, {"norm"}),
        ({"skip": {"embedding", "loss"}}, parts - {"embedding", "loss"}),
        ({}, parts),
    ):
        model = fastgpt.patch(gpt(), **options)  # type: ignore[arg-type]
        report = fastgpt.patch_report(model)
        assert {e.part for e in report.replaced} == wanted
    model = fastgpt.patch(gpt(), dry_run=True)
    assert not any({"forward", "_fastgpt"} & set(m.__dict__) for m in model.modules())
    assert "would replace 12, left 0" in str(fastgpt.patch_report(model))
    text = str(fastgpt.patch_report(fastgpt.patch(model)))
    assert "replaced 12, left 0" in text and "h.*.ln_* (4)" in text and "fastgpt.ops.bias_gelu" in text


def test_wrong_use_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="only=norms: expected some of norm, mlp, attention, rope, loss, embedding"):
        fastgpt.patch(gpt(), only=["norms"])
    with pytest.raises(ValueError, match="skip=head, tail"):
        fastgpt.patch(gpt(), skip=["tail", "head"])
    with pytest.raises(ValueError, match=r"nothing to patch in Linear \(looked for norm, mlp"):
        fastgpt.patch(nn.Linear(2, 2), strict=True)
    with pytest.warns(UserWarning, match="nothing to patch in Sequential"):
        fastgpt.patch(nn.Sequential(fastgpt.nn.LayerNorm(C), fastgpt.nn.RMSNorm(C)))
    with pytest.warns(UserWarning, match="nothing to patch in GPT .looked for rope"):
        fastgpt.patch(gpt(), only="rope")
    mixed = nn.ModuleList([nn.LayerNorm(C), nn.Embedding(V, C, max_norm=1.0)])
    with pytest.raises(ValueError, match="strict, but 1 could not be replaced: embedding 1: it has max_norm"):
        fastgpt.patch(mixed, strict=True)
    assert "forward" not in mixed[0].__dict__, "an error must change nothing"
    assert fastgpt.patch(mixed, strict=True, only="norm") is mixed
    for f in (fastgpt.unpatch, fastgpt.patch_report):
        with pytest.raises(ValueError, match="GPT (is|was) not patched"):
            f(gpt())


def test_patching_twice() -> None:
    model = fastgpt.patch(gpt(), only="norm")
    places = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    assert fastgpt.patch(model, only=["norm"]) is model
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == places
    for whole in (model, nn.ModuleList([model])):
        with pytest.raises(ValueError, match="was patched with other options; unpatch it first"):
            fastgpt.patch(whole)
    assert "0.h.0.ln_1" in {e.name for e in fastgpt.patch_report(nn.ModuleList([model])).replaced}
    assert "_fastgpt" not in fastgpt.unpatch(nn.ModuleList([model]))[0].ln_f.__dict__
    fastgpt.patch(model)


def test_forwards_that_are_someone_elses() -> None:
    """A forward already set on an instance is kept; one set over fastgpt's is not silently lost."""
    model = gpt()
    model.ln_f.forward = lambda x: x  # type: ignore[method-assign]
    (entry,) = fastgpt.patch_report(fastgpt.patch(model)).left
    assert entry.name == "ln_f" and "not that of its class" in entry.why
    ours = model.h[0].mlp.forward
    model.h[0].mlp.forward = lambda x: ours(x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="h.0.mlp.forward was wrapped after patching"):
        fastgpt.unpatch(model)
    assert "forward" in model.h[1].mlp.__dict__, "an error must change nothing"
    model.h[0].mlp.forward = ours  # type: ignore[method-assign]
    fastgpt.unpatch(model)


COUNTER = 0


class Counting(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        global COUNTER
        COUNTER += 1
        return F.scaled_dot_product_attention(x, x, x)


def test_methods_that_write_globals_are_left() -> None:
    with pytest.warns(UserWarning, match="writes to a global"):
        fastgpt.patch(Counting(), only="attention")


def test_other_dtypes_go_to_the_modules_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    fallback._reported.clear()
    norm = nn.LayerNorm(C, device=DEVICE, dtype=torch.bfloat16)
    model, x = nn.Sequential(OwnRMSNorm().to(DEVICE, torch.bfloat16), norm), torch.randn(3, C, device=DEVICE)
    patched = fastgpt.patch(copy.deepcopy(model))
    assert torch.equal(patched[0](x), model[0](x))
    assert "got arguments or dtypes that the op does not support" in caplog.text


def test_import_is_light() -> None:
    code = "import fastgpt, sys; assert not {'transformers', 'fastgpt.patching', 'torch.fx'} <= sys.modules.keys();"
    code += "assert not {'transformers', 'fastgpt.patching'} & sys.modules.keys(); import torch;"
    code += "fastgpt.patch(torch.nn.Sequential(torch.nn.LayerNorm(8))); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
