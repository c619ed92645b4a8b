"""fastgpt.models.gpt against a plain PyTorch transformer: logits, loss and every gradient, for every setting."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastgpt import ops
from fastgpt.models.cache import KVCache
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.ops.rope import rope_frequencies

SMALL = ModelConfig(n_layers=2, n_heads=4, width=32, vocab_size=50, vocab_multiple=32, block_size=24)
LLAMA = dict(
    norm="rms",
    norm_eps=1e-6,
    activation="swiglu",
    mlp_width=48,
    positions="rope",
    qkv_bias=False,
    proj_bias=False,
    mlp_bias=False,
    tied=False,
)
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": LLAMA,
    "mistral": {**LLAMA, "n_kv_heads": 2, "window": 5},
    "qwen3": {**LLAMA, "n_kv_heads": 2, "head_dim": 16, "qk_norm": True, "rope_theta": 1e6},
    "gpt-neo": dict(attn_scale=1.0, window=[None, 4], qkv_bias=False),
    "gpt-j": dict(
        parallel="shared",
        positions="rope",
        rotary_dim=4,
        rope_interleaved=True,
        qkv_bias=False,
        proj_bias=False,
        tied=False,
        head_bias=True,
    ),
    "gpt-neox": dict(parallel="separate", positions="rope", rotary_dim=2, activation="gelu", tied=False),
    "post-norm": dict(norm_placement="post"),
    "post-norm rms": dict(norm_placement="post", norm="rms"),
    "qk layer norm": dict(qk_norm=True),
    "linear rope": dict(positions="rope", rope_scaling=LINEAR),
    "llama3 rope": dict(positions="rope", rope_scaling=LLAMA3, rope_theta=500.0),
    "no positions": dict(positions="none"),
    "no biases": dict(qkv_bias=False, proj_bias=False, mlp_bias=False, norm_bias=False),
    "head bias, tied": dict(head_bias=True),
    "geglu": dict(activation="geglu"),
    "geglu_tanh": dict(activation="geglu_tanh"),
    "reglu2": dict(activation="reglu2"),
    "relu2": dict(activation="relu2"),
    "multi-query": dict(n_kv_heads=1),
    "wide heads": dict(head_dim=12),
    "attention softcap": dict(attn_softcap=2.0),
    "logit softcap": dict(logit_softcap=3.0),
    "eps": dict(norm_eps=0.1),
}


def config(**options: Any) -> ModelConfig:
    return dataclasses.replace(SMALL, **options)


def model_of(c: ModelConfig, seed: int = 0) -> GPT:
    """Return a model whose every parameter is random (biases and norms too), so no error hides behind a zero."""
    model, g = GPT(c), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.3 if p.dim() > 1 else 0.2) + ("norm" in name))
    return model


def batch(c: ModelConfig, seed: int = 1) -> tuple[Tensor, Tensor]:
    assert c.vocab_size is not None
    ids = torch.randint(0, c.vocab_size, (2, 12), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    return ids, targets


def plain_norm(c: ModelConfig, x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    weight = w[f"{name}.weight"]
    if c.norm == "rms":
        return F.rms_norm(x, weight.shape, weight, c.norm_eps)
    return F.layer_norm(x, weight.shape, weight, w.get(f"{name}.bias"), c.norm_eps)


def plain_frequencies(c: ModelConfig) -> Tensor:
    out = []
    for i in range(c.rotary // 2):
        f, s = c.rope_theta ** (-2 * i / c.rotary), c.rope_scaling
        if s is not None and s["rope_type"] == "linear":
            f /= s["factor"]
        elif s is not None:
            wavelength, original = 2 * math.pi / f, s["original_max_position_embeddings"]
            low, high = s["low_freq_factor"], s["high_freq_factor"]
            if wavelength > original / low:
                f /= s["factor"]
            elif wavelength >= original / high:
                ramp = (original / wavelength - low) / (high - low)
                f = (1 - ramp) * f / s["factor"] + ramp * f
        out.append(f)
    return torch.tensor(out, dtype=torch.float64)


def plain_rotate(c: ModelConfig, x: Tensor) -> Tensor:
    """Rotate by multiplying with exp(i angle): x (B, T, H, D), pairs as complex numbers."""
    half, r = c.rotary // 2, c.rotary
    angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), plain_frequencies(c))
    turn = torch.complex(angle.cos().float().to(x.dtype), angle.sin().float().to(x.dtype))[None, :, None]
    even, odd = (x[..., 0:r:2], x[..., 1:r:2]) if c.rope_interleaved else (x[..., :half], x[..., half:r])
    y = torch.complex(even, odd) * turn
    out = x.clone()
    if c.rope_interleaved:
        out[..., 0:r:2], out[..., 1:r:2] = y.real, y.imag
    else:
        out[..., :half], out[..., half:r] = y.real, y.imag
    return out


def plain_attention(c: ModelConfig, x: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
    name, (b, t, _), g, d = f"blocks.{layer}.attn", x.shape, c.kv_heads, c.d_head
    qkv = F.linear(x, w[f"{name}.qkv.weight"], w.get(f"{name}.qkv.bias"))
    q, k, v = qkv.split([c.n_heads * d, g * d, g * d], dim=-1)
    q, k, v = q.view(b, t, c.n_heads, d), k.view(b, t, g, d), v.view(b, t, g, d)
    if c.qk_norm:
        q, k = plain_norm(c, q, w, f"{name}.q_norm"), plain_norm(c, k, w, f"{name}.k_norm")
    if c.positions == "rope":
        q, k = plain_rotate(c, q), plain_rotate(c, k)
    window = c.window[layer % len(c.window)] if isinstance(c.window, list) else c.window
    back = torch.arange(t)[:, None] - torch.arange(t)[None]
    mask = (back >= 0) & (back < (window or t))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if c.attn_softcap > 0:
        k, v = (y.repeat_interleave(c.n_heads // g, dim=1) for y in (k, v))
        scores = c.attn_softcap * torch.tanh(q @ k.mT / math.sqrt(d) / c.attn_softcap)
        y = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c.attn_scale, enable_gqa=True)
    y = y.transpose(1, 2).reshape(b, t, c.n_heads * d)
    return F.linear(y, w[f"{name}.proj.weight"], w.get(f"{name}.proj.bias"))


def plain_mlp(c: ModelConfig, x: Tensor, w: dict[str, Tensor], layer: int) -> Tensor:
    name = f"blocks.{layer}.mlp"
    h = F.linear(x, w[f"{name}.up.weight"], w.get(f"{name}.up.bias"))
    f = c.d_mlp
    acts: dict[str, Any] = {
        "gelu_tanh": lambda: F.gelu(h, approximate="tanh"),
        "gelu": lambda: F.gelu(h),
        "relu2": lambda: F.relu(h) ** 2,
        "swiglu": lambda: F.silu(h[..., :f]) * h[..., f:],
        "geglu": lambda: F.gelu(h[..., :f]) * h[..., f:],
        "geglu_tanh": lambda: F.gelu(h[..., :f], approximate="tanh") * h[..., f:],
        "reglu2": lambda: F.relu(h[..., :f]) ** 2 * h[..., f:],
    }
    return F.linear(acts[c.activation](), w[f"{name}.down.weight"], w.get(f"{name}.down.bias"))


def plain_gpt(c: ModelConfig, w: dict[str, Tensor], ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B, T, V) and mean loss, without using any of fastgpt's ops or modules."""
    x = F.embedding(ids, w["wte.weight"])
    if c.positions == "learned":
        x = x + w["wpe.weight"][: ids.shape[1]]
    for i in range(c.n_layers):
        n1, n2 = f"blocks.{i}.norm1", f"blocks.{i}.norm2"
        if c.norm_placement == "post":
            x = plain_norm(c, x + plain_attention(c, x, w, i), w, n1)
            x = plain_norm(c, x + plain_mlp(c, x, w, i), w, n2)
        elif c.parallel == "none":
            x = x + plain_attention(c, plain_norm(c, x, w, n1), w, i)
            x = x + plain_mlp(c, plain_norm(c, x, w, n2), w, i)
        else:
            h1 = plain_norm(c, x, w, n1)
            h2 = h1 if c.parallel == "shared" else plain_norm(c, x, w, n2)
            x = x + plain_attention(c, h1, w, i) + plain_mlp(c, h2, w, i)
    if c.norm_placement == "pre":
        x = plain_norm(c, x, w, "norm_f")
    z = F.linear(x, w["wte.weight" if c.tied else "head.weight"], w.get("head.bias"))[..., : c.vocab_size]
    z = c.logit_softcap * torch.tanh(z / c.logit_softcap) if c.logit_softcap > 0 else z
    return z, F.cross_entropy(z.flatten(0, 1), targets.flatten())


