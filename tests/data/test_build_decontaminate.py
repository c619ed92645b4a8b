"""Decontamination in a build: which documents are dropped or cut."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.recipes import recipe, settings, text, write_recipe

from fastgpt.core.errors import UserError
from fastgpt.data.built import open_built
from fastgpt.data.pipeline import leaks
from fastgpt.data.pipeline.card import _compared
from fastgpt.data.pipeline.stages import build
from fastgpt.data.pipeline.write import documents_of
from fastgpt.data.recipe_file import load_recipe

LEAK = text("leak", 13).strip(".\n")  # an n-gram
PHRASE = text("phrase", 13).strip(".\n")  # another one, which many documents hold


def built_of(folder: Path, texts: list[str], **changes: Any) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Build a data set of texts, beside one source without overlaps; return the texts' report, and (id, text) of every
    training document of theirs in order of the ids."""
    lines = [json.dumps({"id": f"{i:02}", "text": content}) for i, content in enumerate(texts)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "eval.jsonl").write_text("\n".join(json.dumps(t) for t in (LEAK, PHRASE)), encoding="utf-8")
    source = {"path": str(folder / "texts.jsonl"), "format": {"name": "jsonl", "id": "id"}, "validation": 0}
    plain = settings(folder, decontaminate={"files": ["eval.jsonl"], **changes})
    plain["sources"]["texts"] = source
    report = build(load_recipe(write_recipe(folder, plain)), folder / "out", show=False)
    assert report is not None
    data = open_built(folder / "out")
    found = []
    for shard in [s for s in data.manifest["shards"] if s["source"] is None]:
        ids = np.fromfile(data.path / f"{shard['name']}.bin", "<u2", offset=1024)
        starts, names = documents_of(data.path, shard["name"])
        for i, (name, identity) in enumerate(names):
            if name == "texts":
                found.append((identity, data.tokenizer.decode(ids[starts[i] + 1 : starts[i + 1]].tolist())))
    return report["sources"]["texts"], sorted(found, key=lambda item: item[0])


def long_text(seed: object, size: int) -> str:
    return text(seed, 200)[:size]


def test_overlaps_are_cut_out_of_documents(tmp_path: Path) -> None:
    before, between, after = (long_text(i, 700).replace("\n", " ") for i in range(3))
    whole = [long_text("free", 900), f"{before} {LEAK} {between} {LEAK} {after}", f"{before[:300]} {LEAK} short"]
    report, found = built_of(tmp_path, whole, action="cut")
    assert [identity for identity, _ in found] == ["00", "01", "01", "01"]  # of 02, too little stays
    assert found[0][1] == whole[0]
    stays = [before[:501], between[199:-199], after[199:]]
    assert sorted(content.strip() for _, content in found[1:]) == sorted(part.strip() for part in stays)
    assert report["dropped"] == {"contaminated": 1} and report["changes"] == {"decontaminate": 1}
    assert report["kept"] == 2 and report["train"]["documents"] == 4
    assert report["train"]["bytes"] == sum(len(content.encode()) for _, content in found)


def test_documents_of_too_many_pieces_are_dropped(tmp_path: Path) -> None:
    part = [long_text(i, 650).replace("\n", " ") for i in range(11)]
    report, found = built_of(tmp_path, [f" {LEAK} ".join(part), f" {LEAK} ".join(part[:10])], action="cut")
    assert [identity for identity, _ in found] == ["01"] * 10 and report["dropped"] == {"contaminated": 1}


@pytest.mark.parametrize("action", ["drop", "cut"])
def test_what_many_documents_hold_is_no_leak(action: str, tmp_path: Path) -> None:
    texts = [f"{long_text(i, 700)} {PHRASE} {long_text((i, 2), 700)}" for i in range(4)]
    texts += [texts[0], f"{long_text('one', 700)} {LEAK} {PHRASE}"]
    report, found = built_of(tmp_path, texts, common=3, action=action)
    changed = report["dropped"].get("contaminated", 0) + report["changes"].get("decontaminate", 0)
    assert changed == 1  # the one with LEAK; its PHRASE is in more than 3 documents
    assert [content for _, content in found[:4]] == texts[:4]
    (tmp_path / "rare").mkdir()
    report, found = built_of(tmp_path / "rare", texts[:3] + texts[:2], common=3, action="drop")
    assert not found and report["dropped"] == {"contaminated": 5}  # in 3 documents, their duplicates apart


def test_the_settings_are_part_of_the_result(tmp_path: Path) -> None:
    content = f"{long_text(1, 700)} {LEAK} {long_text(2, 700)}"
    assert len(built_of(tmp_path, [content, "other"], action="cut")[1]) == 3
    assert len(built_of(tmp_path, [content, "other"], action="drop")[1]) == 1
    assert len(built_of(tmp_path, [content, "other"], action="drop", common=1)[1]) == 1


def test_common_grams_over_chunks_are_those_of_one() -> None:
    rng = np.random.default_rng(0)
    hits = np.zeros(500, leaks.HIT)
    hits["row"], hits["gram"] = np.sort(rng.integers(0, 60, 500)), rng.integers(0, 40, 500)
    pairs = {(h["row"], h["gram"]) for h in hits}
    expected = [g for g in range(40) if sum(gram == g for _, gram in pairs) > 10]
    cuts = [hits[(hits["row"] >= a) & (hits["row"] < a + 20)] for a in (0, 20, 40)]
    assert expected and leaks.common_grams(cuts, 10).tolist() == leaks.common_grams([hits], 10).tolist() == expected


def test_wrong_settings_name_the_key(tmp_path: Path) -> None:
    for wrong, expected in (
        ({"action": "trim"}, "decontaminate.action is 'trim', expected drop or cut"),
        ({"common": 0}, "decontaminate.common is 0, expected 1 or more"),
        ({"file": ["a"]}, "decontaminate.file is not a key .did you mean files"),
    ):
        with pytest.raises(UserError, match=expected):
            recipe(tmp_path, decontaminate={"files": [], **wrong})


def test_the_card_says_what_happened() -> None:
    assert _compared(None) == _compared([]) == _compared({"files": [], "action": "cut"}) == "not looked for"
    assert _compared(["a", "b"]) == "compared with 2 files, documents that overlap are dropped"
    assert _compared({"files": ["a"], "action": "cut"}).endswith("overlaps are cut out of the documents")
