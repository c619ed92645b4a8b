"""The engine against a plain forward pass for each request, and what it shares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CASES, model_of

from fastgpt.core.errors import UserError
from fastgpt.data.tokenizer import train_tokenizer
from fastgpt.evaluate.engine import Engine, Pair
from fastgpt.evaluate.prefixes import depth_first, trees_of
from fastgpt.evaluate.target import Target
from fastgpt.models.gpt import GPT

CONTEXT = 40
DYNAMIC: dict[str, Any] = dict(
    norm="rms",
    positions="rope",
    rope_scaling={"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
)


def target_of(model: GPT) -> Target:
    tokenizer = train_tokenizer(["the cat sat on the mat, and the dog saw it. "] * 4, 300)
    return Target(model.eval(), tokenizer, "small", Path(), {})


def engine_of(dtype: torch.dtype = torch.float64, batch_tokens: int | None = None, **settings: Any) -> Engine:
    model = model_of(**{"block_size": CONTEXT, "vocab_size": 300, **settings}).to(dtype)
    return Engine(target_of(model), batch_tokens=batch_tokens)


def draw(n: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def pairs() -> list[Pair]:
    """Return requests: some share a context, some only its beginning, some exceed the window, some are the same."""
    shots, question = draw(14), draw(6, 1)
    found: list[Pair] = [(shots + question, draw(n, i)) for i, n in enumerate((1, 1, 1, 5, 3))]
    found += [(shots + draw(3, 20 + i), draw(2, i)) for i in range(3)]
    found += [(draw(50, 30), draw(4, 2)), (draw(50, 30), draw(5, 3)), (draw(1, 31), draw(CONTEXT, 4))]
    found += [(draw(18, 40)[:i], draw(18, 40)[i : i + 1]) for i in range(1, 18)]  # a token after the other
    return [*found, found[0], (draw(1, 50), draw(1, 51))]


@torch.no_grad()
def plain(model: GPT, context: Any, continuation: Any) -> tuple[float, bool]:
    """Score a pair with one forward pass of its own."""
    ids = torch.tensor([[*context, *continuation][-CONTEXT - 1 :]])
    z = model(ids[:, :-1])[0, -len(continuation) :].log_softmax(-1)
    wanted = torch.tensor(continuation)
    return float(z.gather(1, wanted[:, None]).sum()), bool((z.argmax(-1) == wanted).all())


@pytest.mark.parametrize("batch_tokens", [8, 50, 4096])
@pytest.mark.parametrize("case", [*CASES, "dynamic"])
def test_scores_are_those_of_a_forward_pass_for_each_request(case: str, batch_tokens: int) -> None:
    engine = engine_of(batch_tokens=batch_tokens, **CASES.get(case, DYNAMIC))
    given = pairs()
    for scored, (context, continuation) in zip(engine.loglikelihoods(given), given):
        logprob, greedy = plain(engine.model, context, continuation)
        assert abs(scored.logprob - logprob) < 1e-9 * len(continuation) and scored.greedy == greedy
        assert scored.truncated == max(0, len(context) + len(continuation) - CONTEXT - 1)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype, bound: float) -> None:
    given = pairs()
    exact = engine_of().loglikelihoods(given)
    for batch_tokens in (8, 50, 4096):
        for scored, right in zip(engine_of(dtype, batch_tokens).loglikelihoods(given), exact):
            assert abs(scored.logprob - right.logprob) < bound * max(1, abs(right.logprob) / 10)


def test_what_requests_share_is_computed_once() -> None:
    context, engine = draw(30), engine_of()
    engine.loglikelihoods([(context, [i]) for i in range(4)])  # one-token answers need the context alone
    assert engine.counted == {"passes": 1, "tokens": 30, "rows": 1}

    engine.counted.clear()
    engine.loglikelihoods([(context, [1, *draw(5, i)]) for i in range(3)])  # their first token is the same
    assert engine.counted == {"passes": 1, "tokens": 31 + 3 * 4, "rows": 2 + 3 * 4}

    engine.counted.clear()
    shots, questions = context[:20], [draw(8, i) for i in range(10)]
    engine.loglikelihoods([(shots + question, [i]) for question in questions for i in range(4)])
    assert engine.counted == {"passes": 1, "tokens": 20 + 10 * 8, "rows": 10}


def test_a_prefix_is_kept_between_passes() -> None:
    shots, engine = draw(20), engine_of(batch_tokens=CONTEXT)
    given: list[Pair] = [(shots + draw(8, i), [i]) for i in range(10)]
    assert engine.loglikelihoods(given) == pytest.approx(engine.loglikelihoods(given))  # the cache is empty again
    assert engine.counted == {"passes": 2 * (1 + 2), "tokens": 2 * (20 + 10 * 8), "rows": 2 * 10}


def test_memory_does_not_grow_with_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, sizes = engine_of(torch.float32, batch_tokens=200), {"hidden": [0], "logits": [0]}
    for name in sizes:
        call = getattr(engine.model, name)

        def watched(x: Any, call: Any = call, name: str = name, **options: Any) -> Any:
            sizes[name].append(x.numel() if name == "hidden" else len(x))
            return call(x, **options)

        monkeypatch.setattr(engine.model, name, watched)
    monkeypatch.setattr("fastgpt.evaluate.engine.LOGITS", 50 * engine.model.vocab_size)
    shots = draw(15)
    given: list[Pair] = [(shots + draw(4, i % 250), draw(1 + i % 9, i)) for i in range(1000)]
    scored = engine.loglikelihoods(given)
    assert max(sizes["hidden"]) <= 200 and 25 < max(sizes["logits"]) <= 50
    assert sum(sizes["hidden"]) == engine.counted["tokens"] and sum(sizes["logits"]) == engine.counted["rows"]
    few = [3, 500, 999]
    for i, one in zip(few, engine.loglikelihoods([given[i] for i in few])):
        assert one.logprob == pytest.approx(scored[i].logprob, abs=1e-3)


def test_each_token_of_a_text_is_scored_once() -> None:
    engine = engine_of()
    text = draw(100)
    (nats, tokens), (none, no_tokens) = engine.rolling([text, []])
    start = engine.target.tokenizer.eot
    whole = [start, *text]
    right = plain(engine.model, whole[:1], text[:40])[0] + plain(engine.model, whole[40:41], text[40:80])[0]
    right += plain(engine.model, whole[60:81], text[80:])[0]
    assert nats == pytest.approx(right) and (tokens, none, no_tokens) == (100, 0.0, 0)


def test_progress_counts_every_request() -> None:
    seen: list[int] = []
    engine_of(batch_tokens=50).loglikelihoods(pairs(), seen.append)
    assert sum(seen) == len(pairs()) and len(seen) > 2


@pytest.mark.parametrize(
    "pair, message",
    [
        (([], [1]), "pair 0 has 0 and 1 tokens"),
        (([1], []), "pair 0 has 1 and 0 tokens"),
        (([1], [1] * (CONTEXT + 1)), "a continuation of 1 to 40"),
        (([1], [300]), "ids outside the vocabulary, expected 0 to 299"),
    ],
)
def test_pairs_that_cannot_be_scored_are_errors(pair: Pair, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_of().loglikelihoods([pair])


def test_log_probabilities_that_are_not_finite_are_an_error() -> None:
    engine = engine_of(torch.float16)
    assert engine.model.norm_f is not None
    engine.model.norm_f.weight.data.fill_(6e4)
    with pytest.raises(UserError, match="small has log-probabilities in float16 that are not finite"):
        engine.loglikelihoods([([1], [2])])


def test_settings_that_cannot_be() -> None:
    target = target_of(model_of(vocab_size=300))
    with pytest.raises(UserError, match="batch_tokens is 0, expected at least 1"):
        Engine(target, batch_tokens=0)
    with pytest.raises(UserError, match="expected at most 16, the size of the learned table"):
        Engine(target, context=17)
    assert Engine(target_of(model_of(vocab_size=300, positions="rope")), context=17).context == 17


def test_trees_hold_every_text_and_share_only_what_is_worth_it() -> None:
    texts = [np.array(t) for t in ([1] * 20 + [2], [1] * 20 + [3, 4], [1] * 20, [1, 2], [5], [5, 6], [1] * 20 + [2])]
    nodes, parents = depth_first(trees_of(texts))
    assert sorted(i for node in nodes for i in node.texts) == list(range(len(texts)))
    for node, parent in zip(nodes, parents):
        assert (node.parent, node.start) == ((None, 0) if parent < 0 else (nodes[parent], nodes[parent].end))
        assert node.tokens == node.end - node.start + sum(child.tokens for child in node.children)
    assert [(node.start, node.end) for node in nodes] == [(0, 20), (20, 21), (20, 22), (0, 2), (0, 2)]
    assert len(trees_of(texts, limit=20)) == 5