def run_plain(model: GPT, dtype: torch.dtype) -> dict[str, Tensor]:
    w = {k: v.detach().to(dtype).requires_grad_() for k, v in model.state_dict().items()}
    logits, loss = plain_gpt(model.config, w, *batch(model.config))
    loss.backward()
    return {"logits": logits.detach(), "loss": loss.detach(), **{k: t.grad for k, t in w.items() if t.grad is not None}}


def run_ours(model: GPT) -> dict[str, Tensor]:
    ids, targets = batch(model.config)
    loss = model(ids, targets)
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {"logits": model(ids).detach(), "loss": loss.detach(), **grads}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_plain_pytorch_in_fp64(name: str) -> None:
    model = model_of(config(**OPTIONS[name])).double()
    ours, truth = run_ours(model), run_plain(model, torch.float64)
    assert ours.keys() == truth.keys() and len(ours) == 2 + len(model.state_dict())
    for key, value in truth.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["gpt2", "llama", "post-norm", "gpt-j"])
def test_fp32_is_as_exact_as_plain_pytorch(name: str) -> None:
    model = model_of(config(**OPTIONS[name]))
    truth, baseline, ours = run_plain(model, torch.float64), run_plain(model, torch.float32), run_ours(model)
    for key, value in truth.items():
        error, allowed = (float((t[key].double() - value).norm() / value.norm()) for t in (ours, baseline))
        assert error <= 3 * allowed + torch.finfo(torch.float32).eps, f"{key}: {error} against {allowed}"


