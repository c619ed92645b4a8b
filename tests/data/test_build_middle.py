"""Fill-in-the-middle by a recipe: which documents are reordered, with which special tokens, and what stays as it is."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.recipes import built, recipe, settings, shards, text

from fastgpt.core.errors import UserError
from fastgpt.data.built import open_built
from fastgpt.data.packing import FillInTheMiddle
from fastgpt.data.pipeline.forget import forget
from fastgpt.data.pipeline.show import card
from fastgpt.data.pipeline.stages import Share, build
from fastgpt.data.pipeline.write import documents_of
from fastgpt.data.tokenizer import train_tokenizer

SENTINELS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def sources(folder: Path, middle: Any) -> dict[str, Any]:
    """Return the changes of a recipe whose source `big` uses fill-in-the-middle."""
    found = settings(folder)["sources"]
    found["big"]["fill_in_the_middle"] = middle
    return {"sources": found}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set that tests may read."""
    folder = tmp_path_factory.mktemp("middle")
    built(folder, folder / "out", **sources(folder, {"rate": 0.75, "spm": 0.25}))
    return folder / "out"


def tokens_of(out: Path) -> dict[tuple[str, str], tuple[bool, list[int]]]:
    """Return (source, id) -> whether it is held out, and the ids of the document without `<|endoftext|>`."""
    found = {}
    for shard in open_built(out).manifest["shards"]:
        starts, ids = documents_of(out, shard["name"])
        part = np.fromfile(out / f"{shard['name']}.bin", "<u2", offset=1024)
        for row, (source, identity) in enumerate(ids):
            tokens = part[starts[row] + 1 : starts[row + 1]].tolist()
            found[source, identity] = shard["source"] is not None, tokens
    return found


def test_training_documents_of_the_source_are_reordered(done: Path) -> None:
    data = open_built(done)
    facts = data.manifest["sources"]["big"]["fill_in_the_middle"]
    assert data.manifest["sources"]["small"]["fill_in_the_middle"] is None
    marks = [data.tokenizer.specials[token] for token in SENTINELS]
    assert facts == {**dict(zip(("prefix", "suffix", "middle"), marks)), "rate": 0.75, "spm": 0.25, "seed": 1}
    middle = FillInTheMiddle(**facts)
    changed = whole = 0
    for (source, identity), (held, tokens) in tokens_of(done).items():
        number = int(identity.split("-")[1])
        reordered = [t for t in tokens if t in marks]
        assert sorted(reordered) in ([], sorted(marks))
        assert not reordered or (source == "big" and not held)
        assert data.tokenizer.decode(middle.restore(np.array(tokens)).tolist()) == text((source, number)).strip()
        if source == "big" and not held:
            changed, whole = changed + bool(reordered), whole + 1
    assert abs(changed / whole - 0.75) < 4 * np.sqrt(0.75 * 0.25 / whole) and whole > 30
    said = card(done)
    assert "big: fill-in-the-middle in 75% of the training documents, of these 25% with the suffix first" in said
    assert "small: fill-in-the-middle" not in said


@pytest.mark.slow
def test_two_workers_give_the_same_bytes(done: Path, tmp_path: Path) -> None:
    made = recipe(tmp_path, **sources(tmp_path, {"rate": 0.75, "spm": 0.25}))
    build(made, tmp_path / "out", workers=2, show=False)
    assert shards(tmp_path / "out") == shards(done)


def test_tasks_give_the_same_bytes_and_a_seed_others(done: Path, tmp_path: Path) -> None:
    made, out = recipe(tmp_path, **sources(tmp_path, {"rate": 0.75, "spm": 0.25})), tmp_path / "out"
    build(made, out, only="clean", show=False)
    build(made, out, only="select", show=False)
    build(made, out, only="tokenize", share=Share(1, 2), show=False)  # a killed build left this much
    build(made, out, keep=True, show=False)
    assert shards(out) == shards(done)
    generation = open_built(out).manifest["generation"]
    build(made, out, keep=True, show=False)
    assert open_built(out).manifest["generation"] == generation
    other = recipe(tmp_path, **sources(tmp_path, {"rate": 0.75, "spm": 0.25, "seed": 9}))
    build(other, out, show=False)
    assert shards(out) != shards(done) and open_built(out).manifest["generation"] == generation + 1


def test_a_text_that_crosses_the_borders_is_found(done: Path, tmp_path: Path) -> None:
    built(tmp_path, tmp_path / "out", **sources(tmp_path, {"rate": 1}))
    whole = next(i for (s, i), (held, _) in tokens_of(tmp_path / "out").items() if s == "big" and not held)
    content = text(("big", int(whole.split("-")[1]))).strip()
    entries = forget(tmp_path / "out", texts=[content], show=False)
    assert [(e["source"], e["id"]) for e in entries] == [("big", whole)]
    built(tmp_path, tmp_path / "out", **sources(tmp_path, {"rate": 1}))
    assert ("big", whole) not in tokens_of(tmp_path / "out")


def test_a_given_tokenizer_must_have_the_special_tokens(tmp_path: Path) -> None:
    message = r"sources.big.fill_in_the_middle: the tokenizer has no special token <\|fim_prefix\|>"
    with pytest.raises(UserError, match=message):
        built(tmp_path, tmp_path / "out", tokenizer="gpt2", **sources(tmp_path, True))
    train_tokenizer([text(i) for i in range(9)], 300, ["<PRE>", "<SUF>", "<MID>"]).save(tmp_path / "tokenizer.json")
    names = {"prefix": "<PRE>", "suffix": "<SUF>", "middle": "<MID>"}
    built(tmp_path, tmp_path / "out", tokenizer="tokenizer.json", **sources(tmp_path, names))
    facts = open_built(tmp_path / "out").manifest["sources"]["big"]["fill_in_the_middle"]
    assert [facts[part] for part in names] == [1, 2, 3]


def test_a_trained_tokenizer_without_the_special_tokens_is_replaced(done: Path, tmp_path: Path) -> None:
    built(tmp_path, tmp_path / "out")
    assert not set(SENTINELS) & open_built(tmp_path / "out").tokenizer.specials.keys()
    built(tmp_path, tmp_path / "out", **sources(tmp_path, {"rate": 0.75, "spm": 0.25}))
    assert shards(tmp_path / "out") == shards(done)


@pytest.mark.parametrize(
    "middle, message",
    [
        ({"rate": 0}, "fill_in_the_middle.rate is 0.0, expected more than 0, at most 1"),
        ({"spm": 2}, "fill_in_the_middle.spm is 2.0, expected from 0 to 1"),
        ({"prefix": "<|fim_suffix|>"}, "expected three different ones"),
        ({"suffix": "<|endoftext|>"}, "expected three different ones beside"),
        ({"rates": 1}, "rates is not a key"),
    ],
)
def test_wrong_settings(middle: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sources.big.fill_in_the_middle") as e:
        recipe(tmp_path, **sources(tmp_path, middle))
    assert message in str(e.value)
    with pytest.raises(UserError, match="vocab_size is 259, expected 260 or more"):
        recipe(tmp_path, tokenizer={"train": {"vocab_size": 259}}, **sources(tmp_path, True))
