"""Small recipes and texts for the tests of builds."""

import random
from pathlib import Path
from typing import Any

import yaml

from fastgpt.data.pipeline.stages import build
from fastgpt.data.recipe import Recipe
from fastgpt.data.recipe_file import load_recipe

WORDS = [f"{a}{b}" for a in ("val", "run", "tree", "node", "gain", "sum") for b in ("", "s", "ed", "ing", "er", "é")]


def text(seed: object, words: int = 60) -> str:
    """Return text that depends on the seed; two of them are no near-duplicates."""
    rng = random.Random(str(seed))
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(100)}" for _ in range(words)) + ".\n"


def write_source(folder: Path, name: str, documents: int, words: int = 60) -> str:
    """Write a .jsonl file of documents with ids and return its path."""
    path = folder / f"{name}.jsonl"
    lines = [f'{{"id": "{name}-{i}", "text": "{text((name, i), words).strip()}"}}' for i in range(documents)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a recipe of two sources, which it writes, as plain values."""
    sources = {
        "big": {"path": write_source(folder, "big", 60), "format": {"name": "jsonl", "id": "id"}, "license": "MIT"},
        "small": {"path": write_source(folder, "small", 20), "format": {"name": "jsonl", "id": "id"}},
    }
    tokenizer = {"train": {"vocab_size": 300, "bytes": 20000}}
    plain: dict[str, Any] = {"sources": sources, "validation": 0.25, "tokenizer": tokenizer, "seed": 1}
    return {**plain, "shards": {"tokens": 4000}, "workers": 1, "dedup": {"near": False}, **changes}


def write_recipe(folder: Path, plain: dict[str, Any]) -> Path:
    """Write a recipe as YAML and return its path."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
    return path


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Return a recipe of two sources."""
    return load_recipe(write_recipe(folder, settings(folder, **changes)))


def built(folder: Path, out: Path, keep: bool = False, **changes: Any) -> dict[str, Any]:
    """Build a recipe of two sources and return the report."""
    report = build(recipe(folder, **changes), out, keep=keep, show=False)
    assert report is not None
    return report


def shards(out: Path) -> dict[str, bytes]:
    """Return the content of every shard, index and list of ids of a data set."""
    return {p.name: p.read_bytes() for p in sorted(out.iterdir()) if p.suffix in (".bin", ".idx", ".ids")}