@pytest.mark.parametrize("name", [n for n in OPTIONS if n != "gpt2"])
def test_every_setting_matters(name: str) -> None:
    base, other = model_of(SMALL), model_of(config(**OPTIONS[name]))
    mine = other.state_dict()
    other.load_state_dict({k: v for k, v in base.state_dict().items() if k in mine and mine[k].shape == v.shape}, False)
    ids, _ = batch(SMALL)
    assert not torch.allclose(base(ids), other(ids), atol=1e-3)


@pytest.mark.parametrize("place", ["embed_dropout", "attn_dropout", "resid_dropout"])
def test_dropout_acts_in_training_only(place: str) -> None:
    model, (ids, targets) = model_of(config(**{place: 0.5})), batch(SMALL)
    torch.manual_seed(0)
    first, second = model(ids, targets), model(ids, targets)
    assert first != second
    second.backward()
    torch.manual_seed(0)
    assert model(ids, targets) == first
    model.eval()
    assert torch.equal(model(ids), model_of(SMALL).eval()(ids))


def test_padded_vocabulary_has_no_part() -> None:
    model, (ids, targets) = model_of(config(tied=False, head_bias=True)), batch(SMALL)
    assert model.head.weight.shape[0] == 64 and model(ids).shape == (2, 12, 50)
    loss = model(ids, targets)
    loss.backward()
    assert not model.head.weight.grad[50:].any() and not model.head.bias.grad[50:].any()
    assert model.head.weight.grad[:50].any(dim=1).all()
    with torch.no_grad():
        model.head.weight[50:] = 1e4
    assert model(ids, targets) == loss


