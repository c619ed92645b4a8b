import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt.core.errors import UserError
from fastgpt.data import Tokenizer, default_corpus, load_dataset, prepare, split_files, text_files, unigram_nats
from fastgpt.data import prepare as _prepare  # the function; its module is reached through sys.modules

from .conftest import sentences

module = sys.modules[_prepare.__module__]


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_data_set_holds_the_text_again(folder: Path, tmp_path: Path):
    stages = []
    data = prepare(folder, tmp_path / "out" / "set", 400, progress=lambda *a: stages.append(a))
    assert data.fresh and sorted(content(data.path)) == ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    train, val = split_files(text_files(folder).files)
    for tokens, parts, meta in ((data.train, train, data.meta["train"]), (data.val, val, data.meta["val"])):
        ids = tokens.read(0, len(tokens))
        text = "".join("<|endoftext|>" + p.text() for p in parts)
        assert ids[0] == data.tokenizer.eot and data.tokenizer.decode(ids) == text
        assert (ids == data.tokenizer.eot).sum() == len(parts) == meta["documents"] == meta["files"]
        assert meta["bytes"] == sum(p.file.size for p in parts) and meta["tokens"] == len(ids)
        assert meta["bytes_per_token"] == meta["bytes"] / meta["tokens"] > 1.5
    assert data.meta["tokenizer"] == data.tokenizer.fingerprint and data.meta["n_vocab"] == data.tokenizer.n_vocab
    assert {s for s, _, _ in stages} == {"tokenizer", "train", "val"}
    assert all(0 < done <= total for _, done, total in stages) and stages[-1][1] == stages[-1][2]


def test_documents_in_one_file_are_told_apart_by_their_marks(tmp_path: Path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(sentences(5, i) for i in range(100)), encoding="utf-8")
    data = prepare(tmp_path / "a.txt", tmp_path / "set", 300)
    assert data.meta["train"]["documents"] + data.meta["val"]["documents"] == 100
    assert (data.train.read(0, len(data.train)) == data.tokenizer.eot).sum() == data.meta["train"]["documents"]


def test_tokenizer_learns_from_the_training_split_alone(folder: Path, tmp_path: Path):
    before = prepare(folder, tmp_path / "a", 400)
    held = split_files(text_files(folder).files)[1][0].file.path
    held.write_text("z" * held.stat().st_size)
    after = prepare(folder, tmp_path / "b", 400)
    assert before.tokenizer.fingerprint == after.tokenizer.fingerprint
    assert len(before.val) != len(after.val) and before.meta["inputs"] != after.meta["inputs"]


def test_same_inputs_take_what_is_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = prepare(folder, tmp_path / "set", 400)
    stamps = {p: p.stat().st_mtime_ns for p in first.path.iterdir()}
    again = prepare(folder, tmp_path / "set", 400)
    assert not again.fresh and again.meta == first.meta and len(again.train) == len(first.train)
    assert {p: p.stat().st_mtime_ns for p in first.path.iterdir()} == stamps
    other = prepare(folder, tmp_path / "other", 400)
    assert content(other.path) == content(first.path)
    assert prepare(folder, tmp_path / "set", 401).fresh
    assert prepare(folder, tmp_path / "set", 401, val_fraction=0.2).fresh
    (folder / "a05.txt").write_text("changed\n")
    assert prepare(folder, tmp_path / "set", 401, val_fraction=0.2).fresh


def test_a_damaged_data_set_is_made_again(folder: Path, tmp_path: Path):
    whole = content(prepare(folder, tmp_path / "set", 400).path)
    for name in whole:
        file = tmp_path / "set" / name
        file.write_bytes(file.read_bytes()[:-4])
        assert prepare(folder, tmp_path / "set", 400).fresh
        assert content(tmp_path / "set") == whole
    assert [p.name for p in tmp_path.iterdir() if p.name != "texts"] == ["set"]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, "No space left on device"), UserError)]
)
def test_a_run_that_fails_midway_leaves_what_was_there(folder, tmp_path, monkeypatch, existing, error, seen):
    before = content(prepare(folder, tmp_path / "set", 300).path) if existing else None

    def fail(self, texts, threads=None):
        raise error

    monkeypatch.setattr(Tokenizer, "encode_documents", fail)
    with pytest.raises(seen) as e:
        prepare(folder, tmp_path / "set", 400)
    assert seen is KeyboardInterrupt or "No space left on device" in str(e.value)
    left = {p.name for p in tmp_path.iterdir()} - {"texts"}
    assert left == ({"set"} if existing else set())
    if before is not None:
        assert content(tmp_path / "set") == before


