"""The generator: each request as if it were alone and nothing were cached, how a text ends, and what is refused."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
from small_models import CASES, ROPE, byte_tokenizer, model_of, model_that_says
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastgpt.core import backend
from fastgpt.inference import Generator, Piece, Request, Result, schedule, scoring
from fastgpt.inference.rows import Rows, options_of
from fastgpt.inference.running import context_start
from fastgpt.models.gpt import GPT


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain(model: GPT, request: Request, context: int = 16) -> tuple[list[int], list[float]]:
    """Generate without a cache, alone: the model reads the whole context for each token. Returns ids and logprobs."""
    model.eval()
    rows, ids, logprobs = Rows(model, 1, 1, 1, 8), [int(i) for i in request.prompt], []
    drawn, options = random.Random(request.seed), options_of([request])._replace(logprobs=0)
    for _ in range(request.max_new_tokens):
        rows.set(0, request, ids)
        rows.draw(0, [drawn.random()])
        h = model.hidden(torch.tensor([ids[context_start(len(ids), context) :]]))
        choice = rows.choose(h[:, -1], 0, 1, options)
        assert choice.logprob is not None
        ids.append(int(choice.token))
        logprobs.append(float(choice.logprob))
    return ids[len(request.prompt) :], logprobs


def assert_plain(model: GPT, request: Request, result: Result, context: int = 16) -> None:
    """Check ids and, as they say more about what the model read, log-probabilities."""
    ids, logprobs = plain(model, request, context)
    assert result.ids == ids and result.finish_reason == "length" and result.prompt_tokens == len(request.prompt)
    assert result.logprobs == pytest.approx(logprobs, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_request_does_not_depend_on_the_batch_or_the_cache(name: str) -> None:
    """Prompts of different lengths, some beyond block_size, with different settings, that end at different times; of
    five requests two wait until a row is free."""
    model = model_of(**CASES[name])
    requests = [
        Request(prompt(4, 1), 22, temperature=0.9, top_k=20, seed=3, logprobs=0),
        Request(prompt(16, 2), 5, temperature=0.0, logprobs=0),
        Request(prompt(1, 3), 18, temperature=1.2, top_p=0.9, seed=4, logprobs=2),
        Request(prompt(21, 4), 9, min_p=0.05, seed=3, logprobs=0),
        Request(prompt(5, 5), 7, temperature=0.8, repetition_penalty=1.3, seed=5, logprobs=0),
    ]
    results = Generator(model, max_batch=3).generate(requests)
    for request, result in zip(requests, results):
        assert_plain(model, request, result)
    assert [[len(top) for top in r.top_logprobs or ()] for r in results[1:3]] == [[0] * 5, [2] * 18]


def test_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one pass without padding, with the tokens of each alone."""
    model, shapes, hidden = model_of(), [], GPT.hidden

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return hidden(self, ids, **kwargs)

    requests = [Request(prompt(n, n), 3, seed=n, temperature=2.0, logprobs=0) for n in (8, 2, 9, 7)]
    monkeypatch.setattr(GPT, "hidden", spy)
    results = Generator(model).generate(requests)
    assert shapes == [(1, 26), (4, 1), (4, 1)]
    for request, result in zip(requests, results):
        assert_plain(model, request, result)


def test_a_row_forgets_the_text_before() -> None:
    model = model_of()
    requests = [Request(prompt(9, n), 9, temperature=0, repetition_penalty=2.0, logprobs=0) for n in (1, 2)]
    for request, result in zip(requests, Generator(model, max_batch=1).generate(requests)):
        assert_plain(model, request, result)


def test_logprobs_score_the_text() -> None:
    model = model_of().eval()
    request = Request(prompt(4), 8, temperature=1.5, seed=1, logprobs=1)
    result = Generator(model).generate([request])[0]
    ids = torch.tensor([[*request.prompt, *result.ids]])  # type: ignore[list-item]
    exact = model(ids).log_softmax(-1)[0, 3:-1]
    assert result.logprobs == pytest.approx(exact.gather(1, ids[0, 4:, None])[:, 0].tolist())
    assert result.top_logprobs is not None
    assert [top[0][0] for top in result.top_logprobs] == exact.argmax(-1).tolist()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [5, 4096])
