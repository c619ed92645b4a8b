"""Texts of grammars: what a random model writes fits, with any tokenizer, and what cannot be enforced is refused."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance")

import torch
from sentencepiece_models import MODELS, sentencepiece_folder
from small_models import byte_tokenizer

from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.data.published import open_tokenizer
from fastgpt.evaluate.suite_schema import text_fits
from fastgpt.inference import Generator, Grammar, Request
from fastgpt.inference.matcher import Grammars, Matcher, pack
from fastgpt.inference.tables import unpack
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT

TEXT = 'the cat sat on the mat; ünïcödé ran to it\nand on. {"name": "cat", "age": 12}, [true, null] '
KINDS = ("bytes", "trained", "gpt2", *MODELS)
EXPRESSIONS = (
    "[a-z]{1,8} [0-9]{2,4}",
    r"(yes|no|maybe)(, (yes|no|maybe)){0,3}\.",
    r"\d{4}-\d{2}-\d{2}",
    "[^x]{3,6}",
    "ünï(cö|dé){1,3}",
    "(?i)cat",
    "^a+b$",
    "",
)


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind == "bytes":
        return byte_tokenizer()
    if kind == "trained":
        return train_tokenizer([TEXT * 20], 320, ["<|im_end|>", "<|user|>"])
    if kind == "gpt2":
        return open_tokenizer("gpt2")
    sentencepiece_folder(folder, **MODELS[kind])
    return load_tokenizer(folder)


def model_of(tokenizer: Tokenizer, context: int = 512, seed: int = 0) -> GPT:
    """Return a random model; its vocabulary is a little larger than the tokenizer's."""
    config = ModelConfig(n_layers=1, n_heads=1, width=8, vocab_size=tokenizer.n_vocab + 3, block_size=context)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).eval()


def generator_of(kind: str, folder: Path) -> Generator:
    tokenizer = tokenizer_of(kind, folder)
    return Generator(model_of(tokenizer), tokenizer)


def blanks(tokenizer: Tokenizer) -> dict[int, float]:
    """Return a bias against tokens of blanks, which a random model would add wherever JSON has room for some."""
    texts = ((i, tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab))
    return {i: -8.0 for i, text in texts if text.startswith((b" ", b"\t", b"\r", b"\n"))}


