"""Adapters in the linear layers: the formula, the fused paths around them, what backward keeps, merging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CASES, model_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from fastgpt.core.errors import UserError
from fastgpt.finetune.lora import Lora, adapters_off, add_lora, lora_layers, merge, remove_lora, unmerge
from fastgpt.models.gpt import GPT
from fastgpt.models.recompute import MadeAgain
from fastgpt.nn import Linear
from fastgpt.nn.lora import LoraLinear, lora_linear_ref

LLAMA: dict[str, Any] = dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False, n_kv_heads=2)
LLAMA |= dict(qkv_bias=False, proj_bias=False, mlp_bias=False)


def tokens(b: int = 2, t: int = 13) -> Tensor:
    return torch.randint(50, (b, t), generator=torch.Generator().manual_seed(3))


def adapted(settings: Lora | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> GPT:
    """Return a model with adapters whose B is not 0."""
    model, g = model_of(**options).to(dtype), torch.Generator().manual_seed(1)
    for m in add_lora(model, settings or Lora(rank=3), generator=g).values():
        m.lora_B.data.copy_(torch.randn(m.lora_B.shape, generator=g) * 0.1)
    return model


def layer(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> LoraLinear:
    """Return a layer of 3 segments, of which the second has no adapter."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(12, 20, dtype=dtype)
    for p in base.parameters():
        p.data.copy_(torch.randn(p.shape, generator=g))
    m = LoraLinear(base, 3, 6.0, columns=[(0, 8), (12, 20)], dropout=dropout, generator=g)
    m.lora_B.data.copy_(torch.randn(m.lora_B.shape, generator=g))
    return m


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_formula(dropout: float) -> None:
    m = layer(dropout)
    m.bias.requires_grad_()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, m.bias, m.lora_A, m.lora_B]

    def results(run: Any) -> list[Tensor]:
        torch.manual_seed(4)
        y = run()
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    got = results(lambda: m(x))
    args = (x, m.weight, m.bias, m.lora_A, m.lora_B, m.columns, m.scale, dropout)
    for a, b in zip(got, results(lambda: lora_linear_ref(*args)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_formula_is_that_of_the_delta() -> None:
    m, x = layer(), torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(m.delta()[8:12], torch.zeros(4, 12, dtype=torch.float64))
    b0, b1, (a0, a1) = m.lora_B[:8], m.lora_B[8:], m.lora_A.split(3)
    torch.testing.assert_close(m.delta(), 2.0 * torch.cat((b0 @ a0, m.delta()[8:12], b1 @ a1)))
    torch.testing.assert_close(m(x), x @ (m.weight + m.delta()).t() + m.bias)
    with torch.no_grad():
        torch.testing.assert_close(m(x), x @ (m.weight + m.delta()).t() + m.bias)


@pytest.mark.parametrize("case", [*CASES, "llama"])
def test_a_model_with_adapters_is_the_model_with_merged_weights(case: str) -> None:
    options = LLAMA if case == "llama" else CASES[case]
    model, ids, targets = adapted(**options), tokens(), tokens().roll(1, 1)
    base = adapted(**options)
    with torch.no_grad():
        plain = remove_lora(base, merged=False)(ids)
        assert not torch.allclose(model(ids), plain, rtol=1e-3)
        with adapters_off(model):
            assert torch.equal(model(ids), plain)
    full = remove_lora(adapted(**options)).requires_grad_()
    loss, expected = model(ids, targets), full(ids, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    loss.backward()
    expected.backward()
    for name, m in lora_layers(model).items():  # dB = s dW A^T, dA = s B^T dW
        dw, row, r = full.get_submodule(name).weight.grad, 0, m.rank
        assert m.lora_A.grad is not None and m.lora_B.grad is not None
        for i, (start, end) in enumerate(m.columns):
            rows, rank = slice(row, row + end - start), slice(i * r, (i + 1) * r)
            torch.testing.assert_close(m.lora_B.grad[rows], m.scale * dw[start:end] @ m.lora_A[rank].t())
            torch.testing.assert_close(m.lora_A.grad[rank], m.scale * m.lora_B[rows].t() @ dw[start:end])
            row += end - start
    assert all(p.grad is None for name, p in model.named_parameters() if "lora" not in name)


def test_segments_are_the_modules_of_the_family() -> None:
    llama, gpt2 = adapted(**LLAMA), adapted()
    assert lora_layers(llama)["blocks.0.attn.qkv"].columns == [(0, 32), (32, 48), (48, 64)]
    assert lora_layers(llama)["blocks.1.mlp.up"].columns == [(0, 48), (48, 96)]
    assert lora_layers(gpt2)["blocks.0.attn.qkv"].columns == [(0, 96)]
    assert len(lora_layers(gpt2)) == 8
    some = adapted(Lora(targets=("q_proj", "v_proj", r"1\.mlp.down")), **LLAMA)
    assert {name: m.columns for name, m in lora_layers(some).items()} == {
        "blocks.0.attn.qkv": [(0, 32), (48, 64)],
        "blocks.1.attn.qkv": [(0, 32), (48, 64)],
        "blocks.1.mlp.down": [(0, 32)],
    }
    with pytest.raises(UserError, match="'k_porj' is found in no layer's name, expected a part of one, like .*k_proj"):
        add_lora(model_of(**LLAMA), Lora(targets=("q_proj", "k_porj")))
    with pytest.raises(UserError, match="has adapters already"):
        add_lora(some, Lora())


def saved_bytes(model: GPT) -> int:
    """Return the bytes of memory that forward keeps for backward beside parameters and tables, each once."""
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(tokens(), tokens())
    del loss
    return sum(size for place, size in kept.items() if place not in held)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_backward_keeps_no_more_than_small_products_beyond_full_training(options: dict[str, Any]) -> None:
    full, model = model_of(**options).float(), adapted(dtype=torch.float32, **options)
    small = sum(4 * tokens().numel() * m.lora_A.shape[0] for m in lora_layers(model).values())
    assert saved_bytes(model) <= saved_bytes(full) + small
    some = adapted(Lora(rank=3, targets=("down",)), dtype=torch.float32, **options)
    assert saved_bytes(some) < saved_bytes(model), "a frozen layer keeps its input"


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("level", ["norms", "block"])
def test_recomputation_gives_the_same_gradients_with_dropout(options: dict[str, Any], level: Any) -> None:
    def gradients(recompute: Any) -> list[Tensor]:
        model = adapted(Lora(rank=3, dropout=0.3), dtype=torch.float32, **options).train()
        model.recompute = recompute
        torch.manual_seed(7)
        model(tokens(), tokens()).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients("none"), gradients(level), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt2", "llama"])
def test_adapters_let_backward_recompute_the_same_tensors(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left_out = MadeAgain._pack, [0]

    def spy(self: MadeAgain, t: Tensor) -> Any:
        kept = real(self, t)
        left_out[0] += not isinstance(kept, Tensor)
        return kept

    monkeypatch.setattr(MadeAgain, "_pack", spy)
    counts = []
    for model in (model_of(**options).float(), adapted(dtype=torch.float32, **options)):
        model.recompute, left_out[0] = "norms", 0
        model.train()(tokens(), tokens())
        counts.append(left_out[0])
    assert counts[0] == counts[1] >= 6, "two norms and an activation in each of two blocks"


def test_the_fused_paths_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt import ops

    seen: list[str] = []
    for name in ("rope_qkv", "bias_gelu"):
        real = getattr(ops, name)

        def spy(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Tensor:
            given = args[0].data_ptr()
            out = real(*args, **kwargs)
            if name == "bias_gelu":
                assert args[1] is not None, "the bias was added in a pass of its own"
            else:
                assert out.data_ptr() == given, "rope copied the projection"
            seen.append(name)
            return out

        monkeypatch.setattr(ops, name, spy)
    adapted(dtype=torch.float32, **LLAMA)(tokens(), tokens()).backward()
    adapted(dtype=torch.float32)(tokens(), tokens()).backward()
    assert seen == ["rope_qkv"] * 2 + ["bias_gelu"] * 2


def test_merging_leaves_the_base_as_it_is() -> None:
    model, ids = adapted(dtype=torch.float32, **LLAMA), tokens()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        unmerged = model(ids)
        merge(model)
        assert lora_layers(model)["blocks.0.attn.qkv"].merged is not None
        torch.testing.assert_close(model(ids), unmerged, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected unmerge"):
        model.train()(ids)
    model.eval()
    unmerge(model)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids), unmerged)
    assert not any(isinstance(m, LoraLinear) for m in remove_lora(model).modules())
    assert type(model.blocks[0].attn.qkv) is Linear


def test_adapters_are_fp32_over_bf16() -> None:
    model = adapted(Lora(rank=3, dropout=0.1), dtype=torch.bfloat16, **LLAMA).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(tokens(), tokens()).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad and p.grad is not None)
    assert remove_lora(model).blocks[0].attn.qkv.weight.dtype == torch.bfloat16


def test_the_state_keeps_the_names_of_the_base() -> None:
    names = set(model_of().state_dict())
    extra = set(adapted().state_dict()) - names
    assert names < set(adapted().state_dict())
    assert {n.rpartition(".")[2] for n in extra} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("wrong", [dict(rank=0), dict(alpha=0.0), dict(alpha=float("nan")), dict(dropout=1.0)])
def test_settings_that_make_no_adapter(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"lora.{next(iter(wrong))} is .*, expected"):
        Lora(**wrong)


def test_rslora_scales_by_the_root() -> None:
    base = nn.Linear(4, 4)
    assert LoraLinear(base, 16, 8.0).scale == 0.5
    assert LoraLinear(base, 16, 8.0, rslora=True).scale == 2.0


def test_a_compiled_or_autocast_layer_gives_the_same() -> None:
    m, x = layer(dtype=torch.float32), torch.randn(4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), m(x), rtol=3e-2, atol=3e-2)
