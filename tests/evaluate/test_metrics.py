"""Text metrics equal their libraries where those are right, and say where a tokenizer finds nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.evaluate.metrics import METRICS, OPTIONS, f1, normalized, score

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

ENGLISH = (
    ["The cat sat on the mat near the open door.", "He bought three books and read them all at once.", "No."],
    ["A cat sat on the mat by the open door.", "He bought three old books, and read them all.", "No, never."],
)
CHINESE = (["今天天气很好", "我们去公园散步"], ["今天天气不好", "我们去公园跑步"])


def test_corpus_metrics_are_those_of_sacrebleu() -> None:
    from sacrebleu.metrics import BLEU, CHRF, TER

    predictions, references = ENGLISH
    for metric, scorer in (("bleu", BLEU()), ("chrf", CHRF()), ("chrf++", CHRF(word_order=2)), ("ter", TER())):
        assert score(metric, predictions, references).value == scorer.corpus_score(predictions, [references]).score
    several = [[references[0], "The cat sat."], [references[1]], [references[2]]]
    columns = [references, ["The cat sat.", None, None]]
    assert score("bleu", predictions, several).value == BLEU().corpus_score(predictions, columns).score


def test_short_identical_texts_are_perfect_with_every_metric() -> None:
    texts = ["a", "b c", "d e f"]
    for metric in set(METRICS) - {"bertscore", "rouge2"}:  # one word has no bigram: rouge2 is 0
        found = score(metric, texts, texts)
        perfect = {"ter": 0.0, "bleu": 100.0, "chrf": 100.0, "chrf++": 100.0}.get(metric, 1.0)
        assert found.value == pytest.approx(perfect) and found.items == pytest.approx([perfect] * 3)


@pytest.mark.parametrize("metric", ["rouge1", "rouge2", "rougeL", "rougeLsum"])
def test_rouge_says_where_it_finds_no_word(metric: str) -> None:
    found = score(metric, CHINESE[0], CHINESE[0])
    assert found.value == 0 and "ignores letters in 4 of 4 texts and finds nothing in 4" in found.notes[0]
    assert "tokenizer: unicode" in found.notes[0]
    for tokenizer in ("unicode", "char"):
        right = score(metric, CHINESE[0], CHINESE[0], tokenizer=tokenizer)
        assert right.value == 1 and not [note for note in right.notes if "tokenizer" in note]
    mixed = score(metric, ["今天 good work"], ["明天 good work"])
    assert mixed.value == 1 and "ignores letters in 2 of 2 texts and finds nothing in 0" in mixed.notes[0]


def test_characters_of_chinese_are_words_of_the_unicode_tokenizer() -> None:
    # 5 of 6 and 6 of 7 characters are right
    assert score("rouge1", *CHINESE, tokenizer="unicode").items == pytest.approx([5 / 6, 6 / 7])
    assert score("f1", *CHINESE, tokenizer="unicode").items == pytest.approx([5 / 6, 6 / 7])
    assert score("f1", *CHINESE).items == [0, 0] and "tokenizer: unicode" in score("f1", *CHINESE).notes[0]
    zh = score("bleu", CHINESE[0], CHINESE[0], tokenizer="zh")
    assert zh.value == pytest.approx(100) and not zh.notes and "zh or unicode" in score("bleu", *CHINESE).notes[0]
    assert score("rouge1", ["Ο γάτος"], ["ο ΓΆΤΟΣ κοιμάται"], tokenizer="unicode").value == pytest.approx(4 / 5)


def test_sentences_of_rouge_lsum() -> None:
    texts, swapped = ["One two three. Four five six."], ["Four five six. One two three."]
    plain, split = score("rougeLsum", texts, swapped), score("rougeLsum", texts, swapped, sentences="punctuation")
    assert plain.value == score("rougeL", texts, swapped).value == pytest.approx(0.5)
    assert split.value == 1 and not split.notes and "no text has one" in plain.notes[0]
    lines = score("rougeLsum", [texts[0].replace(". ", ".\n")], [swapped[0].replace(". ", ".\n")])
    assert lines.value == 1 and not lines.notes


def test_words_as_squad() -> None:
    assert normalized("The  Cat, a dog!") == "cat dog"
    assert score("exact_match", ["The cat!"], [["dog", "cat"]]).value == 1
    assert score("exact_match", ["The cat!"], ["cat"], normalize=False).value == 0
    assert f1("the cat sat", ["cat sat down", "no"]) == pytest.approx(2 * 2 / 5)
    assert f1("the", ["a"]) == 1 and f1("", ["cat"]) == 0  # no words on both sides, and on one


def test_standard_errors() -> None:
    predictions, references = (side * 20 for side in ENGLISH)
    rouge = score("rouge1", predictions, references)
    assert rouge.stderr == pytest.approx(np.std(rouge.items, ddof=1) / 60**0.5)
    bleu = score("bleu", predictions, references)
    assert bleu == score("bleu", predictions, references)  # the samples are the same each time
    from sacrebleu.metrics import BLEU

    rng, values = np.random.default_rng(7), []
    for _ in range(200):
        rows = rng.integers(0, 60, 60)
        drawn = [[side[i] for i in rows] for side in (predictions, references)]
        values.append(BLEU(effective_order=True).corpus_score(drawn[0], [drawn[1]]).score)
    assert bleu.stderr == pytest.approx(np.std(values), rel=0.25)  # the relative error of 200 samples is 0.05
    assert score("bleu", ENGLISH[0][:1], ENGLISH[1][:1]).stderr is None


@pytest.mark.parametrize(
    ("metric", "options", "error"),
    [
        ("rogue1", {}, r"'rogue1', expected one of bleu.*did you mean rouge1"),
        ("chrf", {"tokenizer": "zh"}, "metric chrf has no option 'tokenizer', expected one of: lowercase"),
        ("rouge1", {"tokenizer": "zh"}, "tokenizer of rouge1 is 'zh', expected one of default, unicode, char"),
        ("rouge1", {"tokenizer": "unicode", "stemmer": True}, "stemmer has no effect"),
        ("rougeLsum", {"sentences": "lines"}, "'lines', expected newline or punctuation"),
        ("bertscore", {}, "needs the option model"),
        ("bertscore", {"model": "/nowhere", "num_layers": 1}, "expected a folder with config.json"),
    ],
)
def test_wrong_settings(metric: str, options: dict[str, Any], error: str) -> None:
    with pytest.raises(UserError, match=error):
        score(metric, ["a"], ["a"], **options)


def test_wrong_texts() -> None:
    with pytest.raises(UserError, match="got 1 prediction and 2 references"):
        score("f1", ["a"], ["a", "b"])
    with pytest.raises(UserError, match="got 0 predictions"):
        score("f1", [], [])
    with pytest.raises(UserError, match="item 2 has no reference"):
        score("f1", ["a", "b"], ["a", []])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("sacrebleu", "rouge_score", "bert_score"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "config.json").write_text("{}")
    for metric, extra in (("bleu", "eval"), ("rougeL", "eval"), ("bertscore", "bertscore")):
        options = {"model": str(tmp_path), "num_layers": 1} if metric == "bertscore" else {}
        with pytest.raises(UserError, match=rf"pip install fastgpt\[{extra}\]"):
            score(metric, ["a"], ["a"], **options)
    assert set(OPTIONS) == set(METRICS)


@pytest.mark.skipif(importlib.util.find_spec("bert_score") is None, reason="bert-score is not installed")
def test_bertscore_with_a_model_from_a_folder(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "sat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path)
    pairs = ["a cat sat", "dog"], ["a cat sat", ["a cat", "dog"]]
    with pytest.raises(UserError, match="no model_max_length"):
        score("bertscore", *pairs, model=tmp_path, num_layers=2)
    tokenizer.model_max_length = 16
    tokenizer.save_pretrained(tmp_path)
    found = score("bertscore", *pairs, model=tmp_path, num_layers=2)
    assert found.items == pytest.approx([1, 1], abs=1e-5)