def some_schema(draw: random.Random, depth: int = 0) -> dict[str, Any]:
    """Return a random schema whose texts are not long."""
    kinds = ["integer", "string", "enum", "boolean", "null", "number"]
    kind = draw.choice(kinds if depth == 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "enum":
        return {"enum": draw.sample(["a", "b c", 'q"\\', "ü", 1, 2.5, None, True, [1], {"k": "v"}], 3)}
    if kind == "integer":
        low = draw.randint(-200, 100)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": draw.choice([0.5, 10])}
    if kind == "string":
        return draw.choice([{"type": "string", "maxLength": 4, "minLength": draw.randint(0, 4)},
                            {"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}])  # fmt: skip
    if kind == "anyOf":
        return {"anyOf": [some_schema(draw, depth + 1) for _ in range(2)]}
    if kind == "array":
        return {"type": "array", "items": some_schema(draw, depth + 1), "minItems": draw.randint(0, 2), "maxItems": 2}
    if kind == "object":
        named = {name: some_schema(draw, depth + 1) for name in draw.sample(["name", "age", "the cat", "ü\n"], 2)}
        required = draw.sample(sorted(named), draw.randint(0, 2))
        return {"type": "object", "properties": named, "required": required, "additionalProperties": False}
    return {"type": kind}


@pytest.mark.parametrize(
    "kind, count",
    [*((kind, 4) for kind in KINDS if kind != "gpt2"), *(pytest.param(k, 40, marks=pytest.mark.slow) for k in KINDS)],
)
def test_what_a_model_writes_fits(kind: str, count: int, tmp_path: Path) -> None:
    """Whole texts fit; one that max_new_tokens cuts is valid up to there."""
    generator, draw = generator_of(kind, tmp_path), random.Random(count)
    tokenizer: Any = generator.tokenizer
    if "no fallback" in kind:
        schemas, expressions = [], ["(the|cat| ){1,5}", "[a-z]{1,8}"]
    else:
        schemas, expressions = [some_schema(draw) for _ in range(count)], list(EXPRESSIONS)
    bias, more = blanks(tokenizer), dict[str, Any](max_new_tokens=200 if count < 10 else 400, temperature=1.5)
    asked = [Grammar("json_schema", json.dumps(schema)) for schema in schemas]
    asked += [Grammar("regex", expression) for expression in expressions]
    requests = [Request("the", seed=i, grammar=g, logit_bias=bias, **more) for i, g in enumerate(asked)]
    results = generator.generate(requests)
    numbers = [r for r, s in zip(results, schemas) if '"number"' in json.dumps(s)]  # as many digits as it likes
    for result, schema in zip(results, schemas):
        assert result in numbers or result.finish_reason in ("stop", "eos"), (schema, result)
        assert result.finish_reason == "length" or text_fits(result.text, schema), (schema, result.text)
    for result, expression in zip(results[len(schemas) :], expressions):
        assert result.finish_reason in ("stop", "eos") and re.fullmatch(expression, result.text), result
    specials = set(tokenizer.specials.values()) - set(tokenizer.ends)
    assert not any(specials & set(r.ids) for r in results)


@pytest.mark.parametrize("kind", ["trained", "bpe, as Gemma"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    generator = generator_of(kind, tmp_path)
    choices = ["yes", "no\nway", "ü (x) #\\", "the cat"]
    lark = 'start: "the" (" cat" | " mat")+ "."'
    asked = [Grammar.of_choices(choices), Grammar("lark", lark), Grammar("json_object")]
    for seed in range(3):
        choice, sentence, some = generator.generate([Request("a", 120, seed=seed, grammar=g) for g in asked])
        assert choice.text in choices and choice.finish_reason == "stop"
        assert re.fullmatch(r"the( cat| mat)+\.", sentence.text)
        assert some.text.startswith("{") and (some.finish_reason == "length" or isinstance(json.loads(some.text), dict))


def allowed(matcher: Matcher, tokenizer: Tokenizer) -> set[int]:
    return set(unpack(matcher.allowed[None], tokenizer.n_vocab)[0].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("kind", [k if k != "gpt2" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_special_tokens_are_for_ends_alone(kind: str, tmp_path: Path) -> None:
    """Every ordinary token that begins a text may come; the end comes only where the grammar may end."""
    tokenizer = tokenizer_of(kind, tmp_path)
    grammars = Grammars(tokenizer, tokenizer.ends, tokenizer.n_vocab + 40)
    specials = set(tokenizer.specials.values())
    anything = grammars.start(Grammar("regex", "(?s).*"))
    found = allowed(anything, tokenizer)
    assert found & specials == set(tokenizer.ends)
    whole = {i for i in set(range(tokenizer.n_vocab)) - specials if _is_text(tokenizer.decode_bytes([i]))}
    assert whole <= found
    assert not unpack(anything.allowed[None], tokenizer.n_vocab + 40)[0, tokenizer.n_vocab :].any()
    some = grammars.start(Grammar("regex", "(the|at){2}"))
    assert not allowed(some, tokenizer) & specials and not some.complete
    for special in (name for name in specials - set(tokenizer.ends)):
        named = grammars.start(Grammar("lark", f'start: "a" | <[{special}]>'))
        assert special not in allowed(named, tokenizer)


def _is_text(data: bytes) -> bool:
    try:
        return bool(data.decode())
    except UnicodeDecodeError:
        return False


def test_a_text_without_alternatives_has_the_tokens_of_the_tokenizer() -> None:
    """The longest token first would be another way to cut it, which the model has not seen in training."""
    tokenizer = train_tokenizer(["bcd\n" * 100 + "abc\n" * 50], 270)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("abcd")] == ["a", "bcd"]
    (longest,) = tokenizer.encode("abc")
    bias = {int(longest): 50.0}
    (result,) = Generator(model_of(tokenizer), tokenizer).generate(
        [Request("x", 9, grammar=Grammar.of_choices(["abcd"]), logit_bias=bias)]
    )
    assert result.ids == tokenizer.encode("abcd").tolist()


def test_a_special_stop_string_ends_where_the_grammar_may() -> None:
    """A chat model ends with a mark of its template, which is not among the tokenizer's ends."""
    tokenizer = train_tokenizer([TEXT], 280, ["<|im_end|>"])
    mark = tokenizer.specials["<|im_end|>"]
    grammars = Grammars(tokenizer, tokenizer.ends, tokenizer.n_vocab)
    matcher = grammars.start(Grammar("regex", "[ab]{2,}"), [mark])
    assert mark not in allowed(matcher, tokenizer)
    for _ in range(2):
        matcher.accept(int(tokenizer.encode("a")[0]))
    assert {mark, tokenizer.eot} <= allowed(matcher, tokenizer)
    generator = Generator(model_of(tokenizer), tokenizer)
    bias = {mark: 50.0, tokenizer.eot: -50.0}
    request = Request("a", 30, grammar=Grammar("regex", "[ab]{2,}"), stop=["<|im_end|>"], logit_bias=bias)
    (result,) = generator.generate([request])
    assert re.fullmatch("[ab]{2}", result.text) and result.finish_reason == "stop" and result.ids[-1] == mark


def test_other_rows_and_logprobs_are_as_without_a_grammar() -> None:
    tokenizer = train_tokenizer([TEXT], 300)
    generator = Generator(model_of(tokenizer).double(), tokenizer)
    plain = [Request("the", 20, seed=i, logprobs=2, top_k=30) for i in range(3)]
    alone = generator.generate(plain)
    constrained = Request("the", 30, seed=1, logprobs=2, grammar=Grammar("regex", "[0-9]{12}"))
    *others, mine = generator.generate([*plain, constrained])
    for found, expected in zip(others, alone):
        assert found.ids == expected.ids and found.logprobs == pytest.approx(expected.logprobs, abs=1e-9)
    scored = generator.score([tokenizer.prompt("the") + mine.ids])[0][-len(mine.ids) :]
    assert mine.logprobs == pytest.approx(scored, abs=1e-9) and re.fullmatch("[0-9]{12}", mine.text)


def test_a_text_that_is_cut_says_so() -> None:
    tokenizer = byte_tokenizer()
    generator = Generator(model_of(tokenizer, 16), tokenizer)  # so that the context slides
    endless = Grammar("regex", "(ab)+c{40}")
    cut, stopped = generator.generate(
        [Request("x", 30, grammar=endless), Request("x", 30, grammar=endless, stop=["b"])]
    )
    assert cut.finish_reason == "length" and len(cut.ids) == 30 and re.fullmatch("(ab)+a?c*", cut.text)
    assert (stopped.text, stopped.finish_reason) == ("a", "stop")


TOO_MUCH = Grammar("regex", "(((a{100}){100}){100})")
REFUSED = {
    "keyword": (Grammar("json_schema", '{"not": {}}'), 'json_schema cannot be used .*"not"'),
    "type": (Grammar("json_schema", '{"type": "banana"}'), "Invalid type: banana"),
    "no JSON": (Grammar("json_schema", "{"), "json_schema cannot be used"),
    "nothing": (Grammar("json_schema", ""), "json_schema cannot be used"),
    "a list": (Grammar("json_schema", "[]"), "json_schema cannot be used"),
    "reference": (Grammar("json_schema", '{"$ref": "http://localhost/x"}'), "json_schema cannot be used"),
    "leniency": (Grammar("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}'), '"not"'),
    "impossible": (Grammar("json_schema", '{"enum": []}'), "Unsatisfiable"),
    "deep": (Grammar("json_schema", '{"items": ' * 300 + "{}" + "}" * 300), "recursion limit"),
    "class": (Grammar("regex", "["), "regex cannot be used .unclosed character class"),
    "look-around": (Grammar("regex", "(?=a)b"), "look-around"),
    "surrogate": (Grammar("regex", "\ud800"), "regex cannot be used"),
    "rule": (Grammar("lark", "start: b"), "lark cannot be used .*unknown name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_one_sentence(name: str) -> None:
    grammar, expected = REFUSED[name]
    tokenizer = byte_tokenizer()
    generator = Generator(model_of(tokenizer, 32), tokenizer)
    for _ in range(2):  # the second answer is the one that was kept
        with pytest.raises(ValueError, match=expected) as error:
            generator.add(Request("a", grammar=grammar))
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not generator.busy


def test_wrong_grammars_and_requests() -> None:
    for kind, text, expected in [
        ("yaml", "", "kind is 'yaml'"),
        ("choice", "[]", "choice has no texts"),
        ("choice", "[1]", "choice has no texts"),
        ("json_object", "{}", "json_object has a text"),
        ("regex", "a" * 40_000, "has 40,000 characters, expected at most 32,768"),
    ]:
        with pytest.raises(ValueError, match=expected):
            Grammar(kind, text)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ignore_eos is True, expected False beside a grammar"):
        Request("a", ignore_eos=True, grammar=Grammar("json_object"))
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="a grammar is a text, expected a tokenizer"):
        Generator(model_of(tokenizer, 32)).add(Request([1], grammar=Grammar("json_object")))
    with pytest.raises(ValueError, match="no end-of-text token"):
        Generator(model_of(tokenizer, 32), tokenizer, eos=[]).add(Request([1], grammar=Grammar("json_object")))


def test_characters_that_a_tokenizer_lacks_are_refused(tmp_path: Path) -> None:
    generator = generator_of("bpe, no fallback", tmp_path)
    with pytest.raises(ValueError, match="no token of the tokenizer continues the text"):
        generator.add(Request("the", grammar=Grammar("regex", "é+")))
    with pytest.raises(ValueError, match="the text cannot be continued"):
        generator.generate([Request("the", grammar=Grammar("json_object"))])


def test_a_grammar_beyond_the_limits_ends_its_request_alone() -> None:
    tokenizer = byte_tokenizer()
    generator = Generator(model_of(tokenizer, 32), tokenizer)
    number, other = generator.add(Request("a", 10, grammar=TOO_MUCH)), generator.add(Request("a", 10))
    found = [piece for _ in range(12) for piece in generator.step()]
    (failed,) = [piece for piece in found if piece.error is not None]
    assert failed.number == number and "the text cannot be continued" in str(failed.error)
    assert [piece.result for piece in found if piece.number == other][-1] is not None
    with pytest.raises(ValueError, match="cannot be continued"):
        generator.generate([Request("a", 10, grammar=TOO_MUCH)])
    assert not generator.busy


def test_bits_are_packed_lowest_first() -> None:
    flags = torch.rand(5 * 32, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack(pack(flags)[None], 150)[0], flags[:150])
    assert pack(torch.ones(32, dtype=torch.bool)).tolist() == [-1]
