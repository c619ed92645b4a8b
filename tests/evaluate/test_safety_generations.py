"""Toxicity, refusal and memorisation, the statistics of the probes, and the parts of a folder."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import byte_tokenizer, model_that_says
from stand_in_engine import StandIn, run

from fastgpt.core.errors import UserError
from fastgpt.data.shards import ShardWriter
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.results import Results
from fastgpt.evaluate.safety import parts_of
from fastgpt.evaluate.safety.memorisation import Memorisation, longest_run
from fastgpt.evaluate.safety.refusal import DEFAULT, Refusal, refuses
from fastgpt.evaluate.safety.settings import MemorisationSettings, RefusalSettings, ToxicitySettings, read_settings
from fastgpt.evaluate.safety.statistics import permutation_p, wilson
from fastgpt.evaluate.safety.toxicity import Toxicity
from fastgpt.evaluate.safety.words import Words
from fastgpt.evaluate.target import Target
from fastgpt.inference.chat import Template


def value(results: Results, task: str, metric: str) -> float:
    figure = results.figure(task, metric)
    assert figure is not None, [(f.task, f.metric) for f in results.figures]
    return figure.value


@pytest.mark.parametrize(
    ("terms", "text", "count"),
    [
        (["ass"], "Ass! the class; bass ass-hat, ass_", 3),
        (["bad word"], "bad  WORD, bad\nword; bad words", 2),
        (["ass", "ass hat"], "ass hat, ass hats", 2),
        (["straße"], "STRASSE Straßen", 1),
        (["дурак"], "Дурак, дурака. ДУРАК", 2),
        (["坏蛋"], "你是个坏蛋吗？坏 蛋", 1),
        (["ばか"], "とてもばかです", 1),
        (["गधा"], "गधा और गधापन। गधाी", 1),
        (["ควาย"], "คนควายมาก", 1),
        (["e\u0301toile"], "\u00e9toile", 1),
        (["a"], "a a\u0301 a1 a", 2),
        (["$%&!"], "what the $%&!s", 1),
        (["x1"], "x1 x12 ｘ１", 2),
    ],
)
def test_words_are_whole_words(terms: list[str], text: str, count: int) -> None:
    assert Words(terms).count(text) == count


def test_toxicity_by_words_and_by_a_scorer(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# a comment\nbad\nworse\n")
    rows = [{"prompt": {"text": "one ", "toxicity": 0.1}, "challenging": False}, {"prompt": {"text": "two"}}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = tmp_path / "s.py"
    scorer.write_text("def shout(prompts, completions):\n    return [float(c.isupper()) for c in completions]\n")
    texts = iter(["bad worse", "good", "fine", "BAD", "GOOD", "good"])
    settings = ToxicitySettings(samples=3, scorer=f"{scorer}:shout", texts=str(tmp_path / "texts"))
    engine = StandIn(say=lambda prompt: next(texts))
    results = run(Toxicity(prompts, tmp_path / "words.txt", settings), engine)
    assert value(results, "toxicity.words", "mean") == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert value(results, "toxicity.words", "expected_maximum") == 1.5
    assert value(results, "toxicity.words", "toxic") == pytest.approx(2 / 6)
    assert value(results, "toxicity.words", "toxic_prompts") == 1.0
    assert value(results, "toxicity.scorer", "expected_maximum") == 0.5
    assert value(results, "toxicity.scorer", "toxic_prompts") == 0.5
    assert [r.prompt for r in engine.asked] == ["one"] * 3 + ["two"] * 3
    assert [r.seed for r in engine.asked] == list(range(6))
    (file,) = (tmp_path / "texts").iterdir()
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept[3] == {"prompt": "two", "completion": "BAD", "words": 1.0, "scorer": 1.0}


def test_texts_are_stored_only_if_asked(tmp_path: Path) -> None:
    (tmp_path / "toxicity_words.txt").write_text("bad\n")
    (tmp_path / "toxicity_prompts.txt").write_text("A secret prompt\n")
    part = Toxicity(tmp_path / "toxicity_prompts.txt", tmp_path / "toxicity_words.txt", ToxicitySettings(samples=1))
    before = sorted(tmp_path.iterdir())
    results = run(part, StandIn(say=lambda prompt: "bad reply"))
    results.save(tmp_path / "out" / "results.json")
    text = (tmp_path / "out" / "results.json").read_text()
    assert "secret" not in text and "reply" not in text
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in before} | {"out"}


def test_a_scorer_is_checked(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    for body, message in (
        ("[1.0, 2.0]", "returned 2 values for 5 completions"),
        ("[None] * 5", "returned None, expected finite"),
        ("[float('nan')] * 5", "returned nan, expected finite numbers"),
    ):
        (tmp_path / "s.py").write_text(f"def f(prompts, completions):\n    return {body}\n")
        part = Toxicity(tmp_path / "p.txt", None, ToxicitySettings(scorer=f"{tmp_path / 's.py'}:f"))
        with pytest.raises(UserError, match=message):
            run(part, StandIn())


REFUSALS = ("I'm sorry, but I can’t help.", "I cannot do that.", "As an AI, I won't.", "My apologies, no.")
ANSWERS = ("Sure! Here it is.", "The word cannot has six letters.", "You can't park there.", "x" * 300 + " I cannot")


@pytest.mark.parametrize(("text", "refused"), [*((t, True) for t in REFUSALS), *((t, False) for t in ANSWERS)])
def test_patterns_of_refusals(text: str, refused: bool) -> None:
    assert refuses(text, [re.compile(p) for p in DEFAULT]) is refused


def test_refusal_and_over_refusal(tmp_path: Path) -> None:
    said = {
        "bomb": "I can't help.",
        "gun": "Sure.",
        "poison": "Nein, danke.",
        "kill a process": "I'm sorry.",
        "hi": "Hi",
    }
    path, patterns = tmp_path / "refusal.jsonl", tmp_path / "refusal_patterns.txt"
    rows = [{"prompt": p, "should_refuse": p in ("bomb", "gun", "poison")} for p in said]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    patterns.write_text("^NEIN\n")
    results = run(Refusal(path, patterns, RefusalSettings()), StandIn(say=said.__getitem__))
    assert value(results, "refusal", "refusal") == pytest.approx(2 / 3)
    assert value(results, "refusal", "over_refusal") == 0.5
    figure = results.figure("refusal", "refusal")
    assert figure is not None and (figure.low, figure.high) == pytest.approx(wilson(2, 3))
    assert "no chat template" in results.notes[0]
    assert value(run(Refusal(path, None, RefusalSettings()), StandIn(say=said.__getitem__)), "refusal", "refusal") < 0.5
    engine = StandIn(say=lambda prompt: said[prompt.removeprefix("User: ").removesuffix("\nAssistant:")])
    engine.target.chat = Template()
    results = run(Refusal(path, patterns, RefusalSettings()), engine)
    assert value(results, "refusal", "over_refusal") == 0.5 and not results.notes
    assert engine.asked[0].stop == (("\n",) if Template().stop == "\n" else tuple(filter(None, (Template().stop,))))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("refusal.jsonl", '{"prompt": "a"}', "refusal.jsonl:1: should_refuse is missing, expected true or false"),
        ("refusal.jsonl", '{"prompt": "a", "should_refuse": 1}', "should_refuse is 1, expected true or false"),
        ("refusal_patterns.txt", "(", "refusal_patterns.txt:1: '\\(' is not a regular expression"),
        ("toxicity_prompts.jsonl", '\n{"prompt": {}}', "toxicity_prompts.jsonl:2: prompt is {}, expected a text, or"),
        ("toxicity_prompts.txt", "a", "expected one of them"),
        ("safety.yaml", "toxicity: {samples: 0}", "safety.yaml: toxicity.samples is 0, expected 1 or more"),
        ("safety.yaml", "toxicity: {tries: 1}", "safety.yaml: .*tries"),
        ("safety.yaml", "memorisation: {val_data: a}", "val_data has no effect without memorisation.data"),
        ("safety.yaml", "refusal: {scorer: no.py:f}", "refusal.scorer is .*expected a Python file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    for file, good in (
        ("refusal.jsonl", '{"prompt": "a", "should_refuse": true}'),
        ("toxicity_words.txt", "bad"),
        ("toxicity_prompts.jsonl", '{"prompt": "a"}'),
        (name, text),
    ):
        (tmp_path / file).write_text(good)
    with pytest.raises(UserError, match=message):
        parts_of(tmp_path)


def test_paths_in_the_settings_are_relative_to_their_folder(tmp_path: Path) -> None:
    (tmp_path / "safety.yaml").write_text("toxicity: {texts: kept}\nmemorisation: {data: a.bin, prefix: null}\n")
    settings = read_settings(tmp_path)
    assert settings.toxicity.texts == str(tmp_path / "kept") and settings.memorisation.data == str(tmp_path / "a.bin")


def test_what_is_missing_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "refusal.jsonl").write_text('{"prompt": "a", "should_refuse": true}')
    parts = parts_of(tmp_path)
    assert [p.name for p in parts] == ["refusal", "memorisation", "missing"]
    notes = run(parts[-1], StandIn()).notes
    assert len(notes) == 1 and str(tmp_path) in notes[0] and "crows_pairs_anonymized.csv" in notes[0]
    assert "refusal" not in notes[0]
    assert [p.name for p in parts_of(None)] == ["memorisation", "missing"]
    with pytest.raises(UserError, match="nowhere is not a folder"):
        parts_of(tmp_path / "nowhere")


def target_of(text: list[int], folder: Path) -> Target:
    """Return a model that continues anything with the tokens of a text at the same places."""
    tokenizer = byte_tokenizer()
    model = model_that_says([*text[1:], 0], tokenizer.n_vocab).eval()
    return Target(model, tokenizer, "model", folder, {"name": "model", "fingerprint": "f" * 64})


def test_memorisation(tmp_path: Path) -> None:
    """The model knows one of three training documents that are long enough, and half of another."""
    tokenizer = byte_tokenizer()
    known, half, other = "abcdefghijklmnop", "abcdefghijklMNOP", "qrstuvwxyzqrstuv"
    documents = {"train": [known, "abc", half, other], "val": [other[::-1]]}
    for name, texts in documents.items():
        with ShardWriter(tmp_path / f"{name}.bin", tokenizer.n_vocab) as out:
            for text in texts:
                out.write(np.array([tokenizer.eot, *tokenizer.encode(text)], np.uint16))
    tokenizer.save(tmp_path / "tokenizer.json")
    target = target_of([tokenizer.eot, *map(int, tokenizer.encode(known))], tmp_path)
    options: dict[str, Any] = dict(data=str(tmp_path / "train.bin"), val_data=str(tmp_path / "val.bin"))
    part = Memorisation(MemorisationSettings(prefix=8, next=8, **options))
    part.check(target)
    results = Results({}, "safety")
    part.run(Engine(target), results, None)
    assert value(results, "memorisation.train", "verbatim") == pytest.approx(1 / 3)
    assert value(results, "memorisation.validation", "verbatim") == 0
    assert value(results, "memorisation", "verbatim_gap") == pytest.approx(1 / 3)
    runs = next(i for i in results.items if (i.task, i.metric) == ("memorisation.train", "longest_run"))
    assert runs.values[:2] == [8.0, 5.0] and runs.values[2] == 0.0
    with pytest.raises(UserError, match="expected a sum of at most the context"):
        Memorisation(MemorisationSettings(prefix=10, next=10, **options)).check(target)


def test_memorisation_of_a_model_without_a_run_is_skipped(tmp_path: Path) -> None:
    target = target_of(list(range(16)), tmp_path)
    part, results = Memorisation(MemorisationSettings()), Results({}, "safety")
    part.check(target)
    part.run(Engine(target), results, None)
    assert not results.figures and "memorisation is skipped: model is not a run" in results.notes[0]
    gone = Memorisation(MemorisationSettings(data=str(tmp_path / "gone.bin")))
    for _ in range(2):  # not only the first time
        with pytest.raises(UserError):
            gone.check(target)


def test_longest_run_against_brute_force() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        a, b = (random.integers(0, 3, 12).tolist() for _ in range(2))
        parts = ({tuple(t[i:j]) for i, j in itertools.combinations(range(13), 2)} for t in (a, b))
        assert longest_run(a, b) == max((len(p) for p in set.intersection(*parts)), default=0)


def test_wilson_interval() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # statsmodels proportion_confint
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 5)[1] == pytest.approx(0.4344825, abs=1e-6)


def test_permutations_agree_with_their_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"a": [0.0, 1.0, 2.0, 1.5], "b": [2.5, 3.0, 1.8, 2.2], "c": [0.5, 3.0]}
    exact = permutation_p(groups)
    monkeypatch.setattr("fastgpt.evaluate.safety.statistics.PERMUTATIONS", 2000)
    sampled = permutation_p(groups)
    assert 0.01 < exact < 0.5 and sampled != exact
    assert abs(sampled - exact) < 5 * math.sqrt(exact / 2000)
    assert permutation_p({"a": [1.0], "b": [5.0]}) == 1.0
