import errno
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data.recipes import built, recipe, settings, shards, text, write_recipe, write_source

from fastgpt.cli import main as fastgpt
from fastgpt.core.errors import UserError
from fastgpt.data.built import open_built, verify
from fastgpt.data.loader import TokenLoader
from fastgpt.data.packed import PackedLoader
from fastgpt.data.pipeline import gather as gathering
from fastgpt.data.pipeline import stages, store
from fastgpt.data.pipeline.command import inspect_main
from fastgpt.data.pipeline.forget import forget
from fastgpt.data.pipeline.stages import Build, Share, build, dry_run
from fastgpt.data.pipeline.workers import Workers
from fastgpt.data.pipeline.write import documents_of
from fastgpt.data.read import parts_of
from fastgpt.data.source import open_source
from fastgpt.training.build import build_loader, open_data
from fastgpt.training.config import load_config


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data set that tests may read."""
    folder = tmp_path_factory.mktemp("built")
    built(folder, folder / "out", keep=True)
    return folder / "out"


def documents(out: Path, val: bool = False) -> dict[tuple[str, str], str]:
    """Return (source, id) -> text of a data set's training or held-out documents."""
    data = open_built(out)
    found = {}
    for shard in data.manifest["shards"]:
        if (shard["source"] is not None) == val:
            starts, ids = documents_of(out, shard["name"])
            part = np.fromfile(out / f"{shard['name']}.bin", "<u2", offset=1024)
            for row, (source, identity) in enumerate(ids):
                assert part[starts[row]] == data.tokenizer.eot
                found[source, identity] = data.tokenizer.decode(part[starts[row] + 1 : starts[row + 1]].tolist())
    return found


def test_shards_hold_every_document(done: Path) -> None:
    expected = {(s, f"{s}-{i}"): text((s, i)).strip() for s, n in (("big", 60), ("small", 20)) for i in range(n)}
    train, val = documents(done), documents(done, val=True)
    assert train | val == expected
    assert not train.keys() & val.keys() and 4 < len(val) < 34
    verify(done)


def test_the_manifest_counts_what_is_there(done: Path) -> None:
    manifest = open_built(done).manifest
    train = [s for s in manifest["shards"] if s["source"] is None]
    assert len(train) > 2 and manifest["train"]["tokens"] == sum(s["tokens"] for s in train)
    assert Counter(source for source, _ in documents(done)) == {
        name: facts["train"]["documents"] for name, facts in manifest["sources"].items()
    }
    assert manifest["sources"]["big"]["license"] == "MIT" and manifest["generation"] == 1
    assert set(manifest["files"]) == {p.name for p in done.iterdir()} - {"manifest.json", "report.html", "work"}


def test_the_split_stays_when_a_source_grows(done: Path, tmp_path: Path) -> None:
    plain = settings(tmp_path)
    write_source(tmp_path, "big", 90)
    build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert documents(done, val=True).items() <= documents(tmp_path / "out", val=True).items()
    assert documents(done).items() <= documents(tmp_path / "out").items()


def stages_recipe(folder: Path, plain: dict[str, Any]) -> Any:
    from fastgpt.data.recipe_file import load_recipe

    return load_recipe(write_recipe(folder, plain))


