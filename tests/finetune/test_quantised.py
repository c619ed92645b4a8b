"""Adapters over frozen weights of 8 and 4 bits: the gradients of the dense weights, and the memory that they take."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from small_models import model_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastgpt.core.errors import UserError
from fastgpt.finetune.lora import Lora, add_lora, lora_layers, merge, read_merged, remove_lora, unmerge
from fastgpt.finetune.quantised import Nf4, base_bytes, library, matrix_bytes, quantise_base
from fastgpt.models.gpt import GPT
from fastgpt.nn.lora import FrozenLinear

NF4 = pytest.param("nf4", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes"))
LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False, n_kv_heads=2)
SHAPES: list[dict[str, Any]] = [{}, LLAMA]


def tokens() -> Tensor:
    return torch.randint(50, (2, 13), generator=torch.Generator().manual_seed(3))


def base(options: dict[str, Any], kind: str, dtype: torch.dtype = torch.float32) -> GPT:
    return quantise_base(model_of(**options).to(dtype), kind)


def adapted(model: GPT, settings: Lora | None = None) -> GPT:
    """Return the model with adapters whose B is not 0, and a token embedding that trains, too."""
    g = torch.Generator().manual_seed(1)
    for m in add_lora(model, settings or Lora(rank=3), generator=g).values():
        m.lora_B.data.copy_(torch.randn(m.lora_B.shape, generator=g) * 0.1)
    model.wte.weight.requires_grad_()
    return model


@pytest.mark.parametrize("kind", ["int8", NF4])
@pytest.mark.parametrize("options", SHAPES, ids=["gpt2", "llama"])
def test_gradients_are_those_of_the_dense_weights(kind: str, options: dict[str, Any]) -> None:
    settings = Lora(rank=3, targets=("qkv", "down"))  # the other layers are frozen without an adapter
    dense = remove_lora(adapted(base(options, kind)), merged=False)
    for m in [m for m in dense.modules() if isinstance(m, torch.nn.Module)]:
        for name, child in list(m.named_children()):
            if isinstance(child, FrozenLinear):
                layer = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                layer.weight.data, layer.bias = child.store.dense(torch.float32), child.bias
                setattr(m, name, to_ours(layer))
    sides = [adapted(base(options, kind), settings), adapted(dense, settings)]
    losses = [model(tokens(), tokens().roll(1, 1)) for model in sides]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in sides]
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 9
    for name, g in grads[0].items():
        assert float((g - grads[1][name]).norm() / g.norm()) < 1e-5, name


def to_ours(layer: torch.nn.Linear) -> torch.nn.Module:
    from fastgpt.nn import Linear

    ours = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    ours.weight, ours.bias = layer.weight, layer.bias
    return ours


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_values_are_near_those_of_the_weights(kind: str) -> None:
    plain, model = model_of(**LLAMA).float(), base(LLAMA, kind)
    w, stored = plain.blocks[0].mlp.up.weight.detach(), model.blocks[0].mlp.up.store
    error = float((stored.dense(torch.float32) - w).norm() / w.norm())
    assert 1e-4 < error < {"int8": 0.01, "nf4": 0.12}[kind]
    assert stored.dense(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes")
@pytest.mark.parametrize("shape", [(96, 32), (64, 96), (40, 100), (33, 7), (128, 64)])
def test_four_bits_hold_the_nearest_levels_whatever_the_shape(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    stored, levels = Nf4(w), library().get_4bit_type("nf4", device="cpu")
    blocks = torch.nn.functional.pad(w.flatten(), (0, -w.numel() % 64)).view(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    nearest = levels[(blocks / scale)[..., None].sub(levels).abs().argmin(-1)] * scale
    expected = nearest.flatten()[: w.numel()].view(shape)
    got = stored.dense(torch.float32)
    assert float((got - expected).norm() / w.norm()) < 0.02, "the scales are rounded to 8 bits"
    assert float((got - w).norm() / w.norm()) < 0.12


@pytest.mark.parametrize("kind", ["int8", NF4])
@pytest.mark.parametrize("options", SHAPES, ids=["gpt2", "llama"])
def test_planned_bytes_are_those_held(kind: str, options: dict[str, Any]) -> None:
    model = base(options, kind, torch.bfloat16)
    stores = [m.store for m in model.modules() if isinstance(m, FrozenLinear)]
    assert sum(s.nbytes for s in stores) == sum(matrix_bytes(*s.shape, kind) for s in stores)
    held = sum(p.nbytes for p in model.parameters()) + sum(s.nbytes for s in stores)
    assert held == base_bytes(model.config, kind, torch.bfloat16)
    plain = sum(p.nbytes for p in model_of(**options).bfloat16().parameters())
    assert base_bytes(model.config, None, torch.bfloat16) == plain > held


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_backward_keeps_no_dense_weight(kind: str) -> None:
    def kept(model: GPT) -> int:
        held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            loss = model(tokens(), tokens())
        del loss
        return sum(size for place, size in sizes.items() if place not in held)

    assert kept(adapted(base(LLAMA, kind))) == kept(adapted(model_of(**LLAMA).float()))


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_merging_into_a_stored_weight_makes_a_dense_one(kind: str) -> None:
    model = adapted(base(LLAMA, kind))
    with torch.no_grad():
        expected = model(tokens())
        merge(model)
        torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-4)
        unmerge(model)
        assert torch.equal(model(tokens()), expected)
        read = read_merged(model)
        plain = remove_lora(model)
        assert type(plain.blocks[0].attn.qkv.weight) is torch.nn.Parameter
        torch.testing.assert_close(plain(tokens()), expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(read(name), p) for name, p in plain.named_parameters())


@pytest.mark.parametrize("kind", ["int8", NF4])
def test_the_state_has_no_stored_weights_and_a_cast_leaves_them(kind: str) -> None:
    model = base(LLAMA, kind)
    before = model.blocks[0].attn.qkv.store.dense(torch.float32)
    assert not any(
        "attn.qkv" in name for name in adapted(base({"qkv_bias": False}, kind)).state_dict() if "lora" not in name
    )
    assert torch.equal(model.bfloat16().blocks[0].attn.qkv.store.dense(torch.float32), before)
    again = base(LLAMA, kind)
    assert torch.equal(again.blocks[0].attn.qkv.store.dense(torch.float32), before), "the same base, other values"


def test_what_cannot_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="base is 'int4', expected one of int8, nf4"):
        quantise_base(model_of(), "int4")
    for model in (base({}, "int8"), adapted(model_of())):
        with pytest.raises(UserError, match="quantised already, expected a plain model"):
            quantise_base(model, "int8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    plain = model_of().float()
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes.*pip install 'fastgpt\[quantised\]', or choose int8"):
        quantise_base(plain, "nf4")
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes")
def test_a_layer_is_that_of_bitsandbytes() -> None:
    library()
    import bitsandbytes as bnb

    w, x = torch.randn(32, 128), torch.randn(5, 128, requires_grad=True)
    theirs = bnb.nn.Linear4bit(128, 32, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=True)
    theirs = theirs.to("cpu")
    results = []
    for layer in (theirs, FrozenLinear(Nf4(w), None)):
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_meta_model_with_adapters_is_counted_without_memory() -> None:
    from fastgpt.models.config import ModelConfig

    with torch.device("meta"):
        model = GPT(ModelConfig(n_layers=2, n_heads=4, width=32, vocab_size=50, block_size=16))
    add_lora(model, Lora(rank=4))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 4 * (128 + 64 + 160 + 160)
    assert all(m.lora_A.is_meta for m in lora_layers(model).values())