def test_a_prompt_is_scored_in_one_reading(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By passes of 5 tokens for all rows, or at once, and logits of 4 tokens; with and without further tokens."""
    model = model_of(**CASES[name]).eval()
    monkeypatch.setattr(schedule, "PREFILL_TOKENS", tokens)
    monkeypatch.setattr(scoring, "LOGITS", 4 * 50)
    passes, logits, hidden, head = [], [], GPT.hidden, GPT.logits

    def spy(self: GPT, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        passes.append(ids.numel())
        return hidden(self, ids, **kwargs)

    def spy_logits(self: GPT, h: torch.Tensor) -> torch.Tensor:
        logits.append(h.shape[:-1].numel())
        return head(self, h)

    requests = [Request(prompt(n, n), new, seed=0, prompt_logprobs=2) for n, new in ((13, 0), (12, 2), (1, 1))]
    requests.append(Request(prompt(11), 2, temperature=0, logprobs=0))
    with monkeypatch.context() as patched:
        patched.setattr(GPT, "hidden", spy)
        patched.setattr(GPT, "logits", spy_logits)
        results = Generator(model, prefill_tokens=tokens).generate(requests)
    assert max(passes) <= tokens and max(logits) <= 4
    assert results[3].prompt_logprobs is None
    assert_plain(model, requests[3], results[3])
    for request, result in zip(requests[:3], results):
        ids = torch.tensor([list(request.prompt)])  # type: ignore[arg-type]
        exact = model(ids).log_softmax(-1)[0, :-1]
        expected = exact.gather(1, ids[0, 1:, None])[:, 0].tolist()
        assert result.prompt_logprobs is not None and result.prompt_top_logprobs is not None
        assert result.prompt_logprobs[0] is None and result.prompt_logprobs[1:] == pytest.approx(expected, rel=1e-9)
        assert [[i for i, _ in top] for top in result.prompt_top_logprobs[1:]] == exact.topk(2).indices.tolist()
        assert len(result.ids) == request.max_new_tokens and len(result.prompt_top_logprobs) == ids.numel()
    assert Generator(model).score([prompt(13, 13)])[0] == pytest.approx(results[0].prompt_logprobs[1:])  # type: ignore


@pytest.mark.parametrize("window", [None, 3])
def test_rotary_positions_beyond_block_size(window: int | None) -> None:
    """With a larger context no token is dropped: the same as a model whose block_size is larger."""
    small, large = (model_of(**ROPE, window=window, block_size=n) for n in (16, 64))
    request = Request(prompt(12), 40, temperature=0.0, logprobs=0)
    assert_plain(large, request, Generator(small, context=64).generate([request])[0], 64)


def test_seeds() -> None:
    model = model_of()
    a, b, c = (Generator(model).generate([Request(prompt(4), 12, seed=s)])[0] for s in (7, 7, 8))
    assert a.ids == b.ids != c.ids
    free = Generator(model).generate([Request(prompt(4), 12), Request(prompt(4), 12)])
    assert free[0].ids != free[1].ids and free[0].logprobs is None
    assert Generator(model).generate([Request(prompt(4), 12, seed=free[0].seed)])[0].ids == free[0].ids
    longer = Generator(model).generate([Request(prompt(4), 20, seed=7)])[0]
    assert longer.ids[:12] == a.ids


def said(text: str, **options: Any) -> tuple[list[Piece], Generator]:
    """Return the pieces of a model that continues "> " with text, a token for each byte, and then <|endoftext|>."""
    tokenizer = byte_tokenizer()
    script = [0, *tokenizer.encode(text).tolist(), tokenizer.eot]
    generator = Generator(model_that_says(script, tokenizer.n_vocab), tokenizer)
    request = Request("> ", temperature=0, max_new_tokens=len(script) - 1, **options)
    return list(generator.stream([request])), generator


def test_characters_come_whole_and_eos_ends_the_text() -> None:
    pieces, _ = said("a€ß")
    assert [p.text for p in pieces] == ["a", "", "", "€", "", "ß", ""]
    result = pieces[-1].result
    assert result is not None and result.text == "a€ß" and result.finish_reason == "eos"
    assert result.ids[-1] == byte_tokenizer().eot and result.prompt_tokens == 2
    pieces, _ = said("a€ß", ignore_eos=True)
    assert pieces[-1].result is not None and pieces[-1].result.text == "a€ß<|endoftext|>"
    assert pieces[-1].result.finish_reason == "length"


def test_several_ids_may_end_a_text() -> None:
    model = model_that_says([1, 2, 3, 4, 5], 6)
    for eos, ids in (((3, 4), [1, 2, 3]), (2, [1, 2]), ((), [1, 2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])):
        assert Generator(model, eos=eos).generate([Request([0], 5, temperature=0)])[0].ids == ids


def test_a_token_that_only_the_model_has_is_no_text() -> None:
    """As in Qwen, whose vocabulary is padded."""
    tokenizer = byte_tokenizer()
    script = [0, *tokenizer.encode("a").tolist(), tokenizer.n_vocab + 2, *tokenizer.encode("b").tolist()]
    generator = Generator(model_that_says(script, tokenizer.n_vocab + 3), tokenizer)
    result = generator.generate([Request("> ", 3, temperature=0)])[0]
    assert result.text == "ab" and result.ids == script[1:]


def test_a_stop_string_of_several_tokens() -> None:
    pieces, _ = said("ab€c, €d.", stop=["€d", "x"])
    assert [p.text for p in pieces] == ["a", "b", "", "", "", "€c", ",", " ", "", "", "", ""]
    result = pieces[-1].result
    assert result is not None and result.text == "ab€c, " and result.finish_reason == "stop"
    assert byte_tokenizer().decode(result.ids) == "ab€c, €d"


def test_text_held_back_comes_at_the_end() -> None:
    pieces, _ = said("abc", stop=["bcd"])
    assert [p.text for p in pieces] == ["a", "", "", "bc"]


def test_requests_join_and_leave_while_others_run() -> None:
    model = model_of().eval()
    requests = [Request(prompt(n, n), 10, seed=n, logprobs=0) for n in (3, 5, 7)]
    generator = Generator(model, max_batch=2)
    generator.reserve()
    out: dict[int, list[int]] = {}
    results: dict[int, Result] = {}

    def steps(n: int) -> None:
        for _ in range(n):
            for piece in generator.step():
                out.setdefault(piece.number, []).extend([] if piece.id is None else [piece.id])
                if piece.result is not None:
                    results[piece.number] = piece.result

    first = generator.add(requests[0])
    steps(3)
    second, third = generator.add(requests[1]), generator.add(requests[2])
    steps(2)
    generator.cancel(first)
    steps(40)
    assert generator.step() == [] and not generator.busy
    assert out[first] == plain(model, requests[0])[0][:4]  # the second's prompt was read in a step of its own
    assert results.keys() == {second, third}
    for number, request in ((second, requests[1]), (third, requests[2])):
        assert_plain(model, request, results[number])
        assert out[number] == results[number].ids


def test_a_larger_request_waits_for_a_larger_cache() -> None:
    model = model_of().eval()
    generator, small, large = (
        Generator(model, max_batch=4),
        Request(prompt(3), 4, seed=0),
        Request(prompt(9), 7, seed=1),
    )
    generator.add(small)
    generator.step()
    generator.add(large)
    pieces = [p for _ in range(20) for p in generator.step()]
    assert [p.result.ids for p in pieces if p.result] == [plain(model, small)[0], plain(model, large)[0]]


def test_leaving_a_stream_leaves_nothing_behind() -> None:
    model = model_of().train()
    generator = Generator(model)
    for _ in generator.stream([Request(prompt(3), 9), Request(prompt(4), 9)]):
        break
    assert model.training and not generator.busy
    assert len(generator.generate([Request(prompt(3), 2)])[0].ids) == 2


def test_a_request_of_no_tokens() -> None:
    result = Generator(model_of()).generate([Request(prompt(3), 0), Request(prompt(3), 1)])[0]
    assert result.ids == [] and result.finish_reason == "length"


class Calls(TorchDispatchMode):
    """A record of the functions called, and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tree_map(lambda t: tuple(t.shape) if isinstance(t, torch.Tensor) else t, out)))
        return out


