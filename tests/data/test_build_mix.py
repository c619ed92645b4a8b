import itertools
import logging
from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.pipeline.mix import ENTRY, Quotas, interleave, quotas, write_order
from fastgpt.data.recipe import MixRecipe, Recipe, Replay, SourceRecipe, StageRecipe

pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def mixture(tables: list[list[int]], tokens: list[list[int]], block: int = 1 << 16, seed: int = 0) -> np.ndarray:
    plan = Quotas([str(i) for i in range(len(tables))], tokens, [])
    blocks = list(interleave([np.array(t) for t in tables], plan, seed, block))
    return np.concatenate([np.empty(0, ENTRY), *blocks])


@settings(max_examples=60, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=4), st.data())
def test_every_prefix_has_the_proportions_to_within_a_document(tables: list[list[int]], data: st.DataObject) -> None:
    stage = st.lists(st.integers(0, 300), min_size=len(tables), max_size=len(tables))
    tokens = data.draw(st.lists(stage, min_size=1, max_size=3))
    entries = mixture(tables, tokens)
    taken = np.zeros(len(tables))
    longest = np.array([max(t) for t in tables])
    whole = np.cumsum(tokens, axis=0)
    for entry in entries:
        # where the stages stand, by the source that gave the next document
        s = entry["source"]
        k = int(np.searchsorted(whole[:, s], taken[s], side="right"))
        before = whole[k - 1] if k else np.zeros(len(tables))
        share = (taken[s] - before[s]) / tokens[k][s]
        expected = before + share * np.array(tokens[k])
        assert (taken >= expected - 1e-6).all() and (taken <= expected + longest + 1e-6).all()
        taken[s] += entry["tokens"]
    assert (taken >= whole[-1]).all() and (taken < whole[-1] + longest).all() or not whole[-1].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(lengths, min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 5))
def test_the_order_does_not_depend_on_the_blocks(tables: list[list[int]], block: int, seed: int) -> None:
    tokens = [[2 * sum(t) for t in tables], [sum(t) // 2 for t in tables]]
    assert (mixture(tables, tokens, block, seed) == mixture(tables, tokens, seed=seed)).all()


def test_epochs_repeat_every_document_in_another_order() -> None:
    table = list(range(1, 40))
    documents = mixture([table], [[3 * sum(table)]])["document"].reshape(3, len(table))
    assert all(sorted(epoch) == list(range(len(table))) for epoch in documents.tolist())
    assert all((a != b).any() for a, b in itertools.combinations(documents, 2))


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 200))
def test_shards_cut_the_order_between_documents(table: list[int], size: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "order"
        blocks = [mixture([table], [[2 * sum(table)]])]
        pieces = [blocks[0][:7], blocks[0][7:]]
        shards = write_order(path, iter(pieces), size)
        stored = np.fromfile(path, ENTRY)
    assert (stored == blocks[0]).all()
    at = tokens = 0
    for first, count, n in shards:
        assert first == at and n == stored["tokens"][first : first + count].sum() > 0
        assert tokens // size == (tokens + n - stored["tokens"][first + count - 1]) // size  # starts in one interval
        at, tokens = first + count, tokens + n
    assert at == len(stored)


def recipe(mix: MixRecipe = MixRecipe(), **sources: SourceRecipe) -> Recipe:
    return Recipe(sources, mix=mix)


def source(weight: float | None = None, epochs: float | None = None) -> SourceRecipe:
    return SourceRecipe(["x"], weight=weight, epochs=epochs)


SIZES = {"a": 1000, "b": 100}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (recipe(a=source(), b=source()), [[1000, 100]]),
        (recipe(a=source(epochs=0.5), b=source(epochs=3)), [[500, 300]]),
        (recipe(a=source(weight=1), b=source(weight=1)), [[550, 550]]),
        (recipe(MixRecipe(tokens=400), a=source(weight=3), b=source(weight=1)), [[300, 100]]),
        (recipe(MixRecipe(temperature=2.0, tokens=1000), a=source(), b=source()), [[760, 240]]),
        (recipe(MixRecipe(replay=Replay(["a"], 0.3)), a=source(), b=source()), [[330, 770]]),
        (
            recipe(
                MixRecipe(stages=[StageRecipe(3), StageRecipe(1, {"b": 1})], tokens=400),
                a=source(weight=1),
                b=source(weight=1),
            ),
            [[150, 150], [0, 100]],
        ),
    ],
)
def test_quotas(made: Recipe, expected: list[list[int]]) -> None:
    assert quotas(made, SIZES).tokens == expected


def test_a_source_repeated_often_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastgpt"):
        quotas(recipe(a=source(epochs=4), b=source(epochs=4.5)), SIZES)
    assert [r.message for r in caplog.records] == [
        "source b is repeated 4.5 times, expected at most 4: repeating text more often helps little"
    ]


def test_a_share_of_an_empty_source_is_refused() -> None:
    with pytest.raises(UserError, match="source b has a share of the mixture, but no training tokens are left"):
        quotas(recipe(a=source(weight=1), b=source(weight=1)), {"a": 10, "b": 0})
