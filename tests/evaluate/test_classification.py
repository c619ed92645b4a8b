"""Metrics equal SciPy's and scikit-learn's definitions, and undefined cases have the values that are documented."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastgpt.evaluate import classification as metrics


def draw(seed: int, n: int = 60, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes, n)
    return true, np.where(rng.random(n) < 0.6, true, rng.integers(0, classes, n))


@pytest.mark.parametrize("seed", range(5))
def test_classification_follows_its_definitions(seed: int) -> None:
    """Each figure is counted example by example, without the matrix."""
    true, predicted = draw(seed)
    matrix = metrics.confusion_matrix(true, predicted, 4)
    f1, shares = [], []
    for c in range(4):
        hit = sum(t == p == c for t, p in zip(true, predicted))
        precision, recall = hit / sum(predicted == c), hit / sum(true == c)
        got = {name: values[c] for name, values in metrics.per_class(matrix).items()}
        f1.append(2 * precision * recall / (precision + recall))
        shares.append(sum(true == c) / len(true))
        assert got == pytest.approx({"precision": precision, "recall": recall, "f1": f1[-1], "support": sum(true == c)})
    figures = metrics.classification(matrix)
    assert figures["accuracy"] == pytest.approx(np.mean(true == predicted))
    assert figures["macro_f1"] == pytest.approx(np.mean(f1))
    assert figures["weighted_f1"] == pytest.approx(np.dot(f1, shares))


@pytest.mark.parametrize("seed", range(5))
def test_matthews_is_the_correlation_of_indicators(seed: int) -> None:
    true, predicted = draw(seed, classes=2)
    expected = np.corrcoef(true, predicted)[0, 1]
    assert metrics.matthews(metrics.confusion_matrix(true, predicted, 2)) == pytest.approx(expected)
    true, predicted = draw(seed, classes=5)  # Gorodkin: summed covariances of one-hot columns
    x, y = np.eye(5)[true], np.eye(5)[predicted]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert metrics.matthews(metrics.confusion_matrix(true, predicted, 5)) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_classification_equals_scikit_learn(seed: int) -> None:
    learn = pytest.importorskip("sklearn.metrics")
    true, predicted = draw(seed, n=12, classes=6)  # so few that some class is often absent
    matrix = metrics.confusion_matrix(true, predicted, 6)
    assert np.array_equal(matrix, learn.confusion_matrix(true, predicted, labels=range(6)))
    expected = {
        "accuracy": learn.accuracy_score(true, predicted),
        "macro_f1": learn.f1_score(true, predicted, average="macro", zero_division=0),
        "weighted_f1": learn.f1_score(true, predicted, average="weighted", zero_division=0),
        "matthews": learn.matthews_corrcoef(true, predicted),
    }
    assert metrics.classification(matrix) == pytest.approx(expected)


def test_undefined_figures_of_classes_are_zero() -> None:
    matrix = metrics.confusion_matrix([0, 0, 1], [0, 0, 0], 3)  # 1 is never predicted, 2 is nowhere
    figures = metrics.per_class(matrix)
    assert figures["precision"].tolist() == [2 / 3, 0.0, 0.0] and figures["recall"].tolist() == [1.0, 0.0, 0.0]
    assert metrics.classification(matrix)["macro_f1"] == pytest.approx(0.8 / 2)  # over the two classes that are there
    assert metrics.matthews(matrix) == 0.0
    assert metrics.table(matrix, ["a", "b", "c"]).splitlines()[3].split() == ["c", "-", "-", "-", "0"]
    with pytest.raises(ValueError, match="counts no example"):
        metrics.classification(np.zeros((2, 2), np.int64))


def test_classes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 2\)"):
        metrics.confusion_matrix([0, 2], [0, 1], 2)
    with pytest.raises(ValueError, match="got 1 true and 2 predicted"):
        metrics.confusion_matrix([0], [0, 1], 2)


@pytest.mark.parametrize("seed", range(5))
def test_regression_equals_scipy(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 6, 40).astype(float)  # ties
    predicted = true + rng.integers(-2, 3, 40)
    got = metrics.regression(true, predicted)
    assert got["pearson"] == pytest.approx(stats.pearsonr(true, predicted).statistic)
    assert got["spearman"] == pytest.approx(stats.spearmanr(true, predicted).statistic)
    assert np.array_equal(metrics.ranks(predicted), stats.rankdata(predicted))
    assert got["mse"] == pytest.approx(np.mean((true - predicted) ** 2))
    assert got["mae"] == pytest.approx(np.mean(np.abs(true - predicted)))


def test_a_constant_side_has_correlation_zero() -> None:
    got = metrics.regression([1.0, 2.0, 4.0], [0.1, 0.1, 0.1])
    assert got["pearson"] == got["spearman"] == 0.0


def test_spans_of_tags() -> None:
    tags = ["B-per", "I-per", "O", "I-loc", "I-loc", "I-per", "B-per", "B-per"]
    assert metrics.spans(tags) == {(0, 2, "per"), (3, 5, "loc"), (5, 6, "per"), (6, 7, "per"), (7, 8, "per")}
    assert metrics.is_bio(["O", "B-x", "I-x"]) and not metrics.is_bio(["O", "noun"])


def test_span_f1_counts_whole_spans() -> None:
    true = [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]]
    predicted = [["B-a", "O", "O"], ["B-b", "O", "B-b"]]  # one span too short, one of another type, one right
    assert metrics.span_scores(true, predicted) == pytest.approx(
        {"span_precision": 1 / 3, "span_recall": 1 / 3, "span_f1": 1 / 3}
    )
    assert metrics.span_scores([["O"]], [["O"]])["span_f1"] == 0.0


def test_the_confusion_matrix_as_text() -> None:
    matrix = metrics.confusion_matrix([0, 0, 1, 1], [0, 1, 1, 1], 2)
    assert [line.split() for line in metrics.confusion_text(matrix, ["no", "yes"]).splitlines()] == [
        ["true", "\\", "predicted", "no", "yes"],
        ["no", "1", "1"],
        ["yes", "0", "2"],
    ]
