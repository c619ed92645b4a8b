"""Tasks with a head: losses by their formulas, packed or not, validation, and heads that learn."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import model_of
from torch import Tensor

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE
from fastgpt.data.batch import Batch
from fastgpt.evaluate import classification as metrics
from fastgpt.finetune.classify import Classify, Pairwise, Regress, Tag
from fastgpt.finetune.heads import HeadConfig, attach, sequence_scores, token_scores
from fastgpt.finetune.labels import balanced
from fastgpt.models.gpt import GPT

PAD = 7
THREE = ("bad", "fair", "good")
BIO = ("O", "B-x", "I-x")


def texts(n: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 50, (3 + i % 5,), generator=g) for i in range(n)]


def rows(sequences: list[Tensor], per_row: int, **labels: Any) -> Batch:
    """Pack `per_row` sequences into each row of 16 tokens; absent ones at the end get the index -1."""
    b = -(-len(sequences) // per_row)
    ids, number = torch.full((b, 16), PAD), torch.full((b, 16), -1)
    positions = torch.zeros(b, 16, dtype=torch.int64)
    for i, s in enumerate(sequences):
        row = i // per_row
        at = int((number[row] >= 0).sum())
        ids[row, at : at + len(s)], number[row, at : at + len(s)] = s, i
        positions[row, at : at + len(s)] = torch.arange(len(s))
    extra = {"sequence": number, "index": torch.arange(len(sequences)), **labels}
    return Batch(ids, torch.full_like(ids, IGNORE), number.int(), positions, extra)


def headed(kind: Any, labels: tuple[str, ...] = ()) -> tuple[GPT, HeadConfig]:
    model, head = model_of(), HeadConfig(kind, labels, pad_id=PAD)
    attach(model, head, torch.Generator().manual_seed(1))
    return model, head


@torch.no_grad()
def alone(model: GPT, head: HeadConfig, sequences: list[Tensor]) -> Tensor:
    """Return the scores of sequences, each read in a batch of its own: (n, L)."""
    each = [sequence_scores(model, head, s[None], torch.zeros(1, len(s), dtype=torch.int64), 1)[0] for s in sequences]
    return torch.stack(each)


@pytest.mark.parametrize("per_row", [1, 3])
def test_classification_is_weighted_cross_entropy_of_each_sequence(per_row: int) -> None:
    model, head = headed("classification", THREE)
    labels = torch.tensor([2, 0, 1, 1, 2])
    batch = rows(texts(5), per_row, labels=labels)
    batch.extra["index"][3] = -1  # padding
    task = Classify(head, weights=(1.0, 3.0, 0.5), label_smoothing=0.1)
    kept = torch.tensor([0, 1, 2, 4])
    scores = alone(model, head, texts(5))[kept]
    weight = torch.tensor(task.weights)
    expected = F.cross_entropy(scores, labels[kept], weight=weight, label_smoothing=0.1, reduction="sum")
    got = task.loss(model, batch)
    assert torch.allclose(got[0], expected, rtol=1e-6)
    assert int(got[1].detach()) == int((scores.argmax(1) == labels[kept]).sum()) and int(task.counted(batch)) == 4
    assert got.dtype == torch.float32


def test_weights_are_a_factor_of_each_example() -> None:
    model, head = headed("classification", THREE)
    batch = rows(texts(2), 2, labels=torch.tensor([1, 1]))
    plain, weighted = Classify(head).loss(model, batch), Classify(head, weights=(1, 4.0, 1)).loss(model, batch)
    assert torch.allclose(weighted[0], 4 * plain[0])  # not divided by the weights


def test_regression_is_squared_error_and_padding_gives_no_gradient() -> None:
    model, head = headed("regression")
    values = torch.tensor([0.5, -2.0, math.nan, 1.0])
    batch = rows(texts(4), 2, labels=values)
    batch.extra["index"][2] = -1
    kept = torch.tensor([0, 1, 3])
    error = alone(model, head, texts(4))[kept, 0] - values[kept]
    got = Regress(head).loss(model, batch)
    assert torch.allclose(got, torch.stack([(error**2).sum(), error.abs().sum()]), rtol=1e-6)
    got[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tags_score_the_labelled_tokens() -> None:
    model, head = headed("tags", BIO)
    sequences = texts(4)
    batch = rows(sequences, 2)
    labels = torch.where(batch.extra["sequence"] >= 0, batch.ids % 3, IGNORE)
    labels[0, 1] = IGNORE
    batch = batch._replace(extra={**batch.extra, "labels": labels})
    z = token_scores(model, batch.ids, doc_ids=batch.doc_ids, positions=batch.positions)
    expected = F.cross_entropy(z[labels != IGNORE], labels[labels != IGNORE], reduction="sum")
    task = Tag(head)
    got = task.loss(model, batch)
    assert torch.allclose(got[0], expected, rtol=1e-6)
    assert int(task.counted(batch)) == sum(map(len, sequences)) - 1


def test_pairs_are_bradley_terry_with_a_margin() -> None:
    model, head = headed("reward")
    sequences = texts(6)
    batch = rows(sequences, 3, index=torch.tensor([4, -1, 5]))
    s = alone(model, head, sequences).view(3, 2)[[0, 2]]
    ahead = s[:, 0] - s[:, 1]
    got = Pairwise(head).loss(model, batch)
    expected = torch.stack([-torch.sigmoid(ahead).log().sum(), (ahead > 0).float().sum(), ahead.sum()])
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6) and int(Pairwise(head).counted(batch)) == 2
    margin = torch.tensor([1.0, 9.0, -2.0])
    batch = batch._replace(extra={**batch.extra, "margin": margin})
    got = Pairwise(head).loss(model, batch)
    assert torch.allclose(got[0], -torch.sigmoid(ahead - margin[[0, 2]]).log().sum(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["classification", "regression", "tags", "reward"])
def test_a_sum_over_micro_batches_is_the_sum_over_one(kind: Any) -> None:
    tasks: dict[str, Any] = {"classification": Classify, "regression": Regress, "tags": Tag, "reward": Pairwise}
    model, head = headed(kind, BIO if kind in ("classification", "tags") else ())
    task, sequences = tasks[kind](head), texts(8)

    def batch(part: list[Tensor]) -> Batch:
        made = rows(part, 2)
        first = torch.stack([s[0] % 3 for s in part])
        labels = torch.where(made.extra["sequence"] >= 0, made.ids % 3, IGNORE) if kind == "tags" else first
        index = {"index": torch.arange(len(part) // 2)} if kind == "reward" else {}
        return made._replace(extra={**made.extra, "labels": labels, **index})

    whole, halves = batch(sequences), [batch(sequences[:4]), batch(sequences[4:])]
    assert torch.allclose(task.loss(model, whole), sum(task.loss(model, h) for h in halves), rtol=1e-5)
    assert task.counted(whole) == sum(task.counted(h) for h in halves)


def test_validation_gives_the_mean_loss_and_the_metrics() -> None:
    model, head = headed("classification", THREE)
    labels = torch.tensor([2, 0, 1, 1, 2, 0])
    batches = [rows(texts(4), 2, labels=labels[:4]), rows(texts(6)[4:], 2, labels=labels[4:])]
    task = Classify(head, lambda n: batches[:n])
    model.train()
    got = task.validate(SimpleNamespace(model=model), None)
    assert model.training and list(got)[0] == "val_loss"
    scores = alone(model, head, texts(6))
    assert got["val_loss"] == pytest.approx(float(F.cross_entropy(scores, labels)), rel=1e-6)
    matrix = metrics.confusion_matrix(labels, scores.argmax(1), 3)
    assert {k: v for k, v in got.items() if k != "val_loss"} == pytest.approx(metrics.classification(matrix))
    assert metrics.confusion_text(matrix, THREE) in task.report
    first = task.validate(SimpleNamespace(model=model), 1)
    assert first["val_loss"] == pytest.approx(float(F.cross_entropy(scores[:4], labels[:4])), rel=1e-6)
    with pytest.raises(UserError, match="has no example"):
        Classify(head).validate(SimpleNamespace(model=model), None)


def test_validation_of_tags_scores_spans_within_their_text() -> None:
    model, head = headed("tags", BIO)
    batch = rows(texts(4), 2)
    predicted = token_scores(model, batch.ids, doc_ids=batch.doc_ids, positions=batch.positions).argmax(-1)
    number = batch.extra["sequence"]
    labels = torch.where(number >= 0, predicted, IGNORE)
    for i in range(4):  # a span at the end of each text and one at the start of the next, found as one if joined
        places = (number == i).flatten().nonzero().flatten()
        labels.view(-1)[places[[0, -1]]] = torch.tensor([2, 1])
    batch = batch._replace(extra={**batch.extra, "labels": labels})
    got = Tag(head, lambda n: [batch]).validate(SimpleNamespace(model=model), None)
    assert got["accuracy"] == pytest.approx(float((predicted == labels)[number >= 0].float().mean()))
    true, made = ([[BIO[int(c)] for c in side[number == i]] for i in range(4)] for side in (labels, predicted))
    scores = metrics.span_scores(true, made)
    assert {name: got[name] for name in scores} == scores
    assert scores != metrics.span_scores([sum(true, [])], [sum(made, [])])


def test_validation_of_regression_and_pairs() -> None:
    model, head = headed("regression")
    values = torch.tensor([0.5, -2.0, 3.0, 1.0])
    batch = rows(texts(5), 2, labels=torch.cat([values, torch.tensor([9.0])]), index=torch.tensor([0, 1, 2, 3, -1]))
    got = Regress(head, lambda n: [batch]).validate(SimpleNamespace(model=model), None)
    expected = metrics.regression(values, alone(model, head, texts(4)))
    assert got == pytest.approx({"val_loss": expected["mse"], **expected}, rel=1e-5)
    model, head = headed("reward")
    batch = rows(texts(4), 2, index=torch.arange(2))
    s = alone(model, head, texts(4)).view(2, 2)
    got = Pairwise(head, lambda n: [batch]).validate(SimpleNamespace(model=model), None)
    assert got["accuracy"] == float((s[:, 0] > s[:, 1]).float().mean())


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_head_learns_which_token_begins_a_text(pooling: Any) -> None:
    """The first token decides, so the score needs attention: a bag of words would not do."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(8, 12, (320, 6), generator=g)
    labels = drawn[:, 0] - 8
    model = model_of(vocab_size=16, vocab_multiple=16).float()
    model.init_weights(g)
    head = HeadConfig("classification", ("a", "b", "c", "d"), pooling, PAD)
    attach(model, head, g)
    batch = rows(list(drawn[:256]), 2, labels=labels[:256])
    held_out = rows(list(drawn[256:]), 2, labels=labels[256:])
    task, optimizer = Classify(head, lambda n: [held_out]), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        (task.loss(model, batch)[0] / task.counted(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert task.validate(SimpleNamespace(model=model), None)["accuracy"] > 0.9


def test_balanced_weights() -> None:
    weights = balanced([0, 0, 0, 1], ("a", "b"))
    assert weights == [4 / 6, 2.0] and np.dot(weights, [3, 1]) == pytest.approx(4)  # the mean over examples is 1
    with pytest.raises(UserError, match="label 'c' has no example"):
        balanced([0, 1], ("a", "b", "c"))


def test_settings_that_do_not_fit_the_head() -> None:
    head = HeadConfig("classification", THREE)
    with pytest.raises(UserError, match="2 weights, expected 3"):
        Classify(head, weights=(1.0, 2.0))
    with pytest.raises(UserError, match="finite weights of 0 or more"):
        Classify(head, weights=(1.0, -2.0, 1.0))
    with pytest.raises(UserError, match="label_smoothing is 1, expected 0 to less than 1"):
        Classify(head, label_smoothing=1.0)
    with pytest.raises(UserError, match="the head is for classification, expected one for regression"):
        Regress(head)