def test_tied_head_shares_the_embedding() -> None:
    model, (ids, targets) = model_of(SMALL), batch(SMALL)
    assert "head.weight" not in model.state_dict() and model.head_weight is model.wte.weight
    model(ids, targets).backward()
    unused = sorted(set(range(50)) - set(ids.flatten().tolist()))
    grad = model.wte.weight.grad
    assert grad is not None and unused and grad[unused].any(dim=1).all(), "rows without an id get the head's gradient"
    assert not grad[50:].any()


def test_reductions_and_ignored_targets() -> None:
    model, (ids, targets) = model_of(SMALL), batch(SMALL)
    rows = model(ids, targets, reduction="none")
    assert rows.shape == targets.shape and not rows[:, -1].any()
    torch.testing.assert_close(model(ids, targets, reduction="sum"), rows.sum())
    torch.testing.assert_close(model(ids, targets), rows.sum() / (targets != -100).sum())


def test_meta_device_loads_and_casts_without_losing_the_rotary_table() -> None:
    c = config(**OPTIONS["llama"])
    source = model_of(c)
    with torch.device("meta"):
        empty = GPT(c)
    assert all(p.is_meta for p in empty.parameters())
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    ids, _ = batch(c)
    assert torch.equal(empty(ids), source(ids))
    half = source.to(torch.bfloat16)
    assert half.rotary is not None and half.rotary.cos.dtype == torch.float32
    assert half(ids).dtype == torch.bfloat16
    assert "rotary.cos" not in half.state_dict()
    back = half.float().rotary
    assert back is not None and torch.equal(back.cos, empty.rotary.cos)


