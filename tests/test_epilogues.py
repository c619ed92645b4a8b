"""The setting `epilogues`: GELU in the epilogues of products gives the same model where layers are plain. Elsewhere
and on a CPU the setting changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt import ops, parity
from fastgpt.core.backend import use
from fastgpt.finetune.lora import Lora, add_lora
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import keep_gradients
from fastgpt.training.build import build_model
from fastgpt.training.config import TrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL: dict[str, Any] = dict(n_layers=2, n_heads=2, width=16, vocab_size=50, vocab_multiple=2, block_size=12)
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": SMALL,
    "erf, parallel": {**SMALL, "activation": "gelu", "parallel": "shared"},
    "post-norm, dropout": {**SMALL, "norm_placement": "post", "resid_dropout": 0.1},
}
KERNEL = pytest.mark.skipif(not parity.backends_here("gelu_mlp"), reason="needs a GPU or Triton's interpreter")


def model_of(shape: dict[str, Any], epilogues: bool) -> GPT:
    cfg = TrainConfig(model=ModelConfig(**shape), block_size=12, batch_tokens=384, epilogues=epilogues, dtype="fp32")
    return build_model(cfg, shape["vocab_size"], DEVICE)


def results(model: GPT) -> list[Tensor]:
    """Return the loss and all gradients of one batch."""
    ids = torch.randint(50, (3, 12), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    torch.manual_seed(3)
    loss = model(ids, ids)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def spied(monkeypatch: pytest.MonkeyPatch, op: str, argument: str) -> list[Any]:
    """Return a list that gets one keyword argument of every call of an op."""
    found: list[Any] = []
    original = getattr(ops, op)

    def spy(*args: Any, **kwargs: Any) -> Any:
        found.append(kwargs[argument])
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, op, spy)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that gets `recompute` of every call of gelu_mlp."""
    return spied(monkeypatch, "gelu_mlp", "recompute")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the columns of k of every call of linear_qkv."""
    return spied(monkeypatch, "linear_qkv", "n_kv")


def check_both_ways(shape: dict[str, Any], level: Any, **kernels: str) -> None:
    """Check that a model gives the same with the setting and without it; level: what backward recomputes."""
    found = []
    for epilogues in (False, True):
        model = model_of(shape, epilogues)
        model.recompute = level
        if level == "norms":
            keep_gradients(model, min_numel=1)
        with use(**kernels):
            found.append(results(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@KERNEL
@pytest.mark.parametrize("level", ["none", "norms", "block"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_model_is_the_same(name: str, level: Any, calls: list[bool]) -> None:
    check_both_ways(SHAPES[name], level, gelu_mlp="triton")
    assert calls == [level == "norms"] * (4 if level == "block" else 2), (
        "once a layer, and again where it is recomputed"
    )


@KERNEL
@pytest.mark.parametrize("level", ["none", "norms", "block"])
def test_before_the_library_s_attention_the_gradients_of_q_k_and_v_stay_apart(level: Any, in_parts: list[int]) -> None:
    check_both_ways({**SMALL, "n_heads": 4, "n_kv_heads": 2}, level, attention="torch", linear_qkv="triton")
    assert in_parts == [8] * (4 if level == "block" else 2), "once a layer, and again where it is recomputed"


@KERNEL
def test_what_needs_a_packed_projection_keeps_it(in_parts: list[int]) -> None:
    """fastgpt's attention returns a packed gradient; rotary embeddings and norms of heads come in between; a hook and
    an adapter need the layer called."""
    for name in ("attention", "rope", "norms", "hook", "adapter"):
        extra = {"rope": {"positions": "rope"}, "norms": {"qk_norm": True}}.get(name, {})
        model = model_of({**SMALL, "n_layers": 1, **extra}, epilogues=True)
        if name == "hook":
            model.blocks[0].attn.qkv.register_forward_hook(lambda *args: None)
        if name == "adapter":
            add_lora(model, Lora(rank=2, targets=("qkv",)))
        with use(attention="triton" if name == "attention" else "torch", linear_qkv="triton"):
            results(model)
        assert not in_parts, name


@KERNEL
def test_layers_that_are_not_plain_are_called(calls: list[bool]) -> None:
    seen: list[str] = []
    model = model_of({**SMALL, "n_layers": 3}, epilogues=True)
    model.blocks[0].mlp.up.register_forward_hook(lambda *args: seen.append("up"))
    model.blocks[1].mlp.down = torch.nn.Linear(64, 16, device=DEVICE)
    with use(gelu_mlp="triton"):
        results(model)
        assert seen == ["up"] and calls == [False], "the third layer alone"
        calls.clear()
        add_lora(model, Lora(rank=2, targets=("up",)))
        results(model)
    assert not calls


@KERNEL
def test_other_activations_keep_their_layers(calls: list[bool]) -> None:
    with use(gelu_mlp="triton"):
        for activation in ("relu2", "swiglu"):
            results(model_of({**SMALL, "activation": activation}, epilogues=True))
    assert not calls


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a CPU has no such kernel")
def test_a_cpu_runs_the_layers_one_by_one(calls: list[bool]) -> None:
    plain, with_setting = (results(model_of(SMALL, epilogues)) for epilogues in (False, True))
    assert not calls and all(torch.equal(a, b) for a, b in zip(plain, with_setting, strict=True))
