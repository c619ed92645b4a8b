"""Loaders: each learned token is a target once, no target crosses a document, and resuming changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import model_of
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.finetune.batches import ExampleLoader, LabelledLoader, PairLoader, RatedLoader
from fastgpt.finetune.encode import Example
from fastgpt.finetune.examples import Classified, Pair, Rated
from fastgpt.finetune.mixture import Mixture

PACKING = ("best-fit", "none")


def made(sizes: list[int], seed: int = 0, first: int = 1) -> list[Example]:
    """Return examples whose ids are all different, with some tokens learned."""
    rng, examples = np.random.default_rng(seed), []
    for size in sizes:
        learned = rng.random(size) < 0.6
        learned[0] = False
        examples.append(Example(np.arange(first, first + size, dtype=np.uint32), learned))
        first += size
    return examples


def tensors(batch: Any) -> list[Tensor]:
    return [*batch[:4], *batch.extra.values()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


sizes = st.lists(st.integers(2, 40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 16), st.sampled_from(PACKING), st.integers(0, 3))
def test_every_learned_token_is_a_target_once_an_epoch(
    lengths: list[int], batch: int, block: int, packing: Any, seed: int
) -> None:
    examples = made(lengths, seed)
    expected = {int(i): int(i) - 1 for e in examples for i in e.ids[e.learned]}  # target -> the token before it
    if not expected:
        return
    loader = ExampleLoader([examples], batch, block, packing=packing, seed=seed)
    rows = loader.order.epoch
    seen: Counter[int] = Counter()
    taken = 0
    while taken < 2 * rows:
        b = next(loader)
        for k in range(min(batch, 2 * rows - taken)):
            row, targets = b.ids[k], b.targets[k]
            for t in (targets != IGNORE).nonzero().ravel().tolist():
                assert int(row[t]) == expected[int(targets[t])]
                seen[int(targets[t])] += 1
        assert b.ids.shape == (batch, block) and b.doc_ids is not None and b.positions is not None
        firsts = torch.cat([torch.ones(batch, 1, dtype=torch.bool), b.doc_ids[:, 1:] != b.doc_ids[:, :-1]], 1)
        assert (b.positions[firsts] == 0).all() and (b.positions[:, 1:][~firsts[:, 1:]] > 0).all()
        assert (b.targets[b.doc_ids < 0] == IGNORE).all()
        taken += batch
    assert seen == {i: 2 for i in expected}
    assert len(loader) == -(-rows // batch)
    once = [int(t) for b in loader.once() for t in b.targets[b.targets != IGNORE]]
    assert sorted(once) == sorted(expected)


@pytest.mark.parametrize("packing", PACKING)
def test_examples_without_learned_tokens_are_left_out(packing: Any) -> None:
    examples = made([5, 6])
    none = Example(np.arange(50, 60, dtype=np.uint32), np.zeros(10, bool))
    loader = ExampleLoader([[none, *examples, none]], 1, 8, packing=packing)
    assert loader.left_out == 2 and all((b.ids < 50).all() for b in loader.once())
    with pytest.raises(UserError, match="no example with tokens to learn"):
        ExampleLoader([[none]], 1, 8, packing=packing)


def loaders() -> list[Any]:
    examples = [made([9, 4, 7, 12, 3, 8, 5]), made([6, 6, 6, 10], 1, 100)]
    pairs = [[Pair(a, b) for a, b in zip(e[::2], e[1::2])] for e in examples]
    rated = [[Rated(x, i % 2 == 0) for i, x in enumerate(e)] for e in examples]
    labelled = [[Classified(x.ids, i % 3) for i, x in enumerate(e)] for e in examples]
    kinds: list[Any] = [
        (ExampleLoader, examples), (PairLoader, pairs), (RatedLoader, rated), (LabelledLoader, labelled),
    ]  # fmt: skip
    return [(kind, sets, weights) for kind, sets in kinds for weights in (None, [3.0, 1.0])]


@pytest.mark.parametrize(("kind", "sets", "weights"), loaders())
def test_resuming_changes_nothing_and_other_data_are_refused(kind: Any, sets: Any, weights: Any) -> None:
    def loader(sets: Any = sets, **options: Any) -> Any:
        return kind(sets, 2, 12, **{"weights": weights, "seed": 3, **options})

    whole = loader()
    batches = [next(whole) for _ in range(14)]
    for stop in (0, 1, 5):
        first = loader()
        for _ in range(stop):
            next(first)
        second = loader()
        second.load_state_dict(first.state_dict())
        assert all(same(next(second), b) for b in batches[stop:])
    assert not all(same(a, next(other)) for other in [loader(seed=4)] for a in batches)
    for other in (loader(seed=4), loader([sets[0], sets[0]]), loader(weights=[1.0, 1.0])):
        with pytest.raises(UserError, match="cannot resume the data order"):
            other.load_state_dict(whole.state_dict())
    assert batches[0].extra["task"].shape == (2,)


def test_labels_and_ratings_identify_the_data() -> None:
    examples = made([5, 6])
    for kind, item, others in ((RatedLoader, Rated, (True, False)), (LabelledLoader, Classified, (0, 1))):
        a, b = (kind([[item(e if item is Rated else e.ids, x) for e in examples]], 1, 12) for x in others)  # type: ignore
        with pytest.raises(UserError, match="data was"):
            a.load_state_dict(b.state_dict())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.data())
def test_a_mixture_takes_shares_and_repeats_no_sample_before_its_set_ends(lengths: list[int], data: Any) -> None:
    weights = data.draw(st.none() | st.lists(st.floats(0.1, 10), min_size=len(lengths), max_size=len(lengths)))
    order = Mixture(lengths, weights, seed=data.draw(st.integers(0, 5)))
    samples = order.take(0, 3 * order.epoch)
    assert samples == [s for k in range(3 * order.epoch) for s in order.take(k, 1)]
    for epoch in range(3):
        part = samples[epoch * order.epoch : (epoch + 1) * order.epoch]
        assert tuple(sum(s == k for s, _ in part) for k in range(len(lengths))) == order.quotas
    for k, size in enumerate(lengths):
        counts = Counter(i for s, i in samples if s == k)
        assert max(counts.values()) - min(counts[i] for i in range(size)) <= 1
        if weights is None:
            assert order.quotas[k] == size
        else:
            assert abs(order.quotas[k] - weights[k] / sum(weights) * order.epoch) <= max(1, len(lengths))


def test_settings_of_a_mixture_are_checked() -> None:
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(UserError, match="weights are"):
            Mixture([2, 3], weights)
    with pytest.raises(UserError, match="expected at least 1 each"):
        Mixture([2, 0])


def sequence(batch: Any, n: int, prefix: str = "") -> tuple[list[int], list[int]]:
    """Return the ids and the targets of a sequence of a batch."""
    extra = batch.extra
    where = extra[f"{prefix}sequence"] == n
    ids, targets = (extra["kl_ids"], extra["kl_targets"]) if prefix else (batch.ids, batch.targets)
    return ids[where].tolist(), targets[where].tolist()


def expected(example: Example) -> tuple[list[int], list[int]]:
    ids = example.ids.tolist()
    targets = [i if learned else IGNORE for i, learned in zip(ids[1:], example.learned[1:])]
    return ids, [*targets, IGNORE]


@pytest.mark.parametrize("packing", PACKING)
def test_a_batch_of_pairs(packing: Any) -> None:
    examples = made([9, 4, 7, 12, 3, 8])
    pairs = [Pair(a, b) for a, b in zip(examples[::2], examples[1::2])]
    loader = PairLoader([pairs], 2, 12, packing=packing)
    for batch in [next(loader) for _ in range(4)]:
        assert int(batch.extra["n"]) == 4 and batch.extra["n"].shape == ()
        for i, index in enumerate(batch.extra["index"].tolist()):
            assert sequence(batch, 2 * i) == expected(pairs[index].chosen)
            assert sequence(batch, 2 * i + 1) == expected(pairs[index].rejected)
        assert packing == "best-fit" or len(batch.ids) == 4
        assert batch.doc_ids is not None and torch.equal(batch.doc_ids, batch.extra["sequence"].int())
    with pytest.raises(ValueError, match="a sequence has 12 tokens, expected at most 11"):
        PairLoader([pairs], 2, 11)


def test_a_batch_of_ratings_has_the_completion_of_another_prompt() -> None:
    prompts, completions = ([1, 2], [1, 2], [3]), ([11], [12], [13, 14])
    items = [
        Rated(Example(np.array(p + c, np.uint32), np.array([False] * len(p) + [True] * len(c))), good)
        for p, c, good in zip(prompts, completions, (True, False, True))
    ]
    loader = RatedLoader([items], 3, 8)
    batch = next(loader)
    others = {0: [1, 2, 13, 14], 1: [1, 2, 13, 14], 2: [3, 12]}
    for i, index in enumerate(batch.extra["index"].tolist()):
        assert sequence(batch, i) == expected(items[index].example)
        ids, targets = sequence(batch, i, "kl_")
        assert ids == others[index]
        assert targets == [*(t if t > 10 else IGNORE for t in ids[1:]), IGNORE]
        assert bool(batch.extra["good"][i]) == items[index].good


@pytest.mark.parametrize("packing", PACKING)
@pytest.mark.parametrize("label", [2, 0.5, np.array])
def test_a_batch_of_labelled_texts(packing: Any, label: Any) -> None:
    items = [
        Classified(e.ids, (e.ids.astype(np.int64) * 2 if label is np.array else label)) for e in made([5, 3, 8, 2, 6])
    ]
    batch = next(LabelledLoader([items], 4, 9, packing=packing))
    labels, last = batch.extra["labels"], batch.extra["last"]
    for i, index in enumerate(batch.extra["index"].tolist()):
        assert sequence(batch, i)[0] == items[index].ids.tolist()
        assert int(batch.ids.ravel()[last[i]]) == items[index].ids[-1]
    if label is np.array:
        assert torch.equal(labels, torch.where(batch.extra["sequence"] < 0, IGNORE, batch.ids * 2))
    else:
        assert labels.dtype == (torch.float32 if isinstance(label, float) else torch.int64)
        assert labels.tolist() == [label] * 4
    assert (batch.targets == IGNORE).all()


def test_one_pass_in_order_and_a_part_of_it() -> None:
    items = [[Classified(e.ids, 0) for e in made([3] * 7)], [Classified(e.ids, 1) for e in made([3] * 3)]]
    loader = LabelledLoader(items, 4, 8, packing="none")
    batches = list(loader.once())
    assert [len(b.extra["index"]) for b in batches] == [4, 4, 2]
    assert [i for b in batches for i in b.extra["index"].tolist()] == list(range(10))
    assert [b.extra["index"].tolist() for b in loader.once(1)] == [[0, 2, 5, 7]]


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_packed_documents_do_not_see_each_other(positions: str) -> None:
    model = model_of(vocab_size=64, positions=positions, tied=positions == "learned")
    examples = made([9, 4, 7, 12, 3, 8])
    packed = next(iter(ExampleLoader([examples], 10, 16).once()))
    assert len(packed.ids) < len(examples)
    loss = model(packed.ids, packed.targets, doc_ids=packed.doc_ids, positions=packed.positions, reduction="sum")
    alone = torch.zeros(())
    for e in examples:
        ids, targets = (torch.tensor([x]) for x in expected(e))
        alone = alone + model(ids, targets, reduction="sum")
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