def test_parts_do_not_change_the_result(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gathering._units
    monkeypatch.setattr(gathering, "parts_of", lambda file, format, size: parts_of(file, format, 3000))
    monkeypatch.setattr(gathering, "_units", lambda source, parts, size: real(source, parts, 3000))
    monkeypatch.setattr(stages, "CHUNK", 1000)
    made = recipe(tmp_path)
    with Workers(1, show=False) as workers:
        assert len(Build(made, tmp_path / "out", workers).tasks) > 10
    build(made, tmp_path / "out", keep=True, show=False)
    assert len(list((tmp_path / "out" / "work").glob("tokens/*"))) > 30
    assert shards(tmp_path / "out") == shards(done)


def test_two_workers_give_the_same_bytes(done: Path, tmp_path: Path) -> None:
    build(recipe(tmp_path), tmp_path / "out", workers=2, show=False)
    assert shards(tmp_path / "out") == shards(done)


def test_tasks_give_the_same_bytes(done: Path, tmp_path: Path) -> None:
    made, out = recipe(tmp_path), tmp_path / "out"
    with pytest.raises(UserError, match="1 of 2 parts .* are not cleaned yet: run `fastgpt data build --only clean`"):
        build(made, out, only="clean", share=Share(0, 2), show=False)
        build(made, out, only="select", show=False)
    for i in range(2):
        build(made, out, only="clean", share=Share(i, 2), show=False)
    build(made, out, only="select", show=False)
    for i in range(2):
        build(made, out, only="tokenize", share=Share(i, 2), show=False)
    build(made, out, show=False)
    assert shards(out) == shards(done)


def test_nothing_is_left_but_the_data_set(tmp_path: Path) -> None:
    built(tmp_path, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {*open_built(tmp_path / "out").manifest["files"], "manifest.json", "report.html"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [0, 3, 7, 12, 20, 30, 40, 50, 60])
def test_a_build_killed_at_any_rename_ends_in_the_same_shards(
    step: int, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build stops dead at the n-th rename; what it leaves is not a data set, and the next build finishes it."""
    left = step
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def dying(a: Any, b: Any, real: Callable[..., None] = real) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            real(a, b)

        monkeypatch.setattr(os, name, dying)
    made, out = recipe(tmp_path), tmp_path / "out"
    try:
        build(made, out, show=False)
    except Killed:
        with pytest.raises(UserError, match="is not complete: run `fastgpt data build` again to finish it"):
            open_built(out)
    else:
        assert left >= 0
    monkeypatch.undo()
    build(made, out, show=False)
    assert shards(out) == shards(done)


def test_a_full_disk_is_one_sentence_and_the_next_build_goes_on(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = recipe(tmp_path), tmp_path / "out"

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.np, "save", full)
        with pytest.raises(UserError, match="cannot write .*No space left on device; .*work keeps what is finished"):
            build(made, out, show=False)
    build(made, out, show=False)
    assert shards(out) == shards(done)


# Refresh


def test_a_changed_source_redoes_its_parts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    built(tmp_path, out, keep=True)
    made = recipe(tmp_path)
    write_source(tmp_path, "small", 25)
    real, seen = stages.clean, []
    monkeypatch.setattr(stages, "clean", lambda task: seen.append(task.key) or real(task))
    before = {p.name for p in (out / "work" / "clean").iterdir()}
    tokenizer = (out / "tokenizer.json").read_bytes()
    build(made, out, keep=True, show=False)
    assert len(seen) == 2 and len({p.name for p in (out / "work" / "clean").iterdir()} - before) == 1
    manifest = open_built(out).manifest
    assert [g["generation"] for g in manifest["generations"]] == [1, 2]
    assert (out / "tokenizer.json").read_bytes() == tokenizer
    with caplog.at_level(logging.INFO, "fastgpt"):
        build(made, out, keep=True, show=False)
    assert f"{out} is up to date" in caplog.messages and open_built(out).manifest == manifest


def test_shards_of_a_larger_older_data_set_are_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    built(tmp_path, out)
    first = set(shards(out))
    built(tmp_path, out, shards={"tokens": 40_000})
    assert set(shards(out)) < first
    verify(out)


# Selection


def test_a_copy_of_a_held_out_document_is_not_trained_on(tmp_path: Path, done: Path) -> None:
    held = documents(done, val=True)
    plain = settings(tmp_path)
    copies = [{"id": f"copy-{i}", "text": content} for i, content in enumerate(held.values())]
    (tmp_path / "copies.jsonl").write_text("".join(json.dumps(c) + "\n" for c in copies), encoding="utf-8")
    plain["sources"]["copies"] = {"path": str(tmp_path / "copies.jsonl"), "format": {"name": "jsonl", "id": "id"}}
    plain["sources"]["copies"]["validation"] = 0
    build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert not set(documents(tmp_path / "out").values()) & set(held.values())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sources"]["copies"]["dropped"] == {"duplicate": len(held)}


def test_evaluation_texts_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "eval.txt").write_text(text(("big", 7)), encoding="utf-8")
    report = built(tmp_path, tmp_path / "out", decontaminate=["eval.txt"])
    assert report["sources"]["big"]["dropped"] == {"contaminated": 1}
    assert report["sources"]["big"]["examples"] == {"contaminated": ["big-7"]}
    with pytest.raises(UserError, match=r"decontaminate names .*none.txt, expected a file"):
        built(tmp_path, tmp_path / "out", decontaminate=["none.txt"])


def test_defects_are_counted(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    plain["sources"]["small"]["defects"] = "skip"
    with open(plain["sources"]["small"]["path"], "ab") as f:
        f.write(b'{"id": "x", "text": "caf\xe9"}\n{"id": "y", "te\n{"id": "z"}\n')
    report = build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert report is not None and sum(report["sources"]["small"]["defects"].values()) == 3
    assert "small.jsonl, line 21" in report["sources"]["small"]["defect_examples"][0]


def test_limits_and_samples(tmp_path: Path) -> None:
    plain = settings(tmp_path)
    plain["sources"]["big"] |= {"sample": 0.5}
    plain["sources"]["small"] |= {"max_documents": 7, "validation": 0}
    report = build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert report is not None
    big, small = report["sources"]["big"], report["sources"]["small"]
    assert 15 < big["unsampled"] < 45 and big["kept"] == 60 - big["unsampled"]
    assert small["kept"] == 7 and small["dropped"] == {"beyond max_documents": 13}
    plain["sources"]["small"]["validation"] = 0.4
    report = build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert report is not None and report["sources"]["small"]["kept"] == 7
    assert [report["sources"]["small"][split]["documents"] for split in ("train", "val")] == [4, 3]


def test_a_dry_run_reports_and_writes_no_data_set(tmp_path: Path, done: Path) -> None:
    report = dry_run(recipe(tmp_path), tmp_path / "out", show=False)
    assert report["sources"]["big"]["documents"] == 60 and "train" not in report["sources"]["big"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["work"]
    build(recipe(tmp_path), tmp_path / "out", show=False)
    assert shards(tmp_path / "out") == shards(done)


# Forget


def test_forgotten_documents_are_gone_and_stay_away(tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = {"sources": settings(tmp_path)["sources"]}
    changes["sources"]["small"]["epochs"] = 2
    built(tmp_path, out, keep=True, **changes)
    before = documents(out) | documents(out, val=True)
    word = before["big", "big-3"].split()[5]
    hit = {key for key, content in before.items() if word in content} | {("small", "small-4")}
    entries = forget(out, ["small-4"], [word], show=False)
    assert {(e["source"], e["id"]) for e in entries} == hit and not (out / "work").exists()
    left = {key: content for key, content in before.items() if key not in hit}
    assert documents(out) | documents(out, val=True) == left
    manifest = open_built(out).manifest
    assert manifest["generation"] == 2 and manifest["generations"][1]["erased"] == len(hit)
    verify(out)
    assert word not in (out / "erased.jsonl").read_text()
    report = json.loads((out / "report.json").read_text())["sources"]
    for name, facts in manifest["sources"].items():
        assert facts["dropped"]["erased"] == sum(source == name for source, _ in hit)
        assert sum(report[name]["train"]["lengths"]) == facts["train"]["documents"]
    # the text comes back under another id
    sources = changes["sources"]
    line = {"id": "again", "text": before["small", "small-4"]}
    with open(sources["small"]["path"], "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    made = stages_recipe(tmp_path, {**settings(tmp_path), "sources": sources})
    build(made, out, show=False)
    assert documents(out) | documents(out, val=True) == left
    assert open_built(out).manifest["generation"] == 3


def test_an_unknown_document_is_refused(tmp_path: Path, done: Path) -> None:
    shutil.copytree(done, tmp_path / "out")
    for ids, texts, message in (
        (["nobody"], [], "has the id 'nobody'"),
        ([], ["no such text"], "has this text"),
        ([], [""], "the text to match is empty"),
    ):
        with pytest.raises(UserError, match=message):
            forget(tmp_path / "out", ids, texts, show=False)
    assert shards(tmp_path / "out") == shards(done)


# Reading


def test_the_trainer_opens_it_and_validates_each_source(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, val_sources = open_data(load_config(["--data", str(done)], "tiny"))
    assert data.tokenizer is not None and data.n_vocab == data.tokenizer.n_vocab and data.shuffle
    assert set(val_sources) == {"big", "small"} and len(data.val) == sum(map(len, val_sources.values()))


def test_packing_of_a_recipe_is_the_trainers_default(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    built(tmp_path, out, packing={"method": "best-fit", "length": 64})
    assert shards(out) == shards(done)
    source = open_source(str(out))
    assert (source.packing, open_source(str(done)).packing) == ("best-fit", "concatenate")
    cfg = load_config(["--config", "tiny", "--data", str(out), "--block-size", "64", "--micro-batch", "4"])
    loader = build_loader(cfg, source, torch.device("cpu"))
    assert isinstance(loader, PackedLoader)
    inspect_main([str(out), "--samples", "0"])
    said = capsys.readouterr().out
    assert "packing into windows of 64 tokens:" in said
    [row] = [line.split() for line in said.splitlines() if line.startswith("best-fit (default)")]
    assert int(row[2].replace(",", "")) == loader.windows and row[-1] == "0"
    assert "Training documents in windows of 64 tokens" in (out / "report.html").read_text(encoding="utf-8")
    inspect_main([str(done), "--samples", "0", "--length", "128"])
    said = capsys.readouterr().out
    assert "packing into windows of 128 tokens:" in said and "concatenate (default)" in said


def test_a_staged_mixture_is_read_in_order(tmp_path: Path) -> None:
    stages_ = [{"share": 1}, {"share": 1, "weights": {"small": 1}}]
    built(tmp_path, tmp_path / "out", mix={"stages": stages_})
    source = open_source(str(tmp_path / "out"))
    assert not source.shuffle
    loader = TokenLoader(source.train, 2, 64, shuffle=source.shuffle)
    assert np.diff(loader.starts(0, 20)).tolist() == [64] * 19
    with pytest.raises(UserError, match="order was sequential, now it is shuffled"):
        TokenLoader(source.train, 2, 64).load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "manifest.json").unlink(), "has no manifest.json"),
        (lambda out: (out / "manifest.json").write_text("{"), "manifest.json"),
        (lambda out: (out / "manifest.json").write_text("{}"), "is not that of a fastgpt data set"),
        (lambda out: (out / "train_000001.bin").unlink(), "train_000001.bin (No such file or directory)"),
        (lambda out: os.truncate(out / "val_big.bin", 2000), "val_big.bin has 2000 bytes, expected"),
        (lambda out: flip(out / "train_000000.bin"), "train_000000.bin has other tokens than were written"),
        (lambda out: flip(out / "tokenizer.json"), "tokenizer.json"),
    ],
)
def test_a_damaged_data_set_is_refused(damage: Callable[[Path], Any], message: str, done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "out", ignore=shutil.ignore_patterns("work"))
    damage(tmp_path / "out")
    with pytest.raises(UserError) as e:
        open_built(tmp_path / "out")
    assert message in str(e.value) and str(tmp_path / "out") in str(e.value)


def test_what_is_no_data_set_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    for name, message in (
        ("absent", "does not exist"),
        ("file", "is a file, expected a folder"),
        ("folder", "has no manifest.json, expected a folder that `fastgpt data build` made"),
    ):
        for opened in (open_built, lambda path: forget(path, ["a"], show=False)):
            with pytest.raises(UserError, match=f"data set {tmp_path / name} {message}"):
                opened(tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[1500] ^= 1
    path.write_bytes(raw)


# The command


def command(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> int:
    monkeypatch.setattr("sys.argv", ["fastgpt", "data", *map(str, argv)])
    return fastgpt()


def test_build_inspect_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_recipe(tmp_path, settings(tmp_path)), tmp_path / "out"
    assert command(monkeypatch, "build", path, "--out", out) == 0
    assert f"fastgpt train --data {out}" in capsys.readouterr().out
    assert command(monkeypatch, "inspect", out, "--verify") == 0
    said = capsys.readouterr().out
    assert "generation 1" in said and "big MIT, small unknown" in said and "tokens per document" in said
    assert command(monkeypatch, "forget", out, "--doc-id", "big-3") == 0
    assert "erased big big-3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "cleen"], "--only is 'cleen', expected one of clean, select, tokenize (did you mean clean?)"),
        (["--task", "0/2"], "--task divides the parts of one stage"),
        (["--only", "clean", "--task", "2/2"], "--task is '2/2', expected I/N with I from 0 to N - 1"),
        (["--workers", "0"], "--workers is '0', expected a whole number, 1 or more"),
    ],
)
def test_wrong_options(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "build", write_recipe(tmp_path, settings(tmp_path)), *options) == 2
    assert message in capsys.readouterr().err


def change_source(**values: Any) -> Callable[[dict[str, Any], Path], None]:
    return lambda plain, folder: plain["sources"]["small"].update(values)


def overwrite(content: bytes) -> Callable[[dict[str, Any], Path], None]:
    return lambda plain, folder: (folder / "small.jsonl").write_bytes(content)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (overwrite(b'{"id": "a", "text": "caf\xe9"}\n'), "small.jsonl, line 1, byte 24: byte 0xe9 is not UTF-8"),
        (overwrite(b'{"id": "a", "text": "x"}\n{"id": "b", "te'), "small.jsonl, line 2"),
        (overwrite(b'{"id": "a", "text": 5}\n'), "small.jsonl, line 1"),
        (overwrite(b""), "small.jsonl: the file is empty"),
        (change_source(path="nothing.jsonl"), "sources.small: cannot read"),
        (change_source(path="*.none"), "sources.small:"),
        (change_source(format={"name": "jsonl", "texts": "body"}), "sources.small.format.texts is not a key"),
        (change_source(format="jsnl"), "sources.small.format: name is 'jsnl', expected one of"),
        (change_source(format={"name": "jsonl", "max_bytes": "x"}), "sources.small.format.max_bytes is 'x', expected"),
        (lambda plain, folder: plain.update(validation=1e-9), "none of 80 documents was held out"),
        (lambda plain, folder: plain.update(tokenizer="gpt3"), "gpt3"),
        (lambda plain, folder: (folder / "out").mkdir() or (folder / "out" / "mine.txt").touch(), "out holds mine.txt"),
        (lambda plain, folder: (folder / "out").touch(), "out is not a folder"),
    ],
)
def test_bad_input_is_one_sentence(
    break_: Callable[[dict[str, Any], Path], Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = settings(tmp_path)
    break_(plain, tmp_path)
    assert command(monkeypatch, "build", write_recipe(tmp_path, plain), "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_missing_optional_source_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = settings(tmp_path)
    plain["sources"]["extra"] = {"path": "nothing/*.txt", "optional": True}
    with caplog.at_level(logging.WARNING, "fastgpt"):
        report = build(stages_recipe(tmp_path, plain), tmp_path / "out", show=False)
    assert report is not None and report["sources"]["extra"]["documents"] == 0
    assert any(m.startswith("source extra is left out: ") for m in caplog.messages)


def test_another_recipe_does_not_replace_a_data_set(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    path = write_recipe(tmp_path, settings(tmp_path, seed=7))
    other = path.rename(tmp_path / "other.yaml")
    monkeypatch.setattr("sys.argv", ["fastgpt", "data", "build", str(other), "--out", str(out)])
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert fastgpt() == 2
    assert f"{out} is the data set of recipe recipe, expected one of other" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    other.write_text("name: recipe\n" + other.read_text(encoding="utf-8"), encoding="utf-8")
    assert fastgpt() == 0 and open_built(out).manifest["generation"] == 2


@pytest.mark.parametrize(
    "lines, line, said",
    [
        ("    format:\n      name: text\n      slpit: line", 5, "sources.a.format.slpit is not a key"),
        ("    license: mit\n    exclude: a.txt", 5, "sources.a: exclude leaves out"),
        ("    license: mit\ntokenizer: nothere.json", 5, "tokenizer is 'nothere.json', expected gpt2"),
    ],
)
def test_errors_that_are_found_late_name_the_line(
    lines: str,
    line: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("A text.", encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(f"sources:\n  a:\n    path: a.txt\n{lines}\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["fastgpt", "data", "build", str(path), "--out", str(tmp_path / "out")])
    assert fastgpt() == 2
    assert f"{path}, line {line + ('slpit' in lines)}: {said}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