def test_every_step_makes_the_same_calls_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing grows, and a CUDA graph can replay a step."""
    for op in ("attention", "embedding", "rope"):  # values are checked on a CPU only
        monkeypatch.setattr(importlib.import_module(f"fastgpt.ops.{op}"), "checks_values", lambda t: False)
    generator = Generator(model_of(**ROPE, window=[None, 3]).float().eval())
    requests = [
        Request(prompt(n), 9, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, seed=0, logprobs=2) for n in (2, 5)
    ]
    for request in requests:
        generator.add(request)
    generator.step()
    steps = []
    for _ in range(4):
        assert generator.schedule.rows is not None
        with Calls() as calls, torch.no_grad():
            generator.schedule.rows.decode(2, options_of(requests))
        steps.append(calls.seen)
    assert len(steps[0]) > 50 and all(step == steps[0] for step in steps)
    assert not [name for name, _ in steps[0] if "_local_scalar" in name or "nonzero" in name]
    if backend.missing("cpu") is None:
        assert [name for name, _ in steps[0] if "attention" in name] == ["fastgpt.attention_decode_paged_fwd.cpu"] * 2


def test_logits_that_are_not_finite_end_the_call() -> None:
    model = model_of()
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the logits after 4 tokens are not finite"):
        Generator(model).generate([Request([1, 2, 3, 7], 3)])


def test_a_row_whose_logits_are_not_finite_ends_alone() -> None:
    model = model_of(tied=False).eval()
    good = [Request([1, 2, 3], 6, temperature=0), Request([4, 5, 1, 2, 6], 6, temperature=0)]
    wanted = [r.ids for r in Generator(model).generate(good)]
    with torch.no_grad():
        model.wte.weight[7] = torch.nan
    generator = Generator(model, max_batch=3)
    numbers = [generator.add(r) for r in (good[0], Request([1, 7], 6), good[1])]
    found: dict[int, list[int | None]] = {n: [] for n in numbers}
    errors = {}
    while generator.busy:
        for piece in generator.step():
            found[piece.number].append(piece.id)
            if piece.error is not None:
                errors[piece.number] = piece.error
    assert errors == {numbers[1]: "the logits after 2 tokens are not finite, expected finite numbers"}
    assert [found[numbers[0]], found[numbers[2]]] == wanted
    assert generator.schedule.pages.used == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=float("nan")), "temperature is nan, expected 0 or more"),
        (dict(min_p=1.5), "min_p is 1.5, expected 0 to 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0, expected more than 0"),
        (dict(stop="end"), "stop is 'end', expected a sequence of texts that are not empty"),
        (dict(stop=[""]), r"stop is \[''\], expected a sequence of texts that are not empty"),
        (dict(seed=-1), "seed is -1, expected 0 or more"),
        (dict(logprobs=-1), "logprobs is -1, expected 0 or more"),
        (dict(prompt_logprobs=-1), "prompt_logprobs is -1, expected 0 or more"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Request: {message}"):
        Request([1], **options)


def test_what_a_generator_refuses() -> None:
    generator = Generator(model_of())
    for request, message in (
        (Request([]), "the prompt is empty, expected at least one token"),
        (Request([3, 50]), "the prompt has id 50, expected 0 to 49"),
        (Request("text"), "expected a tokenizer"),
        (Request([3] * 17, prompt_logprobs=0), "the prompt has 17 tokens, expected at most 16"),
        (Request([3], stop=["x"]), "expected a tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.generate([request])
    with pytest.raises(ValueError, match="17 positions, expected at most 16, the size of the learned table"):
        Generator(model_of(), context=17)
    with pytest.raises(ValueError, match="max_batch is 0, expected at least 1"):
        Generator(model_of(), max_batch=0)
    generator.add(Request([1]))
    with pytest.raises(ValueError, match="other requests are running"):
        generator.generate([Request([1])])
