"""Perplexity and bits per byte: values against a plain forward pass in fp64, sources of runs, wrong files."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmark_files import Texts
from small_target import small_target

from fastgpt.core.errors import UserError
from fastgpt.data.load import load_tokenizer
from fastgpt.evaluate.engine import Engine
from fastgpt.evaluate.perplexity import Perplexity, figures, read_texts
from fastgpt.evaluate.results import Figure, Results
from fastgpt.evaluate.target import Target, open_target
from fastgpt.models.config import ModelConfig
from fastgpt.models.gpt import GPT
from fastgpt.training import checkpoint
from fastgpt.training.config import TrainConfig, to_dict


def scored(part: Perplexity, target: Target, limit: int | None = None) -> Results:
    part.check(target)
    results = Results({}, "base")
    part.run(Engine(target), results, limit)
    return results


def figure(results: Results, task: str, metric: str) -> Figure:
    found = results.figure(task, metric)
    assert found is not None
    return found


def nats_in_fp64(target: Target, text: str) -> tuple[float, int]:
    """Return the nats of a text that fits into the context, and its tokens."""
    exact = GPT(target.model.config).double().eval()
    exact.load_state_dict(target.model.state_dict())
    ids = torch.tensor([[target.tokenizer.eot, *target.tokenizer.encode(text).tolist()]])
    with torch.no_grad():
        log_p = exact(ids)[0, :-1].log_softmax(-1)
    return float(-log_p.gather(1, ids[0, 1:, None]).sum()), ids.shape[1] - 1


def test_values_are_those_of_a_plain_forward_pass(tmp_path: Path) -> None:
    target, texts = small_target(tmp_path), ["the café runs", "a dog", "трава the"]
    file = tmp_path / "three.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    results = scored(Perplexity([file], validation=False), target)
    nats, tokens = (sum(v) for v in zip(*(nats_in_fp64(target, t) for t in texts), strict=True))
    size = sum(len(t.encode()) for t in texts)
    assert size > sum(map(len, texts))  # bytes, not characters
    bits = figure(results, "three.jsonl", "bits_per_byte")
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-5) and bits.n == 3
    assert figure(results, "three.jsonl", "perplexity").value == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    (items,) = results.items
    assert items.weights is not None and sum(items.weights) == size
    weighted = sum(v * w for v, w in zip(items.values, items.weights, strict=True))
    assert weighted / size == pytest.approx(bits.value)


def test_the_standard_error_is_that_of_many_samples() -> None:
    """Documents of many lengths; the error of the ratio over 400 sets of 60 documents."""
    rng = random.Random(0)

    def rows() -> list[tuple[str, float, int]]:
        lengths = [rng.randint(5, 200) for _ in range(60)]
        return [("x" * n, n * rng.gauss(2.0, 0.3), n) for n in lengths]

    found = [figures("s", rows()) for _ in range(400)]
    for metric in (0, 1):
        values = torch.tensor([f[metric].value for f in found])
        errors = torch.tensor([f[metric].stderr for f in found])
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.12)


def test_one_document_has_no_standard_error(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("the cat\n\nand the dog")
    results = scored(Perplexity([file], validation=False), small_target(tmp_path))
    assert [(f.n, f.stderr, f.higher_is_better) for f in results.figures] == [(1, None, False)] * 2


def test_limit_takes_the_first_documents(tmp_path: Path) -> None:
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps({"text": f"the {i}"}) + "\n" for i in range(5)))
    results = scored(Perplexity([file], validation=False), small_target(tmp_path), limit=2)
    assert results.figures[0].n == 2 and len(results.items[0].ids) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n',
            r"a.jsonl:2 is '.*', expected a JSON object with the key 'text'",
        ),
        ("a.jsonl", b"{\n", r"a.jsonl:1 is '\{', expected a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1 is "),
        ("a.txt", b"", "a.txt has no text, expected at least one document"),
        ("a.txt", b"\xff\xfe", "a.txt cannot be read .*, expected a UTF-8 text file"),
    ],
)
def test_wrong_texts_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


def run_on(data: Path, folder: Path, **settings: Any) -> Target:
    """Return a checkpoint, as if it had been trained on a data set, opened for evaluation."""
    tokenizer = load_tokenizer(data)
    shape: dict[str, Any] = dict(n_layers=1, n_heads=2, width=16, block_size=64)
    config = ModelConfig(**shape, vocab_size=tokenizer.n_vocab)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    state = {"model": dataclasses.asdict(config), "tokenizer": tokenizer.fingerprint, "progress": {}, "loader": {}}
    state["config"] = to_dict(TrainConfig(data=str(data), **settings))
    checkpoint.save(folder, 1, model.state_dict(), {}, state, keep=0)
    tokenizer.save(folder / "tokenizer.json")
    return open_target(str(folder), device="cpu")


def build(folder: Path) -> Path:
    """Build a data set of two sources; return its folder."""
    from fastgpt.data.pipeline.stages import build as build_data
    from fastgpt.data.recipe_file import load_recipe

    sources = {}
    for seed, name in enumerate(("code", "prose")):
        texts = Texts(seed)
        rows = [{"id": f"{name}-{i}", "text": texts(30, 60)} for i in range(30)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[name] = {"path": str(folder / f"{name}.jsonl"), "format": {"name": "jsonl", "id": "id"}}
    tokenizer = {"train": {"vocab_size": 300, "bytes": 20000}}
    recipe = {"sources": sources, "validation": 0.25, "tokenizer": tokenizer, "workers": 1, "dedup": {"near": False}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert build_data(load_recipe(folder / "recipe.yaml"), folder / "built", keep=False, show=False)
    return folder / "built"


def test_a_run_is_scored_on_each_source_of_its_data_set(tmp_path: Path) -> None:
    data = build(tmp_path)
    target = run_on(data, tmp_path / "run", val_sources={"own": str(tmp_path / "code.jsonl")})
    results = scored(Perplexity(), target)
    assert [f.task for f in results.figures if f.metric == "perplexity"] == ["code", "prose", "own"]
    manifest = json.loads((data / "manifest.json").read_text())
    held = {s["source"]: s["documents"] for s in manifest["shards"] if s["source"] is not None}
    assert {f.task: f.n for f in results.figures if f.task in held} == held
    for path in data.glob("*.bin"):
        path.unlink()
    with pytest.raises(UserError, match="is damaged"):
        Perplexity(required=True).check(target)
    assert "the validation data is not scored: data set " in scored(Perplexity(), target).notes[0]


def test_a_run_whose_data_is_gone_is_said(tmp_path: Path) -> None:
    data = build(tmp_path)
    target = run_on(data, tmp_path / "run")
    data.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="built"):
        Perplexity(required=True).check(target)
