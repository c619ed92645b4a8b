"""The model's cache against whole passes, and `generate` for tensors of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CASES, model_of

from fastgpt.inference import generate
from fastgpt.models.cache import KVCache
from fastgpt.models.gpt import GPT


def prompt(length: int = 4) -> torch.Tensor:
    return torch.randint(0, 50, (3, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CASES)
def test_logits_with_cache_equal_the_whole_pass(name: str) -> None:
    model, ids = model_of(**CASES[name]).eval(), prompt(16)
    whole, cache = model(ids), KVCache(model.config, 3, 16, model.wte.weight)
    parts = [model(ids[:, a:b], kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 16))]
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_of_different_lengths_equal_the_whole_pass(name: str) -> None:
    model, ids = model_of(**CASES[name]).eval(), prompt(16)
    whole, cache = model(ids), KVCache(model.config, 3, 16, model.wte.weight)
    lens = torch.tensor([1, 5, 11])
    model(ids[:, :11], kv_cache=cache.part(0, 3))  # slots 1 and 5 on hold what no later token may see
    for _ in range(5):
        z = model(ids.gather(1, lens[:, None]), kv_cache=cache.part(0, 3, lens))
        torch.testing.assert_close(z[:, 0], whole[torch.arange(3), lens], rtol=1e-9, atol=1e-10)
        lens += 1


def test_a_cache_of_lengths_takes_one_token() -> None:
    model = model_of()
    cache = KVCache(model.config, 3, 16, model.wte.weight).part(0, 3, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\), expected \(B, 1\) with kv_cache.lens"):
        model(prompt(), kv_cache=cache)


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
