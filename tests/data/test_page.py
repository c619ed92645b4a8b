"""The page of a data set, and topics."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from fastgpt.core.command import run_command
from fastgpt.data.built import open_built
from fastgpt.data.command import main
from fastgpt.data.pipeline.page import page_of
from fastgpt.data.pipeline.show import samples
from fastgpt.data.pipeline.topics import Topic, topics

pytest.importorskip("matplotlib")


def facts(**changes: Any) -> dict[str, Any]:
    lengths = [0, 0, 0, 5, 40, 12, 1, 0]
    part = {"documents": 58, "tokens": 1500, "bytes": 6000, "lengths": lengths}
    return {
        "documents": 100,
        "bytes": 250_000,
        "unsampled": 0,
        "kept": 60,
        "license": "PSF-2.0",
        "dropped": {"gopher_short_doc": 30, "duplicate": 10},
        "examples": {"gopher_short_doc": ["a.txt#1", "<b>.txt#2"]},
        "changes": {"nfc": 3},
        "defects": {"not UTF-8": 1},
        "defect_examples": ["a.txt, line 3, byte 17: byte 0xff is not UTF-8"],
        "terms": {"before": {"words": 1000, "gender.female": 4}, "after": {"words": 500, "gender.female": 3}},
        "train": part,
        "val": part | {"documents": 2, "tokens": 100, "bytes": 400, "lengths": [0, 0, 0, 1, 1, 0, 0, 0]},
        "epochs": 1.5,
        "mixed_tokens": 2250,
        **changes,
    }


MANIFEST = {
    "generation": 2,
    "generations": [
        {"generation": i, "date": "2026-11-29T10:00:00+00:00", "documents": 60, "tokens": 1600} for i in (1, 2)
    ],
    "train": {"tokens": 1500, "documents": 58},
    "shards": [{"name": "train_000000"}],
    "tokenizer": {"n_vocab": 50257, "fingerprint": "0549f16aa441e41b", "eot": 50256},
    "versions": {"python": "3.12"},
    "files": {"train_000000.bin": {"bytes": 4024, "sha256": "ab" * 32}},
}


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("</style>")[1]))


def test_page_says_what_was_read_dropped_and_kept() -> None:
    duplicates = {"counts": [["docs", "docs", {"exact": 4, "near": 6}]], "clusters": 5}
    report = {"sources": {"docs": facts(), "code & co": facts(dropped={}, mixed_tokens=750)}, "duplicates": duplicates}
    page = page_of(report, MANIFEST, [Topic(["garden", "river"], 0.75, {"docs": 0.5, "code & co": 1.0})])
    text = text_of(page)
    for found in (
        "1,500 training tokens in 58 documents, 1 shards",
        "docs PSF-2.0 100 0.2 60 1,500 100 1.50 75.0% 4.00",
        "docs gopher_short_doc 30 30.00% a.txt#1, &lt;b&gt;.txt#2",
        "docs docs 4 6",
        "docs gender.female 4,000.0 6,000.0",
        "docs nfc 3",
        "docs not UTF-8 1",
        "garden, river 75.0% 50.0% 100.0%",
        "8 to 15 6 6",
        "code &amp; co",
    ):
        assert found in text, found
    assert page.count("<img") == page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=.(?!#|data:)", page), "it loads nothing else"


def test_page_of_a_clean_source_leaves_out_what_is_not_there() -> None:
    clean = facts(dropped={}, changes={}, defects={}, defect_examples=[], terms={})
    text = text_of(page_of({"sources": {"docs": clean}, "duplicates": None}, MANIFEST))
    assert "Dropped documents none" in text
    for absent in ("Changes", "Defects", "Duplicates", "Group terms", "Topics"):
        assert absent not in text


def test_topics_find_the_groups_of_words() -> None:
    draw = random.Random(0)
    words = {"plants": "garden river flower meadow forest blossom".split(), "money": "market price bank trade".split()}
    texts, sources = [], []
    for i in range(60):
        kind = "plants" if i % 3 else "money"
        texts.append(" ".join(draw.choice(words[kind]) for _ in range(40)) + " common words everywhere")
        sources.append("a" if i % 2 else "b")
    first, second = topics(texts, sources, 2)
    assert set(first.words) <= set(words["plants"]) and set(second.words) <= {*words["money"]}
    assert first.share == pytest.approx(2 / 3) and second.sources == {
        "a": pytest.approx(1 / 3),
        "b": pytest.approx(1 / 3),
    }
    assert topics(texts, sources, 2) == [first, second]
    assert topics(["", "123"], ["a", "a"]) == [] and topics([], []) == []
    assert len(topics(["garden river"] * 5, ["a"] * 5)) == 1


def test_samples_page_and_card_of_a_built_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"The garden of house {i} has a river and a meadow with flowers.\n" * 20 for i in range(12)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = {"path": "texts.jsonl", "license": "CC0", "clean": "none"}
    settings = {"sources": {"houses": source}, "tokenizer": {"train": {"vocab_size": 300}}, "dedup": False}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings | {"validation": 0.2}))
    out = str(tmp_path / "out")
    assert run_command(lambda: main(["build", str(tmp_path / "recipe.yaml"), "--out", out, "--workers", "1"])) == 0
    assert f"{out}/report.html is the report" in capsys.readouterr().out
    assert "house" not in text_of((tmp_path / "out" / "report.html").read_text()).replace("houses", "")
    data = open_built(out)
    found = list(samples(data.path, data.tokenizer, 4, 50))
    assert len(found) == 4 == len({s.id for s in found}) and all(s.source == "houses" for s in found)
    assert all(s.text.startswith("The garden of house") and s.tokens > 50 for s in found)
    assert len(list(samples(data.path, data.tokenizer, 100, 5))) == data.manifest["train"]["documents"] and not list(
        samples(data.path, data.tokenizer, 0, 5)
    )
    assert run_command(lambda: main(["inspect", out, "--samples", "2"])) == 0
    assert capsys.readouterr().out.count("The garden of house") >= 2
    assert run_command(lambda: main(["card", out])) == 0
    card = capsys.readouterr().out
    assert "| houses | CC0 | 12 | 12 |" in card and "Duplicates: not looked for" in card
