"""Sampling: the cached path against a full recomputation, the filters, and the end of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgpt.inference.generate import context_start, generate, sample
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT, KVCache

ROPE: dict[str, Any] = dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False)
CASES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rope, grouped heads": {**ROPE, "n_kv_heads": 2},
    "rope, window": {**ROPE, "window": 3},
    "alternating window": dict(window=[None, 3], attn_scale=1.0),
    "multi-query, head norm": {**ROPE, "n_kv_heads": 1, "qk_norm": True},
    "partial interleaved rope, parallel": dict(
        positions="rope", rotary_dim=4, rope_interleaved=True, parallel="shared", head_bias=True
    ),
    "post-norm": dict(norm_placement="post"),
    "softcaps": dict(attn_softcap=2.0, logit_softcap=3.0),
}


def model_of(**options: Any) -> GPT:
    """Return a model in fp64, so the last bit of a sum decides no token; biases and norms are random too."""
    shape: dict[str, Any] = dict(n_layers=2, n_heads=4, width=32, vocab_size=50, vocab_multiple=32, block_size=16)
    model, g = GPT(ModelConfig(**{**shape, **options})).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + ("norm" in name))
    return model


def prompt(length: int = 4) -> torch.Tensor:
    return torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CASES)
def test_logits_with_cache_equal_the_whole_pass(name: str) -> None:
    model, ids = model_of(**CASES[name]).eval(), prompt(16)
    whole, cache = model(ids), KVCache(model.config, 3, 16, model.wte.weight)
    parts = [model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 16))]
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [4, 16, 21])
@pytest.mark.parametrize("name", CASES)
def test_cache_changes_no_token(name: str, length: int) -> None:
    model, ids = model_of(**CASES[name]), prompt(length)
    out = [
        generate(
            model, ids, 30, temperature=0.9, top_k=20, generator=torch.Generator().manual_seed(3), use_cache=cached
        )
        for cached in (True, False)
    ]
    assert out[0].shape == (3, length + 30) and torch.equal(out[0][:, :length], ids)
    assert torch.equal(*out)


def test_context_moves_by_half_a_block() -> None:
    starts = [context_start(n, 8) for n in range(1, 21)]
    assert starts == [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4
    assert [context_start(n, 1) for n in (1, 2, 3)] == [0, 1, 2]


def test_a_long_text_fills_the_cache_anew_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, hidden = model_of(), [], GPT.hidden

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return hidden(self, ids, **kwargs)

    monkeypatch.setattr(GPT, "hidden", spy)
    generate(model, prompt(4), 30)
    assert [n for n in lengths if n > 1] == [4, 9, 9, 9] and len(lengths) == 30


def test_temperature_zero_is_greedy_and_so_are_the_narrowest_filters() -> None:
    model, ids = model_of(), prompt()
    greedy = generate(model, ids, 8, temperature=0)
    for t in range(4, 12):
        assert torch.equal(model(greedy[:, :t])[:, -1].argmax(-1), greedy[:, t])
    assert torch.equal(generate(model, ids, 8, top_k=1), greedy)
    assert torch.equal(generate(model, ids, 8, top_p=1e-9), greedy)


def test_filters_and_temperature_give_the_right_distribution() -> None:
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0])
    logits = probabilities.log().expand(20000, 5)

    def frequencies(**options: Any) -> torch.Tensor:
        g = torch.Generator().manual_seed(0)
        return torch.bincount(sample(logits, generator=g, **options), minlength=5) / 20000

    def near(got: torch.Tensor, weights: list[float]) -> None:
        expected = torch.tensor(weights) / sum(weights)
        assert torch.equal(got > 0, expected > 0) and (got - expected).abs().max() < 0.02, got

    near(frequencies(), [0.05, 0.5, 0.15, 0.3, 0])
    near(frequencies(top_k=2), [0, 0.5, 0, 0.3, 0])
    near(frequencies(top_k=99), [0.05, 0.5, 0.15, 0.3, 0])
    near(frequencies(top_p=0.6), [0, 0.5, 0, 0.3, 0])  # 0.5 alone does not reach 0.6
    near(frequencies(top_p=0.45), [0, 1.0, 0, 0, 0])
    near(frequencies(top_p=1.0), [0.05, 0.5, 0.15, 0.3, 0])
    near(frequencies(temperature=0.5), [0.05**2, 0.5**2, 0.15**2, 0.3**2, 0])


def test_the_same_generator_gives_the_same_text() -> None:
    model, ids = model_of(), prompt()
    a, b, c = (generate(model, ids, 12, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_eot_ends_rows_and_all_rows_end_the_call() -> None:
    model, ids = model_of(), prompt()
    free = generate(model, ids, 12, temperature=0)
    eot = int(free[0, 6])  # row 0 ends with its third new token (or before)
    out = generate(model, ids, 12, temperature=0, eot=eot)
    for row, line in enumerate(out):
        new = line[4:].tolist()
        end = new.index(eot) if eot in new else len(new)
        assert new[:end] == free[row, 4 : 4 + end].tolist() and set(new[end:]) <= {eot}
    assert eot in out[0, 4:7]
    alone = generate(model, ids[:1], 12, temperature=0, eot=eot)
    assert alone.shape[1] <= 7 and alone[0, -1] == eot


@pytest.mark.parametrize("training", [True, False])
def test_mode_comes_back_and_dropout_is_off(training: bool) -> None:
    model = model_of(resid_dropout=0.5).train(training)
    ids = prompt()
    assert torch.equal(generate(model, ids, 6, temperature=0), generate(model, ids, 6, temperature=0))
    assert model.training is training
    model.train()
    loss = model(ids, ids)  # generate left no state behind that forbids gradients
    loss.backward()


def test_no_token_asked_for() -> None:
    assert torch.equal(generate(model_of(), prompt(), 0), prompt())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ids=torch.zeros(3, dtype=torch.int64)), r"ids has shape \(3,\), expected \(B, T\) with T >= 1"),
        (dict(ids=torch.zeros(1, 0, dtype=torch.int64)), r"ids has shape \(1, 0\)"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1, expected 0 or more"),
        (dict(temperature=-0.1), "temperature is -0.1, expected 0 or more"),
        (dict(top_k=0), "top_k is 0, expected at least 1"),
        (dict(top_p=0.0), "top_p is 0.0, expected more than 0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model_of(), **{"ids": prompt(), "max_new_tokens": 3, **options})
