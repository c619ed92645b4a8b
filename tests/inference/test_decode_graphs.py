"""Decode steps from graphs generate what called steps do: on graphs where there is a GPU, elsewhere on a recorder of
PyTorch's calls under the same rules (tests/recorder.py)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorder import recording
from small_models import ROPE, byte_tokenizer, model_of
from torch import Tensor

from fastgpt.core import fallback
from fastgpt.core.errors import UserError
from fastgpt.core.graphs import WARM_STEPS
from fastgpt.inference import Generator, Grammar, Request, graphs
from fastgpt.inference.rows import Rows
from fastgpt.models.gpt import GPT

REQUESTS = [
    Request([3, 1, 4], 22, temperature=0.9, top_k=20, seed=3, logprobs=0),
    Request([1, 5], 13, temperature=0.0, logprobs=1),
    Request([9, 2, 6, 5], 9, top_p=0.9, min_p=0.05, seed=4, repetition_penalty=1.3, logprobs=0),
    Request([3, 5], 12, temperature=1.2, seed=5, logprobs=0, frequency_penalty=0.5, logit_bias={7: 2.0}),
]


def some_model() -> GPT:
    return model_of(**ROPE, window=[None, 3]).float().eval()


def tensors(rows: Rows) -> list[Tensor]:
    """Return everything that a step may change."""
    found = [rows.cache.k, rows.cache.v, rows.pages, rows.lens, rows.tokens, rows.u, *rows.settings]
    tables = (rows.tables.seen, rows.tables.counts, rows.tables.bias, rows.tables.allowed)
    return [*found, *(table for table in tables if table is not None)]


@pytest.fixture
def unlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the checks of ids and lengths, as on a GPU."""
    for op in ("attention", "embedding", "rope"):
        monkeypatch.setattr(importlib.import_module(f"fastgpt.ops.{op}"), "checks_values", lambda t: False)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    """Return a generator whose steps are recorded on a CPU."""
    found = Generator(some_model(), max_batch=3)
    found.reserve()
    rows = found.schedule.rows
    assert rows is not None and not rows.graphs.enabled, "a CPU has no graphs"
    rows.graphs.enabled = True
    monkeypatch.setattr(graphs, "record", recording(lambda: tensors(rows)))
    return found


def results(generator: Generator) -> list[Any]:
    return [(r.ids, r.logprobs, r.top_logprobs) for r in generator.generate(REQUESTS)]


@pytest.mark.usefixtures("unlooked")
def test_replayed_steps_generate_what_called_ones_do(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows and the settings change on the way. Tensors stay where they are."""
    rows = generator.schedule.rows
    assert rows is not None
    called, step = [], rows._decode
    monkeypatch.setattr(rows, "_decode", lambda *key: called.append(key) or step(*key))
    expected = results(Generator(some_model(), max_batch=3))
    assert results(generator) == expected
    places = [t.data_ptr() for t in tensors(rows)]
    assert results(generator) == expected
    assert [t.data_ptr() for t in tensors(rows)] == places
    recorded = rows.graphs.recorded
    assert len(recorded) >= 3 and all(called.count(key) == WARM_STEPS + 1 for key in recorded)
    for _ in range(WARM_STEPS):  # some keys come once in a round
        results(generator)
    before = len(called)
    assert results(generator) == expected and len(called) == before, "nothing but replays"


@pytest.mark.usefixtures("unlooked")
def test_replayed_steps_follow_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llguidance")
    requests = [Request("a", 20, seed=i, grammar=Grammar("regex", "[a-f]{3,6}(x|y)+z")) for i in range(3)]
    made = [Generator(model_of(**ROPE, vocab_size=257).float().eval(), byte_tokenizer()) for _ in range(2)]
    made[0].reserve()
    rows = made[0].schedule.rows
    assert rows is not None
    rows.graphs.enabled = True
    monkeypatch.setattr(graphs, "record", recording(lambda: tensors(rows)))
    for _ in range(2):
        assert [r.ids for r in made[0].generate(requests)] == [r.ids for r in made[1].generate(requests)]
    assert any(options.constrained for _, options, *_ in rows.graphs.recorded)  # type: ignore[misc]


@pytest.mark.usefixtures("unlooked")
def test_moved_weights_are_recorded_again(generator: Generator) -> None:
    rows = generator.schedule.rows
    assert rows is not None
    first = results(generator)
    with torch.no_grad():
        for p in generator.model.parameters():
            p.data = -p.data
    wanted = Generator(some_model(), max_batch=3)
    for p in wanted.model.parameters():
        p.data = -p.data
    assert results(generator) == results(wanted) != first


@pytest.mark.usefixtures("unlooked")
def test_the_graph_that_was_not_used_for_longest_is_dropped(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    assert results(generator) == results(Generator(some_model(), max_batch=3))
    assert generator.schedule.rows is not None and len(generator.schedule.rows.graphs.recorded) == 1


@pytest.mark.usefixtures("unlooked")
def test_a_step_that_cannot_be_recorded_is_called(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(function: Callable[[], Any], inputs: list[Tensor], pool: object) -> Any:
        raise RuntimeError("no recording here")

    monkeypatch.setattr(fallback, "_reported", set())
    monkeypatch.setattr(graphs, "record", fails)
    assert results(generator) == results(Generator(some_model(), max_batch=3))
    assert caplog.messages == [
        "generate: a step could not be recorded, so its kernels are launched one by one (no recording here)"
    ]


def test_a_step_that_waits_ends_the_call(generator: Generator) -> None:
    """The checks of values, which run on a CPU, wait for the device."""
    with pytest.raises(UserError, match="generate: a step cannot be recorded in a CUDA graph .* with --no-graphs"):
        generator.generate(REQUESTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_of_the_gpu_generates_what_called_steps_do() -> None:
    expected = results(Generator(some_model().cuda(), max_batch=3, graphs=False))
    generator = Generator(some_model().cuda(), max_batch=3)
    generator.reserve()
    for _ in range(2):
        assert results(generator) == expected
    rows = generator.schedule.rows
    assert rows is not None and rows.graphs.enabled and rows.graphs.recorded
