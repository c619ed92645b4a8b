"""Generation with pages that texts share: each text as if it were alone and nothing were kept, in fp64; waiting for
pages, giving them back, and long prompts beside texts that are generated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import CASES, ROPE, model_of

from fastgpt.inference import Generator, Request, Result
from fastgpt.models.gpt import GPT

SHARED = torch.randint(50, (20,), generator=torch.Generator().manual_seed(5)).tolist()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def alone(model: GPT, request: Request, **options: Any) -> Result:
    """Return what a request gives without other texts and without reuse."""
    return Generator(model, max_batch=1, reuse=False, **options).generate([request])[0]


def assert_same(result: Result, expected: Result) -> None:
    """Check ids and, as they say more about what the model read, log-probabilities."""
    assert result.ids == expected.ids and result.finish_reason == expected.finish_reason
    assert result.logprobs == pytest.approx(expected.logprobs, rel=1e-9)


def finish(generator: Generator) -> dict[int, Result]:
    """Run all steps; return the results by request."""
    results: dict[int, Result] = {}
    while generator.busy:
        results |= {p.number: p.result for p in generator.step() if p.result is not None}
    return results


@pytest.mark.parametrize("name", ["learned", "rope, grouped heads", "alternating window"])
def test_texts_that_begin_alike_are_as_if_alone(name: str) -> None:
    """Chunks of 7 tokens end within pages; texts grow beyond the context of 32 and are read again from their middle."""
    model = model_of(**CASES[name], block_size=32).eval()
    generator = Generator(model, max_batch=3, page_size=8, prefill_tokens=7)
    generator.reserve()
    settings: dict[str, Any] = dict(temperature=0.9, top_k=20, logprobs=0)
    requests = [Request([*SHARED, *prompt(n, n)], 16 - n, seed=n, **settings) for n in (3, 1, 9, 14)]
    first, second = generator.generate(requests), generator.generate(requests)
    for request, *results in zip(requests, first, second):
        for result in results:
            assert_same(result, alone(model, request))
    assert first[0].cached_tokens == 0 and all(r.cached_tokens >= 16 for r in second[:3])
    assert generator.schedule.pages.used == 0


def test_several_continuations_of_a_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read, hidden = model_of(**ROPE, block_size=64).eval(), [], GPT.hidden

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return hidden(self, ids, **kwargs)

    requests = [Request(prompt(37, 1), 4, seed=seed, temperature=1.5, logprobs=0) for seed in range(5)]
    with monkeypatch.context() as patched:
        patched.setattr(GPT, "hidden", spy)
        results = Generator(model, page_size=8).generate(requests)
    assert read[0] == 37 and sum(n for n in read if n > 1) == 37 + 4 * 5
    assert [r.cached_tokens for r in results] == [0, 32, 32, 32, 32]
    assert len({tuple(r.ids) for r in results}) > 1
    for request, result in zip(requests, results):
        assert_same(result, alone(model, request))


def test_a_conversation_reads_only_what_is_new() -> None:
    """Pages of generated tokens are found, too."""
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=2, page_size=8)
    generator.reserve()
    first = generator.generate([Request(prompt(10, 1), 15, temperature=0)])[0]
    turn = Request([*prompt(10, 1), *first.ids, 3, 1, 4], 6, temperature=0, logprobs=0)
    second = generator.generate([turn])[0]
    assert second.cached_tokens == 24, "of 25, of which the last one was never read"
    assert_same(second, alone(model, turn))


def test_a_model_that_was_trained_reads_its_prompts_again() -> None:
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, page_size=8)
    request = Request(prompt(30, 1), 3, temperature=0, logprobs=0)
    generator.generate([request])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    (result,) = generator.generate([request])
    assert result.cached_tokens == 0
    assert_same(result, alone(model, request))


def test_scores_of_a_prompt_are_complete_and_its_pages_are_kept() -> None:
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=2, page_size=8)
    generator.reserve()
    request = Request(prompt(30, 1), 3, temperature=0, logprobs=0, prompt_logprobs=0)
    results = [generator.generate([request])[0] for _ in range(2)]
    assert results[0].prompt_logprobs == results[1].prompt_logprobs and len(results[1].prompt_logprobs or ()) == 30
    assert results[1].cached_tokens == 0
    assert generator.generate([Request(request.prompt, 1)])[0].cached_tokens == 24


def test_dynamic_frequencies_reuse_nothing() -> None:
    """The keys of a text depend on its length."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}
    model = model_of(**ROPE, block_size=64, rope_scaling=scaling).eval()
    generator = Generator(model, page_size=8, prefill_tokens=4)
    generator.reserve()
    for request in (Request([*SHARED, *prompt(n, n)], 20, temperature=0, logprobs=0) for n in (5, 9)):
        result = generator.generate([request])[0]
        assert result.cached_tokens == 0
        assert_same(result, alone(model, request))


