"""The adapter against the harness's own `hf` model on the exported folder."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece_models import MODELS, sentencepiece_folder

import fastgpt.evaluate
from fastgpt.convert import exporting
from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, train_tokenizer
from fastgpt.data.load import load_tokenizer
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.target import open_target
from fastgpt.inference import Request
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

TEXT = "the cat sat on the mat; the dog's 12 cats ran  to it\nand on. "
CONTEXT = 48
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": dict(norm="rms", activation="swiglu", mlp_width=48, positions="rope", tied=False, n_kv_heads=2),
}
CHAT = """{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}\
{% if add_generation_prompt %}>{% endif %}"""


def tokenizer_for(name: str, folder: Path) -> Tokenizer:
    """Return a tokenizer of GPT-2's kind, or one of SentencePiece's kind that puts <s> first."""
    if name == "gpt2":
        tokenizer = train_tokenizer([TEXT * 20], 280)
        tokenizer.companions = {"chat_template.jinja": CHAT}
        return tokenizer
    sentencepiece_folder(folder, **MODELS["bpe, as Llama 2"])
    settings = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


class Pair:
    """A run, its export, and a model of lm_eval over each."""

    def __init__(self, name: str, folder: Path) -> None:
        from lm_eval.models.huggingface import HFLM

        from fastgpt.evaluate.adapter import HarnessModel

        tokenizer = tokenizer_for(name, folder)
        shape: Any = dict(n_layers=2, n_heads=4, width=32, vocab_size=tokenizer.n_vocab, block_size=CONTEXT)
        c = ModelConfig(**shape, **SHAPES[name], init_std=0.3)
        model = GPT(c, generator=torch.Generator().manual_seed(2))
        if name == "llama":  # bytes are unlikely: transformers decodes those that form no character in its own way
            model.head.weight.data[3:259] = 0
        state = {"progress": {"tokens": 640}, "model": dataclasses.asdict(c), "tokenizer": tokenizer.fingerprint}
        run = folder / "run"
        checkpoint.save(run, 5, model.state_dict(), {}, {**state, "config": {}, "loader": {}}, keep=0)
        tokenizer.save(run / "tokenizer.json")
        assert exporting.main([str(run), "--out", str(folder / "hf")]) == 0
        self.name, self.folder = name, folder
        self.ours = HarnessModel(Engine(open_target(str(run), device="cpu"), batch_tokens=128))
        self.theirs = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, a, i) for i, a in enumerate(arguments)]  # type: ignore[arg-type]


def margin(pair: Pair, ids: list[int], last: int) -> float:
    """Return the smallest distance in fp64 between the two largest logits before each of the last ids."""
    model = pair.ours.engine.model
    exact = GPT(model.config).double().eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        z = exact(torch.tensor([ids[:-1][-CONTEXT:]]))[0, -last:].topk(2).values
    return float((z[:, 0] - z[:, 1]).min())


def test_log_likelihoods_are_those_of_the_harness(pair: Pair) -> None:
    shots = TEXT + "the dog sat. "
    contexts = [
        "the cat",
        "the cat ",
        "",
        shots + "the",
        shots + "the mat",
        TEXT * 4,
        "日本語 ünï \U0001f600",
        "<|endoftext|>on",
    ]
    endings = [" sat", " ran to it and on", "\nx", " 漢字"]
    texts = [(c, e) for c in contexts for e in endings]
    given, before = requests("loglikelihood", texts), pair.ours.truncated
    ours, theirs = pair.ours.loglikelihood(given), pair.theirs.loglikelihood(given, disable_tqdm=True)
    assert pair.ours.truncated - before == sum(
        any(len(c) + len(e) > CONTEXT + 1 for c, e in [encoded(pair, context, ending) for ending in endings])
        for context in contexts
    )
    clear = 0
    for (logprob, greedy), (their_logprob, their_greedy), (context, ending) in zip(ours, theirs, texts):
        assert abs(logprob - their_logprob) < 1e-4
        before_it, after = encoded(pair, context, ending)
        if margin(pair, before_it + after, len(after)) > 1e-3:
            clear += 1
            assert greedy == their_greedy
    assert clear > len(texts) // 2


def encoded(pair: Pair, context: str, ending: str) -> tuple[list[int], list[int]]:
    """Return a request as the harness encodes it."""
    if context:
        return pair.theirs._encode_pair(context, ending)  # type: ignore[no-any-return]
    return [pair.theirs.prefix_token_id], pair.theirs.tok_encode(ending, add_special_tokens=False)


def test_continuations_that_cannot_be_scored_are_errors(pair: Pair) -> None:
    for texts, tokens in ((("the ca", ""), 0), (("the", " cat" * 99), 99)):
        with pytest.raises(UserError, match=f"of {texts[0]!r} has {tokens}.* of its own, expected 1 to 48"):
            pair.ours.loglikelihood(requests("loglikelihood", [texts]))


def test_a_context_of_spaces_is_an_empty_one(pair: Pair) -> None:
    one, other = pair.ours.loglikelihood(requests("loglikelihood", [(" ", "cat"), ("", " cat")]))
    assert one == pytest.approx(other)


def test_the_most_likely_continuation_is_greedy(pair: Pair) -> None:
    context = pair.ours.tok_encode("the cat")
    (result,) = pair.ours.engine.generate([Request(context, 3, temperature=0, ignore_eos=True)])
    wrong = [*result.ids[:2], (result.ids[2] + 1) % pair.ours.engine.model.vocab_size]
    right, other = pair.ours.engine.loglikelihoods([(context, result.ids), (context, wrong)])
    assert right.greedy and not other.greedy


def test_rolling_log_likelihoods_are_those_of_the_harness(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", TEXT, TEXT * 5, "", "日本語 <|endoftext|> ünï", "x"]
    given = requests("loglikelihood_rolling", [(text,) for text in texts])
    monkeypatch.setattr(pair.theirs, "add_bos_token", False)  # else it scores the <s> of the text after its own
    theirs = pair.theirs.loglikelihood_rolling(given, disable_tqdm=True)
    ours = pair.ours.loglikelihood_rolling(given)
    assert all(type(nats) is float for nats in ours)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    (nats, tokens), (_, none) = pair.ours.engine.rolling([texts[2], ""])
    assert abs(nats - theirs[2]) < 1e-4 and none == 0
    assert tokens == len(pair.ours.text_tokenizer.encode(texts[2]))


UNTIL: list[dict[str, Any]] = [
    {"max_gen_toks": 12},
    {"until": "a", "max_gen_toks": 12},
    {"until": ["zzzz", "s"], "max_gen_toks": 24},
    {"until": ["e"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0, "num_beams": 1},
]


def test_generated_texts_are_those_of_the_harness(pair: Pair) -> None:
    contexts = ["the cat", TEXT, TEXT * 3, "on the mat; 日本"]
    given = requests("generate_until", [(c, dict(settings)) for c in contexts for settings in UNTIL])
    before = pair.ours.truncated
    ours, theirs = pair.ours.generate_until(given), pair.theirs.generate_until(given, disable_tqdm=True)
    assert pair.ours.truncated > before
    clear = 0
    for request, our_text, their_text in zip(given, ours, theirs):
        context, settings = request.args
        ids = pair.ours.tok_encode(context)[-(CONTEXT - settings["max_gen_toks"]) :]
        (result,) = pair.ours.engine.generate([Request(ids, settings["max_gen_toks"], temperature=0)])
        if margin(pair, ids + result.ids, len(result.ids)) > 1e-3:
            clear += 1
            assert our_text == their_text
    assert clear > len(given) // 2


def test_a_stop_text_may_span_tokens(pair: Pair) -> None:
    (plain,) = pair.ours.generate_until(requests("generate_until", [("the cat", {"max_gen_toks": 12})]))
    stop = plain[3:6]
    settings = {"max_gen_toks": 12, "until": [stop]}
    (text,) = pair.ours.generate_until(requests("generate_until", [("the cat", settings)]))
    assert len(stop) == 3 and text == plain[: plain.index(stop)]


def test_sampled_texts_differ_and_repeat(pair: Pair) -> None:
    given = requests("generate_until", [("the cat", {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0})] * 3)
    texts = pair.ours.generate_until(given)
    assert len(set(texts)) > 1 and texts == pair.ours.generate_until(given)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_beams": 4}, "num_beams, expected only do_sample, "),
        ({"max_gen_toks": 48}, "max_gen_toks is 48, expected less than the model's context, 48"),
        (
            {"do_sample": True, "temperature": 1.0, "top_p": 0.0, "max_gen_toks": 2},
            "top_p is 0.0, expected more than 0",
        ),
    ],
)
def test_settings_that_do_nothing_are_errors(pair: Pair, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pair.ours.generate_until(requests("generate_until", [("the cat", settings)]))


def test_chat_templates_are_applied_as_by_the_harness(pair: Pair) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer"}]
    if pair.name != "gpt2":
        assert pair.ours.chat_template(True) is None
        with pytest.raises(UserError, match="has no chat template"):
            pair.ours.apply_chat_template(turns)
        return
    for ask, messages in ((True, turns[:1]), (False, turns)):
        ours = pair.ours.apply_chat_template(messages, add_generation_prompt=ask)
        assert ours == pair.theirs.apply_chat_template(messages, add_generation_prompt=ask)
        assert pair.ours.tok_encode(ours) == pair.theirs.tok_encode(ours)
    assert pair.ours.chat_template(True) == pair.theirs.chat_template(True) == CHAT
    assert pair.ours.tokenizer_name == pair.ours.text_tokenizer.fingerprint


def test_a_missing_harness_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "fastgpt.evaluate.adapter", raising=False)
    with pytest.raises(UserError, match=r"expected `pip install fastgpt\[eval\]`"):
        importlib.import_module("fastgpt.evaluate.adapter")


def test_the_harness_is_imported_when_it_is_needed() -> None:
    for path in Path(fastgpt.evaluate.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        names = {a.name for n in body if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in body if isinstance(n, ast.ImportFrom)}
        assert not [name for name in names if name.startswith("lm_eval") or name.endswith("evaluate.adapter")], path