@pytest.mark.parametrize("name", ["gpt2", "llama", "post-norm", "gpt-neox"])
def test_bf16_trains(name: str) -> None:
    model, (ids, targets) = GPT(config(**OPTIONS[name])).to(torch.bfloat16), batch(SMALL)
    loss = model(ids, targets)
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss.item() - math.log(50)) < 0.2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_forward_is_written_in_ops_with_the_residual_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []
    for name in ops.__all__:
        if name not in ("use", "linear"):
            original = getattr(ops, name)

            def spy(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
                calls.append((_name, kwargs.get("residual") is not None))
                return _original(*args, **kwargs)

            monkeypatch.setattr(ops, name, spy)
    ids, targets = batch(SMALL)
    model_of(SMALL)(ids, targets)
    layer = [("attention_qkv", False), ("layer_norm", True), ("bias_gelu", False), ("layer_norm", True)]
    assert calls == [("embedding", False), ("layer_norm", False), *layer, *layer, ("linear_cross_entropy", False)]
    calls.clear()
    model_of(config(**LLAMA))(ids, targets)
    layer = [("rope_qkv", False), ("attention_qkv", False), ("rms_norm", True), ("swiglu", False), ("rms_norm", True)]
    assert calls == [("embedding", False), ("rms_norm", False), *layer, *layer, ("linear_cross_entropy", False)]


@pytest.mark.parametrize("name,sums", [("gpt2", 2), ("post-norm", 2), ("relu2", 4), ("gpt-neox", 6)])
def test_bias_gradients_come_from_passes_that_exist(name: str, sums: int) -> None:
    """Of the four biases of a layer, only that of qkv has its own pass over a gradient; with squared ReLU that of `up`,
    too, and with parallel branches those of `proj` and `down`. There are two layers."""
    model, (ids, targets) = model_of(config(**OPTIONS[name])), batch(SMALL)
    loss, seen = model(ids, targets), list[tuple[int, ...]]()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.sum.dim_IntList and args[0].dim() == 2 and len(args[0]) == ids.numel():
                seen.append(tuple(args[0].shape))  # of all rows; positions sum (B, T, C) over B
            return op(*args, **(kwargs or {}))

    with Count():
        loss.backward()
    assert len(seen) == sums, seen


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
def test_documents_packed_in_a_row_do_not_see_each_other(name: str) -> None:
    model, (ids, _) = model_of(config(**OPTIONS[name])).double(), batch(SMALL)
    docs = torch.tensor([[0] * 5 + [1] * 7, [3] * 11 + [4]])
    positions = torch.tensor([[*range(5), *range(7)], [*range(11), 0]])
    packed = model(ids, positions=positions, doc_ids=docs)
    alone = [model(ids[:1, :5]), model(ids[:1, 5:]), model(ids[1:, :11]), model(ids[1:, 11:])]
    torch.testing.assert_close(packed, torch.cat((torch.cat(alone[:2], 1), torch.cat(alone[2:], 1))))


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gpt-neo", "post-norm", "gpt-j"])
def test_compiles_whole(name: str) -> None:
    model, (ids, targets) = model_of(config(**OPTIONS[name])), batch(SMALL)
    eager = run_ours(model)
    model.zero_grad()
    torch._dynamo.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, targets)
    loss.backward()
    torch.testing.assert_close(loss, eager["loss"])
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, eager[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "post-norm", "gpt-j"])
def test_hooks_on_submodules_fire_once_and_what_they_return_counts(name: str, training: bool) -> None:
    c = config(**OPTIONS[name])
    model, (ids, targets) = model_of(c).train(training), batch(c)
    modules = {n: m for n, m in model.named_modules() if n and not isinstance(m, torch.nn.ModuleList)}

    def forward() -> Tensor:
        """Return logits, or gradients of the embedding."""
        out = model(ids, targets if training else None)
        return torch.autograd.grad(out, model.wte.weight)[0] if training else out.detach()

    def distort(module: Any, inputs: Any, out: Any) -> Any:
        """Distort in a way that no norm and no product of two heads cancels."""
        return tree_map(lambda t: None if t is None else t * (1 + torch.arange(t.shape[-1]) / 8), out)

    seen: list[tuple[Tensor, Tensor]] = []

    def watch(module: Any, inputs: Any, out: Any) -> None:
        first = (out[0] if isinstance(out, tuple) else out).detach()
        seen.append((first, first.clone()))

    expected = forward()
    for name, m in modules.items():
        seen.clear()
        handle = m.register_forward_hook(watch)
        torch.testing.assert_close(forward(), expected)
        assert len(seen) == (c.n_layers if name == "rotary" else 1), name  # each block calls the rotary embedding
        assert all(torch.equal(now, then) for now, then in seen), f"{name}: what its hook saw is overwritten"
        handle.remove()
        handle = m.register_forward_hook(distort)
        assert not torch.allclose(forward(), expected), name
        handle.remove()
    assert torch.equal(forward(), expected)


def test_rope_frequencies_of_llama3_keep_short_waves_and_stretch_long_ones() -> None:
    ratio = rope_frequencies(16, 500.0, LLAMA3) / rope_frequencies(16, 500.0)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(1 / 8) and ((ratio > 1 / 8) & (ratio < 1)).any()


def test_errors_name_what_came() -> None:
    model, (ids, targets) = model_of(SMALL), batch(SMALL)
    with pytest.raises(ValueError, match="ids reach position 25, expected at most 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids has shape \(3,\), expected \(B, T\)"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 0 to 63"):
        model(torch.full((1, 2), 64))
    with pytest.raises(ValueError, match="expected 0 to 49 or ignore_index"):
        model(ids, targets.clamp(min=50))
    cache = KVCache(SMALL, 2, 4, model.wte.weight)
    with pytest.raises(ValueError, match="ids reach position 12, expected at most 4"):
        model(ids, kv_cache=cache)
    with pytest.raises(ValueError, match="got doc_ids and kv_cache"):
        model(ids[:, :2], kv_cache=cache, doc_ids=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="vocab_size or config.block_size is None"):
        GPT(ModelConfig())