def test_a_killed_run_leaves_no_data_set_and_its_rest_is_cleared_away(folder: Path, tmp_path: Path):
    code = (
        "import os, signal, sys; from fastgpt.data import prepare, Tokenizer\n"
        "Tokenizer.encode_documents = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(sys.argv[1], sys.argv[2], 300)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "set")], timeout=60)
    assert run.returncode == -signal.SIGKILL
    assert not (tmp_path / "set").exists() and list(tmp_path.glob(".set.*.partial"))
    busy = tmp_path / f".set.{os.getppid()}.partial"
    busy.mkdir()
    assert prepare(folder, tmp_path / "set", 300).fresh
    assert {p.name for p in tmp_path.iterdir()} == {"texts", "set", busy.name}


def test_folders_of_others_are_left_alone(folder: Path, tmp_path: Path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "meta.json").write_text("{}")
    (out / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match="mine exists and is not a data set that fastgpt prepared"):
        prepare(folder, out, 300)
    assert sorted(content(out)) == ["meta.json", "notes.txt"]
    with pytest.raises(UserError, match="notes.txt exists and is not"):
        prepare(folder, out / "notes.txt", 300)
    with pytest.raises(UserError, match="texts/set lies inside the data folder"):
        prepare(folder, folder / "set", 300)
    (tmp_path / "empty").mkdir()
    assert prepare(folder, tmp_path / "empty", 300).fresh


def test_bad_input_writes_nothing(folder: Path, tmp_path: Path):
    (folder / "a07.txt").write_bytes(b"fine\nnot \xfc fine\n" * 200)
    with pytest.raises(UserError, match=r"a07.txt is not UTF-8: byte 0xfc at line 2, byte 9"):
        prepare(folder, tmp_path / "set", 300)
    with pytest.raises(UserError, match="data path .*nowhere does not exist"):
        prepare(tmp_path / "nowhere", tmp_path / "set", 300)
    with pytest.raises(UserError, match="vocab_size is 10"):
        prepare(folder / "a01.txt", tmp_path / "set", 10)
    with pytest.raises(UserError, match="cannot write data set .*File exists|Not a directory"):
        prepare(folder / "a01.txt", folder / "a02.txt" / "set", 300)
    assert [p.name for p in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("meta.json", lambda b: b[:20], "meta.json (JSONDecodeError"),
        ("meta.json", lambda b: b"[]", "is damaged: meta.json (TypeError"),
        ("meta.json", lambda b: b.replace(b'"version": 1', b'"version": 9'), "has version 9, expected 1"),
        ("meta.json", None, "meta.json: No such file"),
        ("train.bin", lambda b: b[:-2], "but its header says"),
        ("val.bin", None, "no token file matches"),
        ("tokenizer.json", lambda b: b[:-9], "tokenizer.json is damaged"),
    ],
)
def test_loading_a_damaged_data_set_says_what_is_wrong(folder: Path, tmp_path: Path, name, change, said):
    data = prepare(folder / "a01.txt", tmp_path / "set", 260)
    file = data.path / name
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    with pytest.raises(UserError) as e:
        load_dataset(data.path)
    assert said in str(e.value) and str(data.path) in str(e.value)


def test_loading_refuses_parts_of_another_data_set(folder: Path, tmp_path: Path):
    a = prepare(folder / "a01.txt", tmp_path / "a", 260)
    b = prepare(folder / "a02.txt", tmp_path / "b", 270)
    assert load_dataset(a.path).meta == a.meta
    for name, said in (("val.bin", "tokens, meta.json says"), ("tokenizer.json", "not the tokenizer that encoded")):
        kept = (a.path / name).read_bytes()
        (a.path / name).write_bytes((b.path / name).read_bytes())
        with pytest.raises(UserError, match=said):
            load_dataset(a.path)
        (a.path / name).write_bytes(kept)


def test_unigram_nats_is_add_one_cross_entropy():
    train, val = np.array([0, 0, 1, 3]), np.array([0, 2, 2])
    p = np.array([3, 2, 1, 2]) / 8
    assert unigram_nats(train, val, 4) == pytest.approx(-(np.log(p[0]) + 2 * np.log(p[2])) / 3, rel=1e-12)
    uniform = np.arange(100, dtype=np.uint16)
    assert unigram_nats(uniform, uniform, 100) == pytest.approx(np.log(100))
    with pytest.raises(UserError, match="token id 3 at position 3; the vocabulary has 3 ids"):
        unigram_nats(train, val, 3)
    with pytest.raises(UserError, match="validation split has no tokens"):
        unigram_nats(train, val[:0], 4)


def test_default_corpus_with_and_without_the_test_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small, suite = default_corpus(), default_corpus(tests=True)
    pick = small.files[::25], suite.files[:3]
    chosen = {False: type(small)("std", pick[0], []), True: type(small)("std", pick[1], [])}
    monkeypatch.setattr(module, "default_corpus", lambda tests=False: chosen[tests])
    plain = prepare(None, tmp_path / "plain", 500)
    more = prepare(None, tmp_path / "more", 500, stdlib_tests=True)
    assert plain.meta["val"]["bytes"] == more.meta["val"]["bytes"]
    assert more.meta["train"]["files"] - plain.meta["train"]["files"] == len(pick[1])
    assert json.loads((plain.path / "meta.json").read_text())["source"] == "std"
