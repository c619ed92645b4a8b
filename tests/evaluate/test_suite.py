"""Suites: figures by hand, and one clear error for everything that can be wrong with one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_rows import CHATML, chat_tokenizer
from small_models import byte_tokenizer, model_that_says
from suite_files import items_of, run_part, texts_of, tiny_target, write_rows, write_suite

from fastgpt.core.errors import UserError
from fastgpt.evaluate.results import ratio
from fastgpt.evaluate.suite import encode_pairs, suite_of
from fastgpt.evaluate.suite_file import open_suite, read_suite
from fastgpt.evaluate.suite_schema import check_schema, fits, text_fits
from fastgpt.evaluate.suite_settings import KINDS
from fastgpt.evaluate.target import Target
from fastgpt.inference.chat import Template


def logprob(context: str, continuation: str) -> float:
    """Return the log-probability of a continuation whose first token does not depend on the context."""
    target = tiny_target()
    before, after = (target.tokenizer.encode(text).tolist() for text in (context, continuation))
    with torch.no_grad():
        z = target.model(torch.tensor([[*before, *after]]))[0].log_softmax(-1)
    return sum(float(z[len(before) + i - 1, token]) for i, token in enumerate(after))


def test_choice_takes_the_most_likely_by_hand(tmp_path: Path) -> None:
    items = items_of("choice", 40)
    results = run_part(suite_of(write_suite(tmp_path, "choice", items, prompt="Q: {question}\nA:")))
    acc, norm = [], []
    for item in items:
        prompt = f"Q: {item['question']}\nA:"
        found = [logprob(prompt, f" {choice}") for choice in item["choices"]]
        acc.append(float(np.argmax(found) == item["answer"]))
        norm.append(float(np.argmax([v / len(c) for v, c in zip(found, item["choices"])]) == item["answer"]))
    assert [i.values for i in results.items] == [acc, norm] and acc != norm
    figure = results.figure("my-choice", "acc")
    assert figure is not None and figure.value == pytest.approx(sum(acc) / 40) and figure.stderr is not None
    assert figure.chance == pytest.approx((20 / 3 + 20 / 4) / 40)
    assert len(set(results.items[0].ids)) == 40 and results.truncated == {"my-choice": 0}


def test_a_cloze_is_right_if_greedy_decoding_writes_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    ids = [int(i) for i in tokenizer.encode("ab cat")]
    target = Target(model_that_says([*ids[1:], 0], tokenizer.n_vocab), tokenizer, "says", Path(), {})
    items = [{"text": "ab", "answer": "cat"}, {"text": "ab", "answer": "cow"}]
    results = run_part(suite_of(write_suite(tmp_path, "cloze", items)), target)
    assert results.items[0].values == [1, 0]
    perplexity = results.figure("my-cloze", "perplexity")
    assert perplexity is not None and perplexity.higher_is_better is False and perplexity.value > 1


def test_answers_are_compared_as_squad(tmp_path: Path) -> None:
    path = write_suite(tmp_path, "qa", max_new_tokens=6)
    text = texts_of(path)[0]
    items = [{**items_of("qa", 1)[0], "answers": ["no", text.strip()]}, items_of("qa", 2)[1]]
    results = run_part(suite_of(write_suite(tmp_path, "qa", items, max_new_tokens=6)))
    assert [i.metric for i in results.items] == ["exact_match", "f1"]
    assert results.items[0].values == [1, 0]
    assert run_part(suite_of(path), limit=2).figures[0].n == 2


def test_macro_f1_and_the_majority(tmp_path: Path) -> None:
    items = [{"text": "the cat", "label": label} for label in ["a", "b", "b", "b"]]
    results = run_part(suite_of(write_suite(tmp_path, "classification", items, labels=["a", "b"])))
    a_wins = logprob("the cat\nLabel:", " a") > logprob("the cat\nLabel:", " b")
    shares = (0.25, (2 * 1 / 5) / 2) if a_wins else (0.75, (2 * 3 / 7) / 2)  # of F1, one class has 0
    assert [f.value for f in results.figures] == pytest.approx(shares)
    assert "always answering 'b' has acc 0.7500" in results.notes[0]


def test_perplexity_is_over_the_sums(tmp_path: Path) -> None:
    items = items_of("perplexity", 5)
    results = run_part(suite_of(write_suite(tmp_path, "perplexity", items)))
    target = tiny_target()
    nats = []
    for item in items:
        ids = [target.tokenizer.eot, *target.tokenizer.encode(item["text"]).tolist()]
        assert len(ids) <= 97  # one window
        with torch.no_grad():
            z = target.model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        nats.append(-float(z.gather(1, torch.tensor(ids[1:])[:, None]).sum()))
    size = sum(len(item["text"].encode()) for item in items)
    figure = results.figure("my-perplexity", "bits_per_byte")
    assert figure is not None and figure.value == pytest.approx(sum(nats) / size / math.log(2))
    items_, weights = results.items[0].values, results.items[0].weights
    assert figure.value == pytest.approx(np.average(items_, weights=weights))
    assert items_[1] == pytest.approx(nats[1] / len(items[1]["text"]) / math.log(2))


def test_the_error_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    size = rng.integers(10, 100, 400).astype(np.float64)
    nats = size * 2 + rng.normal(0, 10, 400)
    value, error = ratio(nats, size)
    rows = rng.integers(0, 400, (2000, 400))
    assert value == pytest.approx(nats.sum() / size.sum())
    assert error == pytest.approx(np.std(nats[rows].sum(1) / size[rows].sum(1)), rel=0.1)
    assert ratio(np.ones(1), np.ones(1)) == (1.0, None)


def test_patterns_and_schemas_judge(tmp_path: Path) -> None:
    part = suite_of(write_suite(tmp_path, "generation", [{"prompt": "a"}], judge={"regex": "^\\d+$", "full": True}))
    assert part.grade(" 12\n", (), "\\d+") == {"pass": 1} and part.grade("12 cats", (), "\\d+") == {"pass": 0}
    open_part = suite_of(write_suite(tmp_path, "generation", [{"prompt": "a", "regex": "ca.s"}]))
    assert open_part.grade("12 cats", (), "ca.s") == {"pass": 1}
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "required": ["n"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for given in (schema, "schema.json"):
        part = suite_of(write_suite(tmp_path, "generation", [{"prompt": "a"}], judge={"schema": given}))
        assert part.grade('{"n": 2}', (), "") == {"valid": 1} and part.grade('{"n": 0}', (), "") == {"valid": 0}


def test_schemas() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"type": "string", "minLength": 2, "pattern": "^[a-z]+$"}, "tags": {"type": "array"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    check_schema(schema)
    for value, right in (
        ({"name": "ab"}, True),
        ({"name": "a"}, False),
        ({"name": "AB"}, False),
        ({"name": "ab", "tags": 1}, False),
        ({"name": "ab", "more": 1}, False),
        ({"tags": []}, False),
        ([], False),
    ):
        assert fits(value, schema) == right, value
    assert fits(True, {"enum": ["yes", True]}) and not fits(1, {"enum": [True]}) and not fits(True, {"type": "integer"})
    assert (
        fits(3.0, {"type": "integer"}) and fits(1, {"const": 1.0}) and not fits("5", {"maximum": 4, "type": "number"})
    )
    assert fits(None, {"anyOf": [{"type": "null"}, {"type": "string"}]})
    assert not fits([1, "a"], {"items": {"type": "number"}}) and not fits([1, 2], {"maxItems": 1})
    assert text_fits('```json\n{"a": 1}\n```', {"type": "object"}) and not text_fits("Sure! {}", {"type": "object"})
    for wrong, error in (({"minimun": 1}, "did you mean minimum"), ({"type": "text"}, "schema.type has a value")):
        with pytest.raises(UserError, match=error):
            check_schema({"properties": {"n": wrong}} if "minimun" in wrong else wrong)


def test_pairs_are_divided_as_the_harness_does() -> None:
    tokenizer = tiny_target().tokenizer
    for context, continuation in (("the cat", " sees"), ("the cat ", "sees"), ("th", "e cat"), ("", " cat")):
        ((before, after),) = encode_pairs(tokenizer, context, [continuation], start=7)
        assert before == (tokenizer.prompt(context.rstrip()) if context else [7])
        left = "" if not context else tokenizer.decode(before)
        if context != "th":  # "the" is one token: the harness takes as many tokens as "th" has away
            assert left + tokenizer.decode(after) == context + continuation


def test_an_answer_that_joins_the_prompt_in_one_token_is_scored(tmp_path: Path) -> None:
    """Without a delimiter the harness has no token left to score."""
    tokenizer = tiny_target().tokenizer
    assert len(tokenizer.encode("the")) == 1
    assert encode_pairs(tokenizer, "th", ["e"]) == [(tokenizer.prompt("th"), tokenizer.encode("e").tolist())]
    items = [{"question": "th", "choices": ["e", "ee"], "answer": 0}]
    assert run_part(suite_of(write_suite(tmp_path, "choice", items, delimiter=""))).figures[0].n == 1


def test_an_item_in_yaml_and_in_jsonl_is_the_same(tmp_path: Path) -> None:
    for kind in KINDS:
        settings: dict[str, Any] = {"judge": {"regex": "a"}} if kind == "generation" else {}
        beside = open_suite(write_suite(tmp_path, kind, **settings))
        inside = open_suite(write_suite(tmp_path, kind, inline=True, **settings))
        assert [i.id for i in beside.items] == [i.id for i in inside.items]
        assert [i.prompt for i in beside.items] == [i.prompt for i in inside.items]
        assert beside.items[2].place.endswith("items.jsonl, line 3")


@pytest.mark.parametrize(
    ("kind", "item", "error"),
    [
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": 2}, "answer is 2, expected a choice from 0 to 1"),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": "c"}, "answer is none of the choices"),
        ("choice", {"question": "q", "choices": ["a", "b"]}, "answer is missing"),
        ("choice", {"question": "q", "choices": ["a", ""], "answer": 0}, r"choices\[1\] is an empty text"),
        ("choice", {"question": "q", "choices": ["a"], "answer": 0}, "choices has one text"),
        ("choice", {"qestion": "q", "choices": ["a", "b"], "answer": 0}, r"key question is missing.*did you mean"),
        ("choice", ["q"], "the item is a list, expected keys and values"),
        ("classification", {"text": "t", "label": "goood"}, "label is none of the suite's labels .did you mean good"),
        ("cloze", {"text": "t", "answer": True}, "answer is true or false, expected a text"),
        ("qa", {"question": "q", "answers": []}, "answers is a list, expected a text or several"),
        ("span", {"question": "q", "answers": ["a"]}, "key context is missing"),
        ("perplexity", {"txt": "t"}, r"text is missing .did you mean txt"),
        ("generation", {"prompt": "p"}, "regex is missing, and the suite has no judge"),
        ("generation", {"prompt": "p", "regex": "("}, "regex is not valid"),
        ("cloze", {"text": " ", "answer": "a"}, "the prompt is white space alone"),
    ],
)
def test_wrong_items(kind: str, item: Any, error: str, tmp_path: Path) -> None:
    secret = {"choice": "choices"}.get(kind, "zzz")
    path = write_suite(tmp_path, kind, [*items_of(kind, 1), item, item])
    with pytest.raises(UserError, match=rf"items.jsonl, line 2: .*{error}.*and 1 more error") as raised:
        open_suite(path)
    assert len(read_suite(path).problems) == 2 and len(read_suite(path).items) == 1
    assert secret not in str(raised.value) or secret == "choices"


@pytest.mark.parametrize(
    ("kind", "settings", "error"),
    [
        ("choices", {}, "kind is 'choices', expected one of choice, classification"),
        ("choice", {"labels": ["a", "b"]}, "line 3: labels has no effect in a suite of kind choice"),
        ("perplexity", {"shots": 1, "examples": []}, "has no effect in a suite of kind perplexity"),
        ("choice", {"shots": 2}, "shots is 2, expected a pool of examples"),
        ("choice", {"shots": 2, "examples": []}, "shots is 2, but the pool of examples has 0"),
        ("choice", {"examples": "pool.jsonl"}, "examples has no effect, because shots is 0"),
        ("choice", {"shots": -1}, "shots is -1, expected 0 or more"),
        ("classification", {"labels": ["a"]}, "labels has 1, expected at least two"),
        ("qa", {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ("qa", {"tokenizer": "zh"}, "tokenizer is 'zh', expected one of default, unicode, char"),
        ("qa", {"propmt": "x"}, r"line 3: propmt is not a key .did you mean prompt"),
        ("choice", {"prompt": "{question:3}"}, "brace that names no key"),
        ("generation", {"judge": {"regex": "a", "schema": {}}}, "got regex and schema, expected one of"),
        ("generation", {"judge": {"regex": "("}}, "regex is not valid"),
        ("generation", {"judge": {"schema": {"typ": "a"}}}, "did you mean type"),
        ("generation", {"judge": {"schema": "no.json"}}, "schema no.json cannot be read"),
        ("generation", {"judge": {"model": {"url": "here", "model": "m"}}}, "url is 'here', expected one such as"),
        ("choice", {"items": "no.jsonl"}, "items is .*no.jsonl, which cannot be read: No such file"),
        ("choice", {"items": {"a": 1}}, "items is not a file, expected a JSONL file or a list"),
    ],
)
def test_wrong_settings(kind: str, settings: dict[str, Any], error: str, tmp_path: Path) -> None:
    path = write_suite(tmp_path, "choice", items_of("choice", 2) if kind != "generation" else [{"prompt": "p"}])
    content = {"suite": "s", "kind": kind, **settings}
    content.setdefault("items", "items.jsonl")
    path.write_text(json.dumps(content, indent=0).replace("{\n", "{", 1))
    with pytest.raises(UserError, match=error) as raised:
        open_suite(path)
    assert str(raised.value).startswith(str(tmp_path))


def test_values_that_yaml_refuses(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for value in ("2019-13-45", "!!python/object:os.path {}"):
        path.write_text(f"suite: s\nkind: cloze\nitems:\n- {{text: a, answer: b, day: {value}}}\n")
        with pytest.raises(UserError, match="not valid YAML"):
            open_suite(path)


def test_an_example_is_not_an_item_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "pool.jsonl", items_of("choice", 3, first=11))
    path = write_suite(tmp_path, "choice", examples="pool.jsonl", shots=2)
    with pytest.raises(UserError, match=r"items.jsonl, line 12: the item is also the example in .*pool.jsonl, line 1"):
        open_suite(path)


def test_what_the_model_cannot_do_is_an_error_before_it_runs(tmp_path: Path) -> None:
    part = suite_of(write_suite(tmp_path, "qa", max_new_tokens=96))
    with pytest.raises(UserError, match="max_new_tokens is 96, expected less than the context of 96 tokens of tiny"):
        part.check(tiny_target())
    items = [{"text": "t", "answer": "the cat sees " * 100}]
    with pytest.raises(UserError, match=r"items.jsonl, line 1: an answer has \d+ tokens"):
        suite_of(write_suite(tmp_path, "cloze", items)).check(tiny_target())
    with pytest.raises(UserError, match="expected a YAML file with settings that names it"):
        suite_of(tmp_path / "items.jsonl")
    (tmp_path / "items.jsonl").write_text("")
    with pytest.raises(UserError, match="has no items"):
        suite_of(write_suite(tmp_path, "cloze", []))


def test_a_prompt_is_sent_in_the_chat_template(tmp_path: Path) -> None:
    """The model says something only where the template's prompt ends."""
    tokenizer = chat_tokenizer()
    template = Template(CHATML, eos_token="<|endoftext|>")
    prompt = tokenizer.encode(template.render([{"role": "user", "content": "the cat?"}]), specials=True).tolist()
    reply = tokenizer.encode("the dog<|im_end|>", specials=True).tolist()
    says = [*[0] * (len(prompt) - 1), *reply, *[0] * 20]
    target = Target(model_that_says(says, tokenizer.n_vocab), tokenizer, "says", Path(), {}, template)
    items = [{"prompt": "the cat?", "regex": "^the dog$"}]
    path = write_suite(tmp_path, "generation", items, chat=True, max_new_tokens=8)
    assert run_part(suite_of(path), target).figures[0].value == 1
    with pytest.raises(UserError, match="has `chat: true`, but tiny has no chat template"):
        suite_of(path).check(tiny_target())
    long = [{"prompt": "the cat? " * 99, "regex": "a"}]
    with pytest.raises(UserError, match=r"items.jsonl, line 1: the message needs \d+ tokens"):
        suite_of(write_suite(tmp_path, "generation", long, chat=True, max_new_tokens=8)).check(target)
    with pytest.raises(UserError, match="line 3: chat has no effect in a suite of kind choice"):
        suite_of(write_suite(tmp_path, "choice", chat=True))


def test_prompts_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    long = " ".join(item["text"] for item in items_of("classification", 12))
    items = [{"text": long, "label": "good"}, *items_of("classification", 2)]
    assert run_part(suite_of(write_suite(tmp_path, "classification", items))).truncated == {"my-classification": 1}
    items = [{"question": long, "answer": "a"}, *items_of("qa", 2)]
    assert run_part(suite_of(write_suite(tmp_path, "qa", items, max_new_tokens=4))).truncated == {"my-qa": 1}
