"""Bias in the data and the quality classifier: counts of terms, drops by a scorer, counterfactual balancing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data.clean import Cleaner, clean_all
from fastgpt.data.clean.bias import Counterfactual
from fastgpt.data.clean.classifier import Classifier, auc, train
from fastgpt.data.clean.features import Features
from fastgpt.data.clean.terms import WordList
from fastgpt.data.document import Document


def test_word_list_counts_words_phrases_and_shared_terms(tmp_path: Path) -> None:
    path = tmp_path / "terms.txt"
    path.write_text("a: old people, she  # comment\nb: She\nplain\n", encoding="utf-8")
    terms = WordList.of(str(path), "groups")
    assert terms.categories == ["a", "b", "terms"]
    assert terms.counts(Features("She said old people, OLD PEOPLE and older people. Plain!")).tolist() == [3, 1, 1]
    assert terms.counts(Features("É she")).tolist() == [1, 1, 0]
    assert terms.counts(Features("")).tolist() == [0, 0, 0]
    path.write_text("a: one two three four five\n", encoding="utf-8")
    with pytest.raises(UserError, match="has 5 words, expected 1 to 4"):
        WordList.of(str(path), "groups")
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="no terms"):
        WordList.of(str(path), "groups")


def test_rates_before_and_after() -> None:
    documents = [
        Document("She met an idiot", "0", "x"),
        Document("IDIOT IDIOT", "1", "x"),
        Document("he ran", "2", "y"),
    ]
    _, tally = clean_all(Cleaner.of({"spam": True, "bias": True}), documents)
    assert tally.terms["x"] == {
        "before": {"words": 6, "group.gender.female": 1, "toxic.insult": 3},
        "after": {"words": 4, "group.gender.female": 1, "toxic.insult": 1},
    }
    assert tally.rates()["y"]["before"] == {"group.gender.male": 500_000.0}


def test_toxic_terms_drop_by_threshold() -> None:
    cleaner = Cleaner.of({"bias": {"max_toxic_ratio": 0.1}})
    assert cleaner.process(Document("idiot " + "word " * 9, "0", "x")).dropped_by is None
    assert cleaner.process(Document("idiot " + "word " * 8, "0", "x")).dropped_by == "toxic_terms"


def test_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer.py").write_text("def length(text):\n    return 1 / (len(text) - 3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    cleaner = Cleaner.of({"scorer": {"function": "my_scorer:length", "max_score": 0.5}})
    assert cleaner.process(Document("abcde", "0", "x")).dropped_by is None
    assert cleaner.process(Document("abcd", "0", "x")).dropped_by == "scorer"
    with pytest.raises(UserError, match="scorer my_scorer:length failed on document 7: ZeroDivisionError"):
        cleaner.process(Document("abc", "7", "x"))


SWAPS = [
    ("He told his sister that she is a KING.", "She told her brother that he is a QUEEN."),
    ("I saw her. I saw her and left.", "I saw him. I saw him and left."),
    ("That is her book, not hers.", "That is his book, not his."),
    ("The theory of heat; shed his hers", "The theory of heat; shed her his"),
    ("Mr Smith's wife", "Ms Smith's husband"),
]


@pytest.mark.parametrize("text, expected", SWAPS)
def test_counterfactual_swaps(text: str, expected: str) -> None:
    outcome = Cleaner.of({"counterfactual": {"share": 1.0}}).process(Document(text, "0", "x", {"title": "t"}))
    assert outcome.document == Document(expected, "0", "x", {"title": "t", "counterfactual": "gender"})
    assert outcome.changes["counterfactual.documents"] == 1
    again = Cleaner.of({"counterfactual": {"share": 1.0}}).process(outcome.document)
    assert again.document == outcome.document


def test_counterfactual_share_depends_on_seed_and_id_alone() -> None:
    ids = [f"a#{i}" for i in range(4000)]

    def chosen(share: float, seed: int = 0) -> set[str]:
        rule = Counterfactual(share=share, seed=seed)
        return {i for i in ids if rule.chosen(i)}

    some = chosen(0.3, seed=1)
    assert abs(len(some) / 4000 - 0.3) < 5 * (0.3 * 0.7 / 4000) ** 0.5
    assert some < chosen(0.5, seed=1)
    assert some != chosen(0.3, seed=2)
    assert chosen(0.0) == set() and chosen(1.0) == set(ids)


def test_counterfactual_pairs_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("origin: french german\n", encoding="utf-8")
    cleaner = Cleaner.of({"counterfactual": {"share": 1.0, "pairs": str(path)}})
    document = cleaner.process(Document("A French king met a German.", "0", "x")).document
    assert document == Document("A German king met a French.", "0", "x", {"counterfactual": "origin"})
    path.write_text("origin: french\n", encoding="utf-8")
    with pytest.raises(UserError, match="'french', expected two words, such as 'he she'"):
        Cleaner.of({"counterfactual": {"pairs": str(path)}})


def samples(words: list[str], n: int, seed: int) -> list[str]:
    """Return n texts of 40 words, a quarter of them from `words`."""
    rng = random.Random(seed)
    common = [f"common{i}" for i in range(200)]
    return [" ".join(rng.choice(words if rng.random() < 0.25 else common) for _ in range(40)) for _ in range(n)]


GOOD, BAD = samples([f"good{i}" for i in range(50)], 200, 1), samples([f"bad{i}" for i in range(50)], 100, 2)


def test_classifier_learns_is_saved_and_drops(tmp_path: Path) -> None:
    training = train(GOOD, BAD, bits=14)
    assert training.accuracy > 0.95 and training.auc > 0.99
    assert training.held_out == (40, 20)
    path = tmp_path / "q.npz"
    training.classifier.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["q.npz"]
    loaded = Classifier.load(path)
    assert [loaded.score(Features(t)) for t in GOOD[:5]] == [training.classifier.score(Features(t)) for t in GOOD[:5]]
    cleaner = Cleaner.of({"classifier": {"path": str(path)}})
    kept, tally = clean_all(cleaner, [Document(t, str(i), "x") for i, t in enumerate(GOOD + BAD)])
    assert tally.dropped["classifier"] + len(kept) == 300
    assert len(kept) == pytest.approx(200, abs=6)
    same = train(GOOD[::-1], BAD, bits=14).classifier
    assert np.array_equal(same.weights, training.classifier.weights) and same.bias == training.classifier.bias


def test_classifier_cannot_learn_where_there_is_no_difference() -> None:
    texts = samples(["x"], 300, 3)
    assert abs(train(texts[:150], texts[150:], bits=14).auc - 0.5) < 0.25  # 3.3 standard errors, for 30 against 30


def test_classifier_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="classifier: 1 different bad samples, expected at least 10"):
        train(GOOD, ["x"] * 100)
    path = tmp_path / "x.npz"
    for content in (b"", b"PK\x03\x04", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a classifier, expected a file of"):
            Classifier.load(path)
    np.savez(path, settings=np.array([99, 4, 1]), weights=np.zeros(16), bias=0.0)
    with pytest.raises(UserError, match="classifier of format 99, expected 1; train it again"):
        Classifier.load(path)


def test_auc() -> None:
    assert auc(np.array([2.0, 3.0]), np.array([0.0, 1.0])) == 1
    assert auc(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.5
    assert auc(np.array([0.0]), np.array([1.0, 2.0])) == 0
