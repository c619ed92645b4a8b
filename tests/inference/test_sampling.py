"""The sampling settings: the distribution that each gives, and transformers' processors as the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import generator
from torch import Tensor

from fastgpt.inference import sampling
from fastgpt.inference.grammar import Grammar
from fastgpt.inference.requests import Request
from fastgpt.inference.rows import options_of
from fastgpt.inference.sampling import Settings, adjust, choose, draw, keep_likely, penalise
from fastgpt.inference.tables import Tables


def settings(requests: list[Request], vocabulary: int) -> Settings:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    columns = [[getattr(r, name) or (vocabulary if name == "top_k" else 0) for r in requests] for name in names]
    return Settings(*(torch.tensor(c, dtype=torch.int64 if n == "top_k" else None) for n, c in zip(names, columns)))


def chosen(logits: Tensor, u: Tensor, **options: Any) -> Tensor:
    requests = [Request([0], **options)] * len(logits)
    return choose(logits, settings(requests, logits.shape[-1]), options_of(requests), u).token


def test_a_token_is_drawn_in_proportion_to_its_probability() -> None:
    p = torch.tensor([[0.05, 0.5, 0.15, 0.3, 0.0, 0.0]]).expand(1000, 6)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert torch.bincount(draw(p.log(), u), minlength=6).tolist() == [50, 500, 150, 300, 0, 0]
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]] * 2), ends).tolist() == [1, 2]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.05, 0.5, 0.15, 0.3, 0]),
        (dict(top_k=2), [0, 0.5, 0, 0.3, 0]),
        (dict(top_k=99), [0.05, 0.5, 0.15, 0.3, 0]),
        (dict(top_p=0.6), [0, 0.5, 0, 0.3, 0]),  # 0.5 alone does not reach 0.6
        (dict(top_p=0.45), [0, 1.0, 0, 0, 0]),
        (dict(top_p=1e-300), [0, 1.0, 0, 0, 0]),  # 0 in fp32
        (dict(top_p=0.6, top_k=1), [0, 1.0, 0, 0, 0]),
        (dict(min_p=0.4), [0, 0.5, 0, 0.3, 0]),
        (dict(temperature=0.5), [0.05**2, 0.5**2, 0.15**2, 0.3**2, 0]),
        (dict(temperature=1e-40), [0, 1.0, 0, 0, 0]),
    ],
)
def test_settings_give_the_right_distribution(options: dict[str, Any], expected: list[float]) -> None:
    logits = torch.tensor([0.05, 0.5, 0.15, 0.3, 0.0]).log().expand(4000, 5)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    got = torch.bincount(chosen(logits, u, **options), minlength=5) / 4000
    wanted = torch.tensor(expected) / sum(expected)
    assert (got - wanted).abs().max() < 1e-3, got


def test_top_p_sorts_a_few_logits_if_they_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same result; rows with top_k and rows without filters are in the batch."""
    monkeypatch.setattr(sampling, "FEW", 8)
    requests = [Request([0], top_p=0.9), Request([0], top_p=0.5, top_k=3), Request([0], top_k=5), Request([0])]
    s, o = settings(requests, 60), options_of(requests)
    for scale, width in ((6.0, 8), (0.1, 60)):
        z = torch.randn(4, 60, generator=generator(1)) * scale
        assert sampling.largest(z, s, o, waits=True).shape == (4, width)
        assert torch.equal(keep_likely(z, s, o, waits=True), keep_likely(z, s, o))
    assert sampling.largest(z, s, o, waits=False).shape == (4, 60)


