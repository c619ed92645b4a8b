import re
from pathlib import Path

import pytest

from fastgpt.core.errors import UserError
from fastgpt.core.options import descriptions
from fastgpt.data import recipe as recipes
from fastgpt.data.recipe import Recipe, TokenizerRecipe
from fastgpt.data.recipe_file import load_recipe

GOOD = """
sources:
  web:
    path: [texts/*.jsonl, more]
    format: {name: jsonl, text: body, max_bytes: 1000}
    clean: {preset: web, gopher_quality: {min_doc_words: 20}}
    weight: 2
  code: {path: "{stdlib}/*.py", clean: code, weight: 1e-1}
tokenizer: {train: {vocab_size: 300}}
mix:
  replay: {sources: [code], share: 0.2}
  stages:
    - {share: 0.9}
    - {share: 0.1, weights: {web: 1, code: 3}}
"""


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def test_values_have_the_types_of_the_fields(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    web, code = recipe.sources["web"], recipe.sources["code"]
    assert web.path == [str(tmp_path / "texts/*.jsonl"), str(tmp_path / "more")]
    assert web.format == {"name": "jsonl", "text": "body", "max_bytes": "1000"}
    assert web.clean == {"preset": "web", "gopher_quality": {"min_doc_words": 20}}
    assert code.weight == 0.1 and code.path[0].startswith("/") and "{" not in code.path[0]
    assert isinstance(recipe.tokenizer, TokenizerRecipe) and recipe.tokenizer.train.vocab_size == 300
    assert recipe.mix.stages[1].weights == {"web": 1.0, "code": 3.0}


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("weight: 2", "wieght: 2"), 7, "sources.web.wieght is not a key (did you mean weight?)"),
        (
            ("weight: 2", "scrape: {urls: a}\n    weight: 2"),
            3,
            "sources.web has path and scrape, expected one of path, url",
        ),
        (
            ("path: [texts/*.jsonl, more]", "scrape: {delay: 1}"),
            4,
            "sources.web.scrape names no pages, expected urls or",
        ),
        (
            ("path: [texts/*.jsonl, more]", "scrape: {urls: a}"),
            5,
            "sources.web has scrape and format, expected no format",
        ),
        (
            ("path: [texts/*.jsonl, more]", "scrape: {urls: a, delay: -1}"),
            4,
            "scrape.delay is -1.0, expected 0 or more",
        ),
        (("weight: 2", "weight: two"), 7, "sources.web.weight is 'two', expected a number or null"),
        (("weight: 2", "weight: -1"), 7, "sources.web.weight is -1.0, expected more than 0"),
        (("weight: 2", "epochs: 2"), 3, "sources.web has no weight, but sources.code has one"),
        (("weight: 2", "weight: 2\n    epochs: 1"), 8, "sources.web has weight and epochs, expected one of them"),
        (
            ("    path: [texts/*.jsonl, more]\n", ""),
            3,
            "sources.web has no texts, expected one of path, url, hub, debian, scrape, pydoc",
        ),
        (("gopher_quality", "gopher_qualty"), 6, "clean: unknown setting 'gopher_qualty'"),
        (("min_doc_words: 20", "min_doc_words: x"), 6, "clean.gopher_quality.min_doc_words is 'x'"),
        (("vocab_size: 300", "vocab_size: 200"), 9, "tokenizer.train.vocab_size is 200, expected 257 or more"),
        (("tokenizer: {train: {vocab_size: 300}}", "tokenizer: [1]"), 9, "expected text or a mapping"),
        (
            ("sources: [code]", "sources: [cod]"),
            11,
            "mix.replay.sources names 'cod', which is not a source (did you mean code?)",
        ),
        (("code: 3", "cod: 3"), 14, "mix.stages[1].weights.cod is not a source (did you mean code?)"),
        (("share: 0.9", "share: 0"), 13, "mix.stages[0].share is 0.0, expected more than 0"),
        (("weight: 2", "weight: 2\n    weight: 3"), 8, "weight is given twice"),
        (("weight: 2", "weight: 2\n    sample: 2"), 8, "sources.web.sample is 2.0, expected more than 0, at most 1"),
        (("  web:", "  we b:"), 3, "source name is 'we b', expected letters, digits, - and _"),
        (("weight: 2", "defects: ignore\n    weight: 2"), 7, "expected fail, skip or replace"),
        (("mix:", "mix:\n  temperature: 2"), 11, "mix.temperature sets the shares, but sources.web has a weight"),
        (
            ("mix:", "packing: {method: fit}\nmix:"),
            10,
            "packing.method is 'fit', expected concatenate, best-fit or pad",
        ),
        (("mix:", "packing: {length: 0}\nmix:"), 10, "packing.length is 0, expected 1 or more"),
        (("mix:", "shards: {dtype: int8}\nmix:"), 10, "expected auto, uint16 or uint32"),
        (("weight: 2", "weight: [2"), 8, "not valid YAML"),
        (("mix:", "bogus: 1\nmix:"), 10, "bogus is not a key"),
        (("mix:", "dedup: {bandz: 3}\nmix:"), 10, "dedup.bandz is not a key (did you mean bands?)"),
        (("mix:", "dedup: {threshold: 2}\nmix:"), 10, "threshold of deduplication: got 2.0, expected more than 0"),
        (("mix:", "dedup: {keep: source, prefer: [cod]}\nmix:"), 10, "dedup.prefer names 'cod', which is not a source"),
    ],
)
def test_an_error_names_file_line_and_key(tmp_path: Path, change: tuple[str, str], line: int, message: str) -> None:
    assert change[0] in GOOD
    with pytest.raises(UserError) as e:
        load(tmp_path, GOOD.replace(*change))
    assert str(e.value).startswith(f"{tmp_path / 'r.yaml'}, line {line}: ") and message in str(e.value), str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "seed: 1", "sources: {}", "x"])
def test_a_recipe_without_sources_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="sources"):
        load(tmp_path, text)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read recipe .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    names = [n for n in dir(recipes) if n.endswith(("Recipe", "Tokenizer", "Replay"))]
    for name in names:
        cls = getattr(recipes, name)
        keys = {f for f in cls.__dataclass_fields__}
        assert descriptions(cls).keys() == keys
        missing = [key for key in keys if not re.search(rf"`(\w+\.)*{key}`", page)]
        assert not missing, (name, missing)