def test_the_youngest_gives_its_pages_back_and_is_not_lost() -> None:
    """Four texts of up to 7 pages each share 10 pages: none could grow if all were kept."""
    model = model_of(**ROPE, block_size=56).eval()
    generator = Generator(model, max_batch=4, page_size=8, cache_tokens=80, reuse=False)
    generator.reserve()
    requests = [
        Request(prompt(9, n), 40, seed=n, temperature=1.2, logprobs=0, frequency_penalty=0.3, repetition_penalty=1.2)
        for n in range(4)
    ]
    numbers = [generator.add(request) for request in requests]
    waited, order, results = 0, [], {}
    while generator.busy:
        for piece in generator.step():
            if piece.result is not None:
                order.append(piece.number)
                results[piece.number] = piece.result
        waited = max(waited, sum(bool(r.logprobs) for r in generator.schedule.waiting))
    assert waited >= 2 and order == numbers, "the oldest one is never put back"
    for number, request in zip(numbers, requests):
        assert_same(results[number], alone(model, request))
    assert generator.schedule.pages.used == 0


def test_a_request_waits_until_its_pages_are_free_and_keeps_its_place() -> None:
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=4, page_size=8, cache_tokens=64)
    generator.reserve()
    small, large, late = Request(prompt(20, 1), 30, seed=1), Request(prompt(60, 2), 2, seed=2), Request([1, 2], 1)
    for request in (small, large, late):
        generator.add(request)
    generator.step()
    assert len(generator.schedule.running) == 1 and len(generator.schedule.waiting) == 2
    assert list(finish(generator)) == [0, 1, 2], "a smaller one does not overtake"


def test_a_long_prompt_delays_other_texts_by_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes, hidden = model_of(**ROPE, block_size=64).eval(), [], GPT.hidden

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return hidden(self, ids, **kwargs)

    generator = Generator(model, max_batch=4, page_size=8, prefill_tokens=16)
    generator.reserve()
    first, second = Request(prompt(40, 1), 9, seed=1, logprobs=0), Request(prompt(50, 2), 2, seed=2, logprobs=0)
    with monkeypatch.context() as patched:
        patched.setattr(GPT, "hidden", spy)
        numbers = [generator.add(first)]
        generator.step()
        assert shapes == [(1, 40)], "alone, in one pass"
        numbers.append(generator.add(second))
        results = finish(generator)
    assert shapes[1:9] == [(1, 1), (1, 16)] * 3 + [(1, 1), (1, 2)]
    for number, request in zip(numbers, (first, second)):
        assert_same(results[number], alone(model, request))


def test_a_prompt_that_is_cancelled_half_read_leaves_its_pages() -> None:
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=4, page_size=8, prefill_tokens=12)
    generator.reserve()
    generator.add(Request([1, 2], 20, seed=0))
    generator.step()
    request = Request(prompt(50, 2), 3, temperature=0, logprobs=0)
    number = generator.add(request)
    for _ in range(4):
        generator.step()
    assert [r.read for r in generator.schedule.reading] == [24]
    generator.cancel(number)
    assert generator.schedule.pages.used == 1
    again = generator.add(request)
    result = finish(generator)[again]
    assert result.cached_tokens == 24
    assert_same(result, alone(model, request))


def test_two_prompts_that_begin_alike_arrive_together() -> None:
    """The second one waits for the pages that the first one reads, while a third reads its own."""
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=4, page_size=8, prefill_tokens=24)
    generator.reserve()
    prompts = [[*SHARED, *SHARED, 1, 2], [*SHARED, *SHARED, 3], prompt(6, 1)]
    requests = [Request(p, 4, temperature=0, logprobs=0) for p in prompts]
    results = generator.generate(requests)
    assert [r.cached_tokens for r in results] == [0, 40, 0]
    for request, result in zip(requests, results):
        assert_same(result, alone(model, request))


def test_numbers_that_are_not_finite_are_not_kept() -> None:
    model = model_of(**ROPE, block_size=64).eval()
    generator = Generator(model, max_batch=2, page_size=8)
    generator.reserve()
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the logits after 20 tokens are not finite"):
        generator.generate([Request([7] * 20, 3)])
    with torch.no_grad():
        model.wte.weight[7] = 0.5
    request = Request([7] * 20, 3, temperature=0, logprobs=0)
    assert_same(generator.generate([request])[0], alone(model, request))


def test_cache_sizes_that_are_refused() -> None:
    for options, message in (
        (dict(cache_tokens=15), "cache_tokens is 15, expected at least the context, 16"),
        (dict(page_size=12), "page_size is 12, expected a power of two from 8 to 256"),
        (dict(prefill_tokens=0), "prefill_tokens is 0, expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Generator(model_of(), **options)  # type: ignore[arg-type]