@pytest.mark.parametrize("few", [1024, 40])
def test_filters_equal_those_of_transformers_row_by_row(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a batch has other settings, and each equals transformers' processors for that row alone."""
    monkeypatch.setattr(sampling, "FEW", few)
    from transformers.generation import logits_process as hf

    requests = [
        Request([0], temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
        for t, k, p, m, r in [
            (1.0, None, 1.0, 0.0, 1.0),
            (0.7, 5, 1.0, 0.0, 1.3),
            (1.3, None, 0.8, 0.0, 1.0),
            (1.0, None, 1.0, 0.1, 0.8),
            (0.5, 20, 0.9, 0.02, 1.1),
            (2.0, 40, 0.5, 0.3, 1.0),
        ]
    ]
    logits = torch.randn(len(requests), 60, generator=generator(1), dtype=torch.float64) * 3
    text = torch.randint(60, (len(requests), 9), generator=generator(2))
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, text, True)
    s = Settings(*(t.double() if t.is_floating_point() else t for t in settings(requests, 60)))
    ours = penalise(logits, seen, s.penalty) / s.temperature[:, None]
    ours = keep_likely(ours, s, options_of(requests), waits=True).softmax(-1)
    for row, r in enumerate(requests):
        processors: list[Any] = [
            hf.RepetitionPenaltyLogitsProcessor(r.repetition_penalty),
            hf.TemperatureLogitsWarper(r.temperature),
        ]
        processors += [hf.TopKLogitsWarper(r.top_k)] if r.top_k else []
        processors += [hf.TopPLogitsWarper(r.top_p)] if r.top_p < 1 else []
        processors += [hf.MinPLogitsWarper(r.min_p)] if r.min_p > 0 else []
        theirs = logits[row : row + 1]
        for process in processors:
            theirs = process(text[row : row + 1], theirs)
        torch.testing.assert_close(ours[row], theirs[0].softmax(-1), rtol=1e-6, atol=1e-9)


def test_a_row_does_not_depend_on_the_settings_of_others() -> None:
    """Equal logits too, which a filter may sort in any order."""
    logits = torch.randn(2, 50, generator=generator(3)).round()
    u = torch.tensor([0.3, 0.99], dtype=torch.float64)
    cases: list[dict[str, Any]] = [dict(top_k=3), dict(top_p=0.7), dict(top_k=4, top_p=0.9), dict(min_p=0.2), {}]
    for mine in cases:
        alone = int(chosen(logits[1:], u[1:], **mine))
        for other in [*cases, dict(temperature=0.0, logprobs=3, repetition_penalty=2.0)]:
            requests = [Request([0], **other), Request([0], **mine)]
            tables = Tables(2, 50, logits.device)
            tables.seen = torch.ones(2, 50, dtype=torch.bool)
            both = choose(logits, settings(requests, 50), options_of(requests), u, tables)
            assert int(both.token[1]) == alone, (mine, other)


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(2, 50, generator=generator(4))
    requests = [Request([0], temperature=0.0, repetition_penalty=3.0, logprobs=3)] * 2
    tables = Tables(2, 50, logits.device)
    tables.seen = torch.ones(2, 50, dtype=torch.bool)
    out = choose(logits, settings(requests, 50), options_of(requests), torch.zeros(2), tables)
    exact = logits.log_softmax(-1)
    assert out.logprob is not None and out.top_logprobs is not None and out.top_ids is not None
    assert torch.equal(out.logprob, exact.gather(1, out.token[:, None])[:, 0])
    assert torch.equal(out.top_logprobs, exact.topk(3).values) and torch.equal(out.top_ids, exact.topk(3).indices)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_choose_nothing(wrong: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = wrong
    assert chosen(logits, torch.zeros(2, dtype=torch.float64), temperature=temperature).tolist()[1] == -1


def test_bias_and_penalties_change_the_logits() -> None:
    """As in OpenAI's documentation: a presence once, a frequency for each time that the token was added."""
    logits = torch.randn(2, 70, generator=generator(5))
    requests = [Request([0], presence_penalty=0.7, frequency_penalty=-0.2), Request([0], logit_bias={3: 9.0, 69: -9.0})]
    tables, s = Tables(2, 70, logits.device), settings(requests, 70)
    for row, request in enumerate(requests):
        tables.set(row, request, [0, 1])
    for tokens in ([5, 5], [5, 6], [8, 8]):
        tables.add(torch.tensor(tokens))
    expected = logits.clone()
    expected[0, 5] -= 0.7 - 0.2 * 2
    expected[0, 8] -= 0.7 - 0.2
    expected[1, 3] += 9
    expected[1, 69] -= 9
    torch.testing.assert_close(adjust(logits, s, options_of(requests), tables), expected)
    tables.set(1, Request([0]), [0])  # another request takes the row
    assert tables.bias is not None and not tables.bias[1].any()
    tables.move(0, 1)
    assert tables.counts is not None and tables.counts[1].tolist() == tables.counts[0].tolist()


def test_a_grammar_leaves_the_tokens_that_it_allows() -> None:
    logits = torch.randn(3, 70, generator=generator(6))
    bits = torch.zeros(3, dtype=torch.int32)
    bits[0], bits[1], bits[2] = -(2**31), 1, 1 << 5  # tokens 31, 32 and 69
    tables = Tables(3, 70, logits.device)
    tables.allow(0, [None, None])
    assert tables.allowed is None
    tables.allow(1, [bits, None])
    tables.allow(0, [None])
    requests = [Request([0]), Request([0], temperature=0.0, grammar=Grammar("json_object"), logprobs=0)]
    s, o = settings([*requests, requests[0]], 70), options_of(requests)
    found = adjust(logits[1:], s.rows(1, 3), o, tables.rows(1, 3))
    assert found[0].isfinite().nonzero()[:, 0].tolist() == [31, 32, 69] and torch.equal(found[1], logits[2])
    out = choose(logits[1:], s.rows(1, 3), o, torch.zeros(2, dtype=torch.float64), tables.rows(1, 3))
    best = max((31, 32, 69), key=lambda i: float(logits[1, i]))
    assert out.token[0] == best and out.logprob is not None
    assert out.logprob[0] == logits[1].log_softmax(-1)[best]
