"""The model's cache against whole passes, and `generate` for tensors of ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CASES, model_of

from fastgpt.inference import generate
from fastgpt.models.cache import KVCache
from fastgpt.models.gpt import GPT
from fastgpt.models.paged import PagedCache, Reading, Span, Stepping


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
def test_pages_equal_the_whole_pass(name: str) -> None:
    """Texts of different lengths are read in parts, of which some begin in the middle of a page; the second text has
    the first one's first page. Then each grows by a token a step."""
    model, ids = model_of(**CASES[name], block_size=24).eval(), prompt(24)
    ids[1, :8] = ids[0, :8]
    whole, cache = model(ids), PagedCache(model.config, 8, 8, model.wte.weight)
    pages, lens = [[5, 0, 3], [5, 7, 1], [2, 4, 6]], [0, 8, 0]
    for tokens in ((9, 0, 3), (4, 3, 3), (1, 8, 0)):
        spans = [Span(n, lens[i], pages[i]) for i, n in enumerate(tokens) if n]
        packed = torch.cat([ids[i, lens[i] : lens[i] + n] for i, n in enumerate(tokens)])
        z = model(packed[None], kv_cache=Reading(cache, spans))[0]
        wanted = torch.cat([whole[i, lens[i] : lens[i] + n] for i, n in enumerate(tokens)])
        torch.testing.assert_close(z, wanted, rtol=1e-9, atol=1e-10)
        lens = [a + n for a, n in zip(lens, tokens)]
    table, at = torch.tensor(pages, dtype=torch.int32), torch.tensor(lens)
    for _ in range(5):
        z = model(ids.gather(1, at[:, None]), kv_cache=Stepping(cache, table, at))
        torch.testing.assert_close(z[:, 0], whole[torch.arange(3), at], rtol=1e-9, atol=1e-10)
        at += 1


def test_passes_refuse_other_tokens() -> None:
    model = model_of()
    cache = PagedCache(model.config, 3, 8, model.wte.weight)
    step = Stepping(cache, torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\), expected \(B, 1\) in a step"):
        model(prompt(), kv_cache=step)
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\), expected \(1, 12\)"):
        model(prompt(), kv_cache=Reading(cache, [Span(4, 0, [n]) for n in range(3)]))


def test_a_long_text_fills_the_cache_anew_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths, hidden = model_of(), [], GPT.hidden

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        lengths.append(ids.shape[1])
        return hidden(self, ids, **kwargs)

    monkeypatch.setattr(GPT, "hidden", spy)
    generate(model, prompt(4), 30)
    assert [n for n in lengths if n > 1] == [12, 27, 27, 27] and len(lengths) == 30


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
