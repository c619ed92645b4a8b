"""Weights in fewer bits: a converted model is the model with rounded weights, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import CASES, model_of

from fastgpt.inference import Generator, Request, convert_weights
from fastgpt.inference.weights import quantise
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.nn import Linear

NARROW = ("bf16", "int8")


def rounded(model: GPT, kind: str) -> GPT:
    """Return a copy whose matrices have the values of the converted ones, in fp32."""
    model = copy.deepcopy(model).float()
    matrices = [m.weight for m in model.modules() if isinstance(m, Linear) and m.weight is not None]
    for w in [model.wte.weight, *matrices]:
        if kind == "bf16":
            w.data = w.data.bfloat16().float()
        else:
            q, scale = quantise(w)
            w.data = q.float() * scale[:, None]
    return model


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("name", CASES)
def test_a_converted_model_computes_with_the_rounded_weights(name: str, kind: str) -> None:
    """In prefill, which may have more rows than the kernel, and in steps with a cache."""
    model = model_of(**CASES[name], block_size=80)
    wanted = rounded(model, kind).eval()
    converted = convert_weights(model, kind).eval()
    ids = torch.randint(50, (2, 70), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(converted(ids), wanted(ids), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(converted(ids, ids), wanted(ids, ids), rtol=1e-5, atol=1e-5)
    requests = [Request([1, 2, 3], 6, temperature=0.0, logprobs=0), Request([4], 5, temperature=0.0, logprobs=0)]
    for a, b in zip(Generator(converted).generate(requests), Generator(wanted).generate(requests)):
        assert a.ids == b.ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_int8_is_symmetric_and_exact_at_the_ends() -> None:
    w = torch.tensor([[-2.54, 1.27, 0.0], [0.0, 0.0, 0.0], [1e-3, -5e-4, 2.5e-4]])
    q, scale = quantise(w)
    assert q.tolist() == [[-127, 64, 0], [0, 0, 0], [127, -64, 32]]
    assert (q.float() * scale[:, None] - w).abs().max() <= 0.5 * scale.max() * (1 + 1e-6)


@pytest.mark.parametrize("kind,bytes_per_weight", [("bf16", 2), ("int8", 1)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_memory_is_that_of_the_narrow_weights(kind: str, bytes_per_weight: int, tied: bool) -> None:
    model = convert_weights(model_of(tied=tied), kind)
    storages = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    matrices = [t for t in storages.values() if t.dim() == 2 and t.dtype != torch.float32]
    assert (model.head.weight.data_ptr() == model.wte.weight.data_ptr()) is tied
    assert {t.element_size() for t in matrices} == {bytes_per_weight}
    assert len(matrices) == 4 * model.config.n_layers + (1 if tied else 2)


def test_int8_costs_few_bits_per_token() -> None:
    """A model that was trained to predict a text loses less than a hundredth of a bit; bf16 even less."""
    text = torch.tensor(list(b"the quick brown fox jumps over the lazy dog; " * 3))
    config = ModelConfig(n_layers=2, n_heads=2, width=32, vocab_size=128, vocab_multiple=1, block_size=64)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(200):
        ids = torch.stack([text[(step + 7 * i) % 60 :][:65] for i in range(4)])
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    ids, bits = text[None, :65], {}
    for kind in ("fp32", *NARROW):
        with torch.no_grad():
            converted = convert_weights(copy.deepcopy(model), kind).eval()
            bits[kind] = float(converted(ids[:, :-1], ids[:, 1:])) / torch.log(torch.tensor(2.0))
    assert bits["fp32"] < 2, "the model has learnt"
    assert abs(bits["int8"] - bits["fp32"]) < 0.05 and abs(bits["bf16"] - bits["fp32"]) < 0.05, bits


ERRORS: list[tuple[Any, str]] = [
    (lambda: convert_weights(model_of(), "int4"), "weights is 'int4', expected one of fp32, bf16, int8"),
    (lambda: Generator(model_of(), weights="q8"), "weights is 'q8', expected one of fp32"),
    (lambda: convert_weights(convert_weights(model_of(), "int8"), "bf16"), "the model's weights are int8, expected"),
    (lambda: convert_weights(model_of().to("meta"), "int8"), "the model is on meta, expected a model on a CPU"),
]


@pytest.mark.parametrize("call,message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors_name_what_is_expected(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_converts_to_its_own_kind_again() -> None:
    model = convert_weights(model_of(), "int8")
    weight = model.wte.weight
    assert convert_weights(model, "int8").wte.weight is weight
    assert convert_weights(model_of().bfloat16(), "fp32").wte.weight.dtype == torch.float32
